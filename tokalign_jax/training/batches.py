"""The stream of training sequences: a seeded global shuffle of fixed-length windows over the token
shards, by grain.

Sequence i holds tokens i T to i T + T; its last token is the next one's first, so that every token
is predicted once. A token that the tokenizer puts before every text (bos) takes the first position
of each sequence, which is only read. Position p of the stream is a sequence: pass p // N over the
corpus, and within it number p % N in that pass's own order (N sequences a pass). Steps read the
stream in order: step s of a stage that starts at `offset` reads positions offset + s G to offset +
(s + 1) G, G the global batch, however many hosts share the work.

A token that is read but not predicted (a user's turn of a chat) stands as ~id in a sequence, a
negative number, which the losses ignore as a label (`read_and_predicted`).
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Int32

from tokalign_jax.errors import UserError
from tokalign_jax.text.boundaries import NONE

_THREADS, _READY_BATCHES = 2, 8


class Shards(Protocol):
    """The part of `text.tokenizing.TokenShards` that training reads: token ids, the token that
    sequences begin with, and stretches (begin, end) of tokens that are not predicted.
    """

    @property
    def tokens(self) -> np.ndarray:
        """Token ids [tokens]."""
        ...

    @property
    def opening(self) -> int | None:
        """The token that every sequence begins with, if any."""
        ...

    @property
    def unlearned(self) -> np.ndarray:
        """Stretches [n, 2] (begin, end) of tokens that are read but not predicted."""
        ...


class Sequences(Protocol):
    """Random access to training sequences: each an array of token ids, or a dict of arrays."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class TokenSource:
    """Random access to the sequences of the shards; item i is int32 [T + 1]: inputs and, one
    further, labels (`read_and_predicted`).
    """

    def __init__(self, shards: Shards, sequence_length: int):
        self._tokens, self._opening, self._length = shards.tokens, shards.opening, sequence_length
        self._unlearned = shards.unlearned

    def __len__(self) -> int:
        return max(0, (len(self._tokens) - 1) // self._length)

    def __getitem__(self, index: int) -> Int32[np.ndarray, "T+1"]:
        start = int(index) * self._length
        sequence = np.asarray(self._tokens[start : start + self._length + 1]).astype(np.int32)
        for begin, end in self._stretches(start, start + len(sequence)):
            sequence[begin:end] = ~sequence[begin:end]
        if self._opening is not None:
            sequence[0] = self._opening
        return sequence

    def _stretches(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Stretches of unpredicted tokens from `start` to `stop`, relative to `start`."""
        begins, ends = self._unlearned.T
        first, last = np.searchsorted(ends, start, "right"), np.searchsorted(begins, stop)
        for begin, end in self._unlearned[first:last].tolist():
            yield max(begin - start, 0), end - start

    def _getitems(self, indices: Sequence[int]) -> list[Any]:
        """Batched access, which grain calls by this name; it saves its overhead per item."""
        return [self[index] for index in indices]


class SourceText(NamedTuple):
    """The training text in the source model's tokens."""

    shards: Shards
    positions: Int[np.ndarray, "tokens"]
    """For each target token the source token that ends at the same place of the text
    (`text.shared_boundaries`), or `NONE`."""


class PairedSource(TokenSource):
    """The sequences of `TokenSource`, each with the source tokens of its text.

    Items are dicts of int32 arrays: `tokens` [T + 1]; `source` [S], which begins with the source
    token that ends at the first shared boundary of the sequence; and `positions` [T], the position
    in `source` after which the teacher has read the same text, or `NONE`. Of text that takes more
    than S source tokens, the end has no positions.
    """

    def __init__(self, shards: Shards, sequence_length: int, text: SourceText, source_length: int):
        super().__init__(shards, sequence_length)
        self._source, self._width = text, source_length

    def __getitem__(self, index: int) -> dict[str, Int32[np.ndarray, "..."]]:
        begin, (shards, shared) = int(index) * self._length, self._source
        places = np.asarray(shared[begin : begin + self._length]).astype(np.int64)
        first = int(np.argmax(places != NONE))
        start = max(int(places[first]), 0)
        source = np.zeros(self._width, np.int32)
        read = np.asarray(shards.tokens[start : start + self._width])
        source[: len(read)] = read
        places = np.where((places != NONE) & (places - start < self._width), places - start, NONE)
        if shards.opening is not None:
            source[0] = shards.opening
            # After more than the first position the student has read text that the teacher has not.
            places[first] = places[first] if first == 0 else NONE
        return {
            "tokens": super().__getitem__(index),
            "source": source,
            "positions": places.astype(np.int32),
        }


def read_and_predicted(
    tokens: Int[jax.Array, "B T+1"],
) -> tuple[Int[jax.Array, "B T"], Int[jax.Array, "B T"]]:
    """(input ids, labels) of sequences; labels of tokens that are not predicted are negative."""
    read = tokens[:, :-1]
    return jnp.where(read < 0, ~read, read), tokens[:, 1:]


def make_stream(
    source: Sequences,
    *,
    seed: int,
    epochs: int,
    offset: int,
    accumulation: int,
    micro_batch: int,
    host: int = 0,
    hosts: int = 1,
) -> grain.DatasetIterator:
    """Iterates over this host's batches, int32 [accumulation, micro_batch / hosts, T + 1], one a
    step; for sequences that are dicts, dicts of such arrays.

    The global array of a step, the hosts' parts concatenated on axis 1, is the same for any number
    of hosts. `get_state` and `set_state` save and restore the exact position, which does not depend
    on the number of hosts either.

    Args:
      source: the sequences, N of them.
      seed: of the shuffle; every pass has another order.
      epochs: passes until the stream ends; 0: it does not end.
      offset: position in the stream of the first sequence to read.
      accumulation: micro-batches of a step.
      micro_batch: sequences of a micro-batch, over all hosts.
      host: this process, of `hosts`.
      hosts: processes.
    """
    if micro_batch % hosts:
        raise ValueError(
            f"a micro-batch of {micro_batch} sequences does not divide among {hosts} hosts"
        )
    # grain adds the epoch to its seed: without hashing, neighbouring seeds would share orders.
    shuffle_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    stream = grain.MapDataset.source(source).shuffle(seed=shuffle_seed).repeat(epochs or None)
    parts = stream.slice(slice(offset, None)).batch(micro_batch // hosts, drop_remainder=True)
    steps = parts.slice(slice(host, None, hosts)).batch(accumulation, drop_remainder=True)
    return iter(steps.to_iter_dataset(grain.ReadOptions(_THREADS, _READY_BATCHES)))


def resolve_offset(
    start_offset: int | float | str, sequences_per_pass: int, epochs: int, previous_end: int
) -> int:
    """The stream position (sequences) at which a stage starts.

    Args:
      start_offset: a number of sequences (int), a fraction of one pass (float below 1) or
        `after_previous`.
      sequences_per_pass: sequences of this stage's length in the corpus.
      epochs: passes in the stream; 0: unbounded, though a number or fraction must still lie within
        the first pass.
      previous_end: the position after the last sequence that the stage before read.

    Raises:
      UserError: the offset is past the end of the stream.
    """
    if isinstance(start_offset, str):
        position, unbounded = previous_end, not epochs
    elif isinstance(start_offset, float):
        position, unbounded = int(start_offset * sequences_per_pass), False
    else:
        position, unbounded = start_offset, False
    length = sequences_per_pass * max(epochs, 1)
    if position >= length and not unbounded:
        passes = "one pass" if epochs <= 1 else f"{epochs} passes"
        raise UserError(
            f"start_offset {start_offset!r} is sequence {position:,}, but the stream has {length:,}"
            f" sequences ({passes} over a corpus of {sequences_per_pass:,}): choose an offset from"
            f" 0 to {length - 1:,}, more passes (data.epochs) or a larger corpus"
        )
    return position
