"""The cut: new config -> empty model -> each weight sliced along its axes -> strict load. Nothing is patched."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from cascade.models.axes import Axis, ModelAxes, probe_axes
from cascade.models.dims import dims_of
from cascade.pruning.plan import PruningPlan, config_of


def prune(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """A new, smaller model with the units that the plan keeps; the argument is untouched.

    Raises:
        UserError: a weight has an axis that nobody explains.
        ValueError: the plan is for a model of another size.
    """
    axes = probe_axes(model.config)
    if dims_of(model.config) != plan.source_dims:
        raise ValueError(f"the plan is for {plan.source_dims}, the model has {dims_of(model.config)}")
    with no_init_weights():
        pruned: Any = AutoModelForCausalLM.from_config(config_of(plan), dtype=next(model.parameters()).dtype)
    weights = dict(model.named_parameters())
    tensors: dict[str, Tensor] = {}
    for name, weight in weights.items():
        new_name = _renumbered(name, axes, plan)
        if new_name is not None:
            tensors[new_name] = cut_weight(name, weight.detach(), axes, plan)
    for name, value in model.state_dict().items():
        if name not in weights:
            tensors[name] = _tied_or_buffer(name, value, weights, tensors)
    pruned.load_state_dict(tensors, strict=True)
    pruned.tie_weights()
    pruned.generation_config = getattr(model, "generation_config", None)
    result: nn.Module = pruned.to(next(model.parameters()).device).eval()
    return result


def cut_weight(name: str, weight: Tensor, axes: ModelAxes, plan: PruningPlan) -> Tensor:
    """The kept rows of one weight along every axis, times the norm's correction where it is a norm."""
    for position, axis in enumerate(axes.of(name)):
        rows = _kept_rows(axis, axes.layer_of(name), plan)
        if rows is not None:
            weight = weight.index_select(position, rows.to(weight.device))
    scale = plan.norm_scales.get(name)
    return weight if scale is None else (weight.float() * scale).to(weight.dtype)


def _kept_rows(axis: Axis, layer: int | None, plan: PruningPlan) -> Tensor | None:
    if axis.dim is None or axis.dim in ("vocab_size", "head_dim"):
        return None
    units = plan.hidden
    if axis.dim != "hidden_size":
        per_layer = {
            "num_attention_heads": plan.heads,
            "num_key_value_heads": plan.key_value_heads,
            "intermediate_size": plan.neurons,
        }
        if layer is None:
            raise ValueError(f"an axis along {axis.dim} outside the layers")
        units = per_layer[axis.dim][plan.layers.index(layer)]
    rows = plan.source_dims.head_dim if axis.rows_per_unit == "head_dim" else int(axis.rows_per_unit)
    return (torch.tensor(units)[:, None] * rows + torch.arange(rows)).flatten()


def _renumbered(name: str, axes: ModelAxes, plan: PruningPlan) -> str | None:
    """The parameter's name in the pruned model; None if its layer is dropped."""
    layer = axes.layer_of(name)
    if layer is None:
        return name
    if layer not in plan.layers:
        return None
    prefix = axes.layers_prefix
    return f"{prefix}.{plan.layers.index(layer)}." + name.removeprefix(f"{prefix}.{layer}.")


def _tied_or_buffer(name: str, value: Tensor, weights: dict[str, Any], cut: dict[str, Tensor]) -> Tensor:
    for other, weight in weights.items():
        if weight.data_ptr() == value.data_ptr():
            return cut[other]
    return value
