"""A plan says exactly what stays: readable JSON, made from scores, without any weight.

Shapes: L = layers, H = query heads, I = neurons, D = hidden channels.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from cascade.errors import UserError
from cascade.importance.scores import Scores
from cascade.importance.statistics import Statistics
from cascade.models.axes import probe_axes
from cascade.models.dims import ModelDims, config_with_dims, dims_of
from cascade.pruning.corrections import corrected
from cascade.pruning.rotation import require_rotatable, untied
from cascade.pruning.shape import solve_shape
from cascade.pruning.target import Target
from cascade.store import file_sha256

PLAN_FORMAT = 3

_ROTATION = ".rotation.safetensors"


@dataclass(frozen=True)
class PruningPlan:
    """What `prune` needs to know; all indices are the source's, ascending."""

    source_dims: ModelDims
    target_dims: ModelDims
    target_config: dict[str, Any]
    """The pruned model's config, as transformers writes it."""
    layers: list[int]
    hidden: list[int]
    heads: list[list[int]]
    """Query heads, for each kept layer."""
    key_value_heads: list[list[int]]
    """Key/value heads, for each kept layer."""
    neurons: list[list[int]]
    """Neurons, for each kept layer."""
    norm_scales: dict[str, float]
    """Factor on what each norm multiplies by (1 + weight where it is zero-centred), by the source's parameter name:
    the shorter vector has another mean square."""
    scales: dict[str, float]
    """Factor on other weights: an embedding whose scale follows the hidden size, and what undoes it at a tied head."""
    merged_heads: list[list[list[int]]] = field(default_factory=list)
    """For each kept layer, [kept, removed] pairs of query heads: the kept one becomes 2 x kept - removed (Minitron)."""
    rotation: Tensor | None = field(default=None, compare=False)
    """[D, D] float64: the stream is rotated by this before `hidden` counts."""

    def units(self, dim: str | None, layer: int | None) -> list[int] | None:
        """The units that stay along a dimension (in one kept layer of the source); None where all do.

        Raises:
            ValueError: heads or neurons outside the layers.
        """
        if dim == "hidden_size":
            return self.hidden
        per_layer = {
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "intermediate_size": self.neurons,
        }
        if dim not in per_layer:
            return None
        if layer is None:
            raise ValueError(f"an axis along {dim} outside the layers")
        return per_layer[dim][self.layers.index(layer)]


def plan_pruning(
    scores: Scores,
    config: Any,
    target: ModelDims | Target | float,
    *,
    statistics: Statistics | None = None,
    merge_heads: bool = False,
) -> PruningPlan:
    """Keep the best-scored units of each kind, as many as `target` says.

    Query heads are ranked inside each key/value group and kept equally per group; with as many key/value heads as
    heads, whole heads are ranked. With `statistics` the norms are corrected by the energy that the kept channels
    really carry; without, as if the removed channels carried nothing. A target that is no set of dims (a fraction or
    number of parameters) is solved for first.
    """
    source = dims_of(config)
    if not isinstance(target, ModelDims):
        wanted = target if isinstance(target, Target) else Target(params=target)
        target = solve_shape(untied(config) if scores.rotation is not None else config, wanted, parent=config)
    axes = probe_axes(config)
    if target.num_attention_heads % target.num_key_value_heads:
        raise ValueError(f"{target.num_attention_heads} heads cannot be split over {target.num_key_value_heads} groups")
    layers = _best(scores.layers, target.num_hidden_layers)
    hidden = _best(scores.hidden, target.hidden_size)
    heads, groups = [], []
    for layer in layers:
        kept = _best_heads(scores.heads[layer], source, target)
        heads.append(kept[0])
        groups.append(kept[1])
    kept_config = config_with_dims(config, target, kept_layers=layers)
    if scores.rotation is not None:
        require_rotatable(config, axes)
        kept_config = untied(kept_config)
    plan = PruningPlan(
        source_dims=source,
        target_dims=target,
        target_config=_portable(kept_config),
        layers=layers,
        hidden=hidden,
        heads=heads,
        key_value_heads=groups,
        neurons=[_best(scores.neurons[layer], target.intermediate_size) for layer in layers],
        norm_scales={},
        scales={},
        merged_heads=[_merges(scores.heads[layer], kept, source) for layer, kept in zip(layers, heads, strict=True)]
        if merge_heads
        else [],
        rotation=scores.rotation,
    )
    return corrected(plan, axes, statistics)


def save_plan(plan: PruningPlan, path: Path) -> None:
    """JSON with the summary first and one line per list of indices; a rotation in safetensors beside it."""
    record: dict[str, Any] = {"format": PLAN_FORMAT} | {
        name: value.as_dict() if isinstance(value, ModelDims) else value
        for name, value in vars(plan).items()
        if name != "rotation"
    }
    rotation = path.with_suffix(_ROTATION)
    rotation.unlink(missing_ok=True)  # of a plan that lay here before
    record["rotation_sha256"] = None
    if plan.rotation is not None:
        save_file({"rotation": plan.rotation.contiguous()}, rotation)
        record["rotation_sha256"] = file_sha256(rotation)
    lines = []
    for name, value in record.items():
        if name in ("heads", "key_value_heads", "neurons"):
            rows = ",\n    ".join(json.dumps(row) for row in value)
            lines.append(f"  {json.dumps(name)}: [\n    {rows}\n  ]")
        elif isinstance(value, dict):
            lines.append(f"  {json.dumps(name)}: " + json.dumps(value, indent=2).replace("\n", "\n  "))
        else:
            lines.append(f"  {json.dumps(name)}: {json.dumps(value)}")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def load_plan(path: Path) -> PruningPlan:
    """What `save_plan` wrote.

    Raises:
        UserError: it is no plan, one of another format, or without the rotation that belongs to it.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.pop("format") != PLAN_FORMAT:
            raise UserError(f"{path}: written in another plan format; make the plan again")
        digest = record.pop("rotation_sha256")
        for name in ("source_dims", "target_dims"):
            record[name] = ModelDims(**record[name])
        plan = PruningPlan(**record, rotation=None)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a pruning plan as `cascade prune` writes it ({error})") from error
    if digest is None:
        return plan
    rotation = path.with_suffix(_ROTATION)
    if not rotation.is_file() or file_sha256(rotation) != digest:
        raise UserError(f"{path}: its rotation, {rotation.name} beside it, is missing or another one; copy both files")
    return replace(plan, rotation=load_file(rotation)["rotation"])


def config_of(plan: PruningPlan) -> Any:
    """The pruned model's transformers config."""
    values = dict(plan.target_config)
    return AutoConfig.for_model(values.pop("model_type"), **values)


def _portable(config: Any) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    values.pop("_name_or_path", None)  # where the source happened to lie on this machine
    return values


def _best(scores: Tensor, count: int) -> list[int]:
    # A stable sort, so that equal scores (an untouched model) keep the first units, the same on every machine.
    order = torch.sort(scores, descending=True, stable=True).indices[:count]
    indices: list[int] = order.sort().values.tolist()
    return indices


def _merges(scores: Tensor, kept: list[int], source: ModelDims) -> list[list[int]]:
    """Minitron's residual merge: of each group the weakest kept head with the strongest removed one, and so on."""
    per_group = source.num_attention_heads // source.num_key_value_heads
    per_group = source.num_attention_heads if per_group == 1 else per_group
    pairs = []
    for first in range(0, source.num_attention_heads, per_group):
        ranked = torch.sort(scores[first : first + per_group], descending=True, stable=True).indices + first
        staying = [int(head) for head in ranked if int(head) in kept]
        going = [int(head) for head in ranked if int(head) not in kept]
        pairs += [[one, other] for one, other in zip(reversed(staying), going, strict=False)]
    return pairs


def _best_heads(scores: Tensor, source: ModelDims, target: ModelDims) -> tuple[list[int], list[int]]:
    """(query heads, key/value heads) of one layer: the best groups, and in each of them the best query heads."""
    num_groups, num_kept = source.num_key_value_heads, target.num_key_value_heads
    if num_groups == source.num_attention_heads:
        heads = _best(scores, target.num_attention_heads)
        return heads, heads
    per_group = source.num_attention_heads // num_groups
    by_group = scores.view(num_groups, per_group)
    groups = _best(torch.linalg.vector_norm(by_group, dim=1), num_kept)
    heads = [
        group * per_group + head
        for group in groups
        for head in _best(by_group[group], target.num_attention_heads // num_kept)
    ]
    return heads, groups
