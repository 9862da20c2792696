"""A root's folder: records of windows in shards that appear whole or not at all, each record with its own checksum.

A shard is a safetensors file named by the sha256 of its content, of four tensors: `windows` uint8 [W, 16] (their keys),
`ends` int64 [W] (of their records in the data), `sums` uint8 [W, 16] and `data` uint8. A checksum covers the root, the
window and its record, so that a record that was damaged, moved to another window or brought from another root is none.

Shapes: W = windows of a shard.
"""

import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save

from cascade.models.checkpoint.tensor_file import Entry, entries_of, opened
from cascade.runtime.errors import DiskError, RunError, UserError, is_disk_error
from cascade.runtime.failpoints import failpoint
from cascade.runtime.files import sync_folder

logger = logging.getLogger(__name__)

KEY_BYTES = 16
ROOT_FILE = "root.json"
MAX_SHARD_BYTES = 1 << 26
SECONDS_BETWEEN_SHARDS = 60.0
"""What a killed labelling loses at most."""

_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class _Shard:
    path: Path
    ends: NDArray[np.int64]
    sums: NDArray[np.uint8]
    data: NDArray[np.uint8]
    """Mapped: read when it is looked at."""

    def record(self, number: int) -> NDArray[np.uint8]:
        start = int(self.ends[number - 1]) if number else 0
        return self.data[start : int(self.ends[number])]


@dataclass
class Windows:
    """The records of one root, by their windows' keys."""

    folder: Path
    root: str
    """64 hexadecimal digits."""
    _found: dict[bytes, list[tuple[_Shard, int]]] = field(default_factory=dict)
    """The shards that a window is in, and where."""
    _known: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Files that were looked at: inode and time of each."""
    passed_over: set[Path] = field(default_factory=set)
    """Files that are no shards of this root, or are cut off."""
    num_damaged: int = 0
    """Records that were read and not used."""

    def refresh(self) -> "Windows":
        """Look for shards that have come since."""
        for path in sorted(self.folder.glob(f"*{_SUFFIX}")):
            try:
                stat = path.stat()
            except FileNotFoundError:  # removed meanwhile
                continue
            if self._known.get(path.name) != (stat.st_ino, stat.st_mtime_ns):  # new, or written again
                self._known[path.name] = stat.st_ino, stat.st_mtime_ns
                self._open(path)
        return self

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, key: bytes) -> bool:
        return key in self._found

    def keys(self) -> Iterator[bytes]:
        """Of all windows that seem to be there."""
        return iter(list(self._found))

    def read(self, key: bytes) -> NDArray[np.uint8] | None:
        """A window's record; None where there is none that is whole: from then on the window is missing."""
        for shard, number in list(self._found.get(key, ())):
            record = shard.record(number)
            if _checksum(self.root, key, record) == shard.sums[number].tobytes():
                return record
            logger.warning("%s: the record of window %s is damaged and not used", shard.path, key.hex())
            self.num_damaged += 1
            self._found[key] = [place for place in self._found[key] if place[0] is not shard]
        self._found.pop(key, None)
        return None

    def targets(self) -> dict[str, Any]:
        """How records are laid out, as the root says."""
        found: dict[str, Any] = self.record()["targets"]
        return found

    def record(self) -> dict[str, Any]:
        """All that the root's name stands for."""
        found: dict[str, Any] = json.loads((self.folder / ROOT_FILE).read_text(encoding="utf-8"))
        return found

    def num_bytes(self) -> int:
        """Of all its shards."""
        return sum(_size(path) for path in self.folder.glob(f"*{_SUFFIX}"))

    def _open(self, path: Path) -> None:
        """Take up a shard's windows; one that is cut off, of another root or no shard at all is passed over."""
        try:
            if _root_of(path) != self.root:
                raise UserError(f"{path}: belongs to another root")
            entries = dict(entries_of(path))
            keys = _mapped(entries["windows"]).copy().reshape(-1, KEY_BYTES)
            ends = _mapped(entries["ends"]).copy().view("<i8")
            sums = _mapped(entries["sums"]).copy().reshape(-1, KEY_BYTES)
            data = _mapped(entries["data"])
            if not len(keys) == len(ends) == len(sums) or (np.diff(ends, prepend=0) < 0).any():
                raise UserError(f"{path}: its tables do not fit each other")
            if len(ends) and ends[-1] != len(data):
                raise UserError(f"{path}: {len(data)} bytes of records where {ends[-1]} were due")
        except (UserError, OSError, KeyError, ValueError, TypeError) as error:
            logger.warning("%s: passed over, its windows count as missing: %s", path, error)
            self.passed_over.add(path)
            return
        self.passed_over.discard(path)
        shard = _Shard(path, ends, sums, data)
        for number, key in enumerate(keys):
            others = [place for place in self._found.get(key.tobytes(), ()) if place[0].path != path]
            self._found[key.tobytes()] = [*others, (shard, number)]


class Writer:
    """Collects records into shards.

    Raises:
        RunError: the disk is full; what was written before stays.
    """

    def __init__(self, folder: Path, root: str) -> None:
        self.folder, self.root = folder, root
        self.records: dict[bytes, bytes] = {}
        self.held, self.written, self.last = 0, 0, time.monotonic()

    def add(self, key: bytes, record: bytes) -> bool:
        """Keep a window's record; whether a shard was written."""
        self.records[key] = record
        self.held += len(record)
        due = self.held >= MAX_SHARD_BYTES or time.monotonic() - self.last >= SECONDS_BETWEEN_SHARDS
        if due:
            self.flush()
        return due

    def flush(self) -> None:
        """Write what is held, as one shard."""
        if self.records:
            content = _shard_bytes(self.root, self.records)
            name = hashlib.sha256(content).hexdigest()
            _write(self.folder / f"{name}{_SUFFIX}", content)
            self.written += len(self.records)
        self.records, self.held, self.last = {}, 0, time.monotonic()


def has_root(cache: Path, record: dict[str, Any]) -> bool:
    """Whether something is kept under the root with this record."""
    root = _named(record)[1]
    return root_name(cache / root[:16]) == root and any((cache / root[:16]).glob(f"*{_SUFFIX}"))


def _named(record: dict[str, Any]) -> tuple[str, str]:
    """(text, name) of a root's record."""
    text = json.dumps(record, indent=1, sort_keys=True) + "\n"
    return text, hashlib.sha256(text.encode()).hexdigest()


def root_folder(cache: Path, record: dict[str, Any]) -> tuple[Path, str]:
    """(folder, name) of the root with this record, made if there is none."""
    text, root = _named(record)
    folder = cache / root[:16]
    with telling(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if root_name(folder) != root:  # new, or damaged
        _write(folder / ROOT_FILE, text.encode())
    return folder, root


@contextmanager
def telling(folder: Path) -> Iterator[None]:
    """Failures to write there, as errors that say what to do.

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
    """64 hexadecimal digits: what a root's folder says it is; its own name where it says nothing."""
    try:
        return hashlib.sha256((folder / ROOT_FILE).read_bytes()).hexdigest()
    except OSError:
        return folder.name


def damaged_shards(folder: Path) -> list[Path]:
    """Shards whose content is not what their names say."""
    return [path for path in sorted(folder.glob(f"*{_SUFFIX}")) if _sha256(path) != path.name.removesuffix(_SUFFIX)]


def _shard_bytes(root: str, records: dict[bytes, bytes]) -> bytes:
    data = np.frombuffer(b"".join(records.values()), dtype=np.uint8)
    sums = b"".join(_checksum(root, key, np.frombuffer(record, dtype=np.uint8)) for key, record in records.items())
    tensors = {
        "windows": np.frombuffer(b"".join(records), dtype=np.uint8).reshape(-1, KEY_BYTES),
        "ends": np.cumsum([len(record) for record in records.values()], dtype=np.int64),
        "sums": np.frombuffer(sums, dtype=np.uint8).reshape(-1, KEY_BYTES),
        "data": data,
    }
    return bytes(save(tensors, metadata={"root": root}))


def _checksum(root: str, key: bytes, record: NDArray[np.uint8]) -> bytes:
    digest = hashlib.blake2b(root.encode() + key, digest_size=KEY_BYTES)
    digest.update(np.ascontiguousarray(record).data)
    return digest.digest()


def _root_of(path: Path) -> str:
    with opened(path) as file:
        return str(file.metadata()["root"])


def _mapped(entry: Entry) -> NDArray[np.uint8]:
    """A tensor's bytes, read from the file when they are looked at."""
    values: NDArray[np.uint8] = entry.read().flatten().view(torch.uint8).numpy()
    return values


def _write(path: Path, content: bytes) -> None:
    """A file that is there whole or not at all."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    with telling(path.parent):
        try:
            with temporary.open("wb") as file:
                failpoint("shard.begun")
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            failpoint("shard.synced")
            os.replace(temporary, path)
            failpoint("shard.renamed")
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
