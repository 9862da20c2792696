"""How large a model shall be: bounds on measures of its size, explicit dims, or both; the rest is solved for."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from cascade.models.architecture.axes import ModelAxes
from cascade.models.architecture.dims import ModelDims
from cascade.models.architecture.sized import Sized


class Latency(Protocol):
    """A measured latency: how long a shape takes to decode."""

    @property
    def parent_ms(self) -> float:
        """Milliseconds of one decoding step of the parent, which shares are of."""

    def milliseconds(self, axes: ModelAxes, dims: ModelDims) -> Any:
        """Milliseconds of one decoding step under `dims`."""


@dataclass(frozen=True)
class Target:
    """The size wanted: upper bounds on measures of size (all hold), explicit dims, or both (the dims then bind).

    A bound of at most 1 is a share of the parent's measure.
    """

    params: float | None = None
    """Parameters."""
    params_non_embedding: float | None = None
    """Parameters without the matrices that have the vocabulary as an axis."""
    flops_per_token: float | None = None
    """Forward FLOPs of one token at a context of `context` tokens."""
    memory_bytes: float | None = None
    """Weights, and keys and values of `batch_size` sequences of `context` tokens, at `bytes_per_value`."""
    decode_ms: float | None = None
    """Milliseconds of one decoding step of `batch_size` sequences after `context` tokens, as `latency` says."""
    context: int = 2048
    batch_size: int = 1
    bytes_per_value: int = 2
    dims: dict[str, int] | None = None
    """Explicit dims by Hugging Face name; what is not named stays as in the seed, or is solved for."""

    latency: "Latency | None" = None
    """The latency measured on this machine by `latency.fit_decode_latency`; needed for decode_ms."""

    def with_latency(self, latency: "Latency") -> "Target":
        """A copy of the target that judges decode_ms by this latency."""
        return replace(self, latency=latency)

    def bounds(self) -> dict[str, float]:
        """The bounds that are given, by name."""
        return {name: bound for name in MEASURES if (bound := getattr(self, name)) is not None}


def _decode_ms(axes: ModelAxes, dims: ModelDims, target: Target) -> Any:
    if target.latency is None:
        raise ValueError("a target in decode_ms needs `latency`; fit_decode_latency measures it")
    return target.latency.milliseconds(axes, dims)


MEASURES: dict[str, Callable[[ModelAxes, ModelDims, Target], Any]] = {
    "params": lambda axes, dims, target: axes.num_parameters(dims),
    "params_non_embedding": lambda axes, dims, target: axes.num_parameters_non_embedding(dims),
    "flops_per_token": lambda axes, dims, target: axes.flops_per_token(dims, target.context),
    "memory_bytes": lambda axes, dims, target: (
        axes.num_parameters(dims) * target.bytes_per_value
        + axes.cache_bytes_per_token(dims, target.bytes_per_value) * target.batch_size * target.context
    ),
    "decode_ms": _decode_ms,
}
"""Measures of size that a target can bound; each takes single dims or arrays of candidates."""


def whole_measure(name: str, config: Any, target: Target) -> float:
    """The measure of the model that shares are of."""
    if name == "decode_ms" and target.latency is not None:
        return target.latency.parent_ms
    whole = Sized(config)
    return float(MEASURES[name](whole.axes, whole.dims, target))
