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
"""Seconds within which a holder on another machine has to show that it lives."""


@contextmanager
def locked(run_folder: Path) -> Iterator[None]:
    """Hold the lock of a run directory inside, and remove what killed runs have left in the directory.

    Raises:
        BusyError: another run holds the lock.
        UserError: nothing can be written there, or the file system has no locks.
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
        _wait_for_holder(run_folder, file)
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
        _write(file, json.dumps(holder | {"command": redact(" ".join(sys.argv))}))
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
    """Refuse to start work whose files will not fit on the disk; `what` names the files in the message.

    Raises:
        DiskError: fewer than `num_bytes` are free.
    """
    free = shutil.disk_usage(existing(folder)).free
    if free < num_bytes:
        raise DiskError(
            f"{folder}: {what} need {num_bytes / 1e9:,.2f} GB of disk, {free / 1e9:,.2f} GB are free; make room, or "
            "give an --output on another disk"
        )


def existing(folder: Path) -> Path:
    """The folder itself, or the nearest folder above it that exists."""
    folder = folder.resolve()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _opened(run_folder: Path) -> IO[str]:
    """The lock file, open for reading and writing; made where it does not exist."""
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
    """Host, process, time and command that the lock file names; empty where it names none."""
    file.seek(0)
    with suppress(ValueError):
        holder = json.loads(file.read() or "{}")
        if isinstance(holder, dict):
            return holder
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


def _wait_for_holder(run_folder: Path, file: IO[str]) -> None:
    """Where a run on another machine has not signed off, wait to see whether it still touches the file.

    Raises:
        BusyError: the run is alive.
    """
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
    """Seconds since the epoch by the clock of a folder's file system."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{LOCK}-") as file:
        return os.fstat(file.fileno()).st_mtime


def _beat(path: Path, ended: threading.Event) -> None:
    """Touch the lock file every few seconds until the run has ended."""
    while not ended.wait(BEAT_SECONDS):
        with suppress(OSError):
            os.utime(path)
