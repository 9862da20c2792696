"""One writer at a time in a run directory.

The kernel holds the lock and drops it when its holder dies, however it dies: nothing has to be unlocked by hand. On a
file system that several machines share, the kernel's lock may not reach the others; the holder therefore also touches
the lock file every few seconds, and whoever finds another machine's name in it waits to see whether that goes on.
"""

import fcntl
import json
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from cascade.runtime.errors import BusyError, DiskError, UserError
from cascade.runtime.failpoints import at
from cascade.runtime.files import make_folder, write_atomically
from cascade.runtime.secrets import redact
from cascade.store.commits import sweep

LOCK = ".cascade.lock"

BEAT_SECONDS = 15.0
WAIT_SECONDS = 60.0
"""How long a holder on another machine is given to show that it lives."""


@contextmanager
def locked(run_folder: Path) -> Iterator[None]:
    """Hold the run directory against a second run, and tidy what killed ones have left in it.

    Raises:
        BusyError: another run holds it.
        UserError: nothing can be written there.
    """
    with _opened(run_folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError(_held_by(run_folder, _record(file))) from error
        except OSError as error:
            raise UserError(
                f"{run_folder}: this file system has no locks ({error.strerror}), and two runs in one directory would "
                "spoil each other; give an --output on one that has"
            ) from error
        _wait_for_others(run_folder, file)
        mine = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
        _write(file, json.dumps(mine | {"command": redact(" ".join(sys.argv))}))
        ended = threading.Event()
        threading.Thread(target=_beat, args=(run_folder / LOCK, ended), daemon=True).start()
        try:
            sweep(run_folder)
            _try_writing(run_folder)
            yield
        finally:
            ended.set()
            _write(file, "")


def require_room(folder: Path, num_bytes: int, what: str) -> None:
    """Refuse to start what will not fit on the disk.

    Raises:
        DiskError: less is free than is needed.
    """
    free = shutil.disk_usage(existing(folder)).free
    if free < num_bytes:
        raise DiskError(
            f"{folder}: {what} need {num_bytes / 1e9:,.2f} GB of disk, {free / 1e9:,.2f} GB are free; make room, or "
            "give an --output on another disk"
        )


def existing(folder: Path) -> Path:
    """The folder itself, or the nearest above it that is there."""
    folder = folder.resolve()
    return next(one for one in (folder, *folder.parents) if one.exists())


def _opened(run_folder: Path) -> IO[str]:
    """The lock file."""
    try:
        make_folder(run_folder)
        return (run_folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(_closed(run_folder, error)) from error


def _closed(run_folder: Path, error: OSError) -> str:
    return f"{run_folder}: cannot be written to: {error.strerror or error}; give an --output where this user may write"


def _try_writing(run_folder: Path) -> None:
    """Write, sync and rename a file, before hours depend on it."""
    probe = run_folder / f"{LOCK}-0"
    try:
        with at("lock"):
            write_atomically(probe, "written, synced and renamed")
        probe.unlink()
    except PermissionError as error:
        raise UserError(_closed(run_folder, error)) from error


def _record(file: IO[str]) -> dict[str, Any]:
    file.seek(0)
    with suppress(ValueError):
        found = json.loads(file.read() or "{}")
        if isinstance(found, dict):
            return found
    return {}


def _write(file: IO[str], text: str) -> None:
    with suppress(OSError):  # a full disk: the lock itself is the kernel's
        file.truncate(0)
        file.write(text)
        file.flush()


def _held_by(run_folder: Path, holder: dict[str, Any]) -> str:
    who = f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'this machine')}"
    since = f", since {holder['started']}: {holder.get('command', '')}" if "started" in holder else ""
    return f"{run_folder}: another run is writing here ({who}{since}); wait for it, stop it, or give another --output"


def _wait_for_others(run_folder: Path, file: IO[str]) -> None:
    """Where a run on another machine has not signed off, see whether it still touches the file."""
    holder = _record(file)
    if holder.get("host") in (None, socket.gethostname()):
        return
    last = os.stat(run_folder / LOCK).st_mtime
    # Both times are the file system's own: the machines' clocks may differ.
    waits = min(WAIT_SECONDS, WAIT_SECONDS - (_clock_of(run_folder) - last))
    until = time.monotonic() + waits
    if waits > 0:
        print(f"{run_folder}: waiting to see whether the run on {holder['host']} is alive", file=sys.stderr, flush=True)
    while time.monotonic() < until:
        time.sleep(min(1.0, WAIT_SECONDS / 10))
        if os.stat(run_folder / LOCK).st_mtime != last:
            raise BusyError(_held_by(run_folder, holder))


def _clock_of(folder: Path) -> float:
    """What time it is for the file system of a folder."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{LOCK}-") as file:
        return os.fstat(file.fileno()).st_mtime


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        with suppress(OSError):
            os.utime(path)
