"""Streaming readers of corpus files and hub datasets: the files of a name, and their records.

Files are read unchanged; only a byte-order mark at the beginning is dropped. A problem of a single
record (a malformed line, invalid UTF-8) is reported with that record, and reading continues; a
problem of the file itself is a `UserError`.
"""

import bz2
import glob
import io
import itertools
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn, cast

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from tokalign_jax.config import EMBEDDED, TextConfig
from tokalign_jax.errors import UserError

PASSAGE_BYTES = 1 << 20
"""Size at which a plain-text document without blank lines ends, at the next line end."""
LINE_BYTES = 16 << 20
"""Length at which a line of plain text is cut, so that a file without line ends is not held in
memory.
"""

SUPPORTED = (
    ".json, .jsonl, .ndjson or .txt (or compressed: .gz, .xz, .zst, .bz2), .parquet or .arrow"
)
_BLOCK = 1 << 20
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files of the datasets library that describe the data beside them."""
_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
"""Byte-order marks of unsupported encodings."""


class Record(NamedTuple):
    """One record of a source."""

    place: str
    """Its place in the source: `line 7`, `record 7`."""
    value: Any
    """An object with fields, if there is no problem."""
    problem: str = ""
    """Why it could not be read; "" if it could."""


class Position:
    """Progress of reading a source."""

    def __init__(self):
        self.bytes = 0
        """Bytes of the file read, as stored on disk."""


class Source(NamedTuple):
    """A file or hub dataset."""

    name: str
    size: int | None
    """Bytes on disk; None for a hub dataset."""
    records: Callable[[Position], Iterator[Record]]
    """Streams the records from the first one on."""


# --- Names --------------------------------------------------------------------------------------


def split(names: str) -> list[str]:
    """Split names separated by commas, unless there is a file or folder of that whole name."""
    return (
        [names]
        if exists(Path(names))
        else [part.strip() for part in names.split(",") if part.strip()]
    )


def exists(path: Path) -> bool:
    """Return whether there is such a file or folder; a name too long for a path is none."""
    try:
        return path.exists()
    except OSError:
        return False


def sources(name: str, config: TextConfig) -> list[Source]:
    """Return the sources of a name: a path, glob, folder or hub dataset.

    Files of a glob or folder are sorted by name.

    Raises:
      UserError: nothing has that name, or nothing of it is readable.
    """
    path = Path(name).expanduser()
    if not exists(path):
        is_pattern = re.search(r"[*?\[]", name)
        return _pattern(name, path, config) if is_pattern else [_hub(name, path, config)]
    if path.is_dir():
        path = _split_folder(path, config.hub_split)
        files = [p for p in _data_in(path) if _kind(p)]
        if not files:
            raise UserError(f"the corpus folder '{name}' holds no file ending in {SUPPORTED}")
        return [_file(p, config) for p in files]
    return [_file(path, config)]


def _pattern(name: str, path: Path, config: TextConfig) -> list[Source]:
    files = sorted(Path(p) for p in glob.glob(str(path), recursive=True))
    files = [p for p in files if not p.is_dir() and _is_data(p, p.parent)]
    if not files:
        raise UserError(f"no file matches the corpus pattern '{name}' (looked from {Path.cwd()})")
    return [_file(p, config) for p in files]


def _data_in(folder: Path) -> list[Path]:
    """List the files below a folder, of any kind, except those that are not data.

    Linked folders are read too, each folder once.
    """

    def refuse(error: OSError) -> NoReturn:
        raise UserError(
            f"the corpus folder '{error.filename}' cannot be read ({error.strerror}): change its"
            " permissions, or name the files to read"
        ) from error

    files, seen = [], {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = {name: os.path.realpath(os.path.join(parent, name)) for name in sorted(folders)}
        folders[:] = [name for name in real if real[name] not in seen]
        seen.update(real.values())
        files += [Path(parent, name) for name in names]
    return sorted(path for path in files if _is_data(path, folder))


def unread(name: str, config: TextConfig) -> list[Path]:
    """List the files of a folder that are left out because of their endings."""
    path = Path(name).expanduser()
    if not (exists(path) and path.is_dir()):
        return []
    return [file for file in _data_in(_split_folder(path, config.hub_split)) if not _kind(file)]


def _hub(name: str, path: Path, config: TextConfig) -> Source:
    looks_local = (
        _kind(path)
        or name.startswith((".", "/", "~"))
        or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@\S+)?", name)
    )
    if looks_local:
        raise UserError(
            f"the corpus file '{brief(name)[1:-1]}' does not exist (looked from {Path.cwd()}):"
            f" {_nearest_files(path)}"
        )
    return Source(name, None, lambda position: _hub_records(name, config))


def _split_folder(folder: Path, split: str) -> Path:
    """Return a split's folder: a subfolder if `DatasetDict.save_to_disk` wrote it."""
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
    """Return whether a file of a folder or pattern is data.

    Hidden files, descriptions, and caches of the datasets library are not.
    """
    if (
        any(part.startswith(".") for part in path.relative_to(folder).parts)
        or path.name in _DESCRIPTIONS
    ):
        return False
    state = path.parent / "state.json"
    if path.suffix == ".arrow" and state.is_file():
        return path.name in _data_files(state)
    return not (path.suffix == ".arrow" and path.name.startswith(("cache-", "tmp")))


def _data_files(state: Path) -> list[str]:
    """Return the data files of `Dataset.save_to_disk`, without caches of `map` and `filter`."""
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


def _nearest_files(path: Path) -> str:
    """Describe the contents of the nearest existing folder, for a mistyped path."""
    nearest = next(
        parent for parent in path.absolute().parents if exists(parent) and parent.is_dir()
    )
    names = sorted(p.name for p in itertools.islice(nearest.iterdir(), 1000))
    return (
        f"{nearest} holds {', '.join(names[:10]) or 'nothing'}{', ...' if len(names) > 10 else ''}"
    )


# --- Files --------------------------------------------------------------------------------------


def _file(path: Path, config: TextConfig) -> Source:
    if not path.exists():
        raise UserError(
            f"the corpus file '{path}' is a link to a file that does not exist: copy it again, or"
            " remove the link"
        )
    reader = _kind(path)
    if reader is None:
        raise UserError(f"the corpus file '{path}' has an unknown ending: it must be {SUPPORTED}")

    def records(position: Position) -> Iterator[Record]:
        yield from _guarded(str(path), reader(path, config, position))
        position.bytes = path.stat().st_size

    return Source(str(path), path.stat().st_size, records)


_Reader = Callable[[Path, TextConfig, Position], Iterator[Record]]


def _kind(path: Path) -> _Reader | None:
    """Return the reader for a file name, or None."""
    suffixes = [s.lower() for s in path.suffixes] or [""]
    if len(suffixes) > 1 and suffixes[-1] in _MEMBERS:
        suffixes.pop()
    readers = dict.fromkeys((".json", ".jsonl", ".ndjson"), _json_records) | {".txt": _text_records}
    return (readers | {".parquet": _parquet_records, ".arrow": _arrow_records}).get(suffixes[-1])


def is_plain_text(path: Path) -> bool:
    """Return whether a file of this name is read as plain text."""
    return _kind(path) is _text_records


def _guarded(name: str, records: Iterator[Record]) -> Iterator[Record]:
    """Yield `records`; errors of a decoder become a UserError that names the file."""
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


class _Decompressed(io.RawIOBase):
    """Decompresses the consecutive members (streams, frames) of a file.

    Unlike the readers of the compression libraries, which skip what they do not recognise after a
    member, it raises an error if a member is truncated or damaged, whichever it is.
    """

    def __init__(self, file: BinaryIO, new_member: Callable[[], Any]):
        self._file, self._new_member = file, new_member
        self._member = new_member()  # also of an empty file, which is thereby truncated
        self._compressed, self._content = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            compressed = self._compressed or self._file.read(1 << 17)
            if not compressed and self._member is not None:
                raise EOFError
            if not compressed:
                return 0
            if self._member is None:
                self._compressed = compressed.lstrip(b"\0")  # padding
                self._member = self._new_member() if self._compressed else None
                continue
            self._content, self._compressed = memoryview(self._member.decompress(compressed)), b""
            if self._member.eof:
                self._compressed, self._member = self._member.unused_data, None
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count


_MEMBERS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=16 + zlib.MAX_WBITS),
    ".xz": lzma.LZMADecompressor,
    ".bz2": bz2.BZ2Decompressor,
    ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(),
}
"""Decompressor of a member by the suffix of its file."""


def _lines(path: Path, position: Position, longest: int = -1) -> Iterator[bytes]:
    """Yield the lines of a text file, plain or compressed, with their ends.

    Lines end with LF or CR LF; a lone CR ends no line.

    Args:
      path: the file.
      position: updated while reading.
      longest: bytes at which a line is cut; -1 for no limit.
    """
    with path.open("rb") as file:
        new_member = _MEMBERS.get(path.suffix.lower())
        content: Any = file
        if new_member:
            content = io.BufferedReader(_Decompressed(file, new_member), _BLOCK)
        for number in itertools.count():
            line = content.readline(longest)
            if not number:
                encoding = _MARKS.get(line[:2])
                # Without a mark, every other byte of text in Latin letters is a NUL.
                if not encoding and 3 * line.count(b"\0") > len(line.strip(b"\0\r\n")) > 0:
                    encoding = "UTF-16 or UTF-32, or is not text"
                if encoding:
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
    """Yield records of JSON Lines, or of one array of objects (which is held in memory).

    Records are parsed one by one, not as a table: fields that are not used may change their type.
    """
    lines = ((n, line) for n, line in enumerate(_lines(path, position), start=1) if line.strip())
    first = [*itertools.islice(lines, 2)]
    # An array, unless it is complete on its line and other lines follow: then it is a bad record.
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
    """Yield documents of plain text, separated by blank lines.

    They take the names of the configured fields.
    """
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
    """Return the end of the last complete character."""
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
    """Yield records of Arrow's stream format (as of `save_to_disk`) or file format.

    Raises:
      UserError: a stream lacks the mark of its end. One that was cut off between two batches would
        otherwise look complete.
    """
    with pa.memory_map(str(path)) as file:
        is_stream = file.read_at(6, 0) != b"ARROW1"
        reader = pa.ipc.open_stream(file) if is_stream else pa.ipc.open_file(file)
        columns, read, end = _columns(path, reader.schema, config), 0, file.tell()
        batches = (
            reader if is_stream else (reader.get_batch(i) for i in range(reader.num_record_batches))
        )
        for batch in batches:
            end = file.tell()
            for start in range(0, len(batch), 256):
                yield from _rows(batch.select(columns).slice(start, 256), read + start)
            read += len(batch)
            position.bytes = end
        if is_stream and file.tell() == end:
            raise UserError(
                f"the corpus file '{path}' is cut off: its Arrow stream has no end-of-stream mark;"
                " copy or save it again"
            )


def _rows(batch: pa.RecordBatch, before: int) -> Iterator[Record]:
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:
        # Arrow does not check the bytes of its strings. Only the affected rows are lost.
        for i in range(len(batch)):
            yield _row(batch.slice(i, 1), f"record {before + i + 1}")
        return
    for number, row in enumerate(rows, start=before + 1):
        yield Record(f"record {number}", row)


def _row(batch: pa.RecordBatch, place: str) -> Record:
    """Return the record of a batch of one row."""
    values = {}
    for name, column in zip(batch.schema.names, batch.columns):
        try:
            values[name] = column[0].as_py()
        except UnicodeDecodeError as error:
            return Record(place, None, f"is not UTF-8 in its field '{name}' ({error.reason})")
    return Record(place, values)


def _columns(path: Path, schema: pa.Schema, config: TextConfig) -> list[str]:
    """Return the columns to read.

    Raises:
      UserError: a column is missing, or is not text.
    """
    needed = {"text_field": config.text_field, "language_field": config.language_field}
    messages = config.messages_field if config.messages_field in schema.names else ""
    if messages and config.text_field not in schema.names:
        del needed["text_field"]
    for key, field in needed.items():
        if field and field not in schema.names:
            raise UserError(f"the corpus file '{path}' {no_field(field, key, schema.names)}")
    kind = schema.field(config.text_field).type if "text_field" in needed else pa.string()
    if not _is_text(kind):
        raise UserError(
            f"the corpus file '{path}' has type {kind} in its column '{config.text_field}', which"
            " is no text: name another one with --config.text.text_field=... (there are"
            f" {sorted(schema.names)}), or cast it to string"
        )
    return [field for field in (*needed.values(), messages) if field]


def no_field(field: str, key: str, fields: Iterable[str]) -> str:
    """Describe the lack of a field."""
    return (
        f"has no field '{field}'; it has {sorted(fields)}: name the right one with"
        f" --config.text.{key}=..."
    )


def _is_text(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.BaseExtensionType):
        return _is_text(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return _is_text(cast(Any, kind).value_type)
    # The newer types are compared by name: older releases of pyarrow lack functions for them.
    checks = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_fixed_size_binary,
        pa.types.is_null,
    )
    return any(check(kind) for check in checks) or str(kind) in ("string_view", "binary_view")


# --- Hub datasets -------------------------------------------------------------------------------


def _hub_records(name: str, config: TextConfig) -> Iterator[Record]:
    import datasets  # Imported here, since local files need neither its cache nor its import time.

    repository, _, revision = name.partition("@")
    try:
        dataset = datasets.load_dataset(
            repository,
            config.hub_config or None,
            split=config.hub_split,
            revision=revision or None,
            streaming=True,
        )
        for number, value in enumerate(dataset, start=1):
            yield Record(f"record {number}", value)
    except GeneratorExit:
        raise
    except Exception as error:
        raise UserError(
            f"the corpus '{name}' is no local file, and could not be loaded as a hub dataset"
            f" (config '{config.hub_config}', split '{config.hub_split}'): {type(error).__name__}:"
            f" {brief(error)}. Without a network, point --config.corpus to local files"
            f" ({SUPPORTED}) or run with --config.corpus={EMBEDDED}"
        ) from error


def brief(value: object) -> str:
    """Describe a value in one line of at most 160 characters."""
    text = str(value) if isinstance(value, Exception) else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= 160 else f"{text[:157]}..."
