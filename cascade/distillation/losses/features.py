"""Feature losses: on hidden states between layers, on embeddings, and on attention relations.

Hidden states and embeddings are compared along the map that pruning leaves (`Origin`), without learned projections;
attention relations as in MiniLM (https://arxiv.org/abs/2002.10957, https://arxiv.org/abs/2012.15828), from the outputs
of the projections, so that any attention kernel will do.

Shapes: B = batch, S = block size, N = tokens that count, D = hidden size (each model its own), W = width of all heads.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from cascade.distillation.losses.relations import attention_projections, fitting_heads, relation_loss, sides, splitting
from cascade.distillation.options import FORMS, RELATIONS, Features
from cascade.distillation.teacher_memory import remembered
from cascade.models.architecture.axes import probe_axes
from cascade.models.architecture.behaviour import first_tensor
from cascade.models.architecture.dims import dims_of
from cascade.models.architecture.head import last_hidden
from cascade.models.architecture.origin import Origin
from cascade.runtime.errors import UserError


@dataclass
class Seen:
    """Activations of one model's forward pass that the losses read."""

    points: dict[int, Tensor] = field(default_factory=dict)
    """[B, S, D]: the input of each watched layer by its number; under the number of layers, the last one's output."""
    projections: dict[str, Tensor] = field(default_factory=dict)
    """[B, S, W] each, by q, k and v: the attention projections of the last layer."""

    def tensors(self) -> dict[str, Tensor]:
        """All activations by name, as `of` reads them."""
        return {f"point {number}": states for number, states in self.points.items()} | self.projections

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> "Seen":
        """The activations that `tensors` named, without tensors of other names."""
        points = {int(name.split()[1]): states for name, states in tensors.items() if name.startswith("point ")}
        return cls(points, {name: tensors[name] for name in "qkv" if name in tensors})


@contextmanager
def watching_points(model: nn.Module, points: set[int]) -> Iterator[dict[int, Tensor]]:
    """A context that notes the inputs of these layers in each forward pass (the number of layers: the output)."""
    seen: dict[int, Tensor] = {}
    layers: Any = model.get_submodule(probe_axes(model.config).layers_prefix)

    def enters(point: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[point] = args[0] if args else kwargs["hidden_states"]

        return hook

    def leaves(_: nn.Module, __: Any, output: Any) -> None:
        seen[len(layers)] = first_tensor(output)

    handles = []
    try:
        for point in points - {len(layers)}:
            handles.append(layers[point].register_forward_pre_hook(enters(point), with_kwargs=True))
        if len(layers) in points:
            handles.append(layers[-1].register_forward_hook(leaves))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class FeatureLoss:
    """The losses of `Features` for one student and its teacher.

    Raises:
        UserError: an unknown name, a fade_fraction that is not above 0, or relation heads that do not divide the
            projections' widths.
    """

    def __init__(self, features: Features, origin: Origin, student: nn.Module, teacher: nn.Module):
        self.features, self.origin = features, origin
        for form in (features.hidden, features.embedding):
            if form is not None and form not in FORMS:
                raise UserError(f"a feature loss '{form}' is unknown; known: {', '.join(FORMS)}")
        unknown = [name for name in features.relations if name not in RELATIONS]
        if unknown:
            raise UserError(f"a relation '{unknown[0]}' is unknown; known: {', '.join(RELATIONS)}")
        fade_fraction = features.fade_fraction
        if fade_fraction is not None and not fade_fraction > 0:
            raise UserError(f"fade_fraction {fade_fraction:g} is not above 0; give None where nothing fades")
        depth = len(origin.points) - 1
        places = list(range(1, depth + 1)) if features.hidden else []
        self.places = ([0] if features.embedding else []) + places
        dims = [dims_of(model.config) for model in (student, teacher)]
        self.relation_heads = fitting_heads(features.relation_heads, dims) if features.relations else 0
        self.head_dims = [model_dims.head_dim for model_dims in dims]

    @contextmanager
    def watching(self, model: nn.Module, *, teacher: bool) -> Iterator[Seen]:
        """A context that notes what the losses read of the model's forward passes."""
        projections: dict[str, Tensor] = {}
        handles = []
        points = {self.origin.points[place] if teacher else place for place in self.places}
        try:
            if self.features.relations:
                for module, parts in attention_projections(model, dims_of(model.config).num_hidden_layers - 1):
                    handles.append(module.register_forward_hook(splitting(parts, projections)))
            with watching_points(model, points) as seen:
                yield Seen(seen, projections)
        finally:
            for handle in handles:
                handle.remove()

    def of_teacher(self, teacher: nn.Module, inputs: dict[str, Tensor], *, keep: bool) -> tuple[Tensor, Seen]:
        """The hidden states that the teacher's head reads, [B, S, D], and the activations that the losses read."""

        def look() -> dict[str, Tensor]:
            with self.watching(teacher, teacher=True) as seen:
                hidden = last_hidden(teacher, **inputs, use_cache=False)
            return {"hidden": hidden} | seen.tensors()

        tensors = remembered(teacher, inputs, self.teacher_tensors(), look, keep=keep)
        return tensors["hidden"], Seen.of(tensors)

    def teacher_tensors(self) -> str:
        """A name for the tensors that the losses read of a teacher: the same name stands for the same tensors."""
        return f"{sorted({self.origin.points[place] for place in self.places})} {bool(self.features.relations)}"

    def losses(
        self, student: Seen, teacher: Seen, counted_BS: Tensor, visible: Callable[[], Tensor]
    ) -> dict[str, Tensor]:
        """Each loss, summed over the tokens that count: [] float32 with a gradient towards the student.

        `visible` is called where relations are compared: whether each token may look at another, [B, S, S].
        """
        losses: dict[str, Tensor] = {}
        if self.features.hidden is not None:
            places = [place for place in self.places if place > 0]
            parts = [self._stream(student, teacher, place, self.features.hidden, counted_BS) for place in places]
            losses["hidden"] = torch.stack(parts).mean(0)
        if self.features.embedding is not None:
            losses["embedding"] = self._stream(student, teacher, 0, self.features.embedding, counted_BS)
        if self.features.relations:
            allowed_BSS = visible()
            parts = [
                relation_loss(
                    sides(student.projections, name, self.head_dims[0]),
                    sides(teacher.projections, name, self.head_dims[1]),
                    self.relation_heads,
                    counted_BS,
                    allowed_BSS,
                )
                for name in self.features.relations
            ]
            losses["relations"] = torch.stack(parts).mean(0)
        return losses

    def strength(self, progress: float) -> float:
        """The share of the losses' weight after `progress` of the steps: 1 at the start, 0 once they have faded."""
        fade_fraction = self.features.fade_fraction
        return 1.0 if fade_fraction is None else max(0.0, 1.0 - progress / fade_fraction)

    def scales(self, last: dict[str, float], strength: float = 1.0) -> dict[str, float]:
        """What each loss is multiplied by, from a step's mean losses ('loss' and those of the features)."""
        weights = {name: strength * self.features.weights.get(name, 1.0) for name in self.features.names()}
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
