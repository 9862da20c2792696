"""Ctrl-C and SIGTERM: the first lets a training save its state and stops, the second stops at once."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from cascade.runtime.errors import Stopped

# Signals come to the process as a whole, so that what they have asked for is the process's state as well.
_signal: int | None = None
"""Number of the last signal that has come; None before."""
_savers = 0
"""Trainings inside `saving`."""


@contextmanager
def handled() -> Iterator[None]:
    """Handle both signals inside; only the main thread of a process can.

    Raises:
        Stopped: inside, when a signal has come.
    """
    global _signal
    _signal = None
    before = {number: signal.signal(number, _take) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def saving() -> Iterator[None]:
    """Let a first signal wait for a training inside, which asks `stop_requested` after each step, saves and stops."""
    global _savers
    _savers += 1
    try:
        yield
    finally:
        _savers -= 1


def stop_requested() -> bool:
    """Whether a signal has asked the run to stop."""
    return _signal is not None


def stop() -> None:
    """Stop the run as the signal asks.

    Raises:
        Stopped: always.
    """
    raise Stopped(signal.SIGTERM if _signal is None else _signal)


def _take(number: int, frame: FrameType | None) -> None:
    global _signal
    first, _signal = _signal is None, number
    if first and _savers:
        message = "Stopping once the training's state is saved; once more stops at once."
        # Nobody may be there to read it any more (| tee), or something is just being printed.
        with suppress(OSError, ValueError, RuntimeError):
            print(f"\n{message}", file=sys.stderr, flush=True)
        return
    stop()
