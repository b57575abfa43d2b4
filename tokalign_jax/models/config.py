"""Architecture constants of a model, read by `transformer.Transformer`."""

from dataclasses import dataclass
from typing import Literal

from tokalign_jax.models.rotary import Rope


@dataclass(frozen=True)
class LayerKind:
    """Properties in which a model's layers may differ."""

    rope: Rope | None
    """Rotary embedding; None for none."""
    window: int | None = None
    """Number of latest positions that a query sees, its own included; None for all."""
    query_growth: "QueryGrowth | None" = None
    """Growth of queries with their position; None for none."""
    mixer: Literal["attention", "convolution", "delta"] = "attention"
    """The token mixer (`mixers`)."""
    feed_forward: Literal["mlp", "dense_mlp"] = "mlp"
    """`mlp` is the model's feed-forward, a mixture if it has experts; `dense_mlp` is one without
    experts, of width `ModelConfig.dense_size`."""
    chunk: int | None = None
    """A query sees the positions in its own chunk of this many tokens; None for all."""
    query_key_norm: bool = True
    """The layer has the model's norms of queries and keys, if the model has any."""

    @property
    def parts(self) -> tuple[str, str]:
        """Mixer and feed-forward, which are also the names of their parameters in a layer."""
        return self.mixer, self.feed_forward


@dataclass(frozen=True)
class QueryGrowth:
    """Factor of the queries by position p.

    It is 1 + beta ln(1 + floor((p + offset) / original_positions)).
    """

    beta: float
    original_positions: int
    offset: int = 0


@dataclass(frozen=True)
class DeltaRule:
    """Sizes of gated delta rule layers (`recurrent.DeltaNet`)."""

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    """Size of a key and query head."""
    value_dim: int
    """Size of a value head."""
    kernel_size: int
    """Kernel size of the convolutions of queries, keys and values."""


@dataclass(frozen=True)
class Convolution:
    """Constants of short convolution layers (`recurrent.ShortConvolution`)."""

    kernel_size: int
    bias: bool
    """Adds biases to the convolution and its projections."""


@dataclass(frozen=True)
class ClampedSwiGLU:
    """Activation of gpt-oss's experts: g sigmoid(alpha g) (u + 1).

    g is the gate clipped from above at `limit`, u the other projection clipped at both sides.
    """

    alpha: float
    limit: float


@dataclass(frozen=True)
class Experts:
    """Constants of a mixture of experts that replaces the feed-forward `mlp`."""

    count: int
    """E."""
    per_token: int
    """Number of experts per token: those of the largest scores."""
    normalized: bool
    """Divides the chosen experts' scores by their sum."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """Function of the router's logits that gives the weights of the experts."""
    selection_bias: bool = False
    """Adds a bias for each expert to the scores that choose experts, not to the weights."""
    normalization_epsilon: float = 0.0
    """Added to the sum by which scores are divided if `normalized`."""
    weight_scale: float = 1.0
    """Factor of the weights."""
    shared_size: int | None = None
    """Width of an additional expert for all tokens; None for none."""
    shared_gate: bool = False
    """Weights the shared expert by a sigmoid of the token."""
    bias: bool = False
    """Biases on the router and on the projections of the experts."""
    clamped: ClampedSwiGLU | None = None
    """Activation of the experts if it is not `ModelConfig.activation`."""
    weighted_inputs: bool = False
    """Weights the inputs of the experts instead of their results; without biases."""
    computed: Literal["auto", "dense", "sparse", "blocks", "ragged"] = "auto"
    """Implementation (`experts`); `sparse` is the backend's faster one of the last two, and `auto`
    is sparse but on CPUs."""


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's constants, all read from the checkpoint's config.json (`families`).

    Only features that some families lack have defaults, which turn them off.
    """

    model_type: str
    """The Hugging Face family, which selects the weight table for reading and writing."""
    vocab_size: int
    """V: rows of the input embedding and of the head, including padding rows."""
    hidden_size: int
    """D."""
    num_layers: int
    """L."""
    num_heads: int
    """N: query heads."""
    num_kv_heads: int
    """K: key and value heads; each serves N / K query heads."""
    head_dim: int
    """H."""
    intermediate_size: int
    """F: width of the feed-forward layer `mlp`, or of an expert."""
    activation: Literal["gelu", "gelu_tanh", "relu", "relu_squared", "silu", "xielu"]
    """Activation function; `xielu` (arXiv 2411.13010) has parameters in each layer."""
    gated_mlp: bool
    """down(activation(gate(x)) * up(x)) instead of down(activation(up(x)))."""
    norm: Literal["rms", "layer"]
    norm_epsilon: float
    parallel_residual: bool
    """Attention and feed-forward both read the layer's input; their sum is added to it."""
    attention_bias: bool
    """Biases on q_proj, k_proj and v_proj."""
    attention_out_bias: bool
    """A bias on o_proj."""
    mlp_bias: bool
    tie_word_embeddings: bool
    """The head is the input embedding."""
    max_positions: int
    """Maximum sequence length in tokens."""
    layer_kinds: tuple[LayerKind, ...]
    """The kind of each layer."""

    learned_positions: bool = False
    """Adds a learned vector per position, up to `max_positions`, to the embedding."""
    embedding_norm: bool = False
    """A norm between the embedding and the first layer."""
    norm_scale: bool = True
    """Norms have a learned scale."""
    norm_bias: bool = False
    """Norms of the residual stream have a learned bias."""
    norm_plus_one: bool = False
    """Norms multiply by 1 + scale."""
    norm_placement: Literal["before", "after", "both"] = "before"
    """Position of the norms of attention and feed-forward: on their input, output, or both."""
    shared_norm: bool = False
    """With `parallel_residual`: attention and feed-forward share one input norm."""
    query_key_norm: Literal["head", "each_head", "width", "unscaled"] | None = None
    """Norms of queries and keys: over H with one scale for all heads, over H with a scale for
    each head, over all heads together, or over H without a scale."""
    rotate_before_norm: bool = False
    """Rotates queries and keys before their norms instead of after."""
    qkv_clip: float | None = None
    """Clips projected queries, keys and values to [-qkv_clip, qkv_clip]."""
    attention_scale: float | None = None
    """Factor of the attention logits; None for 1 / sqrt(H)."""
    attention_softcap: float | None = None
    """c: attention logits x become c tanh(x / c)."""
    logit_softcap: float | None = None
    """c: logits x become c tanh(x / c) (`transformer.adjust_logits`)."""
    embedding_scale: float = 1.0
    """Factor of the embedding before the first layer, in the activation dtype."""
    residual_scale: float = 1.0
    """Factor of the outputs of attention and feed-forward."""
    output_scale: float = 1.0
    """Factor of the hidden states after the final norm, so that hidden @ head gives the logits."""
    attention_sinks: bool = False
    """A learned logit per head that takes its share of the softmax without a value."""
    attention_gate: bool = False
    """Multiplies attention's output by a sigmoid of a projection of its input."""
    delta: DeltaRule | None = None
    convolution: Convolution | None = None
    experts: Experts | None = None
    dense_size: int | None = None
    """Width of the feed-forward layers `dense_mlp`."""
