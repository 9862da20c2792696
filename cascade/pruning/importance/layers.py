"""Scores of whole layers: one float32 number each, higher = keep. Each function can be named in a recipe.

Shapes: L = layers, B = batch, S = block size, V = vocabulary.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cascade.data.blocks import IGNORE_INDEX, TokenBlocks
from cascade.models.architecture.axes import probe_axes
from cascade.pruning.importance.statistics import Statistics


def block_influence(statistics: Statistics) -> Tensor:
    """[L]: 1 - cosine(layer input, layer output); ShortGPT, https://arxiv.org/abs/2403.03853."""
    return statistics.block_influence


def norm_ratio(statistics: Statistics) -> Tensor:
    """[L]: ||output|| / ||input||; Ministral 3, https://arxiv.org/abs/2601.08584, algorithm 2."""
    return statistics.norm_ratios


def removal_loss(model: nn.Module, blocks: TokenBlocks, batch_size: int = 8) -> Tensor:
    """[L]: the cross-entropy in nats per token without the layer; Minitron, https://arxiv.org/abs/2407.14679."""
    depth = len(_layers(model))
    return torch.tensor([_loss(model, blocks, [layer], batch_size) for layer in range(depth)])


def removal_logits(model: nn.Module, blocks: TokenBlocks, batch_size: int = 8) -> Tensor:
    """[L]: 0 for the layer that is removed first, L - 1 for the last one left.

    Each time the layer goes whose removal changes the full model's logits least, in squared error over their squared
    norm; Nemotron Elastic, https://arxiv.org/abs/2511.16664, equation 5, repeated after each removal.
    """
    depth = len(_layers(model))
    remaining, order = list(range(depth)), []
    while len(remaining) > 1:
        removed = [layer for layer in range(depth) if layer not in remaining]
        errors = {layer: _logit_error(model, blocks, [*removed, layer], batch_size) for layer in remaining}
        order.append(min(errors, key=lambda layer: errors[layer]))
        remaining.remove(order[-1])
    ranks = torch.empty(depth)
    ranks[torch.tensor(order + remaining)] = torch.arange(depth, dtype=torch.float32)
    return ranks


def contiguous_angle(statistics: Statistics, num_removed: int) -> Tensor:
    """[L]: 0 for the `num_removed` neighbours between whose ends the stream turns least, 1 for the others.

    Gromov et al., https://arxiv.org/abs/2403.17887.
    """
    depth = len(statistics.block_influence)
    starts = statistics.angular_distances[: depth - num_removed + 1, num_removed]
    return _without(depth, int(starts.argmin()), num_removed)


def contiguous_loss(model: nn.Module, blocks: TokenBlocks, num_removed: int, batch_size: int = 8) -> Tensor:
    """[L]: 0 for the `num_removed` neighbours without which the cross-entropy is lowest, 1 for the others."""
    depth = len(_layers(model))
    losses = [
        _loss(model, blocks, range(start, start + num_removed), batch_size) for start in range(depth - num_removed + 1)
    ]
    return _without(depth, int(torch.tensor(losses).argmin()), num_removed)


@contextmanager
def skipped(model: nn.Module, layers: Iterable[int]) -> Iterator[None]:
    """Let the model run without some of its layers inside."""
    handles = [_layers(model)[layer].register_forward_hook(_pass_through, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pass_through(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    inputs = args[0] if args else kwargs["hidden_states"]
    return (inputs, *output[1:]) if isinstance(output, tuple) else inputs


def _layers(model: nn.Module) -> list[nn.Module]:
    return list(model.get_submodule(probe_axes(model.config).layers_prefix).children())


def _without(depth: int, start: int, count: int) -> Tensor:
    """[L]: 0 for `count` neighbouring layers from `start` on, 1 for the others."""
    scores = torch.ones(depth)
    scores[start : start + count] = 0
    return scores


@torch.inference_mode()
def _loss(model: Any, blocks: TokenBlocks, without: Iterable[int], batch_size: int) -> float:
    """The cross-entropy in nats per token without some layers."""
    device, total, count = next(model.parameters()).device, 0.0, 0
    with skipped(model, without):
        for part in blocks.split(batch_size):
            logits = part.predicting(model(**part.inputs(device), use_cache=False).logits).float().flatten(0, 1)
            targets = part.targets().to(device).flatten()
            loss = nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
            total += float(loss)
            count += int((targets != IGNORE_INDEX).sum())
    return total / count


@torch.inference_mode()
def _logit_error(model: Any, blocks: TokenBlocks, without: Iterable[int], batch_size: int) -> float:
    """The squared error of the logits without some layers, as a share of the full model's squared logits."""
    device, missed, energy = next(model.parameters()).device, 0.0, 0.0
    for part in blocks.split(batch_size):
        full = model(**part.inputs(device), use_cache=False).logits.float()
        with skipped(model, without):
            cut = model(**part.inputs(device), use_cache=False).logits.float()
        missed += float((full - cut).square().sum())
        energy += float(full.square().sum())
    return missed / energy
