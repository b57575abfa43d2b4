"""How much of a text an alignment keeps, by embeddings (TokAlign, section 4.3).

Lines are cut by the target tokenizer, each token is replaced by the source token that the alignment
names, and what comes out is compared with the line as the source tokenizer decodes it.

    similarity = mean over lines of the cosine of the two texts' embeddings

Embeddings are those of a sentence encoder, or without one the mean final states of the source
model. Any two texts have a cosine well above 0 in most such spaces; `unrelated`, that of each
decoding with the next line's text, says where nothing in common begins.
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

LONGEST = 128
"""Tokens of a line that are embedded."""
_BATCH = 32

Encoder = Callable[[Sequence[str]], Float[np.ndarray, "N D"]]
"""Embeddings of texts."""


def compare(
    mapping: Int[np.ndarray, "V_t"],
    source: PreTrainedTokenizerBase,
    target: PreTrainedTokenizerBase,
    lines: Mapping[str, Sequence[str]],
    encode: Encoder,
) -> dict[str, dict[str, Any]]:
    """The similarity by language, each with the cosine of `unrelated` lines (None for a single
    line) and how many `lines` there are.

    Args:
      mapping: the source token of each target token.
    """
    found = {}
    for language, of in lines.items():
        cut, own = (
            plain_backend(t).encode_batch_fast(list(of), add_special_tokens=False)
            for t in (target, source)
        )
        ids = [[mapping[e.ids].tolist() for e in cut], [e.ids for e in own]]
        texts = ([str(source.decode(of, skip_special_tokens=True)) for of in side] for side in ids)
        embedded = [_normalized(encode(of)) for of in texts]
        found[language] = {
            "lines": len(of),
            "similarity": _mean_cosine(*embedded),
            "unrelated": (
                _mean_cosine(embedded[0], np.roll(embedded[1], 1, axis=0)) if len(of) > 1 else None
            ),
        }
    return found


def mean_states(
    config: ModelConfig, params: dict, tokenizer: PreTrainedTokenizerBase, dtype: str = "float32"
) -> Encoder:
    """Embeds a text as the mean of the model's final states over its first `LONGEST` tokens."""
    start, backend = first_context(tokenizer), plain_backend(tokenizer)
    length = min(LONGEST, config.max_positions)

    @jax.jit
    def embed(params: dict, ids: Int[Array, "B T"], counts: Int[Array, "B"]) -> Float[Array, "B D"]:
        hidden = forward(config, params, ids, dtype=jnp.dtype(dtype)).astype(jnp.float32)
        inside = jnp.arange(ids.shape[1]) < counts[:, None]
        return jnp.where(inside[..., None], hidden, 0).sum(1) / counts[:, None]

    def encode(texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        tokens = [[start, *encoding.ids][:length] for encoding in encodings]
        order = sorted(range(len(texts)), key=lambda i: len(tokens[i]))  # like lengths together
        found = np.zeros((len(texts), config.hidden_size), np.float32)
        for first in range(0, len(order), _BATCH):
            rows = order[first : first + _BATCH]
            longest = 32 * -(-len(tokens[rows[-1]]) // 32)  # so that few programs are compiled
            ids = np.full((_BATCH, min(longest, length)), start, np.int32)
            counts = np.ones(_BATCH, np.int32)
            for row, i in enumerate(rows):
                ids[row, : len(tokens[i])], counts[row] = tokens[i], len(tokens[i])
            found[rows] = np.asarray(embed(params, ids, counts))[: len(rows)]
        return found

    return encode


def sentence_encoder(folder: str) -> Encoder:
    """A sentence encoder in Hugging Face format, such as all-mpnet-base-v2.

    Raises:
      UserError: sentence-transformers is not installed, or the folder is none of its models.
    """
    try:
        from sentence_transformers import SentenceTransformer  # type: ignore[import-not-found]
    except ImportError as error:
        raise UserError(
            "--encoder needs sentence-transformers, which is not installed: pip install"
            " 'tokalign_jax[encoder]', or leave --encoder out to embed text by the source model"
        ) from error
    if not Path(folder).expanduser().is_dir():
        raise UserError(
            f"--encoder '{folder}': there is no such folder; give the folder of a sentence encoder"
            " in Hugging Face format"
        )
    try:
        model: Any = SentenceTransformer(str(Path(folder).expanduser()), local_files_only=True)
        model.encode(
            ["a", "a longer text"], show_progress_bar=False
        )  # now, rather than after an hour
    except Exception as error:  # whatever its many parts raise
        raise UserError(
            f"--encoder '{folder}' cannot be used as a sentence encoder ({type(error).__name__}:"
            f" {error}); give a model that sentence-transformers reads"
        ) from error
    return lambda texts: np.asarray(model.encode(list(texts), show_progress_bar=False))


def _normalized(vectors: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _mean_cosine(one: Float[np.ndarray, "N D"], other: Float[np.ndarray, "N D"]) -> float:
    return float(np.einsum("nd,nd->n", one, other).mean())
