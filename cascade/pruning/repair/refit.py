"""Repair in closed form: after a cut, each weight that writes the stream is refitted by ridge regression.

What is left of a layer's neurons and heads can say more than slicing lets it: `down_proj` and `o_proj` are fitted, on
calibration text, to what the parent writes there. No training, one Gram matrix per weight.

Shapes: N = tokens, K = kept inputs of a writer (neurons, or heads x head_dim), D = hidden channels that stay.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cascade.data.blocks import TokenBlocks
from cascade.models.architecture.axes import ModelAxes, probe_axes
from cascade.pruning.cut import kept_rows
from cascade.pruning.layerwise import Stream, Watched
from cascade.pruning.plan import PruningPlan
from cascade.pruning.repair.ridge import Moments, add_to_halves

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Repair:
    """Settings of a repair."""

    sequential: bool = True
    """Inputs come from the already cut and refitted stream; else from the parent's own."""
    compensation: float = 1.0
    """Sequential only: the share of what the stream has lost so far that is added to each block's target, besides the
    parent's output. Ignored where a norm stands behind the block, as no linear map can see through it."""
    readers: bool = True
    """Sequential only: also refit what reads the stream (q, k, v, gate, up) to the parent's outputs."""


@dataclass
class RepairReport:
    """The ridges and errors of a repair."""

    ridges: dict[str, float] = field(default_factory=dict)
    """By writer: the ridge chosen, as a share of the Gram matrix's mean diagonal."""
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    """By writer: share of its target's energy that is missed, before and after, on the blocks that choose the ridge."""
    skipped: list[str] = field(default_factory=list)
    """Writers that stay as they were sliced, as their Gram matrix is singular."""


@torch.inference_mode()
def repair(
    student: nn.Module,
    model: nn.Module,
    plan: PruningPlan,
    blocks: TokenBlocks,
    how: Repair | None = None,
    *,
    batch_size: int = 8,
) -> RepairReport:
    """Refit the writers of `student`, cut from `model` by `plan`, in place.

    Layer by layer: the parent's stream and the student's are held in memory (2 x N x hidden_size floats), each layer
    runs once in the parent and twice in the student. Every fourth block is kept aside to choose each weight's ridge.
    """
    how = how or Repair()
    report = RepairReport()
    refit = _Refit(student, model, plan, how, report)
    device = next(model.parameters()).device
    pairs = [
        (Stream.of(model, **part.inputs(device)), Stream.of(student, **part.inputs(device)))
        for part in blocks.split(batch_size)
    ]
    for parent, _ in pairs:
        refit.go_on(parent, range(plan.layers[0]))
    for place, origin in enumerate(plan.layers):
        refit.layer(origin, place, pairs)
    return report


class _Refit:
    """The weights of one layer after another, in the order in which the stream meets them."""

    def __init__(self, student: nn.Module, model: nn.Module, plan: PruningPlan, how: Repair, report: RepairReport):
        self.student, self.model, self.plan, self.how, self.report = student, model, plan, how, report
        self.axes = probe_axes(student.config)
        self.parent_axes = probe_axes(model.config)
        self.parent_layers: Any = model.get_submodule(self.axes.layers_prefix)
        self.student_layers: Any = student.get_submodule(self.axes.layers_prefix)
        self.channels = torch.tensor(plan.hidden)
        weight = next(model.parameters())
        self.turn = None if plan.rotation is None else plan.rotation[:, plan.hidden].to(weight.device, weight.dtype)

    def layer(self, origin: int, place: int, pairs: list[tuple[Stream, Stream]]) -> None:
        """Refit one kept layer, then take both streams through it."""
        writers = writers_of(self.axes, self.student, place)
        if self.plan.merged_heads and not self.how.sequential:
            # Nor does the parent show what a merged head writes from.
            writers = [name for name in writers if self.axes.reads(name) not in _HEADS]
        readers = [self._readers(place, dims) for dims in (_HEADS, _NEURONS)]
        originals = {name: self._origin(name, origin) for name in [*readers[0], *readers[1], *writers]}
        parents = [parent.watched(self.parent_layers[origin], origin, originals) for parent, _ in pairs]
        follows = [*self.plan.layers, self.plan.source_dims.num_hidden_layers][place + 1]
        for (parent, _), watched in zip(pairs, parents, strict=True):
            parent.after = watched.after
            self.go_on(parent, range(origin + 1, follows))
        if self.axes.behaviour.parallel:
            self._refit_readers(readers[0] + readers[1], origin, place, parents, pairs)
            self._refit_writers(writers, [], origin, place, parents, pairs)
        else:
            for reading, writer in zip(readers[-len(writers) :], writers, strict=True):
                self._refit_readers(reading, origin, place, parents, pairs)
                earlier = writers[: writers.index(writer)]
                self._refit_writers([writer], earlier, origin, place, parents, pairs)
        for parent, cut in pairs:
            parent.hidden = parent.after
            if self.how.sequential:
                cut.hidden = cut.through(self.student_layers[place], place)

    def go_on(self, parent: Stream, layers: range) -> None:
        """Take the parent's stream through layers that the student lacks."""
        for number in layers:
            parent.after = parent.through(self.parent_layers[number], number, parent.after)
        if layers.start == 0:
            parent.hidden = parent.after

    def _readers(self, place: int, dims: tuple[str, ...]) -> list[str]:
        if not (self.how.sequential and self.how.readers):
            return []
        if self.plan.merged_heads and dims == _HEADS:
            return []  # the parent has no head that does what a merged one does
        prefix = f"{self.axes.layers_prefix}.{place}"
        return [
            name
            for name, _ in self.student_layers[place].named_parameters(prefix=prefix)
            if self.axes.module_of(name) in self.axes.behaviour.readers and self.axes.writes(name) in dims
        ]

    def _refit_readers(
        self,
        names: list[str],
        origin: int,
        place: int,
        parents: list[Watched],
        pairs: list[tuple[Stream, Stream]],
    ) -> None:
        """Refit each reader of the stream to what the parent's reader gives at the same place."""
        halves = {name: (Moments(), Moments()) for name in names}
        modules = {name: self._module(name) for name in names}
        for number, theirs, (_, cut) in _numbered(parents, pairs):
            ours = cut.watched(self.student_layers[place], place, modules) if names else theirs
            for name in names:
                target = self._in_student(name, origin, theirs.outputs[name].flatten(0, -2), output=True)
                add_to_halves(
                    halves[name],
                    number,
                    len(cut.hidden),
                    ours.inputs[name],
                    target,
                    biased=self._bias([name]) is not None,
                )
        for name in names:
            self._solve([name], halves[name])

    def _refit_writers(
        self,
        group: list[str],
        earlier: list[str],
        origin: int,
        place: int,
        parents: list[Watched],
        pairs: list[tuple[Stream, Stream]],
    ) -> None:
        """Refit writers that share one target: the parent's output, and what the stream has lost so far."""
        gains = {name: self.axes.behaviour.writers[self.axes.module_of(name)] for name in group + earlier}
        compensates = self.how.sequential and self.how.compensation > 0 and None not in gains.values()
        is_last = self.axes.behaviour.parallel or bool(earlier)
        dropped_behind = is_last and origin + 1 not in (*self.plan.layers, self.plan.source_dims.num_hidden_layers)
        halves = Moments(), Moments()
        modules = {name: self._module(name) for name in group + earlier}
        for number, theirs, (parent, cut) in _numbered(parents, pairs):
            outputs = [theirs.outputs[name].view_as(parent.hidden) for name in group]
            target = self._student_channels(torch.stack(outputs).sum(0))
            if self.how.sequential:
                ours = cut.watched(self.student_layers[place], place, modules)
                inputs = [ours.inputs[name] for name in group]
            else:
                inputs = [self._in_student(name, origin, theirs.inputs[name], output=False) for name in group]
            if compensates:
                lost = self._student_channels(parent.hidden) - cut.hidden
                for name in earlier:
                    before = self._student_channels(theirs.outputs[name].view_as(parent.hidden))
                    lost = lost + (gains[name] or 0) * (before - ours.outputs[name].view_as(lost))
                if dropped_behind:
                    # Nobody else will write what the dropped layers wrote.
                    lost = lost + self._student_channels(parent.after - theirs.after)
                target = target + self.how.compensation / (gains[group[0]] or 1) * lost
            features = torch.cat([part.flatten(0, -2) for part in inputs], 1)
            add_to_halves(halves, number, len(cut.hidden), features, target, biased=self._bias(group) is not None)
        self._solve(group, halves)

    def _solve(self, group: list[str], halves: tuple[Moments, Moments]) -> None:
        """Fit the weights of a group, which stand side by side in one linear map, and write them into the student."""
        current = torch.cat([_matrix(self.axes, name, self._module(name)) for name in group], 1).double()
        bias = self._bias(group)
        fitted = Moments.fit(halves, current, bias)
        label = " + ".join(group)
        if fitted is None:
            self.report.skipped.append(label)
            logger.warning("repair: the Gram matrix at '%s' is singular; this weight stays as it was sliced", label)
            return
        self.report.ridges[label], self.report.errors[label] = fitted.ridge, fitted.errors
        start, carrier = 0, self._carrier(group)
        for name in group:
            module = self._module(name)
            width = _matrix(self.axes, name, module).shape[1]
            part = fitted.weight[:, start : start + width]
            module.weight.copy_(part if self.axes.output_axis(name) == 0 else part.T)
            start += width
            if fitted.bias is not None and getattr(module, "bias", None) is not None:
                module.bias.copy_(fitted.bias if name == carrier else torch.zeros_like(fitted.bias))

    def _bias(self, group: list[str]) -> Tensor | None:
        """[D]: the sum of a group's biases; None where none of them has one."""
        biases = [getattr(self._module(name), "bias", None) for name in group]
        present = [bias.detach().double() for bias in biases if bias is not None]
        return torch.stack(present).sum(0) if present else None

    def _carrier(self, group: list[str]) -> str | None:
        """The first of a group with a bias: weights that are fitted together share one."""
        return next((name for name in group if getattr(self._module(name), "bias", None) is not None), None)

    def _module(self, name: str) -> Any:
        return self.student.get_submodule(name.rpartition(".")[0])

    def _origin(self, name: str, origin: int) -> nn.Module:
        return self.model.get_submodule(self.axes.module_of(name).replace("*", str(origin)))

    def _student_channels(self, stream: Tensor) -> Tensor:
        """The parent's stream in the student's channels."""
        return stream[..., self.channels] if self.turn is None else stream @ self.turn

    def _in_student(self, name: str, origin: int, values: Tensor, *, output: bool) -> Tensor:
        """Those of the parent's outputs (or inputs) at a weight that the student has."""
        position = self.parent_axes.output_axis(name) or 0
        rows = kept_rows(self.parent_axes.of(name)[position if output else 1 - position], origin, self.plan)
        return values if rows is None else values[..., rows]


_HEADS, _NEURONS = ("num_attention_heads", "num_key_value_heads"), ("intermediate_size",)


def _numbered(
    parents: list[Watched], pairs: list[tuple[Stream, Stream]]
) -> Iterator[tuple[int, Watched, tuple[Stream, Stream]]]:
    """Each batch, with the number of its first block."""
    first = 0
    for theirs, pair in zip(parents, pairs, strict=True):
        yield first, theirs, pair
        first += len(pair[0].hidden)


def writers_of(axes: ModelAxes, model: nn.Module, layer: int) -> list[str]:
    """The weights of one layer that write the stream from heads, then from neurons."""
    names = [name for name, _ in model.named_parameters() if axes.layer_of(name) == layer]
    return [name for dim in ("num_attention_heads", "intermediate_size") for name in names if axes.reads(name) == dim]


def _matrix(axes: ModelAxes, name: str, module: Any) -> Tensor:
    """A weight as [D, K]."""
    weight: Tensor = module.weight.detach()
    return weight if axes.output_axis(name) == 0 else weight.T
