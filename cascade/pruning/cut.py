"""The cut: new config -> empty model -> each weight sliced along its axes -> strict load. Nothing is patched."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from cascade.models.architecture.axes import ModelAxes
from cascade.models.architecture.model_class import model_from_config
from cascade.models.architecture.parts import Axis
from cascade.models.architecture.sized import Sized
from cascade.pruning.plan import PruningPlan, config_of
from cascade.pruning.rotation import rotated_weight


def prune(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """A new, smaller model with the units that the plan keeps; the argument is untouched.

    Raises:
        UserError: a weight has an axis that nobody explains.
        ValueError: the plan is for a model of another size.
    """
    sized = Sized(model.config)
    axes = sized.axes
    if sized.dims != plan.source_dims:
        raise ValueError(f"the plan is for {plan.source_dims}, the model has {sized.dims}")
    with no_init_weights():
        pruned = model_from_config(config_of(plan), dtype=next(model.parameters()).dtype)
    weights = dict(model.named_parameters())
    ours = {value.data_ptr() for value in model.state_dict().values()}
    tensors: dict[str, Tensor] = {}
    rows: dict[Any, Tensor | None] = {}
    for name, weight in weights.items():
        new_name = renumbered(name, axes, plan)
        if new_name is not None:
            tensors[new_name] = cut_weight(name, weight.detach(), axes, plan, model.get_parameter, rows)
    for name, value in model.state_dict().items():
        new_name = renumbered(name, axes, plan)
        if name in weights or new_name is None:
            continue
        if name in axes.tied and plan.rotation is not None and name.endswith(".weight"):
            tensors[new_name] = cut_weight(name, value.detach(), axes, plan, model.get_parameter, rows)
        else:
            tensors[new_name] = tensors[axes.tied[name]] if name in axes.tied else value
    # The model's own, and not copies: weights that are cut along no axis are still the parent's here.
    tensors = {name: value.clone() if value.data_ptr() in ours else value for name, value in tensors.items()}
    pruned.load_state_dict(tensors, strict=True, assign=True)
    pruned.tie_weights()
    pruned.generation_config = getattr(model, "generation_config", None)
    result: nn.Module = pruned.to(next(model.parameters()).device).eval()
    return result


def cut_weight(
    name: str,
    weight: Tensor,
    axes: ModelAxes,
    plan: PruningPlan,
    weight_of: Callable[[str], Tensor],
    known_rows: dict[Any, Tensor | None] | None = None,
) -> Tensor:
    """The kept rows of one weight along every axis, rotated before and corrected after where the plan says so.

    `weight_of` gives other weights of the same model by name: a rotation folds norms into what reads them.
    `known_rows` keeps what one weight has in common with others, from call to call.
    """
    if plan.rotation is not None:
        weight = rotated_weight(name, weight, axes, plan.rotation, weight_of)
    weight = _with_merged_heads(name, weight, axes, plan)
    for position, axis in enumerate(axes.of(axes.tied.get(name, name))):
        key = (axis, axes.layer_of(name))
        rows = known_rows[key] if known_rows and key in known_rows else kept_rows(*key, plan)
        if known_rows is not None:
            known_rows[key] = rows
        if rows is not None:
            weight = weight.index_select(position, rows.to(weight.device))
    dtype = weight.dtype
    if name in plan.norm_scales:
        zero_centred = axes.behaviour.norms[axes.module_of(name)].zero_centred
        scaled = weight.float() * plan.norm_scales[name]
        weight = (scaled + (plan.norm_scales[name] - 1) if zero_centred else scaled).to(dtype)
    if name in plan.scales:
        weight = (weight.float() * plan.scales[name]).to(dtype)
    return weight


def _with_merged_heads(name: str, weight: Tensor, axes: ModelAxes, plan: PruningPlan) -> Tensor:
    """2 x kept - removed in a head's rows (queries only where groups share keys and values).

    Minitron, https://arxiv.org/abs/2407.14679, section 2.3.
    """
    layer = axes.layer_of(name)
    if not plan.merged_heads or layer not in plan.layers or axes.module_of(name) not in axes.behaviour.readers:
        return weight
    position, source = axes.output_axis(name) or 0, plan.source_dims
    merging = {"num_attention_heads"}
    if source.num_key_value_heads == source.num_attention_heads:
        merging.add("num_key_value_heads")
    merged, offset = weight.clone(), 0
    for part in axes.of(name)[position].parts:
        rows = part.rows_per_unit(source)
        if part.dim in merging:
            for pair in plan.merged_heads[plan.layers.index(layer)]:
                staying, removed = (weight.narrow(position, offset + head * rows, rows) for head in pair)
                merged.narrow(position, offset + pair[0] * rows, rows).copy_(2 * staying - removed)
        offset += int(part.length(source))
    return merged


def kept_rows(axis: Axis, layer: int | None, plan: PruningPlan) -> Tensor | None:
    """The rows that stay along one axis of a weight of a (kept) layer; None if all do.

    Raises:
        ValueError: heads or neurons outside the layers.
    """
    rows_of_parts, offset, whole = [], 0, True
    for part in axis.parts:
        length = int(part.length(plan.source_dims))
        units = plan.units(part.dim, layer)
        if units is None:
            rows_of_parts.append(torch.arange(offset, offset + length))
        else:
            whole = False
            rows = part.rows_per_unit(plan.source_dims)
            rows_of_parts.append((torch.tensor(units)[:, None] * rows + torch.arange(rows)).flatten() + offset)
        offset += length
    return None if whole else torch.cat(rows_of_parts)


def renumbered(name: str, axes: ModelAxes, plan: PruningPlan) -> str | None:
    """The parameter's name in the pruned model; None if its layer is dropped."""
    layer = axes.layer_of(name)
    if layer is None:
        return name
    if layer not in plan.layers:
        return None
    prefix = axes.layers_prefix
    return f"{prefix}.{plan.layers.index(layer)}." + name.removeprefix(f"{prefix}.{layer}.")
