"""Which shape: the legal dims that meet a target.

A target fixes some dims and, if it names a parameter count, leaves the others to be solved for.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from cascade.errors import UserError
from cascade.models.axes import ModelAxes, probe_axes
from cascade.models.dims import ModelDims, config_with_dims, dims_of

CUT_DIMS = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")

# How much cutting an axis by a given ratio is assumed to hurt: squared log-ratios are weighted by these. Depth
# first hurts most (Minitron's practice 4: width over depth below 15B parameters).
_AXIS_COST = {
    "num_hidden_layers": 3.0,
    "hidden_size": 1.5,
    "intermediate_size": 1.0,
    "num_attention_heads": 1.5,
}

TOLERANCES = (0.03, 0.10)
"""A solved shape has at most the parameters asked for, and less by at most the first of these shares; by at most the
second where the legal values are too coarse for the first."""


@dataclass(frozen=True)
class Target:
    """The size wanted: a parameter count, explicit dims, or both (the dims then bind)."""

    params: float | None = None
    """Parameters: a number above 1, or a fraction of the parent's (at most 1)."""
    dims: dict[str, int] | None = None
    """Explicit dims by Hugging Face name; what is not named stays as in the seed, or is solved for."""


def solve_shape(config: Any, target: Target, *, parent_parameters: int) -> ModelDims:
    """Legal dims for a cut of the model of `config` (the seed) that meet the target.

    Raises:
        UserError: the target is larger than the seed, or no legal shape meets it; the message lists what is legal.
    """
    axes, seed = probe_axes(config), dims_of(config)
    fixed = dict(target.dims or {})
    _check_dims(fixed, config, seed)
    if target.params is None:
        dims = seed.replace(**fixed)
        if seed.num_key_value_heads == seed.num_attention_heads:
            dims = dims.replace(num_key_value_heads=dims.num_attention_heads)
        _require_accepted(config, dims)
        return dims
    wanted = round(target.params * parent_parameters) if target.params <= 1 else round(target.params)
    size = axes.num_parameters(seed)
    if wanted > size:
        raise UserError(f"target of {wanted:,} parameters is larger than the seed, which has {size:,}")
    return _nearest_shape(config, axes, seed, fixed, wanted)


def legal_values(seed: ModelDims) -> dict[str, list[int]]:
    """Values that each axis can be cut to, largest first: rounded to what kernels like, heads equal per group."""
    per_group = seed.num_attention_heads // seed.num_key_value_heads
    groups = 1 if per_group == 1 else seed.num_key_value_heads
    return {
        "num_hidden_layers": list(range(seed.num_hidden_layers, 0, -1)),
        "hidden_size": _multiples(seed.hidden_size),
        "intermediate_size": _multiples(seed.intermediate_size),
        "num_attention_heads": list(range(seed.num_attention_heads, 0, -groups)),
    }


def _multiples(size: int) -> list[int]:
    """Down from `size` in steps of a power of two, at most a sixteenth of it and at most 128."""
    step = min(128, 1 << max(0, (size // 16).bit_length() - 1))
    rounded = list(range(size - size % step, 0, -step))
    return rounded if rounded and rounded[0] == size else [size, *rounded]


def _check_dims(fixed: dict[str, int], config: Any, seed: ModelDims) -> None:
    unknown = sorted(set(fixed) - set(CUT_DIMS))
    if unknown:
        raise UserError(f"target.dims: {', '.join(unknown)} cannot be cut; known: {', '.join(CUT_DIMS)}")
    legal = legal_values(seed)
    for name, value in fixed.items():
        limit = getattr(seed, name)
        if not 0 < value <= limit:
            raise UserError(f"target.dims.{name}: {value} is not between 1 and the seed's {limit}")
        if name == "num_attention_heads" and value not in legal[name]:
            raise UserError(
                f"target.dims.{name}: {value} cannot be split over {seed.num_key_value_heads} key/value heads; "
                f"legal: {', '.join(map(str, legal[name]))}"
            )


def _nearest_shape(config: Any, axes: ModelAxes, seed: ModelDims, fixed: dict[str, int], wanted: int) -> ModelDims:
    values = {name: [fixed[name]] if name in fixed else legal for name, legal in legal_values(seed).items()}
    grid = np.meshgrid(*(np.array(values[name], dtype=np.int64) for name in CUT_DIMS), indexing="ij")
    columns: dict[str, Any] = dict(zip(CUT_DIMS, (part.ravel() for part in grid), strict=True))
    if seed.num_key_value_heads == seed.num_attention_heads:
        columns["num_key_value_heads"] = columns["num_attention_heads"]
    sizes = axes.num_parameters(seed.replace(**columns))
    cost = sum(weight * np.log(columns[name] / getattr(seed, name)) ** 2 for name, weight in _AXIS_COST.items())
    order = np.argsort(cost, kind="stable")
    near = [(sizes[order] <= wanted) & (sizes[order] >= (1 - tolerance) * wanted) for tolerance in TOLERANCES]
    refusals = []
    for index in (*order[near[0]], *order[near[1] & ~near[0]]):
        dims = seed.replace(**{name: int(column[index]) for name, column in columns.items()})
        try:
            config_with_dims(config, dims)
        except ValueError as error:
            refusals.append(str(error))
            continue
        return dims
    smallest, nearest = int(sizes.min()), int(sizes[np.abs(sizes - wanted).argmin()])
    raise UserError(
        f"no legal shape has {(1 - TOLERANCES[-1]) * wanted:,.0f} to {wanted:,} parameters; the smallest has "
        f"{smallest:,}, the nearest {nearest:,}."
        + "".join(f" {name}: {_listed(legal)}." for name, legal in values.items())
        + (f" {refusals[0]}" if refusals else "")
    )


def _require_accepted(config: Any, dims: ModelDims) -> None:
    try:
        config_with_dims(config, dims)
    except ValueError as error:
        legal = " ".join(f"{name}: {_listed(values)}." for name, values in legal_values(dims_of(config)).items())
        raise UserError(f"target.dims: {error}. Usual values: {legal}") from error


def _listed(values: list[int]) -> str:
    return (
        ", ".join(map(str, values))
        if len(values) <= 12
        else f"{values[-1]} to {values[0]} in steps of {values[1] - values[2]}"
    )
