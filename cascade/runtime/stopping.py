"""Ctrl-C and SIGTERM: the first lets a training save its state and stops, the second stops at once."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from cascade.runtime.errors import Stopped

_asked: int | None = None
_savers = 0


@contextmanager
def handled() -> Iterator[None]:
    """Take both signals meanwhile; only a process's main thread can.

    Raises:
        Stopped: inside, when one has come.
    """
    global _asked
    _asked = None
    before = {number: signal.signal(number, _take) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def saving() -> Iterator[None]:
    """Whoever is inside asks `asked` after each step, saves, and calls `stop`."""
    global _savers
    _savers += 1
    try:
        yield
    finally:
        _savers -= 1


def asked() -> bool:
    """Whether the run shall stop."""
    return _asked is not None


def stop() -> None:
    """Stop, as asked.

    Raises:
        Stopped: always.
    """
    raise Stopped(signal.SIGTERM if _asked is None else _asked)


def _take(number: int, frame: FrameType | None) -> None:
    global _asked
    first, _asked = _asked is None, number
    if first and _savers:
        told = "Stopping once the training's state is saved; once more stops at once."
        # Nobody may be there to read it any more (| tee), or something is just being printed.
        with suppress(OSError, ValueError, RuntimeError):
            print(f"\n{told}", file=sys.stderr, flush=True)
        return
    stop()
