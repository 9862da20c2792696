"""A shard's index: which windows the shard holds, where each record lies and its checksum, in a file beside the shard.

A training opens a shard by its index and then reads its own records and nothing else. A shard has the same tables
inside, so an index can always be made again: where it is missing, damaged, or says another size or header than the
shard has. It knows one fact more than the shard: records that were found damaged are left out of it, so that their
windows are labelled again.

The file is one line of JSON and then a table with a row per window. Shapes: W = windows of a shard.
"""

import hashlib
import json
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cascade.models.checkpoint.tensor_file import Entry, entries_of
from cascade.runtime.errors import UserError

logger = logging.getLogger(__name__)

KEY_BYTES = 16
"""Bytes of a window's key, and of a record's checksum."""
SHARD_SUFFIX, INDEX_SUFFIX = ".safetensors", ".index"

_FORMAT = 1
_MAX_HEADER = 1 << 16
_ROW = np.dtype([("key", "u1", KEY_BYTES), ("start", "<i8"), ("size", "<i8"), ("checksum", "u1", KEY_BYTES)])


@dataclass(frozen=True, kw_only=True)
class Index:
    """Where the records of a shard lie."""

    shard: str
    """The shard's file name."""
    shard_bytes: int
    """Size of the shard's file."""
    header: str
    """sha256 of the shard's safetensors header."""
    root: str
    """64 hexadecimal digits: the root that the shard belongs to."""
    keys: NDArray[np.uint8]
    """[W, 16]: the windows' keys."""
    starts: NDArray[np.int64]
    """[W]: where each record starts in the shard's file, in bytes."""
    sizes: NDArray[np.int64]
    """[W]: how long each record is, in bytes."""
    checksums: NDArray[np.uint8]
    """[W, 16]: each record's checksum."""

    def without(self, numbers: set[int]) -> "Index":
        """The index without the records of these numbers."""
        rows = np.array([number for number in range(len(self.keys)) if number not in numbers], dtype=np.int64)
        tables = {name: getattr(self, name)[rows] for name in ("keys", "starts", "sizes", "checksums")}
        return replace(self, **tables)


def index_path(shard: Path) -> Path:
    """Where the index of a shard lies."""
    return shard.with_name(shard.name.removesuffix(SHARD_SUFFIX) + INDEX_SUFFIX)


def shard_path(index: Path) -> Path:
    """The shard that an index belongs to."""
    return index.with_name(index.name.removesuffix(INDEX_SUFFIX) + SHARD_SUFFIX)


def index_bytes(index: Index) -> bytes:
    """The index as a file's content."""
    table = np.zeros(len(index.keys), dtype=_ROW)
    table["key"], table["start"] = index.keys, index.starts
    table["size"], table["checksum"] = index.sizes, index.checksums
    return _first_line(index, table.tobytes()) + table.tobytes()


def read_index(shard: Path) -> Index | None:
    """The index that lies beside a shard; None where there is none that is whole and of this very shard.

    Of the shard itself the header alone is read.

    Raises:
        UserError: the shard's header is damaged.
        OSError: the shard cannot be read.
    """
    try:
        first_line, _, rows = index_path(shard).read_bytes().partition(b"\n")
        record = json.loads(first_line)
        table = np.frombuffer(rows, dtype=_ROW)
        index = Index(
            shard=shard.name,
            shard_bytes=record["shard_bytes"],
            header=record["header"],
            root=record["root"],
            keys=table["key"],
            starts=table["start"],
            sizes=table["size"],
            checksums=table["checksum"],
        )
        whole = _first_line(index, rows) == first_line + b"\n"
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s: is not used, and made again: %s", index_path(shard), error)
        return None
    if not whole or (index.shard_bytes, index.header) != (shard.stat().st_size, _sha256(_header_text(shard))):
        logger.warning("%s: is damaged or of another shard; it is not used, and made again", index_path(shard))
        return None
    return index


def index_of(shard: Path) -> Index:
    """The index of a shard, from the shard's own tables.

    Raises:
        UserError: the shard is damaged.
        OSError: the shard cannot be read.
    """
    header = _header_text(shard)
    try:
        entries = dict(entries_of(shard))
        table = json.loads(header)
        root = str(table["__metadata__"]["root"])
        keys = _array(entries["windows"]).reshape(-1, KEY_BYTES)
        ends = _array(entries["ends"]).view("<i8")
        checksums = _array(entries["sums"]).reshape(-1, KEY_BYTES)
        data = entries["data"]
        data_start = 8 + len(header) + int(table["data"]["data_offsets"][0])
        sizes = np.diff(ends, prepend=0)
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{shard}: is no shard of targets: {error}") from error
    if not len(keys) == len(ends) == len(checksums) or (sizes < 0).any():
        raise UserError(f"{shard}: its tables do not fit each other")
    if len(ends) and ends[-1] != data.size:
        raise UserError(f"{shard}: {data.size} bytes of records where {ends[-1]} were due")
    return Index(
        shard=shard.name,
        shard_bytes=shard.stat().st_size,
        header=_sha256(header),
        root=root,
        keys=keys,
        starts=data_start + ends - sizes,
        sizes=sizes,
        checksums=checksums,
    )


def _first_line(index: Index, rows: bytes) -> bytes:
    record = {
        "format": _FORMAT,
        "shard": index.shard,
        "shard_bytes": index.shard_bytes,
        "header": index.header,
        "root": index.root,
        "rows": _sha256(rows),
    }
    return json.dumps(record).encode() + b"\n"


def read_at(path: Path, start: int, size: int) -> bytes:
    """Bytes of a file from a position on, read without read-ahead; fewer where the file ends.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):  # or the system would read on behind them
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        return os.pread(file.fileno(), size, start)


def _header_text(shard: Path) -> bytes:
    length = int.from_bytes(read_at(shard, 0, 8), "little")
    if length > min(_MAX_HEADER, shard.stat().st_size - 8):
        raise UserError(f"{shard}: its header claims {length:,} bytes; it is damaged")
    return read_at(shard, 8, length)


def _array(entry: Entry) -> NDArray[np.uint8]:
    return np.frombuffer(entry.read().flatten().view(torch.uint8).numpy().tobytes(), dtype=np.uint8)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
