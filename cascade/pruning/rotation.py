"""The stream turned into its principal axes before channels are cut: every weight that touches it turns along.

SliceGPT, https://arxiv.org/abs/2401.15024; one rotation for the whole network as in Ministral 3,
https://arxiv.org/abs/2601.08584. Norm weights are folded into what reads them first, as a norm with unit weights does
not mind a rotation. For a square rotation the model stays exactly what it was.

Shapes: D = hidden channels.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cascade.models.architecture.axes import ModelAxes
from cascade.models.architecture.sized import Sized
from cascade.runtime.errors import UserError


def require_rotatable(sized: Sized) -> None:
    """Refuse a stream that cannot be rotated.

    Raises:
        UserError: a norm subtracts a mean, or stands between a branch and the stream; it is named.
    """
    for name, norm in sized.axes.behaviour.norms.items():
        if sized.axes.weights[f"{name}.weight"][0].dim != "hidden_size":
            continue
        reason = ""
        if norm.centres:
            reason = "subtracts the mean over channels, which a rotation does not keep"
        elif norm.writes_stream:
            reason = "multiplies what a branch writes to the stream channel by channel, which cannot be folded"
        if reason:
            raise UserError(
                f"model type '{sized.config.model_type}' cannot be rotated (prune.hidden: pca): its norm '{name}' "
                f"{reason}. Use prune.hidden: activation_norm"
            )


def untied(config: Any) -> Any:
    """The config with an output head of its own: the final norm's weight is folded into the head, not the embedding."""
    changed = copy.deepcopy(config)
    changed.tie_word_embeddings = False
    return changed


def rotated_weight(
    name: str, weight: Tensor, axes: ModelAxes, rotation: Tensor, weight_of: Callable[[str], Tensor]
) -> Tensor:
    """A parameter after the rotation x -> x Q of the stream; `weight_of` gives others of the same model by name.

    `rotation` is Q [D, D], orthogonal. A head that is tied to the embedding goes by its own name.
    """
    template = axes.template(name)
    module = axes.module_of(name)
    norm = axes.behaviour.norms.get(module)
    dims = [axis.dim for axis in axes.weights[axes.tied.get(template, template)]]
    if "hidden_size" not in dims:
        return weight
    if norm is not None:
        return torch.full_like(weight, 0.0 if norm.zero_centred else 1.0)
    turn = rotation.double().to(weight.device)
    is_head = template in axes.tied
    if len(dims) == 1 or (module in axes.behaviour.lookups and not is_head):
        return _by_slabs(weight, lambda rows: rows @ turn)
    output = 0 if is_head else axes.output_axis(name)
    straight = weight if output == 0 else weight.T
    if (dims[1] if output == 0 else dims[0]) == "hidden_size":
        gain = _gain(name, axes, weight_of)
        turned = _by_slabs(straight, lambda rows: (rows * gain) @ turn)
    else:
        turned = _by_slabs(straight.T, lambda rows: rows @ turn).T
    return turned if output == 0 else turned.T


def _by_slabs(weight: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """`change` of a few rows at a time, in float64, so that no second copy of a large weight is ever needed."""
    if weight.ndim == 1:
        return change(weight.double()).to(weight.dtype)
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for start in range(0, len(weight), _SLAB):
        result[start : start + _SLAB] = change(weight[start : start + _SLAB].double()).to(weight.dtype)
    return result


_SLAB = 1024


def _gain(name: str, axes: ModelAxes, weight_of: Callable[[str], Tensor]) -> Tensor:
    """What the norm before a reader of the stream multiplies by; 1 where none stands there."""
    layer = axes.layer_of(name)
    if layer is not None:
        norm = axes.behaviour.reads_through.get(axes.module_of(name))
    else:
        outside = [key for key, norm in axes.behaviour.norms.items() if "*" not in key and not norm.writes_stream]
        norm = outside[0] if outside else None
    if norm is None:
        return torch.ones((), dtype=torch.float64)
    gain = weight_of(f"{norm}.weight".replace("*", str(layer))).detach().double()
    return gain + 1 if axes.behaviour.norms[norm].zero_centred else gain
