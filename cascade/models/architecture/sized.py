"""One sized architecture: a config, its dims, the axes of its weights, and what they add up to."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from cascade.models.architecture.axes import ModelAxes, probe_axes
from cascade.models.architecture.dims import ModelDims, dims_of


@dataclass(frozen=True)
class Sized:
    """A transformers config with the dims and axes that follow from it.

    The axes hold at any size: `sized.axes.num_parameters(dims)` counts a candidate that `config` is not.

    Raises:
        UserError: the config lacks a dim, or size-probing does not explain the architecture.
    """

    config: Any
    dims: ModelDims = field(init=False, compare=False)
    axes: ModelAxes = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Probe (once for each config, `probe_axes` remembers) and read the dims."""
        object.__setattr__(self, "axes", probe_axes(self.config))
        object.__setattr__(self, "dims", dims_of(self.config))

    @cached_property
    def num_parameters(self) -> int:
        """Exact count, each tied weight once."""
        return int(self.axes.num_parameters(self.dims))

    @cached_property
    def num_parameters_non_embedding(self) -> int:
        """The count without every matrix that has the vocabulary as an axis (embeddings, head)."""
        return int(self.axes.num_parameters_non_embedding(self.dims))

    def flops_per_token(self, length: float) -> float:
        """Forward FLOPs of one token over a causal context of `length` tokens; of one image where it reads images."""
        return float(self.axes.flops_per_token(self.dims, length))
