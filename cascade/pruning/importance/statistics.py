"""One forward pass over the calibration blocks -> statistics of every kind of unit.

Shapes: L = layers, H = query heads, I = neurons, D = hidden channels, B = batch, S = block size.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cascade.data.blocks import TokenBlocks
from cascade.models.architecture.behaviour import run_body
from cascade.models.architecture.dims import ModelDims
from cascade.models.architecture.sized import Sized
from cascade.pruning.importance.sums import RotatedEnergies, Sums
from cascade.runtime import ranks
from cascade.runtime.errors import UserError


@dataclass(frozen=True)
class Statistics:
    """Statistics of the calibration tokens, float32.

    (L2, mean) is the square root of the sum over batch rows of squared means over the sequence, the best of
    Minitron's nine aggregations (https://arxiv.org/abs/2407.14679, table 11).
    """

    block_influence: Tensor
    """[L]: 1 - cosine(layer input, layer output), mean over tokens; ShortGPT, https://arxiv.org/abs/2403.03853."""
    norm_ratios: Tensor
    """[L]: ||layer output|| / ||layer input||, mean over tokens; Ministral 3, https://arxiv.org/abs/2601.08584."""
    angular_distances: Tensor
    """[L, L + 1]: entry (l, n) is arccos(cosine(input of layer l, input of layer l + n)) / pi at each block's last
    token, mean over blocks; https://arxiv.org/abs/2403.17887. Zero where l + n > L."""
    head_norms: Tensor
    """[L, H]: (L2, mean) of each query head's channels at the input of the attention output projection."""
    head_contributions: Tensor
    """[L, H]: ||(head's output) W_o||_2, mean over tokens; empty where they were not collected."""
    neuron_norms: Tensor
    """[L, I]: (L2, mean) at the input of the MLP's output projection."""
    neuron_weights: Tensor
    """[L, I]: ||W_down[:, i]||_2, the length of what each neuron writes."""
    hidden_norms: Tensor
    """[R, D]: (L2, mean) of what attention and MLPs read: R = outputs of the norms inside the layers, or the stream
    itself where no norm stands before them."""
    norm_energies: dict[str, Tensor]
    """By norm weight, [its length]: mean over tokens of x_d^2 / mean(x^2), x = the norm's input (less its mean where
    the norm takes it off). Each adds up to its length."""
    rotation: Tensor
    """[D, D] float64: the principal axes of what the norms inside the layers see, as columns, largest variance first;
    every token counts equally. Empty where it was not computed."""
    rotated_energies: dict[str, Tensor]
    """norm_energies with x in the rotated stream; empty without a rotation."""
    num_tokens: int
    """Number of calibration tokens."""


def collect_statistics(
    model: nn.Module,
    blocks: TokenBlocks,
    *,
    batch_size: int = 8,
    head_contributions: bool = False,
    covariance_blocks: int = 0,
    device: torch.device | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> Statistics:
    """All statistics from one forward pass of the model's body (without its head).

    The stream's covariance, which costs a matrix product per norm, is taken on `covariance_blocks` blocks; the energies
    along its principal axes then take a second pass over those. `device` is where the model computes, if not where its
    weights are (`offloaded`). Several processes share the blocks; each gets the whole statistics.

    Raises:
        UserError: the architecture's axes cannot be explained.
        UserError: an activation is not finite; the message names the layer.
    """
    sized = Sized(model.config)
    sums = Sums(model, sized.axes, head_contributions)
    device = device or next(model.parameters()).device
    batches = blocks.split(batch_size)
    with torch.inference_mode(), sums.hooked():
        for number, part in enumerate(batches):
            sums.second_moments, sums.batch_size = number * batch_size < covariance_blocks, len(part)
            if number % ranks.world_size() == ranks.rank():
                run_body(model, **part.inputs(device))
            if on_batch is not None:
                on_batch(number + 1, len(batches))
    sums.sums = ranks.sum_tensors(sums.sums)
    sums.complete_lengths()
    _require_finite(sums)
    rotation = torch.zeros(0, 0, dtype=torch.float64)
    rotated: dict[str, Tensor] = {}
    if covariance_blocks:
        rotation = sums.principal_axes()
        turned = RotatedEnergies(model, sums.norms, rotation)
        with torch.inference_mode(), turned.hooked():
            for part in batches[ranks.rank() : -(-covariance_blocks // batch_size) : ranks.world_size()]:
                run_body(model, **part.inputs(device))
        turned.sums = ranks.sum_tensors(turned.sums)
        rotated = turned.finish()
    return _statistics(sums, rotation, rotated, sized.dims, blocks.input_ids.numel(), len(blocks))


_BY_NORM = ("norm_energies", "rotated_energies")


def save_statistics(statistics: Statistics, path: Path) -> None:
    """Write the statistics as one safetensors file."""
    tensors = {field.name: getattr(statistics, field.name) for field in fields(statistics) if field.type is Tensor}
    for kind in _BY_NORM:
        tensors |= {f"{kind}.{name}": tensor for name, tensor in getattr(statistics, kind).items()}
    metadata = {"num_tokens": str(statistics.num_tokens)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)


def load_statistics(path: Path) -> Statistics:
    """The statistics that `save_statistics` wrote."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        num_tokens = int(file.metadata()["num_tokens"])
    by_norm: dict[str, dict[str, Tensor]] = {kind: {} for kind in _BY_NORM}
    for name in list(tensors):
        kind, _, norm = name.partition(".")
        if kind in by_norm:
            by_norm[kind][norm] = tensors.pop(name)
    energies, rotated = (by_norm[kind] for kind in _BY_NORM)
    return Statistics(**tensors, norm_energies=energies, rotated_energies=rotated, num_tokens=num_tokens)


def _require_finite(sums: Sums) -> None:
    """Refuse sums that are not finite.

    Raises:
        UserError: names the first such module in the order of the forward pass: there the trouble starts.
    """
    for name, values in sums.sums.items():
        if not name.startswith("covariance") and not torch.isfinite(values).all():
            where = name.partition(":")[2]
            raise UserError(f"activations at '{where}' are not finite; the model or its calibration text is broken")


def _statistics(
    collected: Sums, rotation: Tensor, rotated: dict[str, Tensor], dims: ModelDims, num_tokens: int, num_blocks: int
) -> Statistics:
    sums, depth = collected.sums, dims.num_hidden_layers
    neurons, heads = collected.writers["intermediate_size"], collected.writers["num_attention_heads"]
    head_norms = torch.stack([sums[f"norm:{name}"].sqrt() for name in heads]).view(depth, -1, dims.head_dim)
    contributions = [sums[f"contribution:{name}"] / num_tokens for name in heads if collected.head_contributions]
    return Statistics(
        block_influence=1 - collected.per_layer("cosine") / num_tokens,
        norm_ratios=collected.per_layer("ratio") / num_tokens,
        angular_distances=collected.per_layer("angle") / num_blocks,
        head_norms=torch.linalg.vector_norm(head_norms, dim=2).float(),
        head_contributions=torch.stack(contributions).float() if contributions else torch.zeros(0),
        neuron_norms=torch.stack([sums[f"norm:{name}"].sqrt() for name in neurons]).float(),
        neuron_weights=torch.stack([collected.lengths[name] for name in neurons]),
        hidden_norms=torch.stack(
            [sums[f"norm:{name}"].sqrt() for name in collected.read_norms + collected.bare_readers]
        ).float(),
        norm_energies={name: (sums[f"energy:{name}"] / num_tokens).float() for name in collected.norms},
        rotation=rotation,
        rotated_energies=rotated,
        num_tokens=num_tokens,
    )
