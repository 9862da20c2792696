"""transformers' messages while it reads a model: warnings are logged once, its loading report must be empty."""

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from cascade.models.checkpoint.weight_files import listed_names
from cascade.runtime.errors import UserError

logger = logging.getLogger(__name__)

_DROPPED = ("LOAD REPORT", "Dequantizing the whole model", "tied weights mapping")
"""Parts of warnings that are not passed on: they are errors here, are said more clearly, or do not matter."""


@lru_cache(maxsize=1024)
def tell_once(message: str) -> None:
    """Log a warning once in this process, however often the same model is read."""
    logger.warning(message)


@contextmanager
def relay_warnings(reference: str) -> Iterator[None]:
    """Log, once each, the warnings that transformers gives inside, whatever verbosity it is set to."""
    transformers = logging.getLogger("transformers")
    messages: list[str] = []
    collector = _Collector(messages)
    level, propagates, handlers = transformers.level, transformers.propagate, list(transformers.handlers)
    transformers.handlers, transformers.propagate = [collector], False
    transformers.setLevel(logging.WARNING)
    try:
        yield
    finally:
        transformers.handlers, transformers.propagate = handlers, propagates
        transformers.setLevel(level)
    for message in dict.fromkeys(messages):
        if not any(part in message for part in _DROPPED):
            tell_once(f"{reference}: transformers: {message.strip()}")


def require_whole(
    report: Mapping[str, Any],
    reference: str,
    *,
    left_out: Collection[str] = (),
    absent: Collection[str] = (),
) -> None:
    """Refuse a model that transformers has not filled, or filled only in part, with a checkpoint's weights.

    Raises:
        UserError: the loading report names weights besides those that are rightly `left_out` or `absent`.
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
        differences = "; ".join(f"{what}: {listed_names(names)}" for what, names in parts.items() if names)
        raise UserError(f"{reference}: its weights are not those of its architecture; {differences}")


class _Collector(logging.Handler):
    """A logging handler that keeps messages instead of printing them."""

    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message of a record."""
        self.messages.append(record.getMessage())
