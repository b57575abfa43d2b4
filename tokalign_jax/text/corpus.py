"""Documents: read, de-duplicated, drawn within a byte budget, and split into training and held-out
text.

The artifact is a folder of `train-00000.parquet ...` and `held_out.parquet` (columns `text`,
`language`, `bytes`, `source`) and `summary.json`. Memory does not grow with the corpus: text is
streamed, and the hashes that find duplicates live in a SQLite file that exists only while reading.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import re
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int

from tokalign_jax import demo
from tokalign_jax.config import SELF, Config, TextConfig
from tokalign_jax.errors import UserError
from tokalign_jax.text import chats, reading
from tokalign_jax.text.reading import Position, Record, Source
from tokalign_jax.utils.progress import Log, Progress, quantity

FILE_BYTES = 32 << 20
"""Text per training file."""
GROUP_BYTES = 4 << 20
"""Text per Parquet row group, the unit in which it is read back."""
ALL = "all"
"""The language of every document when no language field is named, and the row of results over all
languages."""
UNKNOWN = "unknown"
"""The language of a document whose language field is empty."""
OTHER = "other"
"""The language of documents past `MOST_LANGUAGES`."""
MOST_LANGUAGES = 1000
"""Languages that are told apart; each keeps a document in memory until the end, and has a row in
the results."""
SPARED = 10
"""Unusable records that are skipped in any corpus, beside the share that `text.max_broken_share`
allows."""
FIRST_RECORDS = 5
"""A file whose first records are all unusable, so many of them, is refused at once."""
CHECKED = 32
"""Files whose first records are looked at before any long work."""
OPEN_FILES = 64
"""Files that stay open while others are read; what is closed is read again from its beginning if
there is room for more of it."""

PLAIN = (".jsonl", ".ndjson", ".json", ".txt")
"""Endings of files whose size is about that of their text."""
SLICES = 16
"""Rounds in which a part that has a weight is read through all of its files."""
EXPANSION = 5
"""Bytes of text in a byte of a compressed file, about."""

_SCHEMA = pa.schema(
    {
        "text": pa.string(),
        "language": pa.string(),
        "bytes": pa.int64(),
        "source": pa.string(),
        "chat": pa.string(),
    }
)
_WEIGHT = re.compile(r"(.+)=([-+]?[\d.]+(?:e[-+]?\d+)?)", re.IGNORECASE)
"""A name of the corpus with its weight behind it."""


class Document(NamedTuple):
    """One text, its language (or domain), its length in UTF-8 bytes, and which part of the corpus
    it is from."""

    text: str
    """Of a chat the contents of its messages."""
    language: str
    bytes: int
    source: str = ""
    chat: str = ""
    """The messages of a chat as JSON (`chats.py`)."""


# --- the artifact -------------------------------------------------------------------------------


ChatCheck = Callable[[Sequence[chats.Message]], None]
"""Raises `chats.Unusable` for messages that cannot be trained on."""


def _any_chat(messages: Sequence[chats.Message]) -> None:
    del messages


def run(
    config: Config, folder: Path, log: Log, check_chat: ChatCheck = _any_chat
) -> dict[str, Any]:
    """Reads `config.corpus` into `folder`; returns what `summary.json` says.

    A document is held out when the first 8 bytes of its SHA-256, as a fraction of 2^64, lie below
    `held_out_fraction`: the choice depends on the text alone. Where that leaves a language of
    several documents with none, the one with its smallest hash is held out.

    Raises:
      UserError: the corpus is missing, unreadable, empty, without the text field, or too small to
        split.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in (*folder.glob("*.parquet"), folder / "seen.sqlite"):
        leftover.unlink(missing_ok=True)
    ledger = _Ledger(_settings(config), log, check_chat)
    parts = _parts(config, ledger)
    streams = [stream for part in parts for stream in part.streams]
    train, held_out = _Writer(folder, "train-{:05d}", FILE_BYTES), _Writer(folder, "held_out", None)
    split = _Split(config.text.held_out_fraction, train.add, held_out.add, ledger.counts)
    progress = Progress(log, "corpus", _expected_bytes(config, streams), "bytes")
    budget, kept, stopped = config.text.budget_bytes, 0, False
    with _Seen(folder / "seen.sqlite") as seen:

        def is_new(document: Document, digest: bytes) -> bool:
            found = seen.is_new(digest)
            ledger.counts[document.language, "duplicates"] += not found
            return found

        for document, digest in _mixed(parts, budget, is_new):
            if kept + document.bytes > budget:
                stopped = True
                break
            kept += document.bytes
            ledger.sources[document.source] += document.bytes
            split.add(document, digest)
            progress.update(document.bytes)
    split.finish()
    train.close()
    held_out.close()
    progress.done()
    summary = _summary(ledger, streams, stopped)
    if not (summary["train_documents"] and summary["held_out_documents"]):
        raise UserError(_too_small(config, summary, stopped))
    ledger.report()
    if summary["not_read"]["files"]:
        log(_unread(summary["not_read"], parts, budget, stopped))
    if len(parts) > 1:
        log(f"corpus: {_shares(ledger.sources)}")
    content = json.dumps(summary, indent=1, ensure_ascii=False) + "\n"
    # A path need not be UTF-8, and comes into this file with a record that is broken.
    (folder / "summary.json").write_text(content, encoding="utf-8", errors="replace")
    return summary


def check(config: Config, check_chat: ChatCheck = _any_chat) -> None:
    """Looks, before any long work, whether the corpus is there, readable, not empty, and has the
    fields named.

    Raises:
      UserError: naming the file (or dataset) at fault, what it holds instead, and the remedy.
    """
    ledger = _Ledger(_settings(config), lambda line: None, check_chat)
    streams, has_text = (
        [stream for part in _parts(config, ledger) for stream in part.streams],
        False,
    )
    for number, stream in enumerate(streams):
        if number >= CHECKED and has_text:
            break
        has_text |= stream.peek() is not None
        stream.close()
    if not has_text:
        raise UserError(
            ledger.first
            or f"the corpus '{_named(config.corpus)}' is empty: no document with text in {_named(stream.source.name for stream in streams)}"
        )


def names(config: Config) -> list[str]:
    """What the corpus is read from, in order: paths of local files, or names of hub datasets."""
    return [source.name for entry in _entries(config) for source in entry.sources]


SELF_TEXT = "self_text.jsonl"
"""File of text that the source model wrote. Its fields are its own, whatever `config.text`
names."""
_SELF_FIELDS = {"text_field": "text", "messages_field": "messages", "language_field": "language"}


def has_self(config: Config) -> bool:
    """Whether the corpus names text that the source model writes."""
    return any(name == SELF for name, _ in _names(config))


def with_self(config: Config, file: Path) -> Config:
    """The config with the file of the source model's text instead of `self`."""
    return _with_names(config, lambda name: str(file) if name == SELF else name)


def without_self(config: Config) -> Config | None:
    """The config without the source model's text; None where its corpus names nothing else."""
    rest = [name for name, _ in _names(config) if name != SELF]
    return _with_names(config, lambda name: "" if name == SELF else name) if rest else None


def _with_names(config: Config, rename: Callable[[str], str]) -> Config:
    renamed = [(rename(name), weight) for name, weight in _names(config)]
    parts = [f"{name}={weight}" if weight else name for name, weight in renamed if name]
    return dataclasses.replace(config, corpus=tuple(parts))


def mixture(config: Config) -> list[str]:
    """The parts of a corpus that has several, with their weights: what it depends on beside the
    contents of its files."""
    entries = _entries(config)
    return [f"{entry.name}={entry.weight}" for entry in entries] if len(entries) > 1 else []


def read(config: Config, log: Log = lambda line: None) -> Iterator[Document]:
    """Every document with text of `config.corpus` as it is, duplicates included; none of it is
    written anywhere."""
    ledger = _Ledger(_settings(config), log)
    for stream in [stream for part in _parts(config, ledger) for stream in part.streams]:
        while found := stream.peek():
            stream.take()
            yield found[0]
    ledger.report()


def in_groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents about `GROUP_BYTES` of text at a time."""
    group, size = [], 0
    for document in documents:
        group.append(document)
        size += document.bytes
        if size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def train_batches(folder: Path) -> Iterator[list[Document]]:
    """The training documents in file order, about `GROUP_BYTES` of text at a time."""
    for path in sorted(folder.glob("train-*.parquet")):
        yield from _batches(path)


def at(folder: Path, positions: Int[np.ndarray, "n"]) -> Iterator[Document]:
    """The training documents at these positions (sorted, in file order); parts of files that hold
    none of them are not read."""
    first = 0
    for path in sorted(folder.glob("train-*.parquet")):
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                wanted = (
                    positions[
                        np.searchsorted(positions, first) : np.searchsorted(positions, first + rows)
                    ]
                    - first
                )
                if len(wanted):
                    yield from _documents(file.read_row_group(group).take(wanted))
                first += rows


def held_out(folder: Path) -> Iterator[Document]:
    """The held-out documents, in the order in which they were read."""
    return itertools.chain.from_iterable(_batches(folder / "held_out.parquet"))


def _batches(path: Path) -> Iterator[list[Document]]:
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            yield _documents(file.read_row_group(group))


def _documents(table: pa.Table) -> list[Document]:
    return [Document(**row) for row in table.to_pylist()]


def _summary(ledger: "_Ledger", streams: Sequence["_Stream"], stopped: bool) -> dict[str, Any]:
    """Totals, and the same by language; what was not read, and what could not be used."""
    counts = ledger.counts
    names = [f"{part}_{unit}" for part in ("train", "held_out") for unit in ("documents", "bytes")]
    names += ["duplicates", "without_text"]
    languages = {}
    for language in sorted({language for language, _ in counts}):
        languages[language] = {name: counts[language, name] for name in names}
    totals = {name: sum(language[name] for language in languages.values()) for name in names}
    unread = [stream for stream in streams if not stream.is_spent()]
    return {
        **totals,
        "stopped_at_budget": stopped,
        "not_read": {
            "files": len(unread),
            "bytes": sum(
                max((stream.source.size or 0) - stream.position.bytes, 0) for stream in unread
            ),
            "of_bytes": sum(stream.source.size or 0 for stream in streams),
        },
        "sources": dict(ledger.sources),
        "broken": {"records": ledger.broken, "first": ledger.first},
        "languages": languages,
    }


def _unread(not_read: dict[str, Any], parts: Sequence["_Part"], budget: int, stopped: bool) -> str:
    files = sum(len(part.streams) for part in parts)
    share = (
        "; each was read in proportion to its size"
        if files > len(parts) or not parts[0].weight
        else ""
    )
    share = share if files > 1 else ""
    ended = [part.name for part in parts if all(stream.has_ended for stream in part.streams)]
    why = f"text.budget_bytes={budget:,} is spent"
    if not stopped:
        why = f"'{ended[0]}' has no more text, and without it the weights would not hold"
    return (
        f"corpus: {why}: {quantity(not_read['bytes'])} of {quantity(not_read['of_bytes'])} bytes,"
        f" in {not_read['files']} of {files} files, were not read{share}"
    )


def _too_small(config: Config, summary: dict[str, Any], stopped: bool) -> str:
    found = summary["train_documents"] + summary["held_out_documents"]
    corpus = f"the corpus '{_named(config.corpus)}'"
    broken = summary["broken"]
    skipped = (
        f"; {broken['records']} records cannot be used, the first of them: {broken['first']}"
        if broken["first"]
        else ""
    )
    if stopped:
        budget = config.text.budget_bytes
        return (
            f"{corpus} gave {found} documents within text.budget_bytes={budget:,}; two or more are"
            " needed: raise it"
        )
    if not found:
        return (
            f"{corpus} is empty: it has no document with text in the field"
            f" '{config.text.text_field}'{skipped}"
        )
    return (
        f"{corpus} gave {summary['train_documents']} documents to train on and"
        f" {summary['held_out_documents']} to hold out; at least one of each is needed: give more"
        " documents (those of a .txt file end at blank lines), or another text.held_out_fraction"
        f" than {config.text.held_out_fraction}{skipped}"
    )


# --- splitting and writing ----------------------------------------------------------------------


class _Split:
    """Sends each document to the training or the held-out side.

    Per language the training document with the smallest hash is kept back until the end, in case
    the language has no held-out document by then.
    """

    def __init__(
        self, fraction: float, train: Callable, held_out: Callable, counts: Counter[tuple[str, str]]
    ):
        self._threshold = round(fraction * 2**64)
        self._sinks = {"train": train, "held_out": held_out}
        self._counts = counts
        self._smallest: dict[str, tuple[bytes, Document]] = {}

    def add(self, document: Document, digest: bytes) -> None:
        if int.from_bytes(digest[:8], "big") < self._threshold:
            self._send("held_out", document)
            return
        kept_back = self._smallest.get(document.language)
        if kept_back is None or digest < kept_back[0]:
            self._smallest[document.language] = (digest, document)
            if kept_back is not None:
                self._send("train", kept_back[1])
        else:
            self._send("train", document)

    def finish(self) -> None:
        candidates = sorted(self._smallest.values())
        anything = sum(n for (_, name), n in self._counts.items() if name == "held_out_documents")
        for _, document in candidates:
            trained = self._counts[document.language, "train_documents"]
            held = self._counts[document.language, "held_out_documents"]
            # A corpus of one document a language still needs something to be measured on.
            lacking = (trained and not held) or (not anything and len(candidates) > 1)
            self._send("held_out" if lacking else "train", document)
            anything += bool(lacking)

    def _send(self, part: str, document: Document) -> None:
        self._sinks[part](document)
        self._counts[document.language, f"{part}_documents"] += 1
        self._counts[document.language, f"{part}_bytes"] += document.bytes


class _Writer:
    """Parquet files of about `file_bytes` of text each (None: a single file), in row groups of
    `GROUP_BYTES`."""

    def __init__(self, folder: Path, pattern: str, file_bytes: int | None):
        self._folder, self._pattern, self._file_bytes = folder, pattern, file_bytes
        self._files = self._in_file = self._in_group = 0
        self._writer: pq.ParquetWriter | None = None
        self._group: list[Document] = []

    def add(self, document: Document) -> None:
        self._group.append(document)
        self._in_group += document.bytes
        if self._in_group >= GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        if self._group or not self._files:
            self._flush()
        if self._writer:
            self._writer.close()
            self._writer = None

    def _flush(self) -> None:
        if self._writer is None:
            path = self._folder / f"{self._pattern.format(self._files)}.parquet"
            self._writer = pq.ParquetWriter(path, _SCHEMA, compression="zstd")
            self._files += 1
        self._writer.write_table(
            pa.Table.from_pylist([d._asdict() for d in self._group], schema=_SCHEMA)
        )
        self._in_file += self._in_group
        self._in_group, self._group = 0, []
        if self._file_bytes and self._in_file >= self._file_bytes:
            self._writer.close()
            self._writer, self._in_file = None, 0


class _Seen(contextlib.AbstractContextManager):
    """The set of digests seen so far, on disk."""

    def __init__(self, path: Path):
        self._path = path
        self._database = sqlite3.connect(path, isolation_level=None)
        # Nothing here outlives the run, so nothing needs to survive a crash.
        self._database.executescript(
            "PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA locking_mode=EXCLUSIVE; PRAGMA"
            " cache_size=-200000;CREATE TABLE seen (digest BLOB PRIMARY KEY) WITHOUT ROWID; BEGIN;"
        )

    def is_new(self, digest: bytes) -> bool:
        return (
            self._database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,)).rowcount > 0
        )

    def __exit__(self, *_: object) -> None:
        self._database.close()
        self._path.unlink(missing_ok=True)


# --- reading ------------------------------------------------------------------------------------


class _Ledger:
    """What the streams of a corpus count together."""

    def __init__(self, config: TextConfig, log: Log, check_chat: ChatCheck = _any_chat):
        self.config, self._log, self.check_chat = config, log, check_chat
        self.counts: Counter[tuple[str, str]] = Counter()
        """By language and by what is counted."""
        self.sources: Counter[str] = Counter()
        """Bytes kept by part of the corpus."""
        self.records = self.broken = self._pooled = 0
        self.first = ""
        """The first record that could not be used: where it stands, and why."""
        self._languages: set[str] = set()

    def add_broken(self, what: str) -> None:
        """
        Raises:
          UserError: there are more than `text.max_broken_share` allows.
        """
        self.broken += 1
        self.first = self.first or what
        share = self.config.max_broken_share
        if self.broken > (SPARED + share * self.records if share else 0):
            raise UserError(
                f"{self.broken:,} of the first {self.records:,} records of the corpus cannot be"
                f" used, more than text.max_broken_share={share:g} allows (beside {SPARED}); the"
                f" first of them: {self.first}"
            )

    def language(self, name: str) -> str:
        """`name`, or `OTHER` where there are too many languages already."""
        if name not in self._languages:
            if len(self._languages) >= MOST_LANGUAGES:
                self._warn_of_languages()
                self._pooled += 1
                return OTHER
            self._languages.add(name)
        return name

    def _warn_of_languages(self) -> None:
        if not self._pooled:
            self._log(
                f"corpus: warning: text.language_field '{self.config.language_field}' has more than"
                f" {MOST_LANGUAGES:,} values; documents of all further ones count as '{OTHER}':"
                " name a field that has fewer, or leave it empty"
            )

    def report(self) -> None:
        if self.broken:
            self._log(
                f"corpus: warning: {self.broken:,} of {self.records:,} records could not be used"
                f" and were skipped (text.max_broken_share); the first: {self.first}"
            )
        if self._pooled:
            self._log(
                f"corpus: {self._pooled:,} documents are of languages past the first"
                f" {MOST_LANGUAGES:,}: '{OTHER}'"
            )


class _Unusable(Exception):
    """What is wrong with a record."""


class _Stream:
    """The documents of a source, one by one. `peek` and `take` go on where they were after
    `close`."""

    def __init__(self, source: Source, part: str, ledger: _Ledger, config: TextConfig):
        self.source, self.position, self.has_ended = source, Position(), False
        self._part, self._config = part, config
        self.waiting = 0
        """Bytes of the document that comes next; 0 where it was not looked at."""
        self._ledger = ledger
        self._read, self._usable, self._first = 0, 0, ""
        self._records: Iterator[Record] | None = None
        self._next: tuple[Document, bytes] | None = None

    def peek(self) -> tuple[Document, bytes] | None:
        """The next document with text, and the SHA-256 of its UTF-8; None where there is none.

        Raises:
          UserError: the source cannot be read, or too many of its records cannot be used.
        """
        while self._next is None and not self.has_ended:
            if self._records is None:
                self._records = itertools.islice(
                    self.source.records(self.position), self._read, None
                )
            record = next(self._records, None)
            if record is None:
                self.has_ended = True
                self._refuse_if_all_unusable(2)
            else:
                self._read += 1
                self._ledger.records += 1
                self._next = self._document(record)
        self.waiting = self._next[0].bytes if self._next else 0
        return self._next

    def take(self) -> None:
        """Goes on behind the document that `peek` gave."""
        self._next, self.waiting = None, 0

    def is_spent(self) -> bool:
        """Whether no document is left; where the file is closed, as far as is known."""
        if self._records is not None:
            self.peek()
        return self.has_ended

    def close(self) -> None:
        """Closes the file. What `peek` gave is not held in memory."""
        if self._next:
            self._next = None
            self._read -= 1
            self._ledger.records -= 1
        self._records = None

    def _document(self, record: Record) -> tuple[Document, bytes] | None:
        try:
            text, language, chat = _text_of(record, self._config)
            if chat:
                self._ledger.check_chat(chat)
        except (_Unusable, chats.Unusable) as problem:
            what = f"{self.source.name}, {record.place} {problem}"
            self._first = self._first or what
            self._refuse_if_all_unusable(FIRST_RECORDS)
            self._ledger.add_broken(what)
            return None
        self._usable += 1
        language = (
            self._part
            if self._ledger.config.group_by == "source"
            else self._ledger.language(language)
        )
        if not text.strip():
            self._ledger.counts[language, "without_text"] += 1
            return None
        # JSON may hold half a surrogate pair, which no UTF-8 can.
        encoded = text.encode("utf-8", errors="replace")
        messages = json.dumps(chat, ensure_ascii=False) if chat else ""
        document = Document(encoded.decode(), language, len(encoded), self._part, messages)
        return document, hashlib.sha256(encoded + messages.encode()).digest()

    def _refuse_if_all_unusable(self, count: int) -> None:
        if self._first and not self._usable and self._read >= count:
            raise UserError(
                f"none of the first {self._read} records of a corpus file can be used:"
                f" {self._first}"
            )


class _Part(NamedTuple):
    """A part of the corpus, and the share of the text that it is to have."""

    name: str
    weight: float | None
    streams: list[_Stream]


def _mixed(
    parts: Sequence[_Part], budget: int, is_new: Callable[[Document, bytes], bool]
) -> Iterator[tuple[Document, bytes]]:
    """New documents of all parts: with weights such that these hold at any time, until one part has
    ended; else by size."""
    if not parts[0].weight:
        yield from _drawn([stream for part in parts for stream in part.streams], budget, is_new)
        return
    weights = [(part.weight or 0) / sum(other.weight or 0 for other in parts) for part in parts]
    # How much text the parts hold is only known when one has ended. Until then all files of a part
    # go on side by side.
    texts = [sum(_text_bytes(stream.source, budget) for stream in part.streams) for part in parts]
    total = min(budget, *(text / weight for text, weight in zip(texts, weights)))
    drawn = [
        _drawn(part.streams, max(1, round(total * w / SLICES)), is_new)
        for part, w in zip(parts, weights)
    ]
    taken = [0.0 for _ in parts]
    while found := next(drawn[(least := int(np.argmin(taken)))], None):
        taken[least] += found[0].bytes / weights[least]
        yield found


def _text_bytes(source: Source, budget: int) -> int:
    """About how much text a source holds."""
    is_plain = Path(source.name).suffix in PLAIN
    return budget if source.size is None else source.size * (1 if is_plain else EXPANSION)


def _shares(sources: Counter[str]) -> str:
    total = max(sum(sources.values()), 1)
    return (
        ", ".join(f"{name} {size / total:.1%}" for name, size in sources.items()) + " of the text"
    )


def _drawn(
    streams: Sequence[_Stream], planned: int, is_new: Callable[[Document, bytes], bool]
) -> Iterator[tuple[Document, bytes]]:
    """New documents of all streams, of each stream as many bytes as its size makes it due, until
    all have ended.

    The streams are read one after the other up to their share of `planned`. What a stream leaves of
    its share because its next document is larger goes to the one after it, so that of many small
    files some are read whole. What streams leave because they ended is shared by the others in
    another round. Where no more than a hundredth is left there is another round of `planned` bytes:
    who asked for so many does not take them.
    """
    suspended: list[_Stream] = []
    amount = float(planned)
    while going_on := [stream for stream in streams if not stream.has_ended]:
        sizes = _sizes(going_on)
        total = sum(sizes)
        due, spare, progressed = 0.0, 0.0, False
        for stream, size in zip(going_on, sizes):
            due += amount * size / total
            while stream.waiting <= due and (found := stream.peek()) and found[0].bytes <= due:
                stream.take()
                progressed = True
                if is_new(*found):
                    due -= found[0].bytes
                    yield found
            if stream.has_ended:
                spare, due, progressed = spare + due, 0.0, True
            if stream in suspended:
                suspended.remove(stream)
            suspended.append(stream)
            if len(suspended) > OPEN_FILES:
                suspended.pop(0).close()
        left = spare + due
        amount = left if progressed and left > planned / 100 else left + planned


def _sizes(streams: Sequence[_Stream]) -> list[float]:
    """Bytes of each source, at least one; of a hub dataset, where nobody knows, as many as the
    others have on average."""
    known = [stream.source.size for stream in streams if stream.source.size is not None]
    usual = sum(known) / len(known) if known else 1
    return [
        max(usual if stream.source.size is None else stream.source.size, 1) for stream in streams
    ]


def _text_of(record: Record, config: TextConfig) -> tuple[str, str, list[dict[str, str]]]:
    """(text, language, messages of a chat) of a record; a null text is an empty one.

    Raises:
      _Unusable: the record is broken, lacks a field, or its text is none.
    """
    if record.problem:
        raise _Unusable(record.problem)
    fields = record.value
    if not isinstance(fields, dict):
        raise _Unusable(
            f"is of another kind: expected an object with fields, found {reading.brief(fields)}"
        )
    chat = fields.get(config.messages_field) if config.messages_field else None
    needed = {"text_field": config.text_field, "language_field": config.language_field}
    if chat is not None:
        del needed["text_field"]
    for key, field in needed.items():
        if field and field not in fields:
            raise _Unusable(reading.no_field(field, key, fields))
    language = _language(fields[config.language_field]) if config.language_field else ALL
    if chat is not None:
        messages = chats.messages_of(chat)
        return chats.plain_text(messages), language, messages
    text = fields[config.text_field]
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _Unusable(
                f"is not UTF-8 in its field '{config.text_field}' ({error.reason})"
            ) from error
    if not isinstance(text, str | None):
        raise _Unusable(
            f"is of another kind: the field '{config.text_field}' holds {reading.brief(text)}"
            " instead of a string: name the field that holds the text with"
            f" --config.text.text_field=... (there are {sorted(fields)})"
        )
    return text or "", language, []


def _language(value: Any) -> str:
    """A language's name; one that is called like the row of all languages is quoted, so that they
    stay apart."""
    if value is None or value in ("", b""):
        return UNKNOWN
    name = value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)
    name = name.encode("utf-8", errors="replace").decode()
    # It stands in tables and lines of the log, where a line end or control character would do harm.
    name = "".join(c if c.isprintable() else "?" for c in " ".join(name.split())) or UNKNOWN
    return f"'{name}'" if name == ALL else name


def _settings(config: Config) -> TextConfig:
    """How text is read; no language where results are told apart by source."""
    by_source = config.text.group_by == "source"
    return dataclasses.replace(config.text, language_field="") if by_source else config.text


class _Entry(NamedTuple):
    """A name in `config.corpus`, its weight if it has one, and what it stands for."""

    name: str
    weight: float | None
    sources: list[Source]
    config: TextConfig


def _parts(config: Config, ledger: _Ledger) -> list[_Part]:
    return [
        _Part(
            entry.name,
            entry.weight,
            [_Stream(source, entry.name, ledger, entry.config) for source in entry.sources],
        )
        for entry in _entries(config)
    ]


def _entries(config: Config) -> list[_Entry]:
    """What `config.corpus` names, in the order given.

    Raises:
      UserError: it names nothing, what is not there, or gives weights to some of its names only.
    """
    found = _names(config)
    if not found:
        raise UserError(
            "the corpus is an empty name: give files (path or glob), a hub dataset, or 'embedded'"
        )
    bare = [name for name, weight in found if weight is None]
    if 0 < len(bare) < len(found):
        raise UserError(
            f"the corpus '{bare[0]}' has no weight, but others have: give all of them one, or none"
        )
    names = [SELF if _is_self_text(name) else Path(name).name or name for name, _ in found]
    shown = names if len(set(names)) == len(names) else [name for name, _ in found]
    # A name that is not in the encoding of the locale has its bytes as lone surrogates.
    shown = [
        name.encode("utf-8", errors="surrogateescape").decode("utf-8", errors="replace")
        for name in shown
    ]
    entries = []
    for short, (name, weight) in zip(shown, found):
        settings = _settings(config)
        if _is_self_text(name):
            language = settings.language_field and _SELF_FIELDS["language_field"]
            own = {**_SELF_FIELDS, "language_field": language}
            settings = dataclasses.replace(settings, **own)
        sources = [_UNWRITTEN] if name == SELF else reading.sources(demo.corpus(name), settings)
        entries.append(_Entry(short, weight, sources, settings))
    return entries


def _names(config: Config) -> list[tuple[str, float | None]]:
    """The names in `config.corpus` and their weights."""
    given = [config.corpus] if isinstance(config.corpus, str) else list(config.corpus)
    return [_weighted(name) for names in given for name in reading.split(names)]


def _not_written(position: Position) -> Iterator[Record]:
    raise UserError(
        f"the text '{SELF}' is written by a run whose config.corpus names it: here give files, such"
        f" as the {SELF_TEXT} that it left in its workdir's folder '{SELF}' (a folder of that name"
        f" is ./{SELF})"
    )


_UNWRITTEN = Source(SELF, None, _not_written)


def _is_self_text(name: str) -> bool:
    return Path(name).name == SELF_TEXT


def _weighted(name: str) -> tuple[str, float | None]:
    """A name and its weight, of `name=weight`; None where there is none."""
    match = None if reading.exists(Path(name)) else _WEIGHT.fullmatch(name)
    if not match:
        return name, None
    try:
        weight = float(match[2])
    except ValueError:
        return name, None
    if not 0 < weight < math.inf:
        raise UserError(f"the corpus '{match[1]}' has the weight {match[2]}: it must be above 0")
    return match[1].strip(), weight


def _expected_bytes(config: Config, streams: Sequence[_Stream]) -> int:
    """Bytes of text to come, where that can be told beforehand; else 0."""
    sources = [stream.source for stream in streams]
    is_plain = all(Path(source.name).suffix in PLAIN for source in sources)
    return (
        min(sum(source.size or 0 for source in sources), config.text.budget_bytes)
        if is_plain
        else 0
    )


def _named(corpus: str | Iterable[str]) -> str:
    names = [corpus] if isinstance(corpus, str) else list(corpus)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
