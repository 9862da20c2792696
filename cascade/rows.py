"""Rows of family.json from the folders of finished stages."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cascade.caching import LABELS, taught_steps
from cascade.family import ResolvedMember
from cascade.models.axes import probe_axes
from cascade.models.checkpoint import CHECKPOINT, ModelSource, load_config
from cascade.models.dims import dims_of
from cascade.recipe.schema import Recipe
from cascade.report.rates import Rate
from cascade.report.records import Row
from cascade.stage_output import Made

_BASELINES = {"cut": "cut only", "repaired": "cut and repaired", "ce": "cross-entropy"}


_NO_SPEED = {"prefill_tokens_per_s": None, "decode_tokens_per_s": None, "peak_memory_bytes": None}


@dataclass(frozen=True, kw_only=True)
class RoundedCopy:
    """A copy of a member, or of the parent, in fewer bits."""

    name: str
    kind: str
    """int8 or int4"""
    rounded: Made
    """Its checkpoint."""
    evaluation: Made
    num_tokens: int
    """Trained with rounded weights; 0: not at all."""


@dataclass(frozen=True, kw_only=True)
class FinishedMember:
    """What the stages of a member have left, all of them committed; published in this order as where it comes from."""

    cut: Made | None
    repaired: Made | None
    rate: Made | None
    """The search for the learning rate."""
    distilled: Made
    evaluation: Made
    labels: Made | None = None
    """What it took to have the teacher's targets; None where it was asked each time."""
    lineage: list[Made] | None
    """The cuts from the parent to it; None where it was not cut from the parent."""
    baselines: list[Row] = field(default_factory=list)
    candidates: list[Row] = field(default_factory=list)
    """Shapes that a search tried."""
    copies: list[RoundedCopy] = field(default_factory=list)
    rates: dict[str, Rate] = field(default_factory=dict)
    """Row's name -> the learning rate it was trained at, of the member and of its cross-entropy baseline."""
    measured: dict[str, Made] = field(default_factory=dict)
    """Row's name -> its evaluation, of the member and of its baselines."""


def teacher_row(recipe: Recipe, parent: ModelSource, evaluation: Made) -> Row:
    """The parent's row."""
    config = load_config(parent)
    axes, dims = probe_axes(config), dims_of(config)
    return {
        "name": "parent",
        "role": "teacher",
        "status": "done",
        "seed": None,
        "checkpoint": None,
        "dims": dims.as_dict(),
        "num_parameters": int(axes.num_parameters(dims)),
        "num_parameters_non_embedding": int(axes.num_parameters_non_embedding(dims)),
        "bytes": weight_bytes(parent.folder),
        "tokens": {"hop": 0, "cumulative": 0, "teacher_labelled": 0},
        "cost": {"seconds": evaluation.cost()["seconds"], "flops": None, "money": None},
        "stages": {"cut": None, "repaired": None, "recovered": None},
        "metrics": evaluation.json("eval.json")["metrics"],
        "speed": _speed(evaluation),
    }


def member_row(recipe: Recipe, members: list[ResolvedMember], member: ResolvedMember, finished: FinishedMember) -> Row:
    """A finished member's row."""
    stages = (finished.cut, finished.repaired, finished.labels, finished.rate, finished.distilled, finished.evaluation)
    teacher_flops = finished.distilled.cost()["teacher_flops_per_token"]
    labelled = _labelled(recipe, member, finished)
    chain, seed = member.num_tokens, member.seed
    by_name = {other.name: other for other in members}
    while seed in by_name:
        chain += by_name[seed].num_tokens
        seed = by_name[seed].seed
    return _row(member, "member", "done") | {
        "checkpoint": f"members/{member.name}",
        "bytes": weight_bytes(finished.distilled.folder / CHECKPOINT),
        "tokens": {"hop": member.num_tokens, "cumulative": chain, "teacher_labelled": labelled},
        "cost": {
            "seconds": sum(stage.cost()["seconds"] for stage in stages if stage),
            "flops": member.num_tokens * 3 * member.flops_per_token + labelled * teacher_flops,
            "money": None,
        },
        "stages": {
            "cut": finished.cut.json("losses.json") if finished.cut else None,
            "repaired": finished.repaired.json("losses.json") if finished.repaired else None,
            "recovered": finished.distilled.json("losses.json"),
        },
        "metrics": finished.evaluation.json("eval.json")["metrics"],
        "speed": _speed(finished.evaluation),
    }


def baseline_row(member: ResolvedMember, kind: str, stages: list[Made]) -> Row:
    """A row to compare a member with, from its evaluation and, if trained, its training and the search for its rate.

    Its weights stay inside the run. Tokens count from the cut that the member itself starts from.
    """
    tokens = member.num_tokens if kind == "ce" else 0
    return _row(member, "baseline", _BASELINES[kind]) | {
        "name": f"{member.name}-{kind}",
        "tokens": {"hop": tokens, "cumulative": tokens, "teacher_labelled": 0},
        "cost": {
            "seconds": sum(stage.cost()["seconds"] for stage in stages),
            "flops": tokens * 3 * member.flops_per_token,
            "money": None,
        },
        "metrics": stages[0].json("eval.json")["metrics"],
    }


def copy_row(owner: Row, copy: RoundedCopy) -> Row:
    """The row of a copy, from that of what it is a copy of."""
    labelled, cumulative = copy.num_tokens, owner["tokens"]["cumulative"] + copy.num_tokens
    return owner | {
        "name": copy.name,
        "role": "quantised",
        "status": copy.kind,
        "checkpoint": f"members/{copy.name}",
        "bytes": weight_bytes(copy.rounded.folder / CHECKPOINT),
        "tokens": {"hop": copy.num_tokens, "cumulative": cumulative, "teacher_labelled": labelled},
        "cost": {
            "seconds": sum(stage.cost()["seconds"] for stage in (copy.rounded, copy.evaluation)),
            "flops": None,
            "money": None,
        },
        "stages": {"cut": None, "repaired": None, "recovered": None},
        "metrics": copy.evaluation.json("eval.json")["metrics"],
        "speed": _speed(copy.evaluation),
    }


def weight_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's weight files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _labelled(recipe: Recipe, member: ResolvedMember, finished: FinishedMember) -> int:
    """Tokens whose probabilities the teacher has given for this member."""
    if finished.labels is not None:
        taught = len(taught_steps(recipe, member.num_steps)) / max(1, member.num_steps)
        return int(finished.labels.json(LABELS)["tokens"]) + round((1 - taught) * member.num_tokens)
    return member.num_tokens if recipe.distill and recipe.distill.teacher == "parent" else 0


def _row(member: ResolvedMember, role: str, status: str) -> Row:
    return {
        "name": member.name,
        "role": role,
        "status": status,
        "seed": member.seed or None,
        "checkpoint": None,
        "dims": member.dims.as_dict(),
        "num_parameters": member.num_parameters,
        "num_parameters_non_embedding": member.num_parameters_non_embedding,
        "bytes": None,
        "tokens": {"hop": 0, "cumulative": 0, "teacher_labelled": 0},
        "cost": {"seconds": None, "flops": None, "money": None},
        "stages": {"cut": None, "repaired": None, "recovered": None},
        "metrics": [],
        "speed": _NO_SPEED,
    }


def _speed(evaluation: Made) -> dict[str, Any]:
    measured = evaluation.cost().get("speed", {})
    return {name: measured.get(name) for name in _NO_SPEED}
