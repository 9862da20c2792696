"""Rows of family.json from the folders of finished stages."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from cascade.models.architecture.axes import probe_axes
from cascade.models.architecture.sized import Sized
from cascade.models.checkpoint.load import CHECKPOINT, ModelSource, load_config
from cascade.pipeline.kept_targets import LABELS, taught_steps
from cascade.pipeline.stage_output import Made
from cascade.pipeline.stages.shape_search import Candidate
from cascade.planning.family import ResolvedMember
from cascade.recipe.schema import Recipe
from cascade.report.rates import Rate
from cascade.report.records import (
    Cost,
    Losses,
    Metric,
    Row,
    Speed,
    StageLosses,
    Tokens,
    losses_of,
    metrics_of,
    speed_of,
)

_BASELINES = {"cut": "cut only", "repaired": "cut and repaired", "ce": "cross-entropy"}


@dataclass(frozen=True, kw_only=True)
class RoundedCopy:
    """A copy of a member, or of the parent, in fewer bits."""

    name: str
    kind: str
    """int8 or int4"""
    rounded: Made
    """The stage that left its checkpoint."""
    evaluation: Made
    num_tokens: int
    """Tokens or examples of the training with rounded weights; 0: no such training."""


@dataclass(frozen=True, kw_only=True)
class FinishedMember:
    """The committed stages of a member, which cascade.json lists in this order, and the rows that belong to it."""

    cut: Made | None
    repaired: Made | None
    rate: Made | None
    """The search for the learning rate."""
    distilled: Made
    evaluation: Made
    labels: Made | None = None
    """The labelling with the teacher; None where targets are not cached."""
    lineage: list[Made] | None
    """The cuts that lead from the parent to the member; None where it was not cut from the parent."""
    baselines: list[Row] = field(default_factory=list)
    candidates: list[Row] = field(default_factory=list)
    """Rows of the shapes of a search."""
    copies: list[RoundedCopy] = field(default_factory=list)
    rates: dict[str, Rate] = field(default_factory=dict)
    """Learning rates of the member and of its cross-entropy baseline, by the row's name."""
    measured: dict[str, Made] = field(default_factory=dict)
    """Evaluations of the member and of its baselines, by the row's name."""


def teacher_row(parent: ModelSource, evaluation: Made) -> Row:
    """The parent's row."""
    sized = Sized(load_config(parent))
    return Row(
        name="parent",
        role="teacher",
        status="done",
        dims=sized.dims.as_dict(),
        num_parameters=sized.num_parameters,
        num_parameters_non_embedding=sized.num_parameters_non_embedding,
        bytes=weight_bytes(parent.folder),
        cost=Cost(seconds=evaluation.cost()["seconds"]),
        metrics=_metrics(evaluation),
        speed=_speed(evaluation),
    )


def member_row(recipe: Recipe, members: list[ResolvedMember], member: ResolvedMember, finished: FinishedMember) -> Row:
    """A finished member's row."""
    stages = (finished.cut, finished.repaired, finished.labels, finished.rate, finished.distilled, finished.evaluation)
    teacher_flops = finished.distilled.cost()["teacher_flops_per_token"]
    labelled = _labelled(recipe, member, finished)
    return Row(
        name=member.name,
        role="member",
        status="done",
        seed=member.seed or None,
        checkpoint=f"members/{member.name}",
        dims=member.sized.dims.as_dict(),
        num_parameters=member.sized.num_parameters,
        num_parameters_non_embedding=member.sized.num_parameters_non_embedding,
        bytes=weight_bytes(finished.distilled.folder / CHECKPOINT),
        tokens=Tokens(
            hop=member.num_tokens, cumulative=_tokens_along_chain(members, member), teacher_labelled=labelled
        ),
        cost=Cost(
            seconds=_seconds(stage for stage in stages if stage),
            flops=member.num_tokens * 3 * member.flops_per_token + labelled * teacher_flops,
        ),
        stages=StageLosses(
            cut=_losses(finished.cut), repaired=_losses(finished.repaired), recovered=_losses(finished.distilled)
        ),
        metrics=_metrics(finished.evaluation),
        speed=_speed(finished.evaluation),
    )


def baseline_row(member: ResolvedMember, kind: str, stages: list[Made]) -> Row:
    """The row of a member's baseline, from its evaluation and, if it was trained, its training and rate search.

    A baseline is not published. Its tokens count from the cut that the member starts from.
    """
    num_tokens = member.num_tokens if kind == "ce" else 0
    return Row(
        name=f"{member.name}-{kind}",
        role="baseline",
        status=_BASELINES[kind],
        seed=member.seed or None,
        dims=member.sized.dims.as_dict(),
        num_parameters=member.sized.num_parameters,
        num_parameters_non_embedding=member.sized.num_parameters_non_embedding,
        tokens=Tokens(hop=num_tokens, cumulative=num_tokens),
        cost=Cost(seconds=_seconds(stages), flops=num_tokens * 3 * member.flops_per_token),
        metrics=_metrics(stages[0]),
    )


def candidate_rows(member: ResolvedMember, candidates: list[Candidate]) -> list[Row]:
    """Rows of the shapes of a member's search, the chosen shape first."""
    return [_candidate_row(member, candidate, number) for number, candidate in enumerate(candidates, start=1)]


def _candidate_row(member: ResolvedMember, candidate: Candidate, number: int) -> Row:
    losses, dims, axes = candidate.losses(), candidate.shape.dims, probe_axes(candidate.config)
    suffix = f"_{candidate.shape.hidden}" if len(member.hidden_choices) > 1 else ""
    return Row(
        name=f"{member.name}-shape{number}{suffix}",
        role="candidate",
        status="chosen" if number == 1 else "finalist" if len(candidate.stages) > 1 else "candidate",
        seed=member.seed or None,
        dims=dims.as_dict(),
        num_parameters=int(axes.num_parameters(dims)),
        num_parameters_non_embedding=int(axes.num_parameters_non_embedding(dims)),
        cost=Cost(seconds=_seconds(candidate.stages)),
        stages=StageLosses(repaired=losses_of(losses["repaired"]), recovered=losses_of(losses["recovered"])),
    )


def copy_row(owner: Row, copy: RoundedCopy) -> Row:
    """The row of a copy in fewer bits, from the row of the copied model (`owner`)."""
    return replace(
        owner,
        name=copy.name,
        role="quantised",
        status=copy.kind,
        checkpoint=f"members/{copy.name}",
        bytes=weight_bytes(copy.rounded.folder / CHECKPOINT),
        tokens=Tokens(
            hop=copy.num_tokens,
            cumulative=owner.tokens.cumulative + copy.num_tokens,
            teacher_labelled=copy.num_tokens,
        ),
        cost=Cost(seconds=_seconds([copy.rounded, copy.evaluation])),
        stages=StageLosses(),
        metrics=_metrics(copy.evaluation),
        speed=_speed(copy.evaluation),
    )


def weight_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's weight files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _labelled(recipe: Recipe, member: ResolvedMember, finished: FinishedMember) -> int:
    """Tokens whose probabilities the teacher has given for this member."""
    if finished.labels is not None:
        taught = len(taught_steps(recipe, member.num_steps)) / max(1, member.num_steps)
        return int(finished.labels.json(LABELS)["tokens"]) + round((1 - taught) * member.num_tokens)
    return member.num_tokens if recipe.distill and recipe.distill.teacher == "parent" else 0


def _tokens_along_chain(members: list[ResolvedMember], member: ResolvedMember) -> int:
    """Training tokens of the member and of all members that it is cut from."""
    by_name = {entry.name: entry for entry in members}
    num_tokens, seed = member.num_tokens, member.seed
    while seed in by_name:
        num_tokens += by_name[seed].num_tokens
        seed = by_name[seed].seed
    return num_tokens


def _seconds(stages: Iterable[Made]) -> float:
    return sum((float(stage.cost()["seconds"]) for stage in stages), 0.0)


def _losses(stage: Made | None) -> Losses | None:
    return losses_of(stage.json("losses.json")) if stage else None


def _metrics(evaluation: Made) -> tuple[Metric, ...]:
    return metrics_of(evaluation.json("eval.json")["metrics"])


def _speed(evaluation: Made) -> Speed:
    return speed_of(evaluation.cost().get("speed", {}))
