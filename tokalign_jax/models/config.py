"""What distinguishes one decoder from another: the constants of `transformer.Transformer`."""

from dataclasses import dataclass
from typing import Literal

from tokalign_jax.models.rotary import RopeScaling


@dataclass(frozen=True)
class ModelConfig:
    """Every constant comes from the checkpoint's config.json (`families`); none has a default."""

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
    """F: width of the feed-forward layer."""
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"]
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
    rotary_dim: int
    """R: the leading part of each head that rotary embedding turns."""
    rope_theta: float
    rope_scaling: RopeScaling | None
