"""Scores of neurons from the loss's gradients, by torch-pruning's group-aware criteria.

torch-pruning's own graph is not traced (minutes on a large model): the groups come from the probed axes.

Shapes: L = layers, I = neurons.
"""

from types import SimpleNamespace
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn

from cascade.data.blocks import IGNORE_INDEX, TokenBlocks
from cascade.models.architecture.axes import ModelAxes, probe_axes
from cascade.models.architecture.dims import dims_of

_NEURONS = "intermediate_size"


def taylor(model: nn.Module, blocks: TokenBlocks, batch_size: int = 8) -> Tensor:
    """[L, I]: sum over a neuron's weights of |weight x gradient of the loss|; Molchanov et al., CVPR 2019."""
    return _neuron_scores(model, blocks, batch_size, squared=False)


def hessian(model: nn.Module, blocks: TokenBlocks, batch_size: int = 1) -> Tensor:
    """[L, I]: sum over a neuron's weights of weight^2 x mean squared gradient; optimal brain damage, LeCun et al. 1989.

    The mean is over batches, by default of one block each. torch-pruning's own accumulator keeps the last sample only
    (1.6.1), so the sums are taken here.
    """
    return _neuron_scores(model, blocks, batch_size, squared=True)


def _neuron_scores(model: nn.Module, blocks: TokenBlocks, batch_size: int, *, squared: bool) -> Tensor:
    """[L, I] by torch-pruning's Taylor criterion, or with `squared` its Hessian criterion; no gradients are left."""
    axes = probe_axes(model.config)
    neuron_weights = {name: weight for name, weight in model.named_parameters() if _places(name, axes, _NEURONS)}
    required_grad = {name: weight.requires_grad for name, weight in model.named_parameters()}
    try:
        for name, weight in model.named_parameters():
            weight.requires_grad_(name in neuron_weights)
        sums = _summed_gradients(model, neuron_weights, blocks, batch_size, squared)
        for name, weight in neuron_weights.items():
            weight.grad = sums[name].to(weight.dtype)
        criterion = (
            torch_pruning.importance.GroupHessianImportance
            if squared
            else torch_pruning.importance.GroupTaylorImportance
        )
        # Not divided by each layer's mean: neurons are compared inside a layer only, and raw values can be read.
        score = criterion(group_reduction="sum", normalizer=None)
        depth = len(list(model.get_submodule(axes.layers_prefix).children()))
        return torch.stack([score(group_of(model, axes, _NEURONS, layer)).float().cpu() for layer in range(depth)])
    finally:
        for name, weight in model.named_parameters():
            weight.requires_grad_(required_grad[name])
            weight.grad = None


def _summed_gradients(
    model: Any, weights: dict[str, nn.Parameter], blocks: TokenBlocks, batch_size: int, squared: bool
) -> dict[str, Tensor]:
    sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    batches = blocks.split(batch_size)
    device = next(model.parameters()).device
    for part in batches:
        logits = part.predicting(model(**part.inputs(device), use_cache=False).logits).float().flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, part.targets().to(device).flatten(), ignore_index=IGNORE_INDEX)
        gradients = torch.autograd.grad(loss, list(weights.values()))
        for total, gradient in zip(sums.values(), gradients, strict=True):
            total += gradient.float().square() if squared else gradient.float()
    return {name: total / len(batches) for name, total in sums.items()}


def _places(name: str, axes: ModelAxes, dim: str) -> list[tuple[int, int]]:
    """(axis, part) of each run of a dimension's units along a matrix's axes."""
    if axes.output_axis(name) is None:
        return []
    return [
        (position, number)
        for position, axis in enumerate(axes.of(name))
        for number, part in enumerate(axis.parts)
        if part.dim == dim
    ]


class _GroupEntry(tuple[Any, list[int]]):
    """An entry of a group as torch-pruning's criteria read it: (dependency, indices), and the root's indices."""

    root_idxs: list[int]


def group_of(model: nn.Module, axes: ModelAxes, dim: str, layer: int | None) -> list[Any]:
    """The matrices that share the units of a dimension (of one layer), as torch-pruning's criteria take a group."""
    group: list[Any] = []
    dims = dims_of(model.config)
    for name, weight in model.named_parameters():
        if layer is not None and axes.layer_of(name) != layer:
            continue
        for position, number in _places(name, axes, dim):
            parts = axes.of(name)[position].parts
            start = sum(int(part.length(dims)) for part in parts[:number])
            count = int(parts[number].length(dims))
            # A view of the weight as nn.Linear keeps it: [output, input].
            module = nn.Linear(1, 1, bias=False)
            straight = axes.output_axis(name) == 0
            module.weight = nn.Parameter((weight if straight else weight.T).detach(), requires_grad=True)
            if weight.grad is not None:
                module.weight.grad = weight.grad if straight else weight.grad.T
            is_output = position == axes.output_axis(name)
            handler = torch_pruning.prune_linear_out_channels if is_output else torch_pruning.prune_linear_in_channels
            node = SimpleNamespace(module=module)
            # torch-pruning has two names for each of these.
            dependency = SimpleNamespace(target=node, layer=module, handler=handler, pruning_fn=handler)
            entry = _GroupEntry((dependency, list(range(start, start + count))))
            entry.root_idxs = list(range(count))
            group.append(entry)
    return group
