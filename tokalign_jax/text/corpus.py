"""Documents: read, de-duplicated, cut at a byte budget, and split into training and held-out text.

The artefact is a folder of `train-00000.parquet ...` and `held_out.parquet` (columns `text`, `language`, `bytes`) and
`summary.json`. Memory does not grow with the corpus: text is streamed, and the hashes that find duplicates live in a
SQLite file that exists only while reading.
"""

import contextlib
import glob
import hashlib
import itertools
import json
import re
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int

from tokalign_jax import demo
from tokalign_jax.config import EMBEDDED, Config, TextConfig
from tokalign_jax.errors import UserError
from tokalign_jax.progress import Log, Progress

FILE_BYTES = 32 << 20
"""Text per training file."""
GROUP_BYTES = 4 << 20
"""Text per Parquet row group, the unit in which it is read back."""
PASSAGE_BYTES = 1 << 20
"""A plain-text document ends at a blank line, or at the first line end past this size."""
ALL = "all"
"""The language of every document when no language field is named."""
UNKNOWN = "unknown"
"""The language of a document whose language field is empty."""

_COMPRESSED = (".gz", ".xz", ".zst", ".bz2")
_SUPPORTED = ".json, .jsonl, .ndjson or .txt (also with .gz, .xz, .zst or .bz2 behind), .parquet or .arrow"
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Beside the data in folders of the library datasets."""
_SCHEMA = pa.schema({"text": pa.string(), "language": pa.string(), "bytes": pa.int64()})


class Document(NamedTuple):
    """One text, its language (or domain), and its length in UTF-8 bytes."""

    text: str
    language: str
    bytes: int


# --- the artefact -----------------------------------------------------------------------------------------------------


def run(config: Config, folder: Path, log: Log) -> dict[str, Any]:
    """Reads `config.corpus` into `folder`; returns what `summary.json` says.

    A document is held out when the first 8 bytes of its SHA-256, as a fraction of 2^64, lie below `held_out_fraction`:
    the choice depends on the text alone. Where that leaves a language of several documents with none, the one with its
    smallest hash is held out.

    Raises:
      UserError: the corpus is missing, unreadable, empty, without the text field, or too small to be split.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in (*folder.glob("*.parquet"), folder / "seen.sqlite"):
        leftover.unlink(missing_ok=True)
    counts: Counter[tuple[str, str]] = Counter()  # (language, what is counted)
    train, held_out = _Writer(folder, "train-{:05d}", FILE_BYTES), _Writer(folder, "held_out", None)
    split = _Split(config.text.held_out_fraction, train.add, held_out.add, counts)
    progress = Progress(log, "corpus", _expected_bytes(config), "bytes")
    kept, stopped = 0, False
    with _Seen(folder / "seen.sqlite") as seen:
        for document, digest in _documents(config, counts):
            if not seen.is_new(digest):
                counts[document.language, "duplicates"] += 1
                continue
            if kept + document.bytes > config.text.budget_bytes:
                stopped = True
                break
            kept += document.bytes
            split.add(document, digest)
            progress.update(document.bytes)
    split.finish()
    train.close()
    held_out.close()
    progress.done()
    summary = _summary(counts, stopped)
    if not (summary["train_documents"] and summary["held_out_documents"]):
        raise UserError(_too_small(config, summary, stopped))
    (folder / "summary.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    return summary


def check(config: Config) -> None:
    """Looks, before any long work, whether the corpus is there, readable, not empty, and has the fields named.

    Raises:
      UserError: naming the file (or data set) at fault, what it holds instead, and the remedy.
    """
    sources = _sources(config)
    for source in sources[:32]:
        first = next(iter(source.records()), None)
        if first is not None:
            _text_and_language(first, config.text, f"{source.name}, record 1")
    if next(_documents(config, Counter()), None) is None:
        raise UserError(
            f"the corpus '{_named(config.corpus)}' is empty: no document with text in {_named(s.name for s in sources)}"
        )


def names(config: Config) -> list[str]:
    """What the corpus is read from, in order: paths of local files, or names of hub data sets."""
    return [source.name for source in _sources(config)]


def read(config: Config) -> Iterator[Document]:
    """Every document with text of `config.corpus` as it is, duplicates included; none of it is written anywhere."""
    return (document for document, _ in _documents(config, Counter()))


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
    """The training documents at these positions (sorted, in file order); parts of files that hold none of them are not read."""
    first = 0
    for path in sorted(folder.glob("train-*.parquet")):
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                wanted = positions[np.searchsorted(positions, first) : np.searchsorted(positions, first + rows)] - first
                if len(wanted):
                    columns = file.read_row_group(group, columns=_SCHEMA.names).take(wanted).to_pydict()
                    yield from (Document(*row) for row in zip(*columns.values()))
                first += rows


def held_out(folder: Path) -> Iterator[Document]:
    """The held-out documents, in the order in which they were read."""
    return itertools.chain.from_iterable(_batches(folder / "held_out.parquet"))


def _batches(path: Path) -> Iterator[list[Document]]:
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            columns = file.read_row_group(group, columns=_SCHEMA.names).to_pydict()
            yield [Document(*row) for row in zip(*columns.values())]


def _summary(counts: Counter[tuple[str, str]], stopped: bool) -> dict[str, Any]:
    """Totals, and the same by language."""
    names = [f"{part}_{unit}" for part in ("train", "held_out") for unit in ("documents", "bytes")]
    names += ["duplicates", "without_text"]
    languages = {}
    for language in sorted({language for language, _ in counts}):
        languages[language] = {name: counts[language, name] for name in names}
    totals = {name: sum(language[name] for language in languages.values()) for name in names}
    return {**totals, "stopped_at_budget": stopped, "languages": languages}


def _too_small(config: Config, summary: dict[str, Any], stopped: bool) -> str:
    found = summary["train_documents"] + summary["held_out_documents"]
    corpus = f"the corpus '{_named(config.corpus)}'"
    if stopped:
        budget = config.text.budget_bytes
        return f"{corpus} gave {found} documents within text.budget_bytes={budget:,}; two or more are needed: raise it"
    if not found:
        return f"{corpus} is empty: it has no document with text in the field '{config.text.text_field}'"
    return (
        f"{corpus} gave {summary['train_documents']} documents to train on and {summary['held_out_documents']} to hold out; at "
        "least one of each is needed: give more documents (those of a .txt file end at blank lines), or another "
        f"text.held_out_fraction than {config.text.held_out_fraction}"
    )


# --- splitting and writing --------------------------------------------------------------------------------------------


class _Split:
    """Sends each document to the training or the held-out side.

    Per language the training document with the smallest hash is kept back until the end, in case the language has no
    held-out document by then.
    """

    def __init__(self, fraction: float, train: Callable, held_out: Callable, counts: Counter[tuple[str, str]]):
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
    """Parquet files of about `file_bytes` of text each (None: a single file), in row groups of `GROUP_BYTES`."""

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
        self._writer.write_table(pa.Table.from_pylist([d._asdict() for d in self._group], schema=_SCHEMA))
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
            "PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA locking_mode=EXCLUSIVE; PRAGMA cache_size=-200000;"
            "CREATE TABLE seen (digest BLOB PRIMARY KEY) WITHOUT ROWID; BEGIN;"
        )

    def is_new(self, digest: bytes) -> bool:
        return self._database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,)).rowcount > 0

    def __exit__(self, *_: object) -> None:
        self._database.close()
        self._path.unlink(missing_ok=True)


# --- reading ----------------------------------------------------------------------------------------------------------


class _Source(NamedTuple):
    """A file or hub data set, and the function that streams its records."""

    name: str
    records: Callable[[], Iterator[dict[str, Any]]]


def _documents(config: Config, counts: Counter[tuple[str, str]]) -> Iterator[tuple[Document, bytes]]:
    """Every document with text, duplicates included, and the SHA-256 of its UTF-8."""
    for source in _sources(config):
        for number, record in enumerate(source.records(), start=1):
            text, language = _text_and_language(record, config.text, f"{source.name}, record {number}")
            if not text.strip():
                counts[language, "without_text"] += 1
                continue
            # JSON may hold half a surrogate pair, which no UTF-8 can.
            encoded = text.encode("utf-8", errors="replace")
            yield Document(encoded.decode(), language, len(encoded)), hashlib.sha256(encoded).digest()


def _text_and_language(record: Any, config: TextConfig, where: str) -> tuple[str, str]:
    """The two fields that matter; a null text is an empty one, a field that is not there an error."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object with fields, found {_brief(record)}")
    wanted = {"text.text_field": config.text_field, "text.language_field": config.language_field}
    for key, field in wanted.items():
        if field and field not in record:
            raise UserError(
                f"{where} has no field '{field}'; it has {sorted(record)}: name the right one with --config.{key}=..."
            )
    text = record[config.text_field]
    if not isinstance(text, str | None):
        raise UserError(
            f"{where}: the field '{config.text_field}' holds {_brief(text)} instead of a string: name the field that "
            f"holds the text with --config.text.text_field=... (there are {sorted(record)})"
        )
    language = record[config.language_field] if config.language_field else ALL
    named = UNKNOWN if language is None or language == "" else str(language)
    return text or "", named.encode("utf-8", errors="replace").decode()


def _sources(config: Config) -> list[_Source]:
    """The files behind `config.corpus`, in the order given (those of a glob or folder by name), or the hub data set."""
    corpus = demo.corpus(config.corpus)
    given = [corpus] if isinstance(corpus, str) else list(corpus)
    names = []
    for name in given:
        names += [name] if Path(name).exists() else [part.strip() for part in name.split(",") if part.strip()]
    if not names:
        raise UserError("the corpus is an empty name: give files (path or glob), a hub data set, or 'embedded'")
    return [source for name in names for source in _sources_of(name, config.text)]


def _sources_of(name: str, config: TextConfig) -> list[_Source]:
    path = Path(name).expanduser()
    if path.is_dir():
        path = _split_folder(path, config.hub_split)
        files = sorted(p for p in path.rglob("*") if p.is_file() and _kind(p) and _is_data(p.relative_to(path)))
        if not files:
            raise UserError(f"the corpus folder '{name}' holds no file ending in {_SUPPORTED}")
        return [_file(p, config) for p in files]
    if path.exists():
        return [_file(path, config)]
    if re.search(r"[*?\[]", name):
        files = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if not files:
            raise UserError(f"no file matches the corpus pattern '{name}' (looked from {Path.cwd()})")
        return [_file(p, config) for p in files]
    looks_local = (
        _kind(path) or name.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@\S+)?", name)
    )
    if looks_local:
        raise UserError(f"the corpus file '{name}' does not exist (looked from {Path.cwd()}): {_what_there_is(path)}")
    return [_Source(name, lambda: _hub_records(name, config))]


def _split_folder(folder: Path, split: str) -> Path:
    """Where a split's files are: below the folder if `DatasetDict.save_to_disk` made it, else in it."""
    listed = folder / "dataset_dict.json"
    if not listed.is_file():
        return folder
    splits = json.loads(listed.read_text())["splits"]
    if split not in splits:
        raise UserError(
            f"the corpus folder '{folder}' has no split '{split}': name one of {', '.join(splits)} with --config.text.hub_split"
        )
    return folder / split


def _is_data(path: Path) -> bool:
    """Whether a file in a folder is text that is meant, not hidden, a cache, or what the library datasets says of its own."""
    return not (any(part.startswith(".") for part in path.parts) or path.name in _DESCRIPTIONS)


def _file(path: Path, config: TextConfig) -> _Source:
    reader = _kind(path)
    if reader is None:
        raise UserError(f"the corpus file '{path}' has an unknown ending: it must be {_SUPPORTED}")
    return _Source(str(path), lambda: _guarded(str(path), reader(path, config)))


def _kind(path: Path) -> Callable[[Path, TextConfig], Iterator[dict[str, Any]]] | None:
    """The reader for a file name, or None."""
    suffixes = [s.lower() for s in path.suffixes] or [""]
    if len(suffixes) > 1 and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    readers = dict.fromkeys((".json", ".jsonl", ".ndjson"), _json_records) | {".txt": _text_records}
    return (readers | {".parquet": _parquet_records, ".arrow": _arrow_records}).get(suffixes[-1])


def _guarded(name: str, records: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """`records`, with whatever goes wrong in a decoder told as trouble of the file `name`."""
    try:
        yield from records
    except (UserError, GeneratorExit):
        raise
    except Exception as error:
        raise UserError(
            f"the corpus file '{name}' cannot be read: {type(error).__name__}: {_brief(error)}. It must be UTF-8 text, "
            f"whole, and of the kind its ending says ({_SUPPORTED})"
        ) from error


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file, plain or compressed, line ends kept."""
    stream = datasets.load_dataset(
        "text",
        data_files=glob.escape(str(path)),
        split="train",
        streaming=True,
        keep_linebreaks=True,
        chunksize=1 << 20,
    )
    for batch in stream.iter(batch_size=64):
        yield from batch["text"]


def _json_records(path: Path, config: TextConfig) -> Iterator[dict[str, Any]]:
    """JSON Lines, or one array of objects (which is held in memory).

    Records are parsed one by one, not as a table: fields that are not asked for may change their type at will.
    """
    lines = _lines(path)
    first = next((line for line in lines if line.strip("\ufeff \t\r\n")), "").lstrip("\ufeff \t")
    if first.startswith("["):
        yield from json.loads(first + "".join(lines))
        return
    for number, line in enumerate(itertools.chain([first], lines), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}, line {number} is not JSON ({error}): {_brief(line)}; the file must hold one object a "
                    f"line, or one array of objects"
                ) from error


def _text_records(path: Path, config: TextConfig) -> Iterator[dict[str, Any]]:
    """Plain text: blank lines part the documents. There are no fields, so any name fits."""
    passage: list[str] = []
    size = 0
    for line in itertools.chain(_lines(path), [""]):
        if line.strip():
            passage.append(line)
            size += len(line)
        if passage and (not line.strip() or size >= PASSAGE_BYTES):
            yield {
                config.text_field: "".join(passage),
                **({config.language_field: None} if config.language_field else {}),
            }
            passage, size = [], 0


def _parquet_records(path: Path, config: TextConfig) -> Iterator[dict[str, Any]]:
    there = pq.read_schema(path).names
    wanted = [field for field in (config.text_field, config.language_field) if field]
    if not set(wanted) <= set(there):
        yield dict.fromkeys(there)  # the caller says what is missing, and what is there instead
        return
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=256, columns=wanted):
            yield from batch.to_pylist()


def _arrow_records(path: Path, config: TextConfig) -> Iterator[dict[str, Any]]:
    """What `save_to_disk` of the library datasets writes: Arrow's stream format."""
    wanted = [field for field in (config.text_field, config.language_field) if field]
    with pa.memory_map(str(path)) as file:
        for batch in pa.ipc.open_stream(file):
            # Where one is missing the caller says so, and what is there instead.
            yield from (batch.select(wanted) if {*wanted} <= {*batch.schema.names} else batch).to_pylist()


def _hub_records(name: str, config: TextConfig) -> Iterator[dict[str, Any]]:
    repository, _, revision = name.partition("@")
    try:
        yield from datasets.load_dataset(
            repository, config.hub_config or None, split=config.hub_split, revision=revision or None, streaming=True
        )
    except GeneratorExit:
        raise
    except Exception as error:
        raise UserError(
            f"the corpus '{name}' is no local file, and could not be had as a hub data set (config "
            f"'{config.hub_config}', split '{config.hub_split}'): {type(error).__name__}: {_brief(error)}. Without a "
            f"network, point --config.corpus to local files ({_SUPPORTED}) or run with --config.corpus={EMBEDDED}"
        ) from error


def _expected_bytes(config: Config) -> int:
    """Bytes of text to come, where that can be told beforehand; else 0."""
    sizes = [
        Path(s.name).stat().st_size if Path(s.name).suffix in (".jsonl", ".json", ".txt") else 0
        for s in _sources(config)
    ]
    return min(sum(sizes), config.text.budget_bytes) if all(sizes) else 0


def _what_there_is(path: Path) -> str:
    """What a mistyped path might have meant."""
    nearest = next(parent for parent in path.absolute().parents if parent.is_dir())
    names = sorted(p.name for p in itertools.islice(nearest.iterdir(), 1000))
    return f"{nearest} holds {', '.join(names[:10]) or 'nothing'}{', ...' if len(names) > 10 else ''}"


def _named(corpus: str | Iterable[str]) -> str:
    names = [corpus] if isinstance(corpus, str) else list(corpus)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _brief(thing: object) -> str:
    text = str(thing) if isinstance(thing, Exception) else repr(thing)
    text = " ".join(text.split())
    return text if len(text) <= 160 else f"{text[:157]}..."
