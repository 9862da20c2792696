"""Functions that tables name by their place, so that a recipe reads the names without importing torch."""

from importlib import import_module
from typing import Any


def function_at(place: str) -> Any:
    """The function at a place such as `cascade.pruning.importance.scores:head_norms`."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)
