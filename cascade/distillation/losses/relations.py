"""Attention relations from the outputs of the projections: softmax of their scaled products, as in MiniLM.

https://arxiv.org/abs/2002.10957, and relation heads as in https://arxiv.org/abs/2012.15828.

Shapes: B = batch, S = block size, R = relation heads, W = width of all heads together.
"""

import re
from collections.abc import Sequence
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cascade.models.architecture.dims import ModelDims
from cascade.models.architecture.sized import Sized
from cascade.runtime.errors import UserError


def fitting_heads(heads: int | None, dims: Sequence[ModelDims]) -> int:
    """Relation heads for models of these dims, the student's first: `heads`, or with None the most that fit.

    Raises:
        UserError: `heads` does not divide every projection's width.
    """
    counts = [count for model in dims for count in (model.num_attention_heads, model.num_key_value_heads)]
    head_dims = [model.head_dim for model in dims for _ in range(2)]
    widths = [count * head_dim for count, head_dim in zip(counts, head_dims, strict=True)]
    common = gcd(*widths)
    fitting = [count for count in range(1, common + 1) if common % count == 0]
    if heads is None:
        return max(count for count in fitting if count <= dims[0].num_attention_heads)
    if heads not in fitting:
        raise UserError(
            f"relation_heads: {heads} does not divide the widths of the projections "
            f"({', '.join(map(str, sorted(set(widths))))}); possible: {', '.join(map(str, fitting))}"
        )
    return heads


_NAMES = {"q": r"q|query|q_proj|q_lin|wq", "k": r"k|key|k_proj|k_lin|wk", "v": r"v|value|v_proj|v_lin|wv"}
"""The names that architectures give their projections, as patterns."""


def attention_projections(model: Any, layer: int) -> list[tuple[nn.Module, list[tuple[str, int, int]]]]:
    """(module, [(q, k or v; rows of a unit; units)]) of a layer, in the order of its rows.

    With one unit list for all three, each unit has its rows of q, k and v one after another.

    Raises:
        UserError: a projection is missing.
    """
    sized = Sized(model.config)
    axes, dims = sized.axes, sized.dims
    prefix = f"{axes.layers_prefix}.{layer}."
    projections: list[tuple[nn.Module, list[tuple[str, int, int]]]] = []
    for name, _ in model.named_parameters():
        output = axes.output_axis(name) if name.startswith(prefix) else None
        if output is None or axes.module_of(name) not in axes.behaviour.readers:
            continue
        parts, module = axes.of(name)[output].parts, model.get_submodule(name.rpartition(".")[0])
        if any(part.dim not in ("num_attention_heads", "num_key_value_heads") for part in parts):
            continue
        rows = [(part.rows_per_unit(dims), int(getattr(dims, str(part.dim)))) for part in parts]
        if len(parts) == 3:
            projections.append((module, [(letter, *size) for letter, size in zip("qkv", rows, strict=True)]))
        elif parts[0].rows_per_unit(dims) == 3 * dims.head_dim:
            projections.append((module, [("qkv", *rows[0])]))
        else:
            module_name = name.split(".")[-2]
            letters = [letter for letter, pattern in _NAMES.items() if re.fullmatch(pattern, module_name)]
            if letters:
                projections.append((module, [(letters[0], *rows[0])]))
    known = "".join(letter for _, parts in projections for letter, _, _ in parts)
    if sorted(known) != list("kqv"):
        raise UserError(
            f"distill.features.relations: model type '{model.config.model_type}': its projections of queries, keys and "
            f"values are not all known by name (found: {known or 'none'})"
        )
    return projections


def splitting(parts: Sequence[tuple[str, int, int]], into: dict[str, Tensor]) -> Any:
    """A hook that takes a projection's output [B, S, rows] apart into q, k and v [B, S, W]."""

    def hook(_: nn.Module, __: Any, output: Tensor) -> None:
        start = 0
        for letters, rows, units in parts:
            piece = output[..., start : start + rows * units]
            start += rows * units
            if len(letters) == 1:
                into[letters] = piece
                continue
            by_unit = piece.unflatten(-1, (units, 3, rows // 3))
            for number, letter in enumerate(letters):
                into[letter] = by_unit[..., number, :].flatten(-2)

    return hook


def relation_loss(
    ours: list[Tensor], theirs: list[Tensor], heads: int, counted_BS: Tensor, allowed_BSS: Tensor
) -> Tensor:
    """KL of the teacher's relations from the student's, summed over tokens, averaged over heads; one head at a time."""
    split = [[states.unflatten(-1, (heads, -1)) for states in pair] for pair in (ours, theirs)]
    total = ours[0].new_zeros((), dtype=torch.float32)
    for head in range(heads):
        pairs = [states[..., head, :] for pair in split for states in pair]
        total = total + checkpoint(_relation_kl, *pairs, counted_BS, allowed_BSS, use_reentrant=False)
    return total / heads


def sides(projections: dict[str, Tensor], name: str, head_dim: int) -> list[Tensor]:
    """Both sides of a relation, [B, S, W]; keys are repeated for every query head that shares them."""
    pair = [projections[letter] for letter in name]
    width = max(states.shape[-1] for states in pair)
    return [
        states.unflatten(-1, (-1, head_dim)).repeat_interleave(width // states.shape[-1], dim=-2).flatten(-2)
        for states in pair
    ]


def _relation_kl(
    left: Tensor, right: Tensor, their_left: Tensor, their_right: Tensor, counted_BS: Tensor, allowed_BSS: Tensor
) -> Tensor:
    log_q, log_p = (
        (a.float() @ b.float().mT / a.shape[-1] ** 0.5).masked_fill(~allowed_BSS, -torch.inf).log_softmax(-1)
        for a, b in ((left, right), (their_left, their_right))
    )
    difference = torch.where(allowed_BSS, log_p - log_q, 0.0)
    rows_BS: Tensor = (log_p.exp() * difference).sum(-1)
    return rows_BS[counted_BS].sum()
