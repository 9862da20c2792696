"""Losses on what happens inside: the stream between layers, the embeddings, and who attends to whom.

Hidden states and embeddings are compared along the pruning's own map (`Origin`), without learned projections; attention
relations as in MiniLM (https://arxiv.org/abs/2002.10957, https://arxiv.org/abs/2012.15828), from the outputs of the
projections, so that any attention kernel will do.

Shapes: B = batch, S = block size, N = tokens that count, D = hidden size (each model its own), R = relation heads,
W = width of all heads together.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.utils.checkpoint import checkpoint

from cascade.distillation.head import last_hidden
from cascade.distillation.memory import remembered
from cascade.distillation.origin import Origin
from cascade.errors import UserError
from cascade.models.axes import probe_axes
from cascade.models.behaviour import first_tensor
from cascade.models.dims import ModelDims, dims_of

FORMS = ("cosine", "mse")
RELATIONS = ("qq", "kk", "vv", "qk")


@dataclass(frozen=True)
class Features:
    """What a student's inside is asked for, besides its logits."""

    hidden: str | None = None
    """cosine: 1 - cosine similarity; mse: squared distance over the teacher's squared length. Of each token's hidden
    state, averaged over layers."""
    embedding: str | None = None
    """The same of what enters the first layer."""
    relations: tuple[str, ...] = ()
    """qq, kk, vv: softmax of scaled products of the projections with themselves; qk: of queries with keys, as in
    attention. KL from the teacher's, averaged over relation heads, in the last layer."""
    relation_heads: int | None = None
    """What all projections' widths are split into; the largest number up to the student's heads where not given."""
    weights: dict[str, float] = field(default_factory=dict)
    """By 'hidden', 'embedding', 'relations'; 1 where not given."""
    balanced: bool = True
    """Their sum is first scaled to the size of the logit loss, as both were in the step before (ModelOpt)."""

    def names(self) -> list[str]:
        """The losses that are asked for."""
        asked = {"hidden": self.hidden, "embedding": self.embedding, "relations": self.relations}
        return [name for name, value in asked.items() if value]


@dataclass
class Seen:
    """What a forward pass showed of one model."""

    points: dict[int, Tensor] = field(default_factory=dict)
    """[B, S, D]: what enters each layer that was asked for; under the number of layers, what leaves the last."""
    projections: dict[str, Tensor] = field(default_factory=dict)
    """q, k, v: [B, S, W]"""


class FeatureLoss:
    """The losses of `Features` for one student and its teacher.

    Raises:
        UserError: an unknown name, or relation heads that do not divide the projections' widths.
    """

    def __init__(self, features: Features, origin: Origin, student: nn.Module, teacher: nn.Module):
        self.features, self.origin = features, origin
        for form in (features.hidden, features.embedding):
            if form is not None and form not in FORMS:
                raise UserError(f"a feature loss '{form}' is unknown; known: {', '.join(FORMS)}")
        unknown = [name for name in features.relations if name not in RELATIONS]
        if unknown:
            raise UserError(f"a relation '{unknown[0]}' is unknown; known: {', '.join(RELATIONS)}")
        depth = len(origin.points) - 1
        places = list(range(1, depth + 1)) if features.hidden else []
        self.places = ([0] if features.embedding else []) + places
        dims = [dims_of(model.config) for model in (student, teacher)]
        self.relation_heads = fitting_heads(features.relation_heads, dims) if features.relations else 0
        self.head_dims = [one.head_dim for one in dims]

    @contextmanager
    def watching(self, model: nn.Module, *, teacher: bool) -> Iterator[Seen]:
        """What the losses need of the model's forward passes while this holds."""
        seen, handles = Seen(), []
        axes = probe_axes(model.config)
        layers: Any = model.get_submodule(axes.layers_prefix)
        points = {self.origin.points[place] if teacher else place for place in self.places}

        def enters(point: int) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                seen.points[point] = args[0] if args else kwargs["hidden_states"]

            return hook

        def leaves(_: nn.Module, __: Any, output: Any) -> None:
            seen.points[len(layers)] = first_tensor(output)

        try:
            for point in points - {len(layers)}:
                handles.append(layers[point].register_forward_pre_hook(enters(point), with_kwargs=True))
            if len(layers) in points:
                handles.append(layers[-1].register_forward_hook(leaves))
            if self.features.relations:
                for module, parts in _attention_projections(model, len(layers) - 1):
                    handles.append(module.register_forward_hook(_splitting(parts, seen)))
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def of_teacher(self, teacher: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Seen]:
        """What the teacher's head would read of `inputs`, [B, S, D], and what the losses need of its layers."""

        def look() -> dict[str, Tensor]:
            with self.watching(teacher, teacher=True) as seen:
                hidden = last_hidden(teacher, **inputs, use_cache=False)
            points = {f"point {number}": value for number, value in seen.points.items()}
            return {"hidden": hidden} | points | seen.projections

        what = f"{sorted({self.origin.points[place] for place in self.places})} {bool(self.features.relations)}"
        found = remembered(teacher, inputs, what, look)
        points = {int(name.split()[1]): value for name, value in found.items() if name.startswith("point")}
        return found["hidden"], Seen(points, {name: found[name] for name in "qkv" if name in found})

    def losses(
        self, student: Seen, teacher: Seen, counted_BS: Tensor, visible: Callable[[], Tensor]
    ) -> dict[str, Tensor]:
        """Each loss, summed over the tokens that count: [] float32 with a gradient towards the student.

        `visible` gives, if it is needed, which tokens each token's relations are with, [B, S, S].
        """
        found: dict[str, Tensor] = {}
        if self.features.hidden is not None:
            places = [place for place in self.places if place > 0]
            parts = [self._stream(student, teacher, place, self.features.hidden, counted_BS) for place in places]
            found["hidden"] = torch.stack(parts).mean(0)
        if self.features.embedding is not None:
            found["embedding"] = self._stream(student, teacher, 0, self.features.embedding, counted_BS)
        if self.features.relations:
            allowed_BSS = visible()
            parts = [
                _relation_loss(
                    _pair(student, name, self.head_dims[0]),
                    _pair(teacher, name, self.head_dims[1]),
                    self.relation_heads,
                    counted_BS,
                    allowed_BSS,
                )
                for name in self.features.relations
            ]
            found["relations"] = torch.stack(parts).mean(0)
        return found

    def scales(self, last: dict[str, float]) -> dict[str, float]:
        """What each loss is multiplied by, from a step's mean losses ('loss' and those of the features)."""
        weights = {name: self.features.weights.get(name, 1.0) for name in self.features.names()}
        if not self.features.balanced:
            return weights
        together = sum(last[f"{name}_loss"] for name in weights)
        return {name: weight * last["loss"] / max(together, 1e-12) for name, weight in weights.items()}

    def _stream(self, student: Seen, teacher: Seen, place: int, form: str, counted_BS: Tensor) -> Tensor:
        ours_ND = student.points[place][counted_BS].float()
        theirs_ND = self.origin.project(teacher.points[self.origin.points[place]][counted_BS].float())
        if form == "cosine":
            return (1 - cosine_similarity(ours_ND, theirs_ND, dim=-1)).sum()
        return ((ours_ND - theirs_ND).square().sum(-1) / theirs_ND.square().sum(-1).clamp_min(1e-12)).sum()


def fitting_heads(asked: int | None, dims: Sequence[ModelDims]) -> int:
    """Relation heads for models of these dims, the student's first: what was asked for, or the most that fit.

    Raises:
        UserError: what was asked for does not divide every projection's width.
    """
    counts = [count for one in dims for count in (one.num_attention_heads, one.num_key_value_heads)]
    head_dims = [one.head_dim for one in dims for _ in range(2)]
    widths = [count * head_dim for count, head_dim in zip(counts, head_dims, strict=True)]
    common = gcd(*widths)
    fitting = [count for count in range(1, common + 1) if common % count == 0]
    if asked is None:
        return max(count for count in fitting if count <= dims[0].num_attention_heads)
    if asked not in fitting:
        raise UserError(
            f"relation_heads: {asked} does not divide the widths of the projections "
            f"({', '.join(map(str, sorted(set(widths))))}); possible: {', '.join(map(str, fitting))}"
        )
    return asked


_NAMES = {"q": r"q|query|q_proj|q_lin|wq", "k": r"k|key|k_proj|k_lin|wk", "v": r"v|value|v_proj|v_lin|wv"}
"""What architectures call their projections."""


def _attention_projections(model: Any, layer: int) -> list[tuple[nn.Module, list[tuple[str, int, int]]]]:
    """(module, [(q, k or v; rows of a unit; units)]) of a layer, in the order of its rows.

    With one unit list for all three, each unit has its rows of q, k and v one after another.

    Raises:
        UserError: a projection is missing.
    """
    axes, dims = probe_axes(model.config), dims_of(model.config)
    prefix = f"{axes.layers_prefix}.{layer}."
    found: list[tuple[nn.Module, list[tuple[str, int, int]]]] = []
    for name, _ in model.named_parameters():
        output = axes.output_axis(name) if name.startswith(prefix) else None
        if output is None or axes.module_of(name) not in axes.behaviour.readers:
            continue
        parts, module = axes.of(name)[output].parts, model.get_submodule(name.rpartition(".")[0])
        if any(part.dim not in ("num_attention_heads", "num_key_value_heads") for part in parts):
            continue
        rows = [(part.rows_per_unit(dims), int(getattr(dims, str(part.dim)))) for part in parts]
        if len(parts) == 3:
            found.append((module, [(letter, *size) for letter, size in zip("qkv", rows, strict=True)]))
        elif parts[0].rows_per_unit(dims) == 3 * dims.head_dim:
            found.append((module, [("qkv", *rows[0])]))
        else:
            own = name.split(".")[-2]
            letters = [letter for letter, pattern in _NAMES.items() if re.fullmatch(pattern, own)]
            if letters:
                found.append((module, [(letters[0], *rows[0])]))
    known = "".join(letter for _, parts in found for letter, _, _ in parts)
    if sorted(known) != list("kqv"):
        raise UserError(
            f"distill.features.relations: model type '{model.config.model_type}': its projections of queries, keys and "
            f"values are not all known by name (found: {known or 'none'})"
        )
    return found


def _splitting(parts: Sequence[tuple[str, int, int]], seen: Seen) -> Any:
    def hook(_: nn.Module, __: Any, output: Tensor) -> None:
        start = 0
        for letters, rows, units in parts:
            piece = output[..., start : start + rows * units]
            start += rows * units
            if len(letters) == 1:
                seen.projections[letters] = piece
                continue
            by_unit = piece.unflatten(-1, (units, 3, rows // 3))
            for number, letter in enumerate(letters):
                seen.projections[letter] = by_unit[..., number, :].flatten(-2)

    return hook


def _relation_loss(
    ours: list[Tensor], theirs: list[Tensor], heads: int, counted_BS: Tensor, allowed_BSS: Tensor
) -> Tensor:
    """KL of the teacher's relations from the student's, summed over tokens, averaged over heads; one head at a time."""
    split = [[one.unflatten(-1, (heads, -1)) for one in pair] for pair in (ours, theirs)]
    total = ours[0].new_zeros((), dtype=torch.float32)
    for head in range(heads):
        pairs = [one[..., head, :] for pair in split for one in pair]
        total = total + checkpoint(_relation_kl, *pairs, counted_BS, allowed_BSS, use_reentrant=False)
    return total / heads


def _pair(seen: Seen, name: str, head_dim: int) -> list[Tensor]:
    """Both sides of a relation, [B, S, W]; keys are repeated for every query head that shares them."""
    pair = [seen.projections[letter] for letter in name]
    width = max(one.shape[-1] for one in pair)
    return [
        one.unflatten(-1, (-1, head_dim)).repeat_interleave(width // one.shape[-1], dim=-2).flatten(-2) for one in pair
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
