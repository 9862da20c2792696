"""A plan says exactly what stays: readable JSON, made from scores, without any weight.

Shapes: L = layers, H = query heads, I = neurons, D = hidden channels.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from cascade.importance.scores import Scores
from cascade.importance.statistics import Statistics
from cascade.models.axes import probe_axes
from cascade.models.dims import ModelDims, config_with_dims, dims_of
from cascade.pruning.shape import Target, solve_shape

PLAN_FORMAT = 1


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
    """Factor on each norm's weight, by the source's parameter name: the shorter vector has another mean square."""


def plan_pruning(
    scores: Scores, config: Any, target: ModelDims | Target | float, *, statistics: Statistics | None = None
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
        target = solve_shape(config, wanted, parent_parameters=int(probe_axes(config).num_parameters(source)))
    layers = _best(scores.layers, target.num_hidden_layers)
    hidden = _best(scores.hidden, target.hidden_size)
    whole_heads = source.num_key_value_heads == source.num_attention_heads
    heads = [
        _best(scores.heads[layer], target.num_attention_heads)
        if whole_heads
        else _best_in_groups(scores.heads[layer], source.num_key_value_heads, target.num_attention_heads)
        for layer in layers
    ]
    all_groups = list(range(source.num_key_value_heads))
    scales = _norm_scales(config, hidden, statistics) if len(hidden) < source.hidden_size else {}
    target_config = config_with_dims(config, target, kept_layers=layers)
    if scales and _norms_share_no_epsilon(config):
        # Exact where the removed channels carry nothing: the mean over fewer channels is larger by the same factor.
        target_config.rms_norm_eps *= source.hidden_size / target.hidden_size
    return PruningPlan(
        source_dims=source,
        target_dims=target,
        target_config=_portable(target_config),
        layers=layers,
        hidden=hidden,
        heads=heads,
        key_value_heads=heads if whole_heads else [all_groups for _ in layers],
        neurons=[_best(scores.neurons[layer], target.intermediate_size) for layer in layers],
        norm_scales=scales,
    )


def save_plan(plan: PruningPlan, path: Path) -> None:
    """JSON with the summary first and one line per list of indices."""
    record: dict[str, Any] = {"format": PLAN_FORMAT} | {
        name: value.as_dict() if isinstance(value, ModelDims) else value for name, value in vars(plan).items()
    }
    lines = []
    for name, value in record.items():
        if name in ("heads", "key_value_heads", "neurons"):
            rows = ",\n    ".join(json.dumps(row) for row in value)
            lines.append(f"  {json.dumps(name)}: [\n    {rows}\n  ]")
        elif isinstance(value, dict):
            lines.append(f"  {json.dumps(name)}: " + json.dumps(value, indent=2).replace("\n", "\n  "))
        else:
            lines.append(f"  {json.dumps(name)}: {json.dumps(value)}")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def load_plan(path: Path) -> PruningPlan:
    """What `save_plan` wrote."""
    record = json.loads(path.read_text())
    if record.pop("format") != PLAN_FORMAT:
        raise ValueError(f"{path}: written in another plan format; make the plan again")
    for name in ("source_dims", "target_dims"):
        record[name] = ModelDims(**record[name])
    return PruningPlan(**record)


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
    return [int(index) for index in order.sort().values]


def _best_in_groups(scores: Tensor, num_groups: int, count: int) -> list[int]:
    per_group = scores.numel() // num_groups
    kept = [_best(group, count // num_groups) for group in scores.view(num_groups, per_group)]
    return [group * per_group + head for group, heads in enumerate(kept) for head in heads]


def _norm_scales(config: Any, hidden: list[int], statistics: Statistics | None) -> dict[str, float]:
    """sqrt(mean energy of the kept channels), all channels' mean being 1; sqrt(D / D') if only they carry any."""
    source = dims_of(config)
    if statistics is not None:
        energies = statistics.norm_energies[:, hidden].double().mean(1)
        return {name: float(e.sqrt()) for name, e in zip(statistics.norm_names, energies, strict=True)}
    ratio = (source.hidden_size / len(hidden)) ** 0.5
    axes = probe_axes(config)
    names = [name for name in axes.weights if axes.is_norm(name)]
    return {
        name.replace("*", str(layer)): ratio
        for name in names
        for layer in (range(source.num_hidden_layers) if "*" in name else [0])
    }


def _norms_share_no_epsilon(config: Any) -> bool:
    """Whether every norm weight spans the hidden size, so that the config's epsilon is theirs alone."""
    vectors = [axes[0] for name, axes in probe_axes(config).weights.items() if len(axes) == 1 and "norm" in name]
    return hasattr(config, "rms_norm_eps") and all(axis.dim == "hidden_size" for axis in vectors)
