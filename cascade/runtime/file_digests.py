"""The sha256 of large files, read once per process as long as they look the same."""

import os
import time
from functools import lru_cache
from pathlib import Path

from cascade.runtime.files import file_sha256

_CLOCK_STEP_NS = 100_000_000
"""A file that changed less than this before it is read could change again at the same time as its clock tells it."""


def sha256_once(path: Path) -> str:
    """sha256 of a file's content; a file that this process has read is read again once it was written or replaced.

    That is told by its size, inode, time of writing and time of change, of which no program can set the last. For what
    names inputs (the parent of a run); whoever checks that a file is undamaged has to read it (`file_sha256`).
    """
    stat = path.stat()
    if changed_just_now(stat):
        return file_sha256(path)
    return _sha256(path.resolve(), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


def changed_just_now(stat: os.stat_result) -> bool:
    """Whether a file changed so recently that it could change again without its times telling."""
    return time.time_ns() - stat.st_ctime_ns < _CLOCK_STEP_NS


@lru_cache(maxsize=1024)
def _sha256(path: Path, size: int, mtime_ns: int, ctime_ns: int, inode: int) -> str:
    return file_sha256(path)
