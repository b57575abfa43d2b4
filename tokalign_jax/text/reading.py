"""Records of corpus files and hub datasets, streamed: which files a name stands for, and how each
kind is read.

A file is read as it is: only a byte-order mark at its beginning is dropped. What is wrong with a
single record (a broken line, bytes that are no UTF-8) comes with that record, and the reader goes
on; what is wrong with the file itself is a `UserError`.
"""

import bz2
import glob
import gzip
import io
import itertools
import json
import lzma
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from tokalign_jax.config import EMBEDDED, TextConfig
from tokalign_jax.errors import UserError

PASSAGE_BYTES = 1 << 20
"""A plain-text document ends at a blank line, or at the first line end past this size."""
LINE_BYTES = 16 << 20
"""A line of plain text that is longer is cut, so that a file without line ends is not held in
memory."""

SUPPORTED = (
    ".json, .jsonl, .ndjson or .txt (also with .gz, .xz, .zst or .bz2 behind), .parquet or .arrow"
)
_COMPRESSED = (".gz", ".xz", ".zst", ".bz2")
_BLOCK = 1 << 20
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files of the library datasets that describe the data beside them."""
_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
"""Byte-order marks of encodings that are not read."""


class Record(NamedTuple):
    """One record of a source."""

    place: str
    """Where it stands in the source: `line 7`, `record 7`."""
    value: Any
    """An object with fields, if all is well."""
    problem: str = ""
    """What is wrong with it, if it could not be read."""


class Position:
    """How far a source has been read."""

    def __init__(self):
        self.bytes = 0
        """Bytes of the file, as it is on disk."""


class Source(NamedTuple):
    """A file or hub dataset."""

    name: str
    size: int | None
    """Bytes on disk; None of a hub dataset."""
    records: Callable[[Position], Iterator[Record]]
    """Streams the records from the first one on."""


# --- what a name stands for ---------------------------------------------------------------------


def split(names: str) -> list[str]:
    """The names that stand in a list with commas; a file or folder may have them in its own."""
    return (
        [names]
        if exists(Path(names))
        else [part.strip() for part in names.split(",") if part.strip()]
    )


def exists(path: Path) -> bool:
    """Whether there is such a file or folder; a name that is too long to be one is none."""
    try:
        return path.exists()
    except OSError:
        return False


def sources(name: str, config: TextConfig) -> list[Source]:
    """What a name (path, glob, folder or hub dataset) stands for; files of a glob or folder by
    name.

    Raises:
      UserError: there is nothing of that name, or nothing that can be read.
    """
    path = Path(name).expanduser()
    if not exists(path):
        return (
            _of_pattern(name, path, config)
            if re.search(r"[*?\[]", name)
            else [_of_hub(name, path, config)]
        )
    if path.is_dir():
        path = _split_folder(path, config.hub_split)
        files = sorted(p for p in path.rglob("*") if p.is_file() and _kind(p) and _is_data(p, path))
        if not files:
            raise UserError(f"the corpus folder '{name}' holds no file ending in {SUPPORTED}")
        return [_file(p, config) for p in files]
    return [_file(path, config)]


def _of_pattern(name: str, path: Path, config: TextConfig) -> list[Source]:
    files = sorted(Path(p) for p in glob.glob(str(path), recursive=True))
    files = [p for p in files if p.is_file() and _is_data(p, p.parent)]
    if not files:
        raise UserError(f"no file matches the corpus pattern '{name}' (looked from {Path.cwd()})")
    return [_file(p, config) for p in files]


def _of_hub(name: str, path: Path, config: TextConfig) -> Source:
    looks_local = (
        _kind(path)
        or name.startswith((".", "/", "~"))
        or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@\S+)?", name)
    )
    if looks_local:
        raise UserError(
            f"the corpus file '{brief(name)[1:-1]}' does not exist (looked from {Path.cwd()}):"
            f" {_what_there_is(path)}"
        )
    return Source(name, None, lambda position: _hub_records(name, config))


def _split_folder(folder: Path, split: str) -> Path:
    """Where a split's files are: below the folder if `DatasetDict.save_to_disk` made it, else in
    it."""
    listed = folder / "dataset_dict.json"
    if not listed.is_file():
        return folder
    splits = json.loads(listed.read_text(encoding="utf-8"))["splits"]
    if split not in splits:
        raise UserError(
            f"the corpus folder '{folder}' has no split '{split}': name one of {', '.join(splits)}"
            " with --config.text.hub_split"
        )
    return folder / split


def _is_data(path: Path, folder: Path) -> bool:
    """Whether a file that a folder or pattern gives is meant: not hidden, no description, no cache
    of the library datasets."""
    if (
        any(part.startswith(".") for part in path.relative_to(folder).parts)
        or path.name in _DESCRIPTIONS
    ):
        return False
    state = path.parent / "state.json"
    if path.suffix == ".arrow" and state.is_file():
        return path.name in _listed(state)
    return not (path.suffix == ".arrow" and path.name.startswith(("cache-", "tmp")))


def _listed(state: Path) -> list[str]:
    """The data files that `Dataset.save_to_disk` says it wrote; what `map` and `filter` leave
    beside them is not among these."""
    try:
        names = [
            file["filename"]
            for file in json.loads(state.read_text(encoding="utf-8"))["_data_files"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"'{state}' does not list the data files of a saved dataset ({brief(error)}): save it"
            " again, or name its .arrow files"
        ) from error
    if missing := [name for name in names if not (state.parent / name).is_file()]:
        raise UserError(
            f"the corpus folder '{state.parent}' lacks '{missing[0]}', which its state.json lists:"
            " copy it again"
        )
    return names


def _what_there_is(path: Path) -> str:
    """What a mistyped path might have meant."""
    nearest = next(
        parent for parent in path.absolute().parents if exists(parent) and parent.is_dir()
    )
    names = sorted(p.name for p in itertools.islice(nearest.iterdir(), 1000))
    return (
        f"{nearest} holds {', '.join(names[:10]) or 'nothing'}{', ...' if len(names) > 10 else ''}"
    )


# --- files --------------------------------------------------------------------------------------


def _file(path: Path, config: TextConfig) -> Source:
    reader = _kind(path)
    if reader is None:
        raise UserError(f"the corpus file '{path}' has an unknown ending: it must be {SUPPORTED}")

    def records(position: Position) -> Iterator[Record]:
        yield from _guarded(str(path), reader(path, config, position))
        position.bytes = path.stat().st_size

    return Source(str(path), path.stat().st_size, records)


_Reader = Callable[[Path, TextConfig, Position], Iterator[Record]]


def _kind(path: Path) -> _Reader | None:
    """The reader for a file name, or None."""
    suffixes = [s.lower() for s in path.suffixes] or [""]
    if len(suffixes) > 1 and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    readers = dict.fromkeys((".json", ".jsonl", ".ndjson"), _json_records) | {".txt": _text_records}
    return (readers | {".parquet": _parquet_records, ".arrow": _arrow_records}).get(suffixes[-1])


def _guarded(name: str, records: Iterator[Record]) -> Iterator[Record]:
    """`records`, with whatever goes wrong in a decoder told as trouble of the file `name`."""
    try:
        yield from records
    except (UserError, GeneratorExit):
        raise
    except EOFError as error:
        raise UserError(
            f"the corpus file '{name}' is cut off: its compressed data ends before its end; copy or"
            " download it again"
        ) from error
    except Exception as error:
        raise UserError(
            f"the corpus file '{name}' cannot be read: {type(error).__name__}: {brief(error)}. It"
            f" must be UTF-8 text, whole, and of the kind its ending says ({SUPPORTED})"
        ) from error


class _Zstandard(io.RawIOBase):
    """Decompresses Zstandard frames, one behind the other. Unlike the library's own reader it
    notices a frame that is cut off."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._frame: Any = None
        self._compressed, self._content = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            compressed = self._compressed or self._file.read(1 << 17)
            if not compressed and self._frame is not None:
                raise EOFError
            if not compressed:
                return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            self._content, self._compressed = memoryview(self._frame.decompress(compressed)), b""
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count


_DECOMPRESSED: dict[str, Callable[[Any], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".xz": lzma.LZMAFile,
    ".bz2": bz2.BZ2File,
    ".zst": _Zstandard,
}


def _lines(path: Path, position: Position, longest: int = -1) -> Iterator[bytes]:
    """The lines of a text file, plain or compressed, with their ends (LF or CR LF; a lone CR ends
    no line).

    Args:
      longest: bytes at which a line is cut; -1: no line is.
    """
    with path.open("rb") as file:
        decompressed = _DECOMPRESSED.get(path.suffix.lower())
        if decompressed and not path.stat().st_size:
            raise EOFError  # some decompressors take nothing at all for an empty text
        content = io.BufferedReader(decompressed(file), _BLOCK) if decompressed else cast(Any, file)
        for number in itertools.count():
            line = content.readline(longest)
            if not number:
                if encoding := _MARKS.get(line[:2]):
                    raise UserError(
                        f"the corpus file '{path}' is in {encoding}: convert it to UTF-8"
                    )
                line = line.removeprefix(b"\xef\xbb\xbf") or (
                    content.readline(longest) if line else line
                )
            if not line:
                return
            if not number % 64:
                position.bytes = file.tell()
            yield line


def _json_records(path: Path, config: TextConfig, position: Position) -> Iterator[Record]:
    """JSON Lines, or one array of objects (which is held in memory).

    Records are parsed one by one, not as a table: fields that are not asked for may change their
    type at will.
    """
    lines = ((n, line) for n, line in enumerate(_lines(path, position), start=1) if line.strip())
    first = [*itertools.islice(lines, 2)]
    # One array, unless it is whole on its line and other lines follow: then that line is no record.
    is_array = first and first[0][1].lstrip().startswith(b"[")
    if is_array and (len(first) == 1 or _parsed("", first[0][1]).problem):
        values = json.loads(b"".join(line for _, line in itertools.chain(first, lines)))
        yield from (Record(f"record {i}", value) for i, value in enumerate(values, start=1))
        return
    for number, line in itertools.chain(first, lines):
        yield _parsed(f"line {number}", line)


def _parsed(place: str, line: bytes) -> Record:
    try:
        return Record(place, json.loads(line.decode("utf-8").lstrip("\ufeff")))
    except UnicodeDecodeError as error:
        return Record(
            place, None, f"is not UTF-8 ({error.reason} at byte {error.start} of the line)"
        )
    except (ValueError, RecursionError) as error:
        shown = brief(line.decode("utf-8", errors="replace"))
        hint = "the file must hold one object a line, or one array of objects"
        return Record(place, None, f"is not JSON ({brief(error)}): {shown}; {hint}")


def _text_records(path: Path, config: TextConfig, position: Position) -> Iterator[Record]:
    """Plain text: blank lines part the documents. There are no fields, so any name fits."""
    passage: list[bytes] = []
    size, first = 0, 1
    for number, line in enumerate(
        itertools.chain(_lines(path, position, LINE_BYTES), [b""]), start=1
    ):
        is_blank = not line.decode("utf-8", errors="replace").strip()
        if not is_blank:
            first = first if passage else number
            passage.append(line)
            size += len(line)
        if passage and (is_blank or size >= PASSAGE_BYTES):
            content = b"".join(passage)
            # A line that was cut may end within a character.
            end = len(content) if is_blank or content.endswith(b"\n") else _last_boundary(content)
            yield _passage(f"line {first}", content[:end], config)
            passage = [content[end:]] if end < len(content) else []
            size = len(content) - end


def _last_boundary(content: bytes) -> int:
    """Where the last character that is whole ends."""
    for back in range(1, min(4, len(content)) + 1):
        byte = content[-back]
        if byte & 0xC0 != 0x80:
            length = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(content) - back if length > back else len(content)
    return len(content)


def _passage(place: str, content: bytes, config: TextConfig) -> Record:
    language = {config.language_field: None} if config.language_field else {}
    try:
        return Record(place, {config.text_field: content.decode("utf-8"), **language})
    except UnicodeDecodeError as error:
        return Record(
            place,
            None,
            f"begins a passage that is not UTF-8 ({error.reason} at its byte {error.start})",
        )


def _parquet_records(path: Path, config: TextConfig, position: Position) -> Iterator[Record]:
    with pq.ParquetFile(path) as file:
        columns = _columns(path, file.schema_arrow, config)
        size, rows, read = path.stat().st_size, file.metadata.num_rows, 0
        for batch in file.iter_batches(batch_size=256, columns=columns):
            yield from _rows(batch, read)
            read += len(batch)
            position.bytes = size * read // rows


def _arrow_records(path: Path, config: TextConfig, position: Position) -> Iterator[Record]:
    """Arrow's stream format, which `save_to_disk` of the library datasets writes, or its file
    format."""
    with pa.memory_map(str(path)) as file:
        is_stream = file.read_at(6, 0) != b"ARROW1"
        reader = pa.ipc.open_stream(file) if is_stream else pa.ipc.open_file(file)
        columns, read = _columns(path, reader.schema, config), 0
        batches = (
            reader if is_stream else (reader.get_batch(i) for i in range(reader.num_record_batches))
        )
        for batch in batches:
            for start in range(0, len(batch), 256):
                yield from _rows(batch.select(columns).slice(start, 256), read + start)
            read += len(batch)
            position.bytes = file.tell()


def _rows(batch: pa.RecordBatch, before: int) -> Iterator[Record]:
    for number, row in enumerate(batch.to_pylist(), start=before + 1):
        yield Record(f"record {number}", row)


def _columns(path: Path, schema: pa.Schema, config: TextConfig) -> list[str]:
    """The columns to read.

    Raises:
      UserError: one is missing, or holds no text.
    """
    wanted = {"text_field": config.text_field, "language_field": config.language_field}
    messages = config.messages_field if config.messages_field in schema.names else ""
    if messages and config.text_field not in schema.names:
        del wanted["text_field"]
    for key, field in wanted.items():
        if field and field not in schema.names:
            raise UserError(f"the corpus file '{path}' {no_field(field, key, schema.names)}")
    kind = schema.field(config.text_field).type if "text_field" in wanted else pa.string()
    if not _is_text(kind):
        raise UserError(
            f"the corpus file '{path}' has type {kind} in its column '{config.text_field}', which"
            " is no text: name another one with --config.text.text_field=... (there are"
            f" {sorted(schema.names)}), or cast it to string"
        )
    return [field for field in (*wanted.values(), messages) if field]


def no_field(field: str, key: str, there: Iterable[str]) -> str:
    """What is wrong with something that lacks a field."""
    return (
        f"has no field '{field}'; it has {sorted(there)}: name the right one with"
        f" --config.text.{key}=..."
    )


def _is_text(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.BaseExtensionType):
        return _is_text(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return _is_text(cast(Any, kind).value_type)
    # Newer kinds by their names: older releases of pyarrow lack functions for them.
    is_one = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_binary,
        pa.types.is_large_binary,
    )
    is_one += (pa.types.is_fixed_size_binary, pa.types.is_null)
    return any(check(kind) for check in is_one) or str(kind) in ("string_view", "binary_view")


# --- hub datasets -------------------------------------------------------------------------------


def _hub_records(name: str, config: TextConfig) -> Iterator[Record]:
    import datasets  # (local files need neither its cache folder nor the second that this takes)

    repository, _, revision = name.partition("@")
    try:
        found = datasets.load_dataset(
            repository,
            config.hub_config or None,
            split=config.hub_split,
            revision=revision or None,
            streaming=True,
        )
        for number, value in enumerate(found, start=1):
            yield Record(f"record {number}", value)
    except GeneratorExit:
        raise
    except Exception as error:
        raise UserError(
            f"the corpus '{name}' is no local file, and could not be had as a hub data set (config"
            f" '{config.hub_config}', split '{config.hub_split}'): {type(error).__name__}:"
            f" {brief(error)}. Without a network, point --config.corpus to local files"
            f" ({SUPPORTED}) or run with --config.corpus={EMBEDDED}"
        ) from error


def brief(thing: object) -> str:
    """A thing in one line of at most 160 characters."""
    text = str(thing) if isinstance(thing, Exception) else repr(thing)
    text = " ".join(text.split())
    return text if len(text) <= 160 else f"{text[:157]}..."
