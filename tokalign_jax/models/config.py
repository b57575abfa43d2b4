"""What distinguishes one decoder from another: the constants of `transformer.Transformer`."""

from dataclasses import dataclass
from typing import Literal

from tokalign_jax.models.rotary import Rope


@dataclass(frozen=True)
class LayerKind:
    """In what the layers of a model may differ: the mixer, and its use of positions."""

    rope: Rope | None
    """None: without rotary embedding."""
    window: int | None = None
    """A query sees this many latest positions, its own included; None: all before it."""
    query_growth: "QueryGrowth | None" = None
    """Queries grow with their position; None: they do not."""
    mixer: Literal["attention", "convolution", "delta"] = "attention"
    """What mixes tokens (`mixers`)."""


@dataclass(frozen=True)
class QueryGrowth:
    """Factor of the query at position p: 1 + beta ln(1 + floor(p / original_positions))."""

    beta: float
    original_positions: int


@dataclass(frozen=True)
class DeltaRule:
    """Sizes of layers with a gated delta rule (`recurrent.DeltaNet`)."""

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    """Of a key and query head."""
    value_dim: int
    """Of a value head."""
    kernel_size: int
    """Tokens that the convolution of queries, keys and values sees."""


@dataclass(frozen=True)
class Convolution:
    """Constants of layers with a short convolution (`recurrent.ShortConvolution`)."""

    kernel_size: int
    bias: bool
    """On the convolution and on its projections."""


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in the place of each feed-forward layer."""

    count: int
    """E."""
    per_token: int
    """How many of them a token goes through: those of the largest router probabilities."""
    normalized: bool
    """Their probabilities are divided by their sum."""
    shared_size: int | None = None
    """Width of an expert that all tokens go through beside; None: there is none."""
    shared_gate: bool = False
    """The shared expert is weighted by a sigmoid of the token."""
    computed: Literal["auto", "dense", "sparse"] = "auto"
    """See `experts`; `auto`: sparse where the backend has a kernel for it."""


@dataclass(frozen=True)
class ModelConfig:
    """Every constant comes from the checkpoint's config.json (`families`); none has a default.

    What only some families have does: it is absent.
    """

    model_type: str
    """The Hugging Face family: names the weight table that reads and writes this model."""
    vocab_size: int
    """V: rows of the input embedding and of the head, padding rows included."""
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
    """F: width of the feed-forward layer, or of one expert."""
    activation: Literal["gelu", "gelu_tanh", "relu", "relu_squared", "silu", "xielu"]
    """`xielu` (arXiv 2411.13010) has parameters of its own in each layer."""
    gated_mlp: bool
    """down(activation(gate(x)) * up(x)) instead of down(activation(up(x)))."""
    norm: Literal["rms", "layer"]
    norm_epsilon: float
    parallel_residual: bool
    """Attention and feed-forward both read the layer's input, and their sum is added to it."""
    attention_bias: bool
    """Biases on q_proj, k_proj and v_proj."""
    attention_out_bias: bool
    """A bias on o_proj."""
    mlp_bias: bool
    tie_word_embeddings: bool
    """The head is the input embedding."""
    max_positions: int
    """The longest sequence that the model was made for, in tokens."""
    layer_kinds: tuple[LayerKind, ...]
    """Of each layer."""

    learned_positions: bool = False
    """A learned vector per position, up to `max_positions`, is added to the embedding."""
    embedding_norm: bool = False
    """A norm between the embedding and the first layer."""
    norm_scale: bool = True
    """Norms have a learned scale."""
    norm_bias: bool = False
    """Norms of the residual stream have a learned bias."""
    norm_plus_one: bool = False
    """Norms multiply with 1 + scale."""
    norm_placement: Literal["before", "after", "both"] = "before"
    """Where attention and feed-forward have their norms: on their input, output, or both."""
    shared_norm: bool = False
    """With `parallel_residual`: attention and feed-forward share one norm of the input."""
    query_key_norm: Literal["head", "each_head", "width"] | None = None
    """Norms of queries and keys: over H with one scale for all heads, over H with a scale for
    each head, or over all heads together."""
    rotate_before_norm: bool = False
    """Queries and keys are rotated before their norms, not after."""
    qkv_clip: float | None = None
    """Queries, keys and values are clipped to [-qkv_clip, qkv_clip] as they are projected."""
    attention_scale: float | None = None
    """Factor of the attention logits; None: 1 / sqrt(H)."""
    attention_softcap: float | None = None
    """c: attention logits x become c tanh(x / c)."""
    logit_softcap: float | None = None
    """c: logits x become c tanh(x / c) (`transformer.adjust_logits`)."""
    embedding_scale: float = 1.0
    """Factor of the embedding before the first layer, in the type of the activations."""
    residual_scale: float = 1.0
    """Factor of what attention and feed-forward add."""
    output_scale: float = 1.0
    """Factor of the hidden states after the final norm, so that hidden @ head are the logits."""
    attention_gate: bool = False
    """What attention gives is multiplied with a sigmoid of a projection of what it reads."""
    delta: DeltaRule | None = None
    convolution: Convolution | None = None
    experts: Experts | None = None
