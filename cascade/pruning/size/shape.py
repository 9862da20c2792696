"""The legal shapes that meet a target."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from cascade.models.architecture.dims import ModelDims, config_with_dims, dims_of
from cascade.models.architecture.sized import Sized
from cascade.pruning.size.target import MEASURES, Target, whole_measure
from cascade.runtime.errors import UserError

CUT_DIMS = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")

_AXIS_COST = {
    "hidden_size": 3.0,
    "num_hidden_layers": 2.0,
    "intermediate_size": 1.0,
    "num_attention_heads": 1.0,
}
"""How much a member loses by what each axis has lost: weights of log(parent's length / its own) to `_COST_POWER`.

Chosen on the final KL of 91 shapes (17 of them rotated) of stories260K (10 to 60%, 400k tokens) and pico-python (35 and
20%, 200k tokens), each cut from the parent, repaired and recovered; what a least-squares fit gives is near it:
`python tests/benchmarks/shapes.py --fit recipes/experiments/results/shapes-*.jsonl`. In each of ten groups of shapes of
one size the first by these weights is within 2.3% of the best KL; the evenly cut shape was up to 17% off.
"""

_COST_POWER = 1.5

_GROUP_COST = 0.1
"""The weight of key/value heads, where they are cut besides the query heads."""

_COUNT_THE_CACHE = {"memory_bytes", "decode_ms"}

_ROTATED = (
    "a rotated stream needs a head of its own beside the embeddings: cut more, or use prune.hidden: activation_norm"
)

TOLERANCES = (0.03, 0.10)
"""A solved shape has at most what is asked for, and less by at most the first of these shares; by at most the
second where the legal values are too coarse for the first."""


def solve_shape(config: Any, target: Target, *, parent: Any = None) -> ModelDims:
    """Legal dims for a cut of the model of `config` (the seed) that meet the target.

    Shares are of the measures of `parent` (a config; the seed's own by default).

    Raises:
        UserError: the target is larger than the seed or the parent, or no legal shape meets it; the message lists what
            is legal.
    """
    return next(candidate_shapes(config, target, parent=parent))


def candidate_shapes(config: Any, target: Target, *, parent: Any = None) -> Iterator[ModelDims]:
    """All legal shapes that meet the target, those first that lose least by what their axes have lost.

    None that bounds lead to has more parameters than `parent`.

    Raises:
        UserError: there is none.
    """
    seed = Sized(config)
    reference = seed.dims if parent is None else dims_of(parent)
    fixed = _with_dependent_dims(dict(target.dims or {}), seed)
    _check_dims(fixed, seed)
    bounds = _absolute_bounds(seed, target, parent)
    if bounds:
        limit = math.inf if parent is None else whole_measure("params", parent, target)
        return _shapes_within(seed, fixed, bounds, target, limit, reference)
    dims = seed.dims.replace(**fixed)
    _require_accepted(seed, dims)
    return iter([dims])


def _absolute_bounds(seed: Sized, target: Target, parent: Any) -> dict[str, float]:
    """The target's bounds as numbers: shares are of the measures of `parent` (a config; None: the seed).

    Raises:
        UserError: a bound is above the parent's measure, or all are above the seed's.
    """
    bounds, beyond = {}, []
    for name, bound in target.bounds().items():
        whole = whole_measure(name, seed.config if parent is None else parent, target)
        bounds[name] = bound * whole if bound <= 1 else bound
        if parent is not None and bounds[name] > whole * (1 + 1e-9):
            raise UserError(f"target of {_bound_text(name, bounds[name])} is larger than the parent's {_number(whole)}")
        size = MEASURES[name](seed.axes, seed.dims, target)
        if bounds[name] > size * (1 + 1e-9):
            beyond.append(f"target of {_bound_text(name, bounds[name])} is larger than the seed's {_number(size)}")
    if beyond and len(beyond) == len(bounds):  # a bound that does not bind is none
        raise UserError(beyond[0])
    return bounds


def diverse_shapes(config: Any, target: Target, *, parent: Any = None, count: int) -> list[ModelDims]:
    """At most `count` legal shapes that meet the target and differ in what they give up.

    For each depth and hidden size its first shape stands (`candidate_shapes`); of those the first are taken, the very
    first being what `solve_shape` gives.

    Raises:
        UserError: no legal shape meets the target.
    """
    shapes: dict[tuple[int, int], ModelDims] = {}
    for dims in candidate_shapes(config, target, parent=parent):
        shapes.setdefault((dims.num_hidden_layers, dims.hidden_size), dims)
        if len(shapes) == count:
            break
    return list(shapes.values())


def legal_values(seed: Sized) -> dict[str, list[int]]:
    """Values that each axis can be cut to, largest first: rounded to what kernels like, heads equal per group.

    Where heads fill the hidden size, its values are those of whole heads. Key/value heads can be cut where they are
    fewer than the heads; a parameter target does so only where few heads are left: they make the cache, not the count.
    """
    dims = seed.dims
    whole = dims.num_attention_heads // dims.num_key_value_heads == 1
    heads = list(range(dims.num_attention_heads, 0, -1 if whole else -dims.num_key_value_heads))
    return {
        "num_hidden_layers": list(range(dims.num_hidden_layers, 0, -1)),
        "hidden_size": [count * dims.head_dim for count in heads]
        if seed.axes.heads_fill_hidden
        else _multiples(dims.hidden_size),
        "intermediate_size": _multiples(dims.intermediate_size),
        "num_attention_heads": heads,
        "num_key_value_heads": heads if whole else list(range(dims.num_key_value_heads, 0, -1)),
    }


def _bound_text(name: str, bound: float) -> str:
    return f"{_number(bound)} {'parameters' if name == 'params' else name}"


def _number(number: float) -> str:
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


def _multiples(size: int) -> list[int]:
    """`size` and smaller lengths, in steps of a power of two of at most a sixteenth of it and at most 128."""
    step = min(128, 1 << max(0, (size // 16).bit_length() - 1))
    rounded = list(range(size - size % step, 0, -step))
    return rounded if rounded and rounded[0] == size else [size, *rounded]


def _with_dependent_dims(fixed: dict[str, int], seed: Sized) -> dict[str, int]:
    """The explicit dims with those that follow from them."""
    dims = seed.dims
    if seed.axes.heads_fill_hidden:
        if "hidden_size" in fixed and "num_attention_heads" not in fixed:
            fixed["num_attention_heads"] = fixed["hidden_size"] // dims.head_dim
        elif "num_attention_heads" in fixed and "hidden_size" not in fixed:
            fixed["hidden_size"] = fixed["num_attention_heads"] * dims.head_dim
    per_group = dims.num_attention_heads // dims.num_key_value_heads
    if per_group == 1 and "num_attention_heads" in fixed:
        fixed.setdefault("num_key_value_heads", fixed["num_attention_heads"])
    elif "num_key_value_heads" in fixed:
        fixed.setdefault("num_attention_heads", fixed["num_key_value_heads"] * per_group)
    return fixed


def _check_dims(fixed: dict[str, int], seed: Sized) -> None:
    unknown = sorted(set(fixed) - set(CUT_DIMS))
    if unknown:
        raise UserError(f"target.dims: {', '.join(unknown)} cannot be cut; known: {', '.join(CUT_DIMS)}")
    legal, dims = legal_values(seed), seed.dims
    for name, size in fixed.items():
        limit = getattr(dims, name)
        if not 0 < size <= limit:
            raise UserError(f"target.dims.{name}: {size} is not between 1 and the seed's {limit}")
    heads = fixed.get("num_attention_heads", dims.num_attention_heads)
    groups = fixed.get("num_key_value_heads", dims.num_key_value_heads)
    per_group = dims.num_attention_heads // dims.num_key_value_heads
    if per_group > 1 and (heads % groups or heads // groups > per_group):
        possible = [groups * count for count in range(per_group, 0, -1)]
        raise UserError(
            f"target.dims.num_attention_heads: {heads} cannot be split over {groups} key/value heads; "
            f"legal: {', '.join(map(str, possible))}"
        )
    if per_group == 1 and heads != groups:
        raise UserError(
            f"target.dims.num_key_value_heads: {groups} is not {heads}, but every head has keys and values of its own"
        )
    hidden = fixed.get("hidden_size", dims.hidden_size)
    if seed.axes.heads_fill_hidden and hidden != heads * dims.head_dim:
        raise UserError(
            f"target.dims.hidden_size: {hidden} is not {heads} heads x {dims.head_dim}, as this architecture wires in; "
            f"legal, with as many heads: {listed(legal['hidden_size'])}"
        )


@dataclass(frozen=True)
class _Candidates:
    """Every combination of the axes' values, one shape a row of each array."""

    columns: dict[str, Any]
    """Dimension -> its length in each shape, int64."""
    shares: dict[str, Any]
    """Bound -> the share of it that each shape's measure reaches."""
    binding: Any
    """The largest of the shares: that of the bound that binds."""
    small: Any
    """Whether a shape has no more parameters than the parent."""


def _shapes_within(
    seed: Sized,
    fixed: dict[str, int],
    bounds: dict[str, float],
    target: Target,
    limit: float,
    reference: ModelDims,
) -> Iterator[ModelDims]:
    """Legal shapes within the bounds, with at most `limit` parameters (the parent's), the cheapest first.

    What an axis has lost is counted from `reference`, the parent's dims, so that a chain of cuts ends where one would.
    """
    values = _axis_values(seed, fixed)
    columns = _columns(values, seed, fixed, groups_alone=bool(bounds.keys() & _COUNT_THE_CACHE))
    candidates = _candidates(columns, seed, bounds, target, limit)
    order = np.argsort(_cost(columns, seed.dims, reference), kind="stable")
    binding, small = candidates.binding[order], candidates.small[order]
    near = [small & (binding <= 1) & (binding >= 1 - tolerance) for tolerance in TOLERANCES]
    refusals: list[str] = []
    shapes = _legal_shapes(seed, columns, (*order[near[0]], *order[near[1] & ~near[0]]), refusals)
    first = next(shapes, None)
    if first is None:
        raise UserError(_no_shape(candidates, values, bounds, limit, refusals))
    return chain([first], shapes)


def _axis_values(seed: Sized, fixed: dict[str, int]) -> dict[str, list[int]]:
    """The lengths that each axis can take; of a fixed axis only the fixed length."""
    dims, legal = seed.dims, legal_values(seed)
    solved = [name for name in _AXIS_COST if not (seed.axes.heads_fill_hidden and name == "hidden_size")]
    values = {name: [fixed[name]] if name in fixed else legal[name] for name in solved}
    per_group = dims.num_attention_heads // dims.num_key_value_heads
    if per_group > 1 and "num_key_value_heads" not in fixed:
        # Halves only: five full axes are more shapes than are worth looking at.
        halves = [dims.num_key_value_heads >> power for power in range(dims.num_key_value_heads.bit_length())]
        values["num_key_value_heads"] = [groups for groups in halves if groups in legal["num_key_value_heads"]]
        if "num_attention_heads" not in fixed:
            values["num_attention_heads"] = sorted({*values["num_attention_heads"], *halves}, reverse=True)
    return values


def _columns(values: dict[str, list[int]], seed: Sized, fixed: dict[str, int], *, groups_alone: bool) -> dict[str, Any]:
    """Every combination of the values, with the dims that follow from them; one array for each dimension."""
    dims = seed.dims
    columns = _grid(values, _possible_heads(values, dims, groups_alone=groups_alone))
    if seed.axes.heads_fill_hidden:
        columns["hidden_size"] = columns["num_attention_heads"] * dims.head_dim
    if dims.num_key_value_heads == dims.num_attention_heads:
        columns["num_key_value_heads"] = columns["num_attention_heads"]
    elif "num_key_value_heads" in fixed:
        columns["num_key_value_heads"] = np.full_like(columns["num_attention_heads"], fixed["num_key_value_heads"])
    return columns


def _candidates(
    columns: dict[str, Any], seed: Sized, bounds: dict[str, float], target: Target, limit: float
) -> _Candidates:
    candidates = seed.dims.replace(**columns)
    shape = columns["num_hidden_layers"].shape
    shares = {name: MEASURES[name](seed.axes, candidates, target) / bound for name, bound in bounds.items()}
    return _Candidates(
        columns=columns,
        shares=shares,
        binding=np.max(np.stack([np.broadcast_to(share, shape) for share in shares.values()]), axis=0),
        small=np.broadcast_to(seed.axes.num_parameters(candidates) <= limit, shape),
    )


def _cost(columns: dict[str, Any], seed: ModelDims, reference: ModelDims) -> Any:
    """What each shape loses by what its axes have lost since `reference`."""
    return sum(
        # A seed that was not cut from the parent can be larger than it along an axis.
        weight * np.log(max(getattr(reference, name), getattr(seed, name)) / columns[name]) ** _COST_POWER
        for name, weight in (_AXIS_COST | {"num_key_value_heads": _GROUP_COST}).items()
        if name in columns
    )


def _legal_shapes(
    seed: Sized, columns: dict[str, Any], order: tuple[Any, ...], refusals: list[str]
) -> Iterator[ModelDims]:
    """The shapes of these rows that the config class takes; what it says against others goes into `refusals`."""
    for row in order:
        dims = seed.dims.replace(**{name: int(column[row]) for name, column in columns.items()})
        try:
            config_with_dims(seed.config, dims)
        except ValueError as error:
            refusals.append(str(error))
            continue
        yield dims


def _no_shape(
    candidates: _Candidates,
    values: dict[str, list[int]],
    bounds: dict[str, float],
    limit: float,
    refusals: list[str],
) -> str:
    """Why no shape meets the bounds, and what the nearest ones would have."""
    name, bound = next(iter(bounds.items()))
    binding, small = candidates.binding, candidates.small
    if (binding[~small] <= 1).any() and not (binding[small] >= 1 - TOLERANCES[-1]).any():
        bound_text = _bound_text(name, bound)
        return f"every shape of {bound_text} has more parameters than the parent's {_number(limit)}; {_ROTATED}"
    sizes = candidates.shares[name] * bound
    smallest, nearest = sizes.min(), sizes[np.abs(binding - 1).argmin()]
    return (
        f"no legal shape has {_number((1 - TOLERANCES[-1]) * bound)} to {_bound_text(name, bound)}; the smallest has "
        f"{_number(smallest)}, the nearest {_number(nearest)}."
        + "".join(f" {axis}: {listed(lengths)}." for axis, lengths in values.items())
        + (f" {refusals[0]}" if refusals else "")
    )


def _possible_heads(
    values: dict[str, list[int]], seed: ModelDims, *, groups_alone: bool
) -> list[tuple[int, int]] | None:
    """Pairs of query and key/value heads that fit together; None where the latter are not an axis of their own.

    Without `groups_alone` groups follow the heads, where these are no more than the seed's groups.
    """
    if "num_key_value_heads" not in values:
        return None
    per_group, most = seed.num_attention_heads // seed.num_key_value_heads, seed.num_key_value_heads
    return [
        (heads, groups)
        for heads in values["num_attention_heads"]
        for groups in values["num_key_value_heads"]
        if heads % groups == 0 and heads // groups <= per_group and (groups_alone or groups == most or heads <= most)
    ]


def _grid(values: dict[str, list[int]], pairs: list[tuple[int, int]] | None) -> dict[str, Any]:
    """Every combination of the axes' values as columns, one row a shape; `pairs` are those of heads and groups."""
    joint = {"num_attention_heads", "num_key_value_heads"} if pairs is not None else set()
    single = [name for name in values if name not in joint]
    sizes = [np.array(values[name], dtype=np.int64) for name in single]
    grid = np.meshgrid(*sizes, *([np.arange(len(pairs))] if pairs is not None else []), indexing="ij")
    columns: dict[str, Any] = dict(zip(single, (part.ravel() for part in grid), strict=False))
    if pairs is not None:
        heads, groups = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        number = grid[-1].ravel()
        columns |= {"num_attention_heads": heads[number], "num_key_value_heads": groups[number]}
    return columns


def _require_accepted(seed: Sized, dims: ModelDims) -> None:
    try:
        config_with_dims(seed.config, dims)
    except ValueError as error:
        values = legal_values(seed)
        legal = " ".join(f"{name}: {listed(part)}." for name, part in values.items())
        raise UserError(f"target.dims: {error}. Usual values: {legal}") from error


def listed(values: list[int]) -> str:
    """The values as text: each, or a range with its step."""
    return (
        ", ".join(map(str, values))
        if len(values) <= 12
        else f"{values[-1]} to {values[0]} in steps of {values[1] - values[2]}"
    )
