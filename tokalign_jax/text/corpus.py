"""Documents of a corpus: read, de-duplicated, sampled within a byte budget, and split.

The artifact is a folder of training files `train-00000.parquet ...` and `held_out.parquet` (columns
`text`, `language`, `bytes`, `source`, `chat`) and `summary.json`. Memory does not grow with the
corpus: text is streamed, and the hashes that identify duplicates are in a SQLite file that exists
only while reading.
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
"""Text per Parquet row group, the unit of reading."""
ALL = "all"
"""Language of every document if no language field is named, and name of the results over all
languages.
"""
UNKNOWN = "unknown"
"""Language of a document whose language field is empty."""
OTHER = "other"
"""Language of documents past `MOST_LANGUAGES`."""
MOST_LANGUAGES = 1000
"""Distinct languages, at most; each keeps a document in memory until the end, and has a row in the
results.
"""
SPARED = 10
"""Unusable records that any corpus may have, beside the share that `text.max_broken_share` allows.
"""
FIRST_RECORDS = 5
"""Unusable records at the beginning of a file, with no usable one, after which it is refused."""
CHECKED = 32
"""Files whose first records are read by the early check."""
OPEN_FILES = 64
"""Files that stay open while others are read. A closed file is read again from its beginning if the
budget allows more of it.
"""

PLAIN = (".jsonl", ".ndjson", ".json", ".txt")
"""Suffixes of files that are about as large as their text."""
SLICES = 16
"""Rounds in which a weighted part of the corpus is read through all of its files."""
EXPANSION = 5
"""Approximate size of text relative to its compressed file."""

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
"""A name in the corpus, followed by its weight."""


class Document(NamedTuple):
    """A text with its language (or domain), length in UTF-8 bytes, and part of the corpus."""

    text: str
    """For a chat, the contents of its messages."""
    language: str
    bytes: int
    source: str = ""
    chat: str = ""
    """For a chat, its messages as JSON (`chats.py`)."""


# --- Artifact -----------------------------------------------------------------------------------


ChatCheck = Callable[[Sequence[chats.Message]], None]
"""Check of messages that raises `chats.Unusable` if they cannot be trained on."""


def _any_chat(messages: Sequence[chats.Message]) -> None:
    del messages


def run(
    config: Config, folder: Path, log: Log, check_chat: ChatCheck = _any_chat
) -> dict[str, Any]:
    """Read `config.corpus` into `folder` and return the content of `summary.json`.

    A document is held out if the first 8 bytes of its SHA-256, as a fraction of 2^64, are below
    `held_out_fraction`: the choice depends on the text alone. If a language of several documents
    has no held-out document then, the one with its smallest hash is held out.

    Args:
      config: names the corpus.
      folder: receives the artifact.
      log: receives progress and warnings.
      check_chat: check of each chat.

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
    budget, bytes_read, stopped = config.text.budget_bytes, 0, False
    with _Seen(folder / "seen.sqlite") as seen:

        def is_new(document: Document, digest: bytes) -> bool:
            new = seen.is_new(digest)
            ledger.counts[document.language, "duplicates"] += not new
            return new

        for document, digest in _mixed(parts, budget, is_new):
            if bytes_read + document.bytes > budget:
                stopped = True
                break
            bytes_read += document.bytes
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
    _report_other_files(config, log)
    if summary["not_read"]["files"]:
        log(_unread(summary["not_read"], parts, budget, stopped))
    if len(parts) > 1:
        log(f"corpus: {_shares(ledger.sources)}")
    content = json.dumps(summary, indent=1, ensure_ascii=False) + "\n"
    # A path need not be valid UTF-8, and broken records are quoted with theirs.
    (folder / "summary.json").write_text(content, encoding="utf-8", errors="replace")
    return summary


def check(config: Config, check_chat: ChatCheck = _any_chat) -> None:
    """Check that the corpus exists, is readable, not empty, and has the configured fields.

    Args:
      config: names the corpus.
      check_chat: check of each chat.

    Raises:
      UserError: names the offending file (or dataset), its actual content, and the remedy.
    """
    ledger = _Ledger(_settings(config), lambda line: None, check_chat)
    streams = [stream for part in _parts(config, ledger) for stream in part.streams]
    has_text = False
    for number, stream in enumerate(streams):
        if number >= CHECKED and has_text:
            break
        has_text |= stream.peek() is not None
        stream.close()
    if not has_text:
        empty = (
            f"the corpus '{_named(config.corpus)}' is empty: no document with text in "
            f"{_named(stream.source.name for stream in streams)}"
        )
        raise UserError(ledger.first or empty)


def names(config: Config) -> list[str]:
    """List the sources of the corpus in order: paths of local files, or names of hub datasets."""
    return [source.name for entry in _entries(config) for source in entry.sources]


def folders(config: Config) -> list[Path]:
    """List the folders that the corpus names."""
    paths = [Path(name).expanduser() for name, _ in _names(config) if name != SELF]
    return [path for path in paths if reading.exists(path) and path.is_dir()]


SELF_TEXT = "self_text.jsonl"
"""File of text written by the source model. Its field names are fixed, whatever `config.text` says.
"""
_SELF_FIELDS = {"text_field": "text", "messages_field": "messages", "language_field": "language"}


def has_self(config: Config) -> bool:
    """Return whether the corpus includes text written by the source model (`self`)."""
    return any(name == SELF for name, _ in _names(config))


def with_self(config: Config, file: Path) -> Config:
    """Return the config with `self` replaced by the file of the source model's text."""
    return _with_names(config, lambda name: str(file) if name == SELF else name)


def without_self(config: Config) -> Config | None:
    """Return the config without `self`, or None if its corpus names nothing else."""
    rest = [name for name, _ in _names(config) if name != SELF]
    return _with_names(config, lambda name: "" if name == SELF else name) if rest else None


def _with_names(config: Config, rename: Callable[[str], str]) -> Config:
    renamed = [(rename(name), weight) for name, weight in _names(config)]
    parts = [f"{name}={weight}" if weight else name for name, weight in renamed if name]
    return dataclasses.replace(config, corpus=tuple(parts))


def mixture(config: Config) -> list[str]:
    """Describe what the result of `run` depends on beside the contents of the files in order.

    That is, for a corpus of several parts, their names, weights and numbers of files; and which
    files are plain text, since the same content with another ending is read as JSON Lines.
    """
    entries = _entries(config)
    parts = [
        f"{entry.name}={entry.weight}"
        + (f" of {len(entry.sources)} files" if len(entry.sources) > 1 else "")
        for entry in entries
    ]
    names = [source.name for entry in entries for source in entry.sources]
    plain = [i for i, name in enumerate(names) if reading.is_plain_text(Path(name))]
    return (parts if len(parts) > 1 else []) + ([f"plain text: {plain}"] if plain else [])


def read(config: Config, log: Log = lambda line: None) -> Iterator[Document]:
    """Yield every document of `config.corpus` unchanged, duplicates included."""
    ledger = _Ledger(_settings(config), log)
    for stream in [stream for part in _parts(config, ledger) for stream in part.streams]:
        while item := stream.peek():
            stream.take()
            yield item[0]
    ledger.report()


def read_within_budget(config: Config, log: Log = lambda line: None) -> Iterator[Document]:
    """Yield documents of `config.corpus` up to `text.budget_bytes`, duplicates included.

    As in `run`, the budget is shared among the parts of the corpus and their files.
    """
    ledger = _Ledger(_settings(config), log)
    remaining = config.text.budget_bytes
    parts = _parts(config, ledger)
    for document, _ in _mixed(parts, remaining, lambda document, digest: True):
        remaining -= document.bytes
        if remaining < 0:
            break
        yield document
    ledger.report()


def in_groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Group documents to about `GROUP_BYTES` of text."""
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
    """Yield the training documents in file order, in groups of about `GROUP_BYTES` of text."""
    for path in sorted(folder.glob("train-*.parquet")):
        yield from _batches(path)


def at(folder: Path, positions: Int[np.ndarray, "n"]) -> Iterator[Document]:
    """Yield the training documents at these positions (sorted, in file order).

    Row groups without any of them are not read.
    """
    first = 0
    for path in sorted(folder.glob("train-*.parquet")):
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                start, stop = np.searchsorted(positions, [first, first + rows])
                chosen = positions[start:stop] - first
                if len(chosen):
                    yield from _documents(file.read_row_group(group).take(chosen))
                first += rows


def num_files(folder: Path) -> int:
    """Return the number of files (or hub datasets) that the documents come from; 1 if unknown."""
    return json.loads((folder / "summary.json").read_text(encoding="utf-8")).get("files", 1)


def held_out(folder: Path) -> Iterator[Document]:
    """Yield the held-out documents in reading order."""
    return itertools.chain.from_iterable(_batches(folder / "held_out.parquet"))


def _batches(path: Path) -> Iterator[list[Document]]:
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            yield _documents(file.read_row_group(group))


def _documents(table: pa.Table) -> list[Document]:
    return [Document(**row) for row in table.to_pylist()]


def _summary(ledger: "_Ledger", streams: Sequence["_Stream"], stopped: bool) -> dict[str, Any]:
    """Summarize totals, counts by language, unread files, and unusable records."""
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
        "files": len(streams),
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
    reason = f"text.budget_bytes={budget:,} is spent"
    if not stopped:
        reason = f"'{ended[0]}' has no more text, and without it the weights would not hold"
    return (
        f"corpus: {reason}: {quantity(not_read['bytes'])} of {quantity(not_read['of_bytes'])} "
        f"bytes, in {not_read['files']} of {files} files, were not read{share}"
    )


def _report_other_files(config: Config, log: Log) -> None:
    """Warn of files in the corpus's folders that have other endings."""
    names = [demo.corpus(name) for name, _ in _names(config) if name != SELF]
    if files := [file for name in names for file in reading.unread(name, config.text)]:
        shown = ", ".join(repr(str(file))[1:-1] for file in files[:3])
        log(
            "corpus: warning: files of its folders that do not end in"
            f" {reading.SUPPORTED} were not read: {shown}"
            + (f" and {len(files) - 3:,} more" if len(files) > 3 else "")
        )


def _too_small(config: Config, summary: dict[str, Any], stopped: bool) -> str:
    documents = summary["train_documents"] + summary["held_out_documents"]
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
            f"{corpus} gave {documents} documents within text.budget_bytes={budget:,}; two or more"
            " are needed: raise it"
        )
    if not documents:
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


# --- Splitting and writing ----------------------------------------------------------------------


class _Split:
    """Distributes documents to the training and the held-out side.

    For each language the training document with the smallest hash is withheld until the end, in
    case the language has no held-out document by then.
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
        withheld = self._smallest.get(document.language)
        if withheld is None or digest < withheld[0]:
            self._smallest[document.language] = (digest, document)
            if withheld is not None:
                self._send("train", withheld[1])
        else:
            self._send("train", document)

    def finish(self) -> None:
        candidates = sorted(self._smallest.values())
        anything = sum(n for (_, name), n in self._counts.items() if name == "held_out_documents")
        for _, document in candidates:
            trained = self._counts[document.language, "train_documents"]
            held = self._counts[document.language, "held_out_documents"]
            # A corpus of one document per language still needs held-out text.
            lacking = (trained and not held) or (not anything and len(candidates) > 1)
            self._send("held_out" if lacking else "train", document)
            anything += bool(lacking)

    def _send(self, part: str, document: Document) -> None:
        self._sinks[part](document)
        self._counts[document.language, f"{part}_documents"] += 1
        self._counts[document.language, f"{part}_bytes"] += document.bytes


class _Writer:
    """Writes Parquet files of about `file_bytes` of text each (None: a single file).

    Row groups have `GROUP_BYTES` of text.
    """

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
    """Set of digests on disk."""

    def __init__(self, path: Path):
        self._path = path
        self._database = sqlite3.connect(path, isolation_level=None)
        # The file does not outlive the run, so it needs no protection against crashes.
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


# --- Reading ------------------------------------------------------------------------------------


class _Ledger:
    """Counts that the streams of a corpus share."""

    def __init__(self, config: TextConfig, log: Log, check_chat: ChatCheck = _any_chat):
        self.config, self._log, self.check_chat = config, log, check_chat
        self.counts: Counter[tuple[str, str]] = Counter()
        """Counts by language and by name."""
        self.sources: Counter[str] = Counter()
        """Bytes taken, by part of the corpus."""
        self.records = self.broken = self._pooled = 0
        self.first = ""
        """Place and problem of the first unusable record."""
        self.unused_fields: set[str] = set()
        """Fields of chat messages that are left out."""
        self._languages: set[str] = set()

    def add_broken(self, problem: str) -> None:
        """Count an unusable record.

        Raises:
          UserError: there are more than `text.max_broken_share` allows.
        """
        self.broken += 1
        self.first = self.first or problem
        share = self.config.max_broken_share
        if self.broken > (SPARED + share * self.records if share else 0):
            raise UserError(
                f"{self.broken:,} of the first {self.records:,} records of the corpus cannot be"
                f" used, more than text.max_broken_share={share:g} allows (beside {SPARED}); the"
                f" first of them: {self.first}"
            )

    def language(self, name: str) -> str:
        """Return `name`, or `OTHER` if there are too many languages already."""
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
        if self.unused_fields:
            self._log(
                "corpus: warning: of the messages of chats only role and content are read, not"
                f" {', '.join(sorted(self.unused_fields))}"
            )
        if self._pooled:
            self._log(
                f"corpus: {self._pooled:,} documents are of languages past the first"
                f" {MOST_LANGUAGES:,}: '{OTHER}'"
            )


class _Unusable(Exception):
    """An unusable record; the message describes the problem."""


class _Stream:
    """Documents of a source, one by one.

    After `close`, `peek` and `take` continue at the same document.
    """

    def __init__(self, source: Source, part: str, ledger: _Ledger, config: TextConfig):
        self.source, self.position, self.has_ended = source, Position(), False
        self._part, self._config = part, config
        self.waiting = 0
        """Bytes of the next document; 0 before `peek`."""
        self._ledger = ledger
        self._read, self._usable, self._first = 0, 0, ""
        self._records: Iterator[Record] | None = None
        self._next: tuple[Document, bytes] | None = None

    def peek(self) -> tuple[Document, bytes] | None:
        """Return the next document with text, and the SHA-256 of its UTF-8; None at the end.

        Raises:
          UserError: the source cannot be read, or too many of its records are unusable.
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
        """Advance past the document returned by `peek`."""
        self._next, self.waiting = None, 0

    def is_spent(self) -> bool:
        """Return whether no document remains; for a closed file, as far as is known."""
        if self._records is not None:
            self.peek()
        return self.has_ended

    def close(self) -> None:
        """Close the file and release the document returned by `peek`."""
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
                value = record.value[self._config.messages_field]
                self._ledger.unused_fields |= chats.unused_fields(value)
        except (_Unusable, chats.Unusable) as problem:
            description = f"{self.source.name}, {record.place} {problem}"
            self._first = self._first or description
            self._refuse_if_all_unusable(FIRST_RECORDS)
            self._ledger.add_broken(description)
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
        # JSON can contain unpaired surrogates, which UTF-8 cannot encode.
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
    """A part of the corpus, and its share of the text."""

    name: str
    weight: float | None
    streams: list[_Stream]


def _mixed(
    parts: Sequence[_Part], budget: int, is_new: Callable[[Document, bytes], bool]
) -> Iterator[tuple[Document, bytes]]:
    """Yield new documents of all parts.

    With weights the shares hold at any time, until one part has ended; without, parts are read in
    proportion to their size.
    """
    if not parts[0].weight:
        yield from _drawn([stream for part in parts for stream in part.streams], budget, is_new)
        return
    weights = [(part.weight or 0) / sum(other.weight or 0 for other in parts) for part in parts]
    # The amount of text in a part is only known at its end. Until then all files of a part are read
    # side by side.
    texts = [sum(_text_bytes(stream.source, budget) for stream in part.streams) for part in parts]
    total = min(budget, *(text / weight for text, weight in zip(texts, weights)))
    sampled = [
        _drawn(part.streams, max(1, round(total * w / SLICES)), is_new)
        for part, w in zip(parts, weights)
    ]
    taken = [0.0 for _ in parts]
    while item := next(sampled[(least := int(np.argmin(taken)))], None):
        taken[least] += item[0].bytes / weights[least]
        yield item


def _text_bytes(source: Source, budget: int) -> int:
    """Estimate the bytes of text in a source."""
    is_plain = Path(source.name).suffix.lower() in PLAIN
    return budget if source.size is None else source.size * (1 if is_plain else EXPANSION)


def _shares(sources: Counter[str]) -> str:
    total = max(sum(sources.values()), 1)
    return (
        ", ".join(f"{name} {size / total:.1%}" for name, size in sources.items()) + " of the text"
    )


def _drawn(
    streams: Sequence[_Stream], planned: int, is_new: Callable[[Document, bytes], bool]
) -> Iterator[tuple[Document, bytes]]:
    """Yield new documents of all streams in proportion to the streams' sizes, until all have ended.

    Streams are read one after the other up to their share of `planned` bytes. A remainder of a
    share that is smaller than the stream's next document passes to the next stream, so that some of
    many small files are read completely. Shares of streams that have ended are divided among the
    others in another round. If at most a hundredth remains, another round of `planned` bytes
    follows; the caller stops at its budget.
    """
    suspended: list[_Stream] = []
    amount = float(planned)
    while active := [stream for stream in streams if not stream.has_ended]:
        sizes = _sizes(active)
        total = sum(sizes)
        due, spare, progressed = 0.0, 0.0, False
        for stream, size in zip(active, sizes):
            due += amount * size / total
            while stream.waiting <= due and (item := stream.peek()) and item[0].bytes <= due:
                stream.take()
                progressed = True
                if is_new(*item):
                    due -= item[0].bytes
                    yield item
            if stream.has_ended:
                spare, due, progressed = spare + due, 0.0, True
            if stream in suspended:
                suspended.remove(stream)
            suspended.append(stream)
            if len(suspended) > OPEN_FILES:
                suspended.pop(0).close()
        remaining = spare + due
        is_enough = progressed and remaining > planned / 100
        amount = remaining if is_enough else remaining + planned


def _sizes(streams: Sequence[_Stream]) -> list[float]:
    """Return the bytes of each source, at least one; for a hub dataset the mean of the others."""
    sizes = [stream.source.size for stream in streams if stream.source.size is not None]
    usual = sum(sizes) / len(sizes) if sizes else 1
    return [
        max(usual if stream.source.size is None else stream.source.size, 1) for stream in streams
    ]


def _text_of(record: Record, config: TextConfig) -> tuple[str, str, list[dict[str, str]]]:
    """Return (text, language, messages of a chat) of a record; a null text is an empty one.

    Raises:
      _Unusable: the record is broken, lacks a field, or its text is not a string.
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
    """Return a language's name for tables and logs (`_group_name`)."""
    if value is None or value in ("", b""):
        return UNKNOWN
    name = value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)
    return _group_name(name.encode("utf-8", errors="replace").decode())


def _group_name(name: str) -> str:
    """Return the name of a language or source for tables and logs.

    A name equal to that of the results over all languages is quoted, to keep them apart.
    """
    # Line ends and control characters would break tables and log lines.
    name = "".join(c if c.isprintable() else "?" for c in " ".join(name.split())) or UNKNOWN
    return f"'{name}'" if name == ALL else name


def _settings(config: Config) -> TextConfig:
    """Return the settings of reading; without a language field if results are grouped by source."""
    by_source = config.text.group_by == "source"
    return dataclasses.replace(config.text, language_field="") if by_source else config.text


class _Entry(NamedTuple):
    """A name in `config.corpus`, its weight if it has one, and its sources."""

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
    """List the entries of `config.corpus` in order.

    Raises:
      UserError: it names nothing, something that does not exist, or gives weights to only some of
        its names.
    """
    weighted = _names(config)
    if not weighted:
        raise UserError(
            "the corpus is an empty name: give files (path or glob), a hub dataset, or 'embedded'"
        )
    bare = [name for name, weight in weighted if weight is None]
    if 0 < len(bare) < len(weighted):
        raise UserError(
            f"the corpus '{bare[0]}' has no weight, but others have: give all of them one, or none"
        )
    names = [SELF if _is_self_text(name) else Path(name).name or name for name, _ in weighted]
    shown = names if len(set(names)) == len(names) else [name for name, _ in weighted]
    # File names that are not valid in the locale's encoding contain lone surrogates.
    shown = [
        _group_name(
            name.encode("utf-8", errors="surrogateescape").decode("utf-8", errors="replace")
        )
        for name in shown
    ]
    entries = []
    for short, (name, weight) in zip(shown, weighted):
        settings = _settings(config)
        if _is_self_text(name):
            language = settings.language_field and _SELF_FIELDS["language_field"]
            fields = {**_SELF_FIELDS, "language_field": language}
            settings = dataclasses.replace(settings, **fields)
        sources = [_UNWRITTEN] if name == SELF else reading.sources(demo.corpus(name), settings)
        entries.append(_Entry(short, weight, sources, settings))
    return entries


def _names(config: Config) -> list[tuple[str, float | None]]:
    """List the names in `config.corpus` with their weights."""
    lists = [config.corpus] if isinstance(config.corpus, str) else list(config.corpus)
    return [_weighted(name) for names in lists for name in reading.split(names)]


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
    """Split `name=weight` into a name and a weight, None without one."""
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
    """Estimate the bytes of text to read; 0 if that cannot be known before reading."""
    sources = [stream.source for stream in streams]
    is_plain = all(Path(source.name).suffix.lower() in PLAIN for source in sources)
    return (
        min(sum(source.size or 0 for source in sources), config.text.budget_bytes)
        if is_plain
        else 0
    )


def _named(corpus: str | Iterable[str]) -> str:
    names = [corpus] if isinstance(corpus, str) else list(corpus)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
