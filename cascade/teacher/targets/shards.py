"""A root's folder: records of windows in shards that appear whole or not at all, each record with its own checksum.

A shard is a safetensors file named by the sha256 of its content, of four tensors: `windows` uint8 [W, 16] (their keys),
`ends` int64 [W] (of their records in the data), `sums` uint8 [W, 16] and `data` uint8. A checksum covers the root, the
window and its record, so that a record that was damaged, moved to another window or brought from another root is none.
Beside each shard lies its index (`cascade.teacher.targets.index`).

Shapes: W = windows of a shard.
"""

import hashlib
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from cascade.runtime.errors import DiskError, RunError, UserError, is_disk_error
from cascade.runtime.failpoints import failpoint
from cascade.runtime.files import read_json, sync_folder
from cascade.teacher.targets.index import (
    KEY_BYTES,
    SHARD_SUFFIX,
    Index,
    index_bytes,
    index_of,
    index_path,
    read_at,
    read_index,
)

logger = logging.getLogger(__name__)

ROOT_FILE = "root.json"
MAX_SHARD_BYTES = 1 << 26
SECONDS_BETWEEN_SHARDS = 60.0
"""Seconds of work that a killed labelling loses at most."""


@dataclass(frozen=True)
class _Shard:
    path: Path
    index: Index

    def record(self, number: int) -> NDArray[np.uint8] | None:
        """The bytes of one record; None where the file cannot be read now, which says nothing of the record."""
        start, size = int(self.index.starts[number]), int(self.index.sizes[number])
        try:
            content = np.frombuffer(read_at(self.path, start, size), dtype=np.uint8)
        except OSError as error:
            logger.warning("%s: cannot be read: %s", self.path, error.strerror)
            return None
        return content if len(content) == size else None


@dataclass
class Windows:
    """The records of one root, by their windows' keys."""

    folder: Path
    root: str
    """64 hexadecimal digits."""
    from_shards: bool = False
    """Go by the shards' own tables, whatever their indexes say: for checks of a whole cache."""
    _places: dict[bytes, list[tuple[_Shard, int]]] = field(default_factory=dict)
    """By window, the shards that hold its record, and the record's number there."""
    _seen_files: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Inode and time of each shard that was opened, by name."""
    _shards: dict[Path, _Shard] = field(default_factory=dict)
    """The shards that are open."""
    _damaged: dict[Path, set[int]] = field(default_factory=dict)
    """By shard, the numbers of the records that were found damaged."""
    _unsaved: set[Path] = field(default_factory=set)
    """Shards whose index is missing, or lists records that were found damaged."""
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)
    """Held while the tables change: a training's targets are read by a thread of their own."""
    passed_over: set[Path] = field(default_factory=set)
    """Files that are no shards of this root, or are cut off."""
    num_damaged: int = 0
    """Records that were read and not used."""

    def refresh(self) -> "Windows":
        """Open the shards that were written since the last call."""
        for path in sorted(self.folder.glob(f"*{SHARD_SUFFIX}")):
            try:
                stat = path.stat()
            except FileNotFoundError:  # removed meanwhile
                continue
            if self._seen_files.get(path.name) != (stat.st_ino, stat.st_mtime_ns):  # new, or written again
                self._seen_files[path.name] = stat.st_ino, stat.st_mtime_ns
                self._open(path)
        return self

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def keys(self) -> Iterator[bytes]:
        """The keys of all windows that have a record; whether it is whole is known when it is read."""
        return iter(list(self._places))

    def read(self, key: bytes) -> NDArray[np.uint8] | None:
        """A window's record; None where there is none that is whole: from then on the window is missing."""
        for shard, number in list(self._places.get(key, ())):
            record = shard.record(number)
            if record is not None and self._is_whole(shard, number, key, record):
                return record
            fault = "damaged" if record is not None else "not readable now"
            logger.warning("%s: the record of window %s is %s; it is not used", shard.path, key.hex(), fault)
            with self._lock:
                self.num_damaged += 1
                if record is not None:
                    self._damaged.setdefault(shard.path, set()).add(number)
                    self._unsaved.add(shard.path)
                self._places[key] = [place for place in self._places.get(key, ()) if place[0] is not shard]
        with self._lock:
            if not self._places.get(key):
                self._places.pop(key, None)
        return None

    def _is_whole(self, shard: _Shard, number: int, key: bytes, record: NDArray[np.uint8]) -> bool:
        checksum: bytes = shard.index.checksums[number].tobytes()
        return record_checksum(self.root, key, record) == checksum

    def _is_as_opened(self, path: Path) -> bool:
        """Whether a shard is still the file that was opened; another run may have written it again since."""
        try:
            stat = path.stat()
        except OSError:
            return False
        return self._seen_files.get(path.name) == (stat.st_ino, stat.st_mtime_ns)

    def save_indexes(self) -> None:
        """Write the indexes that are missing, and those of shards with damaged records, which they leave out.

        A folder that cannot be written stays as it is: indexes only spare reading.
        """
        with self._lock:
            unsaved = {path: self._shards[path] for path in self._unsaved if path in self._shards}
            unsaved = {path: shard for path, shard in unsaved.items() if self._is_as_opened(path)}
            indexes = [shard.index.without(self._damaged.get(path, set())) for path, shard in unsaved.items()]
            self._unsaved.clear()
        _save_indexes(self.folder, indexes)

    def targets(self) -> dict[str, Any]:
        """The layout of the root's records."""
        layout: dict[str, Any] = self.record()["targets"]
        return layout

    def record(self) -> dict[str, Any]:
        """The root's record: all that its name stands for (`root_record`)."""
        record: dict[str, Any] = read_json(self.folder / ROOT_FILE)
        return record

    def num_bytes(self) -> int:
        """Bytes of all its shards, without their indexes."""
        return sum(_size(path) for path in self.folder.glob(f"*{SHARD_SUFFIX}"))

    def _open(self, path: Path) -> None:
        """Take up a shard's windows; one that is cut off, of another root or no shard at all is passed over."""
        try:
            saved = None if self.from_shards else read_index(path)
            index = saved or index_of(path)
            if index.root != self.root:
                raise UserError(f"{path}: belongs to another root")
        except (UserError, OSError) as error:
            logger.warning("%s: passed over, its windows count as missing: %s", path, error)
            self.passed_over.add(path)
            return
        shard = _Shard(path, index)
        with self._lock:
            self.passed_over.discard(path)
            self._shards[path] = shard
            self._damaged.pop(path, None)
            (self._unsaved.add if saved is None else self._unsaved.discard)(path)
            keys = index.keys.tobytes()
            for number in range(len(index.keys)):
                key = keys[number * KEY_BYTES : (number + 1) * KEY_BYTES]
                elsewhere = [place for place in self._places.get(key, ()) if place[0].path != path]
                self._places[key] = [*elsewhere, (shard, number)]


class Writer:
    """Collects records and writes them as shards.

    Raises:
        RunError: the disk is full; shards that were written before stay.
    """

    def __init__(self, folder: Path, root: str) -> None:
        self.folder, self.root = folder, root
        self.records: dict[bytes, bytes] = {}
        self.num_bytes, self.last_written = 0, time.monotonic()

    def add(self, key: bytes, record: bytes) -> bool:
        """Add a window's record; whether this wrote a shard."""
        self.records[key] = record
        self.num_bytes += len(record)
        due = self.num_bytes >= MAX_SHARD_BYTES or time.monotonic() - self.last_written >= SECONDS_BETWEEN_SHARDS
        if due:
            self.flush()
        return due

    def flush(self) -> None:
        """Write the records that were added since the last shard as a shard, and its index."""
        if self.records:
            content = _shard_bytes(self.root, self.records)
            name = hashlib.sha256(content).hexdigest()
            path = self.folder / f"{name}{SHARD_SUFFIX}"
            _write(path, content)
            _save_indexes(self.folder, map(index_of, [path]))  # after the shard: an index is never of what is not there
        self.records, self.num_bytes, self.last_written = {}, 0, time.monotonic()


def has_root(cache: Path, record: dict[str, Any]) -> bool:
    """Whether a cache has shards of the root with this record."""
    root = _text_and_name(record)[1]
    return root_name(cache / root[:16]) == root and any((cache / root[:16]).glob(f"*{SHARD_SUFFIX}"))


def _text_and_name(record: dict[str, Any]) -> tuple[str, str]:
    """(text of `ROOT_FILE`, name) of a root with this record."""
    text = json.dumps(record, indent=1, sort_keys=True) + "\n"
    return text, hashlib.sha256(text.encode()).hexdigest()


def root_folder(cache: Path, record: dict[str, Any]) -> tuple[Path, str]:
    """(folder, name) of the root with this record, which is created where there is none."""
    text, root = _text_and_name(record)
    folder = cache / root[:16]
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if root_name(folder) != root:  # new, or damaged
        _write(folder / ROOT_FILE, text.encode())
    return folder, root


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """A context that turns failures to write into a folder into errors that say what to do.

    Raises:
        DiskError: the disk takes no more.
        RunError: the folder cannot be written.
    """
    try:
        yield
    except OSError as error:
        if is_disk_error(error):
            raise DiskError(
                f"{folder}: the disk is full, or fails ({error.strerror}). What was labelled before is kept; make room "
                "(`cascade cache prune`) or give another distill.cache.folder, and run the same command again"
            ) from error
        raise RunError(f"{folder}: cannot be written: {error.strerror}; give another distill.cache.folder") from error


def root_name(folder: Path) -> str:
    """A root's name, 64 hexadecimal digits, from its folder's record; the folder's name where that has none."""
    try:
        return hashlib.sha256((folder / ROOT_FILE).read_bytes()).hexdigest()
    except OSError:
        return folder.name


def damaged_shards(folder: Path) -> list[Path]:
    """Shards whose content does not have the sha256 that is their name."""
    shards = sorted(folder.glob(f"*{SHARD_SUFFIX}"))
    return [path for path in shards if _sha256(path) != path.name.removesuffix(SHARD_SUFFIX)]


def _shard_bytes(root: str, records: dict[bytes, bytes]) -> bytes:
    data = np.frombuffer(b"".join(records.values()), dtype=np.uint8)
    sums = b"".join(
        record_checksum(root, key, np.frombuffer(record, dtype=np.uint8)) for key, record in records.items()
    )
    tensors = {
        "windows": np.frombuffer(b"".join(records), dtype=np.uint8).reshape(-1, KEY_BYTES),
        "ends": np.cumsum([len(record) for record in records.values()], dtype=np.int64),
        "sums": np.frombuffer(sums, dtype=np.uint8).reshape(-1, KEY_BYTES),
        "data": data,
    }
    return bytes(save(tensors, metadata={"root": root}))


def record_checksum(root: str, key: bytes, record: NDArray[np.uint8]) -> bytes:
    """16 bytes: the blake2b digest of the root, the window's key and the record."""
    digest = hashlib.blake2b(root.encode() + key, digest_size=KEY_BYTES)
    digest.update(np.ascontiguousarray(record).data)
    return digest.digest()


def _write(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all.

    Raises:
        DiskError: the disk takes no more.
        RunError: the folder cannot be written.
    """
    with disk_errors(path.parent):
        replace_file(path, content, "shard")


def _save_indexes(folder: Path, indexes: Iterable[Index]) -> None:
    """Write indexes beside their shards, where the folder can be written."""
    try:
        for index in indexes:
            replace_file(index_path(folder / index.shard), index_bytes(index), "index")
    except (UserError, OSError) as error:
        logger.warning("%s: the shards' indexes are not kept, and made again: %s", folder, error)


def replace_file(path: Path, content: bytes, kind: str) -> None:
    """Put a file in place in one step, synced; `kind` names the failpoints (shard or index).

    Raises:
        OSError: the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with temporary.open("wb") as file:
            failpoint(f"{kind}.begun")
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        failpoint(f"{kind}.synced")
        os.replace(temporary, path)
        failpoint(f"{kind}.renamed")
        sync_folder(path.parent)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # removed meanwhile
        return 0


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
