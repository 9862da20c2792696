"""What an axis of a weight is made of: runs of units of one dimension."""

from dataclasses import dataclass
from typing import Any

from cascade.models.architecture.dims import ModelDims


@dataclass(frozen=True)
class Part:
    """A run of consecutive units along an axis."""

    dim: str | None
    """The dimension whose units these are, or None for a fixed length."""
    rows: int
    """Rows of one unit (of the whole part where it is fixed), in head_dims where `of_head_dim`."""
    of_head_dim: bool = False

    def rows_per_unit(self, dims: ModelDims) -> int:
        """Consecutive rows that one unit takes."""
        return self.rows * dims.head_dim if self.of_head_dim else self.rows

    def length(self, dims: ModelDims) -> Any:
        """Rows of the part under `dims`."""
        rows = self.rows_per_unit(dims)
        return rows if self.dim is None else rows * getattr(dims, self.dim)


@dataclass(frozen=True)
class Axis:
    """One axis of one weight: one part, or several where a weight is fused."""

    parts: tuple[Part, ...]

    @property
    def dim(self) -> str | None:
        """The dimension of the first part: the query heads' where q, k and v are fused."""
        return self.parts[0].dim

    def length(self, dims: ModelDims) -> Any:
        """The axis's length under `dims`."""
        return sum(part.length(dims) for part in self.parts)
