"""Files that are on the disk when a function returns, also after a crash; and their sha256."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from cascade.runtime.errors import DiskError, is_disk_error
from cascade.runtime.failpoints import failpoint


def make_folder(folder: Path) -> None:
    """Make a folder and the missing ones above it; each new entry survives a crash."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file in one step, durably: after a crash the file has either its old or its new content.

    Raises:
        DiskError: the disk takes no more.
    """
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            failpoint("file.begun")
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        failpoint("file.synced")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if is_disk_error(error):
            raise DiskError(no_room(path, error, len(text))) from error
        raise
    failpoint("file.renamed")
    sync_folder(path.parent)


def no_room(path: Path, error: BaseException, written: int) -> str:
    """The message about a file that a disk could not take; `written` counts the bytes until then."""
    place = next(folder for folder in path.parents if folder.exists())
    reason = getattr(error, "strerror", None) or str(error)
    return (
        f"{path}: cannot be written: {reason}. {written:,} bytes were written before that, "
        f"{shutil.disk_usage(place).free:,} are free there. Make room"
    )


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no JSON, or no UTF-8.
    """
    return json.loads(path.read_text(encoding="utf-8"))


def sync_file(path: Path) -> None:
    """Fsync a file, so that its content survives a crash."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Fsync a folder, so that created, renamed and removed entries survive a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
