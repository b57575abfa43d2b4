"""Floating-point operations of training steps."""

import math
import re

from tokalign_jax.config import StageConfig, learns_from_source
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.recurrent import CHUNK
from tokalign_jax.models.transformer import abstract_params
from tokalign_jax.planning.memory import shapes
from tokalign_jax.training import source_teacher
from tokalign_jax.utils import paths


def flops_per_token(
    model: ModelConfig, stage: StageConfig, teacher: ModelConfig | None = None
) -> float:
    """FLOPs of a training step for each token, without recomputation, attention over all T.

    For each parameter of a matrix product (PaLM, appendix B): 2 forward, 2 backward to its input, 2
    to its weights if these train. Attention: 4 N H T forward and twice that backward. A teacher
    only runs forward; the source model reads its own tokens, and the student's likelihoods then
    take a further product with the head.

    Args:
      teacher: of the stage, if it has one.
    """
    trained, frozen = shapes(model, stage)
    length = stage.batch.sequence_length
    total = (
        6 * products(model, trained) + 4 * products(model, frozen) + 3 * attention(model, length)
    )
    if not teacher:
        return total
    read = length
    if learns_from_source(stage):
        read = source_teacher.source_length(length, teacher)
        if stage.weights.likelihood:
            total += 2 * model.vocab_size * model.hidden_size
    forward = 2 * products(teacher, abstract_params(teacher)) + attention(teacher, read)
    return total + forward * read / length


def forward_flops_per_token(model: ModelConfig, stage: StageConfig) -> float:
    """FLOPs of the model's forward pass for each token of a stage's sequences."""
    weights = sum(products(model, tree) for tree in shapes(model, stage))
    return 2 * weights + attention(model, stage.batch.sequence_length)


def products(model: ModelConfig, tree: paths.Tree) -> float:
    """Parameters of matrix products that are used for a token."""
    active = model.experts.per_token / model.experts.count if model.experts else 1.0
    sizes = {
        path: math.prod(leaf.shape) * (active if "experts/" in path else 1)
        for path, leaf in paths.flatten(tree).items()
        if re.search(r"(kernel|lora_[ab])$", path)
        or (model.tie_word_embeddings and path == "embed_tokens/embedding")
    }
    return sum(sizes.values())


def attention(model: ModelConfig, length: int) -> float:
    """FLOPs of the mixers, but for their projections, in the forward pass for each token."""
    mixers = [kind.mixer for kind in model.layer_kinds]
    total = 4 * mixers.count("attention") * model.num_heads * model.head_dim * length
    if model.delta is None:
        return total
    # Of each value head: the state is read twice and written, and tokens of a chunk read each
    # other.
    key, value = model.delta.key_dim, model.delta.value_dim
    each = 2 * (3 * key * value + 2 * CHUNK * (key + value))
    return total + mixers.count("delta") * model.delta.num_value_heads * each
