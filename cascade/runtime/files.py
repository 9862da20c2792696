"""Files that are on the disk when a function returns, also after a crash; and their sha256."""

import hashlib
import os
import shutil
from pathlib import Path

from cascade.runtime.errors import DiskError, is_disk_error
from cascade.runtime.failpoints import failpoint


def make_folder(folder: Path) -> None:
    """Make a folder and those above it; each new entry is synced."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    for one in reversed(missing):
        one.mkdir(exist_ok=True)
        sync_folder(one.parent)


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file in one step."""
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
    """What to say of a disk that takes no more."""
    place = next(one for one in path.parents if one.exists())
    said = getattr(error, "strerror", None) or str(error)
    return (
        f"{path}: cannot be written: {said}. {written:,} bytes were written before that, "
        f"{shutil.disk_usage(place).free:,} are free there. Make room"
    )


def sync_file(path: Path) -> None:
    """What was written into a file is on the disk then."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Names that were given in a folder, or taken, are on the disk then."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
