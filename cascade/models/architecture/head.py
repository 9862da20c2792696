"""The head of a model: what turns its last hidden states into logits, and how to stop just before it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from cascade.models.architecture.model_class import build_on_meta
from cascade.models.architecture.twin import twin_of
from cascade.runtime.errors import UserError

TOLERANCE = 1e-5
"""Largest difference, as a share of the largest logit, at which the head counts as understood."""


@dataclass(frozen=True)
class Head:
    """logits = softcap * tanh((hidden @ weight.T + bias) * scale / softcap)."""

    weight: Tensor
    """[V, D]"""
    bias: Tensor | None
    """[V]"""
    scale: float = 1.0
    softcap: float | None = None

    def narrowed(self, vocab_size: int) -> "Head":
        """The head of the first `vocab_size` rows: padding rows at the end stand for no token."""
        if vocab_size == len(self.weight):
            return self
        bias = None if self.bias is None else self.bias[:vocab_size]
        return Head(self.weight[:vocab_size], bias, self.scale, self.softcap)


def head_of(model: nn.Module) -> Head:
    """The head of a causal or masked language model.

    Raises:
        UserError: the model has no head, or its logits are not those that weight, bias, scale and softcap give.
    """
    _require_understood(model)
    return _read(model)


def require_head(config: Any) -> None:
    """Refuse, before any weight is read, a config whose model `head_of` would refuse.

    Raises:
        UserError: the model would have no head, or one that is not understood.
    """
    _require_understood(build_on_meta(config))


def last_hidden(model: Any, **inputs: Any) -> Tensor:
    """[B, S, D]: what the model's head would read; the head itself is not computed."""
    with _stopped(model.get_output_embeddings()) as seen:
        model(**inputs)
    return seen[0]


@contextmanager
def _stopped(output: nn.Module) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []

    def stop(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return hidden[..., :1]  # for what the model does to its logits

    output.forward = stop
    try:
        yield seen
    finally:
        del output.forward


def _read(model: Any) -> Head:
    output, config = model.get_output_embeddings(), model.config
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return Head(output.weight, getattr(output, "bias", None), scale, None if softcap is None else float(softcap))


def _require_understood(model: Any) -> None:
    if model.get_output_embeddings() is None:
        raise UserError(f"{type(model).__name__} has no language-model head; its logits cannot be distilled this way")
    config_class: Any = type(model.config)
    model_class: Any = type(model)
    difference = _difference_on_twin(config_class, model.config.to_json_string(use_diff=False), model_class)
    if not difference <= TOLERANCE:
        raise UserError(
            f"{type(model).__name__}: its logits are not its head's, scaled and capped as its config says (a tiny "
            f"model differs by {difference:.0e}); what it does to them is missing here"
        )


@lru_cache(maxsize=32)
@torch.no_grad()
def _difference_on_twin(config_class: Any, config_json: str, model_class: Any) -> float:
    """Largest difference between a twin's logits and its head's product, as a share of the largest logit."""
    config = config_class(**json.loads(config_json))
    config.architectures = [model_class.__name__]
    twin: Any = twin_of(config)
    ids = torch.arange(3, 11)[None]
    logits = twin(input_ids=ids).logits
    computed = logits_of(last_hidden(twin, input_ids=ids), _read(twin))
    return float((computed - logits).abs().max() / logits.abs().max())


def logits_of(hidden: Tensor, head: Head) -> Tensor:
    """[..., V]: the logits of hidden states [..., D]; meant for few tokens, as they take V floats each."""
    logits = nn.functional.linear(hidden, head.weight, head.bias) * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
