"""Rows of local files, one after another: JSON lines, JSON lists, Parquet, and texts, which are a row each.

Only the wanted fields are read, so that what stands in the others, and changes from row to row, does not matter. Every
row says where it stands, for messages and for going on from there.
"""

import bz2
import gzip
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from cascade.runtime.errors import UserError
from cascade.runtime.paths import ROWS, TABLE, kind_of, require_kind

_BOM = b"\xef\xbb\xbf"

_OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
"""First bytes of a compressed file -> how it is compressed."""

_SNIFFED = 1024
"""First bytes of a file by which UTF-16 without a byte-order mark is recognised."""

_UNKNOWN_FIELD_ROWS = 1000
"""First rows without a field that are enough to say that a file lacks it."""


class Place(NamedTuple):
    """File and number of a row."""

    file: str
    """A path, or a dataset of the hub and its split."""
    number: int
    """Number of the row, from 1"""
    unit: str
    """'line', 'row', or '' where the whole file is one row."""

    def __str__(self) -> str:
        if self.unit == "line":
            return f"{self.file}:{self.number}"
        return f"{self.file}: row {self.number}" if self.unit else self.file


class Row(NamedTuple):
    """A row with its place and its fields."""

    place: Place
    values: dict[str, Any]
    """The requested fields by name; those that the row lacks are absent."""
    offset: int = 0
    """Bytes of the file, unpacked, up to the row's end; 0 where reading cannot go on from there but by number."""


def read_rows(path: str, fields: Sequence[str], *, key: str = "data", after: tuple[int, int] = (0, 0)) -> Iterator[Row]:
    """The rows of one file; those behind row `after` = (its number, its offset), where given.

    A byte-order mark is no text, and a text file's lines end in a line feed alone, whatever the file has.

    Raises:
        UserError: the file is missing, of an unknown kind or damaged, or no row has a field of `fields`; `key` is the
            recipe's key that names the file.
    """
    kind = kind_of(path)
    if not Path(path).is_file():
        raise UserError(f"{key}: {path}: no such file")
    require_kind(path, key)
    reader = _table if kind == TABLE else _json if kind == ROWS else _text
    try:
        yield from reader(path, fields, after)
    except _Malformed as error:
        raise UserError(f"{key}: {error}") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: {path}: cannot be read: {error}") from error


def require_fields(rows: Iterable[Row], fields: dict[str, str], *, key: str = "data") -> Iterator[Row]:
    """The rows, if some of the first thousand have each of the fields: {field: what to do without it}.

    Raises:
        UserError: a field is in none of these rows; those that the file has are named.
    """
    missing, number, row = dict(fields), 0, None
    for row in rows:
        number += 1
        if missing:
            missing = {name: remedy for name, remedy in missing.items() if name not in row.values}
            if missing and number == _UNKNOWN_FIELD_ROWS:
                raise UserError(_lacks(row.place.file, missing, key))
        yield row
    if missing and row is not None:
        raise UserError(_lacks(row.place.file, missing, key))


def without_padding(values: dict[str, Any]) -> dict[str, Any]:
    """A row of a table, without the keys that its structs have only because other rows have them.

    A table gives every struct of a column all keys, with null where a row has none. The row's own fields stay, and so
    do `role` and `content` of a message, of which null is told.
    """
    return {name: _without_nulls(value, ("role", "content")) for name, value in values.items()}


def _without_nulls(value: Any, stay: tuple[str, ...] = ()) -> Any:
    if isinstance(value, list):
        return [_without_nulls(part, stay) for part in value]
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None or name in stay}
    return value


def field_names(path: str) -> list[str]:
    """The fields of a file's first row."""
    if kind_of(path) == TABLE:
        return list(_parquet(path).schema_arrow.names)
    if kind_of(path) == ROWS:
        return next((list(record) for _, record, _ in _records(path, (0, 0)) if isinstance(record, dict)), [])
    return ["text"]


def _lacks(file: str, missing: dict[str, str], key: str) -> str:
    field, remedy = next(iter(missing.items()))
    names = field_names(file) if Path(file).is_file() else []
    has = f"; it has: {', '.join(names)}" if names else ""
    return f"{key}: {file}: no field '{field}'{has}. {remedy}."


class _Malformed(Exception):
    """What is wrong in a file, with its place."""


def _open(path: str) -> BinaryIO:
    if path.endswith(".gz"):
        return cast(BinaryIO, gzip.open(path, "rb"))
    with open(path, "rb") as file:
        first = file.read(8)
    opener: Any = next((opener for magic, opener in _OPENERS.items() if first.startswith(magic)), None)
    return cast(BinaryIO, open(path, "rb") if opener is None else opener(path, "rb"))


def _decoded(content: bytes, place: str) -> str:
    start = content[:_SNIFFED]
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _Malformed(f"{place}: cannot be read: it is UTF-16; save it as UTF-8")
    if start and start.count(0) * 3 >= len(start):
        raise _Malformed(
            f"{place}: cannot be read: a third of it and more is NUL bytes, as in UTF-16 or a damaged file; save it as "
            "UTF-8"
        )
    try:
        return content.removeprefix(_BOM).decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _Malformed(f"{place}{f':{line}' if line > 1 else ''}: cannot be read as UTF-8: {error}") from error


def _text(path: str, fields: Sequence[str], after: tuple[int, int]) -> Iterator[Row]:
    if after[0]:
        return
    with _open(path) as file:
        text = _decoded(file.read(), path)
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    yield Row(Place(path, 1, ""), {"text": text} if "text" in fields else {})


def _parquet(path: str) -> Any:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with open(path, "rb") as file:
            packed = not file.read(4).startswith(b"PAR1")
        return ParquetFile(BytesIO(_open(path).read()) if packed else path)
    except ArrowException as error:
        raise _Malformed(f"{path}: cannot be read: {error}") from error


def _table(path: str, fields: Sequence[str], after: tuple[int, int]) -> Iterator[Row]:
    from pyarrow import ArrowException

    file = _parquet(path)
    columns = [name for name in fields if name in file.schema_arrow.names]
    number = 0
    for group in range(file.metadata.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        if number + count <= after[0]:
            number += count
            continue
        try:
            for batch in file.iter_batches(batch_size=256, row_groups=[group], columns=columns):
                for values in batch.to_pylist() if columns else [{}] * batch.num_rows:
                    number += 1
                    if number > after[0]:
                        yield Row(Place(path, number, "row"), without_padding(values))
        except ArrowException as error:
            raise _Malformed(f"{path}: cannot be read behind row {number}: {error}") from error


def _json(path: str, fields: Sequence[str], after: tuple[int, int]) -> Iterator[Row]:
    for place, record, offset in _records(path, after):
        values = {name: record[name] for name in fields if name in record} if isinstance(record, dict) else {}
        yield Row(place, values, offset)


def _records(path: str, after: tuple[int, int]) -> Iterator[tuple[Place, Any, int]]:
    """(place, value, offset of its end) of each value of a JSON file, however they stand in it."""
    with _open(path) as file:
        first = file.readline()
        while first and not first.removeprefix(_BOM).strip():
            first = file.readline()
        start = first.removeprefix(_BOM).lstrip()
        if start.startswith(b"["):
            whole = True
        else:  # objects may be written over several lines each
            whole = ".json" in Path(path).suffixes[-2:] and bool(start) and not _is_whole(start)
        file.seek(0)
        yield from _values(path, file, after[0]) if whole else _lines(path, file, after)


def _is_whole(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _lines(path: str, file: BinaryIO, after: tuple[int, int]) -> Iterator[tuple[Place, Any, int]]:
    number, offset = after
    file.seek(offset)
    for line in file:
        number += 1
        offset += len(line)
        place = Place(path, number, "line")
        text = _decoded(line, str(place))
        if not text.strip():
            continue
        try:
            yield place, json.loads(text), offset
        except (ValueError, RecursionError) as error:
            raise _Malformed(f"{place}: not JSON ({error}); the file cannot be read") from error


def _values(path: str, file: BinaryIO, after: int) -> Iterator[tuple[Place, Any, int]]:
    """The elements of a list, or values one after another."""
    text, decoder = _decoded(file.read(), path), json.JSONDecoder()
    position, number = _skipped(text, 0), 0
    listed = text.startswith("[", position)
    if listed:
        position = _skipped(text, position + 1)
    while position < len(text) and not (listed and text.startswith("]", position)):
        try:
            record, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise _Malformed(f"{path}: row {number + 1}: not JSON ({error}); the file cannot be read") from error
        number += 1
        position = _skipped(text, position)
        if listed and text.startswith(",", position):
            position = _skipped(text, position + 1)
        elif listed and not text.startswith("]", position):
            raise _Malformed(f"{path}: not JSON: after row {number} a comma or ] is missing; the file cannot be read")
        if number > after:
            yield Place(path, number, "row"), record, 0
    if listed and position >= len(text):
        raise _Malformed(f"{path}: not JSON: the list does not end; the file cannot be read")
    if listed and _skipped(text, position + 1) < len(text):
        raise _Malformed(f"{path}: not JSON: something follows the list; the file cannot be read")


def _skipped(text: str, position: int) -> int:
    """The place of the next letter that is no white space."""
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position
