"""What transformers says while it reads a model: its warnings are told once, its loading report must be empty."""

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from cascade.models.checkpoint.weight_files import listed_names
from cascade.runtime.errors import UserError

logger = logging.getLogger(__name__)

_SAID_BETTER = ("LOAD REPORT", "Dequantizing the whole model", "tied weights mapping")
"""Of what is refused, told in the checkpoint's own terms, or of no consequence here."""


@lru_cache(maxsize=1024)
def tell_once(message: str) -> None:
    """A warning that each process gives once, however often the same model is read."""
    logger.warning(message)


@contextmanager
def told_warnings(reference: str) -> Iterator[None]:
    """Tells what transformers warns of meanwhile, whatever verbosity it is set to."""
    theirs = logging.getLogger("transformers")
    messages: list[str] = []
    collector = _Collector(messages)
    level, propagates, handlers = theirs.level, theirs.propagate, list(theirs.handlers)
    theirs.handlers, theirs.propagate = [collector], False
    theirs.setLevel(logging.WARNING)
    try:
        yield
    finally:
        theirs.handlers, theirs.propagate = handlers, propagates
        theirs.setLevel(level)
    for message in dict.fromkeys(messages):
        if not any(part in message for part in _SAID_BETTER):
            tell_once(f"{reference}: transformers: {message.strip()}")


def require_whole(
    report: Mapping[str, Any],
    reference: str,
    *,
    left_out: Collection[str] = (),
    absent: Collection[str] = (),
) -> None:
    """Refuse a model that transformers has not filled, or filled only in part, with the weights given.

    Raises:
        UserError: its report names weights besides those that are rightly `left_out` or `absent`.
    """
    missing = {str(name) for name in report["missing_keys"]} - set(absent)
    unread = {str(name) for name in report["unexpected_keys"]} - set(left_out)
    shapes = {
        f"{name} {tuple(here)} where {tuple(there)} is asked for"
        for name, here, there in report["mismatched_keys"]
        if name not in absent
    }
    parts = {"missing": missing, "not read": unread, "of another shape": shapes}
    if missing or unread or shapes:
        told = "; ".join(f"{what}: {listed_names(names)}" for what, names in parts.items() if names)
        raise UserError(f"{reference}: its weights are not those of its architecture; {told}")


class _Collector(logging.Handler):
    """Keeps messages instead of printing them."""

    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        self.messages.append(record.getMessage())
