"""Similarity of text before and after an alignment, by embeddings (TokAlign, section 4.3).

Lines are encoded by the target tokenizer, each token is replaced by the source token that the
alignment maps it to, and the decoded result is compared with the line that the source tokenizer
encodes and decodes.

    similarity = mean over lines of the cosine of the two texts' embeddings

Embeddings are those of a sentence encoder or, without one, the mean final states of the source
model. In most such spaces any two texts have a cosine well above 0; `unrelated`, the cosine with
the next line's text, is the level of texts that have nothing in common.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from transformers import PreTrainedTokenizerBase

from tokalign_jax.errors import UserError
from tokalign_jax.evaluation.bits_per_byte import first_context
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.transformer import forward
from tokalign_jax.text.canonical import plain_backend

MAX_TOKENS = 128
"""Number of tokens per line that are embedded."""
_BATCH_SIZE = 32

Encoder = Callable[[Sequence[str]], Float[np.ndarray, "N D"]]
"""A function that embeds texts."""


def compare(
    mapping: Int[np.ndarray, "V_t"],
    source: PreTrainedTokenizerBase,
    target: PreTrainedTokenizerBase,
    lines: Mapping[str, Sequence[str]],
    encode: Encoder,
) -> dict[str, dict[str, Any]]:
    """Computes the similarity by language.

    Args:
      mapping: the source token of each target token.
      source: the source tokenizer.
      target: the target tokenizer.
      lines: lines of text by language.
      encode: embeds texts.

    Returns:
      By language: the number of `lines`, their `similarity`, and that of `unrelated` lines (None
      for a single line).
    """
    result = {}
    for language, texts in lines.items():
        target_encodings, source_encodings = (
            plain_backend(t).encode_batch_fast(list(texts), add_special_tokens=False)
            for t in (target, source)
        )
        sides = [
            [mapping[e.ids].tolist() for e in target_encodings],
            [e.ids for e in source_encodings],
        ]
        decoded = (
            [str(source.decode(ids, skip_special_tokens=True)) for ids in side] for side in sides
        )
        mapped, original = (_normalized(encode(side)) for side in decoded)
        result[language] = {
            "lines": len(texts),
            "similarity": _mean_cosine(mapped, original),
            "unrelated": (
                _mean_cosine(mapped, np.roll(original, 1, axis=0)) if len(texts) > 1 else None
            ),
        }
    return result


def mean_states(
    config: ModelConfig, params: dict, tokenizer: PreTrainedTokenizerBase, dtype: str = "float32"
) -> Encoder:
    """Returns an encoder: the mean of the model's final states over `MAX_TOKENS` tokens."""
    start, backend = first_context(tokenizer), plain_backend(tokenizer)
    length = min(MAX_TOKENS, config.max_positions)

    @jax.jit
    def embed(params: dict, ids: Int[Array, "B T"], counts: Int[Array, "B"]) -> Float[Array, "B D"]:
        hidden = forward(config, params, ids, dtype=jnp.dtype(dtype)).astype(jnp.float32)
        is_token = jnp.arange(ids.shape[1]) < counts[:, None]
        return jnp.where(is_token[..., None], hidden, 0).sum(1) / counts[:, None]

    def encode(texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        tokens = [[start, *encoding.ids][:length] for encoding in encodings]
        order = sorted(range(len(texts)), key=lambda i: len(tokens[i]))  # Batches similar lengths.
        embeddings = np.zeros((len(texts), config.hidden_size), np.float32)
        for first in range(0, len(order), _BATCH_SIZE):
            rows = order[first : first + _BATCH_SIZE]
            longest = 32 * -(-len(tokens[rows[-1]]) // 32)  # Limits the number of programs.
            ids = np.full((_BATCH_SIZE, min(longest, length)), start, np.int32)
            counts = np.ones(_BATCH_SIZE, np.int32)
            for row, i in enumerate(rows):
                ids[row, : len(tokens[i])], counts[row] = tokens[i], len(tokens[i])
            embeddings[rows] = np.asarray(embed(params, ids, counts))[: len(rows)]
        return embeddings

    return encode


def sentence_encoder(folder: str) -> Encoder:
    """Loads a sentence encoder in Hugging Face format, such as all-mpnet-base-v2.

    Raises:
      UserError: sentence-transformers is not installed, or cannot load the folder.
    """
    try:
        from sentence_transformers import SentenceTransformer  # type: ignore[import-not-found]
    except ImportError as error:
        raise UserError(
            "--encoder needs sentence-transformers, which is not installed: pip install"
            " 'tokalign_jax[encoder]', or omit --encoder to embed text with the source model"
        ) from error
    if not Path(folder).expanduser().is_dir():
        raise UserError(
            f"--encoder '{folder}': there is no such folder; give the folder of a sentence encoder"
            " in Hugging Face format"
        )
    try:
        model: Any = SentenceTransformer(str(Path(folder).expanduser()), local_files_only=True)
        # A first use, so that errors show now rather than after an hour.
        model.encode(["a", "a longer text"], show_progress_bar=False)
    except Exception as error:  # Its components raise errors of many types.
        raise UserError(
            f"--encoder '{folder}' cannot be used as a sentence encoder ({type(error).__name__}:"
            f" {error}); give a model that sentence-transformers can load"
        ) from error
    return lambda texts: np.asarray(model.encode(list(texts), show_progress_bar=False))


def _normalized(vectors: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _mean_cosine(first: Float[np.ndarray, "N D"], second: Float[np.ndarray, "N D"]) -> float:
    return float(np.einsum("nd,nd->n", first, second).mean())
