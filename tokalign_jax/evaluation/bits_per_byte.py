"""Bits per byte: what a model needs for held-out text, comparable across tokenizers because every one spells the same bytes.

    bits per byte = sum of -log2 p(token | tokens before it) / UTF-8 bytes of the text

Each document begins with end-of-text (or the tokenizer's beginning-of-text) as context, as in training. A document longer than
a window is cut into windows that do not overlap.
"""

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from transformers import PreTrainedTokenizerBase

from tokalign_jax import sharding
from tokalign_jax.config import ComputeConfig
from tokalign_jax.models import transformer
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.progress import Log, Progress
from tokalign_jax.text.canonical import plain_backend
from tokalign_jax.text.corpus import Document
from tokalign_jax.text.tokenizing import end_of_text_id
from tokalign_jax.training.losses import IGNORED, head_of, token_nll


@dataclass(frozen=True)
class Score:
    """What one group of documents cost."""

    nats: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens

    def __add__(self, other: "Score") -> "Score":
        return Score(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes)

    def summary(self) -> dict[str, float]:
        """The sums and what follows from them, for JSON."""
        return {**asdict(self), "bits_per_byte": self.bits_per_byte, "bytes_per_token": self.bytes_per_token}


def choose(documents: Iterable[Document], bytes_per_language: int) -> dict[str, list[str]]:
    """Texts by language: whole documents up to the given bytes, the last one cut."""
    chosen: dict[str, list[str]] = {}
    room: dict[str, int] = {}
    for text, language, size in documents:
        left = room.get(language, bytes_per_language)
        if left > 0:
            chosen.setdefault(language, []).append(
                text if size <= left else text.encode()[:left].decode(errors="ignore")
            )
            room[language] = left - size
    return chosen


def cut(tokens: list[int], start: int, length: int) -> list[tuple[list[int], list[int]]]:
    """(inputs, labels) windows of at most `length` tokens; every token of the document is a label exactly once."""
    context = [start, *tokens[:-1]]
    return [(context[i : i + length], tokens[i : i + length]) for i in range(0, len(tokens), length)]


def first_context(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token before a document's first: beginning-of-text, else end-of-text."""
    start = tokenizer.bos_token_id
    return start if isinstance(start, int) else end_of_text_id(tokenizer)


@functools.partial(jax.jit, static_argnames=("config", "compute", "mesh"))
def _window_nats(params, inputs, labels, *, config: ModelConfig, compute: ComputeConfig, mesh: Mesh) -> jax.Array:
    """Summed -log p of each window's labels, [B], on every device."""
    with sharding.within(mesh):
        hidden = transformer.forward(config, params, inputs, dtype=jnp.dtype(compute.dtype))
        nll = token_nll(hidden, transformer.head_matrix(params), labels, head_of(config, compute))
        return sharding.constrain(nll.sum(axis=1), None)


def evaluate(
    config: ModelConfig,
    params: dict,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, list[str]],
    *,
    sequence_length: int,
    batch: int,
    compute: ComputeConfig = ComputeConfig(dtype="float32"),  # noqa: B008 (frozen)
    mesh: Mesh | None = None,
    log: Log = lambda line: None,
    what: str = "evaluate",
) -> dict[str, Score]:
    """Scores the texts of every language.

    Args:
      params: weights of the model, [V, D] matrices at least as long as the tokenizer.
      texts: documents by language.
      sequence_length: tokens of a window; must not exceed the model's positions.
      batch: windows that a device reads at once.
      compute: type of activations and weights; the log-sum-exp is float32 always.
      mesh: of the devices to run on, where `params` are or go; None: all devices.

    Returns:
      Score by language.
    """
    start, backend = first_context(tokenizer), plain_backend(tokenizer)  # as the shards are made
    windows: list[tuple[str, list[int], list[int]]] = []
    totals = {}
    for language, documents in texts.items():
        encoded = [e.ids for e in backend.encode_batch_fast(documents, add_special_tokens=False)]
        totals[language] = Score(0.0, sum(map(len, encoded)), sum(len(d.encode()) for d in documents))
        windows += [(language, *window) for tokens in encoded for window in cut(tokens, start, sequence_length)]

    # Windows of like length go together, so that short ones are not padded to the longest.
    windows.sort(key=lambda window: len(window[1]))
    progress = Progress(log, what, sum(len(w[1]) for w in windows), "tokens")
    mesh = mesh or sharding.make_mesh()
    params = sharding.place(params, mesh)
    batch, split = batch * sharding.sequences_at_once(mesh), NamedSharding(mesh, P(sharding.BATCH))
    for first in range(0, len(windows), batch):
        group = windows[first : first + batch]
        length = _padded_length(len(group[-1][1]), sequence_length)
        inputs = np.zeros((batch, length), np.int32)
        labels = np.full((batch, length), IGNORED, np.int32)
        for row, (_, window_inputs, window_labels) in enumerate(group):
            inputs[row, : len(window_inputs)] = window_inputs
            labels[row, : len(window_labels)] = window_labels
        inputs, labels = (sharding.put(of, split) for of in (inputs, labels))
        nats = np.asarray(_window_nats(params, inputs, labels, config=config, compute=compute, mesh=mesh), np.float64)
        for row, (language, _, _) in enumerate(group):
            totals[language] += Score(float(nats[row]), 0, 0)
        progress.update(sum(len(w[1]) for w in group))
    average = sum(totals.values(), Score(0.0, 0, 0))
    progress.done(f"{average.bits_per_byte:.3f} bits per byte")
    return totals


def _padded_length(length: int, longest: int) -> int:
    """The longest window halved as often as `length` allows, so that few programs are compiled."""
    size = longest
    while size // 2 >= max(length, 32):
        size //= 2
    return size
