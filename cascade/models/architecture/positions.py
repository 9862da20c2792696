"""How many tokens a model can really take, which is not always what its config's `max_position_embeddings` says.

RoBERTa numbers places from its padding id + 1, so that of 514 positions 512 can be used; OPT's table has two rows more
than its config says. Which rows a tiny model of the architecture looks up tells.
"""

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from cascade.models.architecture.twin import small_dims, twin_of
from cascade.runtime.errors import UserError

_LENGTH = 8
"""Tokens of the text that the tiny model reads: a table of which it reads so many rows in turn is one of positions."""


def usable_context(config: Any) -> int | None:
    """The most tokens that a model of this config can take; None where its config sets no limit.

    Never more than `max_position_embeddings`, up to which rotary positions were trained.
    """
    declared = getattr(config, "max_position_embeddings", None)
    if not isinstance(declared, int) or declared <= 0:
        return None
    architectures = tuple(getattr(config, "architectures", None) or ())
    config_class: Any = type(config)
    return min(declared, *_places(config_class, config.to_json_string(use_diff=False), architectures))


def require_context(config: Any, length: int, place: str, whose: str = "parent") -> None:
    """Refuse texts of `length` tokens where a model cannot read as many.

    Raises:
        UserError: `length` is beyond the model's context.
    """
    context = usable_context(config)
    if context is None or length <= context:
        return
    declared = config.max_position_embeddings
    why = "" if context == declared else f" (of its {declared} positions the first {declared - context} are never used)"
    raise UserError(f"{place}: {length} is longer than the {whose}'s context of {context} tokens{why}")


@lru_cache(maxsize=64)
def _places(config_class: Any, config_json: str, architectures: tuple[str, ...]) -> list[int]:
    """The tokens that the config declares, then those that each learned table of positions has rows for."""
    config = config_class(**json.loads(config_json))
    config.architectures = list(architectures) or None
    declared: list[int] = [config.max_position_embeddings]
    padding = config.pad_token_id if isinstance(getattr(config, "pad_token_id", None), int) else 0
    try:
        small = small_dims(config)
        model: Any = twin_of(config, dims=small.replace(vocab_size=max(small.vocab_size, padding + 1)))
        token = next(number for number in (3, 4) if number != padding)
        with _Lookups() as seen, torch.no_grad():
            model(input_ids=torch.full((1, _LENGTH), token))
    except (UserError, ValueError, RuntimeError, TypeError, AttributeError, KeyError, IndexError):
        return declared  # no model of this kind can be built small: its config is all that is known
    return [*declared, *seen.places]


class _Lookups(TorchFunctionMode):
    """While entered, notes for each table of positions its number of rows from the first looked-up row on."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[int] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is nn.functional.embedding:
            rows, table = [*args, *(kwargs or {}).values()][:2]
            if rows.numel() == _LENGTH and (rows.flatten().diff() == 1).all():
                self.places.append(len(table) - int(rows.min()))
        return func(*args, **(kwargs or {}))
