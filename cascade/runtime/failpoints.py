"""Named places where a test lets the program die, fail or go wrong; they do nothing unless a fault is set.

CASCADE_FAILPOINT="NAME:ACTION[=VALUE][@COUNT]", several with commas, taken by the command line only where
CASCADE_ALLOW_FAILPOINTS=1 stands beside it. NAME is that of a place, with what the program is at before it
(`distill/store.renamed`), and may have `*`; COUNT is how often it is passed before (1: the first time; `each`: once for
every name). ACTION: kill, exit, raise, term, int, sleep=SECONDS, oom, enospc, edquot, eio, erofs, or nan, which the
place itself carries out. CASCADE_FAILPOINT_LOG names a file that gets a line for each that fired, so that a test can
tell a fault that was survived from one that never happened.
"""

import errno
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from cascade.runtime.errors import UserError

_ERRNOS = {"enospc": errno.ENOSPC, "edquot": errno.EDQUOT, "eio": errno.EIO, "erofs": errno.EROFS}
_SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}
_ACTIONS = (*_SIGNALS, *_ERRNOS, "exit", "raise", "sleep", "oom", "nan")

EXIT_STATUS = 17
"""Exit status of a process that the action `exit` has ended."""


class InjectedError(Exception):
    """The error that the action `raise` raises."""


@dataclass
class _Fault:
    pattern: str
    action: str
    value: float
    left: int
    each: bool


# A process has one environment and so one set of faults; the places are too deep in the code for an argument.
_armed: list[_Fault] = []
_log: Path | None = None
_at: list[str] = []


def arm(environment: Mapping[str, str]) -> None:
    """Set the faults that the environment names; earlier ones are dropped.

    Raises:
        UserError: a fault cannot be read, or CASCADE_ALLOW_FAILPOINTS does not allow faults.
    """
    text = environment.get("CASCADE_FAILPOINT", "")
    if text and environment.get("CASCADE_ALLOW_FAILPOINTS") != "1":
        raise UserError(
            "CASCADE_FAILPOINT is set: it makes runs fail, for tests. Unset it, or set CASCADE_ALLOW_FAILPOINTS=1"
        )
    global _log
    _armed[:] = [_read(part) for part in text.split(",") if part]
    _log = Path(environment["CASCADE_FAILPOINT_LOG"]) if environment.get("CASCADE_FAILPOINT_LOG") else None


@contextmanager
def at(place: str) -> Iterator[None]:
    """Put the name of what the program works on before the names of the places inside."""
    _at.append(place)
    try:
        yield
    finally:
        _at.pop()


def failpoint(name: str) -> bool:
    """Carry out the fault that is set for this place; True where it is `nan`, which the caller has to put in."""
    if not _armed:
        return False
    full = "/".join([*_at[-1:], name])
    for fault in _armed:
        if fnmatchcase(full, fault.pattern) and _due(fault, full):
            return _do(fault, full)
    return False


def _read(text: str) -> _Fault:
    name, _, rest = text.rpartition(":")
    rest, _, count = rest.partition("@")
    action, _, value = rest.partition("=")
    try:
        left, number = 1 if count in ("", "each") else int(count), float(value or 0)
    except ValueError:
        action, left, number = "", 1, 0.0
    if not name or action not in _ACTIONS or left < 1:
        raise UserError(f"CASCADE_FAILPOINT: '{text}' is not NAME:ACTION[@COUNT]; actions: {', '.join(_ACTIONS)}")
    return _Fault(name, action, number, left, count == "each")


def _due(fault: _Fault, full: str) -> bool:
    if fault.each:  # of all processes that write to one log, the first to pass
        return _log is None or not _log.exists() or full not in _log.read_text(encoding="utf-8").split("\n")
    fault.left -= 1
    return fault.left == 0


def _do(fault: _Fault, full: str) -> bool:
    if _log is not None:
        with _log.open("a", encoding="utf-8") as file:
            file.write(full + "\n")
            file.flush()
            os.fsync(file.fileno())
    if fault.action in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[fault.action])
    elif fault.action in _ERRNOS:
        number = _ERRNOS[fault.action]
        raise OSError(number, os.strerror(number), full)
    elif fault.action == "exit":
        os._exit(EXIT_STATUS)
    elif fault.action == "raise":
        raise InjectedError(full)
    elif fault.action == "oom":
        raise MemoryError(full)
    elif fault.action == "sleep":
        time.sleep(fault.value)
    return fault.action == "nan"
