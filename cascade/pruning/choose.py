"""Choosing the units that stay: the best-scored of each kind, as many as the target says."""

import json
from typing import Any

import torch
from torch import Tensor

from cascade.models.architecture.dims import ModelDims, config_with_dims
from cascade.models.architecture.sized import Sized
from cascade.pruning.corrections import corrected
from cascade.pruning.importance.scores import Scores
from cascade.pruning.importance.statistics import Statistics
from cascade.pruning.plan import PruningPlan
from cascade.pruning.rotation import require_rotatable, untied
from cascade.pruning.size.shape import solve_shape
from cascade.pruning.size.target import Target


def plan_pruning(
    scores: Scores,
    config: Any,
    target: ModelDims | Target | float,
    *,
    statistics: Statistics | None = None,
    merge_heads: bool = False,
) -> PruningPlan:
    """The plan that keeps the best-scored units of each kind, as many as `target` says.

    Query heads are ranked inside each key/value group and kept equally per group; with as many key/value heads as
    heads, whole heads are ranked. With `statistics` the norms are corrected by the energy that the kept channels
    really carry; without, as if the removed channels carried nothing. A target that is no set of dims (a fraction or
    number of parameters) is solved for first.
    """
    sized = Sized(config)
    source = sized.dims
    if not isinstance(target, ModelDims):
        size = target if isinstance(target, Target) else Target(params=target)
        target = solve_shape(untied(config) if scores.rotation is not None else config, size, parent=config)
    if target.num_attention_heads % target.num_key_value_heads:
        raise ValueError(f"{target.num_attention_heads} heads cannot be split over {target.num_key_value_heads} groups")
    layers = _best(scores.layers, target.num_hidden_layers)
    hidden = _best(scores.hidden, target.hidden_size)
    heads, groups = [], []
    for layer in layers:
        layer_heads, layer_groups = _best_heads(scores.heads[layer], source, target)
        heads.append(layer_heads)
        groups.append(layer_groups)
    pruned_config = config_with_dims(config, target, kept_layers=layers)
    if scores.rotation is not None:
        require_rotatable(sized)
        pruned_config = untied(pruned_config)
    plan = PruningPlan(
        source_dims=source,
        target_dims=target,
        target_config=_portable(pruned_config),
        layers=layers,
        hidden=hidden,
        heads=heads,
        key_value_heads=groups,
        neurons=[_best(scores.neurons[layer], target.intermediate_size) for layer in layers],
        norm_scales={},
        scales={},
        merged_heads=[
            _merges(scores.heads[layer], layer_heads, source) for layer, layer_heads in zip(layers, heads, strict=True)
        ]
        if merge_heads
        else [],
        rotation=scores.rotation,
    )
    return corrected(plan, sized.axes, statistics)


def _portable(config: Any) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    values.pop("_name_or_path", None)  # where the source happened to lie on this machine
    return values


def _best(scores: Tensor, count: int) -> list[int]:
    # A stable sort, so that equal scores (an untouched model) keep the first units, the same on every machine.
    order = torch.sort(scores, descending=True, stable=True).indices[:count]
    indices: list[int] = order.sort().values.tolist()
    return indices


def _merges(scores: Tensor, heads: list[int], source: ModelDims) -> list[list[int]]:
    """Minitron's residual merge: of each group the weakest kept head with the strongest removed one, and so on."""
    per_group = source.num_attention_heads // source.num_key_value_heads
    per_group = source.num_attention_heads if per_group == 1 else per_group
    pairs = []
    for first in range(0, source.num_attention_heads, per_group):
        ranked = torch.sort(scores[first : first + per_group], descending=True, stable=True).indices + first
        staying = [int(head) for head in ranked if int(head) in heads]
        going = [int(head) for head in ranked if int(head) not in heads]
        pairs += [[kept_head, removed_head] for kept_head, removed_head in zip(reversed(staying), going, strict=False)]
    return pairs


def _best_heads(scores: Tensor, source: ModelDims, target: ModelDims) -> tuple[list[int], list[int]]:
    """(query heads, key/value heads) of one layer: the best groups, and in each of them the best query heads."""
    num_groups, num_target_groups = source.num_key_value_heads, target.num_key_value_heads
    if num_groups == source.num_attention_heads:
        heads = _best(scores, target.num_attention_heads)
        return heads, heads
    per_group = source.num_attention_heads // num_groups
    by_group = scores.view(num_groups, per_group)
    groups = _best(torch.linalg.vector_norm(by_group, dim=1), num_target_groups)
    heads = [
        group * per_group + head
        for group in groups
        for head in _best(by_group[group], target.num_attention_heads // num_target_groups)
    ]
    return heads, groups
