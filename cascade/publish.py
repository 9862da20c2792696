"""Rows of family.json from stage folders, and the published folder of each member."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cascade.evaluation.reload import ReloadError
from cascade.family import ResolvedMember
from cascade.models.architecture import auto_class_of
from cascade.models.axes import probe_axes
from cascade.models.checkpoint import CHECKPOINT, ModelSource, fingerprint, load_config
from cascade.models.dims import dims_of
from cascade.ownership import resolved_recipe
from cascade.recipe.schema import Recipe
from cascade.report.card import member_card
from cascade.report.logs import training_logs
from cascade.report.records import Row, load_family
from cascade.report.verdicts import VERDICTS, judge
from cascade.report.write import write_family
from cascade.runner import read_cost
from cascade.store import is_committed, output_digest, staged, write_atomically
from cascade.yaml_reader import write_yaml

_BASELINES = {"cut": "cut only", "repaired": "cut and repaired", "ce": "cross-entropy"}

_NO_SPEED = {"prefill_tokens_per_s": None, "decode_tokens_per_s": None, "peak_memory_bytes": None}


@dataclass(frozen=True)
class RoundedCopy:
    """A copy of a member, or of the parent, in fewer bits."""

    name: str
    kind: str
    """int8 or int4"""
    made: Path
    evaluation: Path
    num_tokens: int
    """Trained with rounded weights; 0: not at all."""


@dataclass(frozen=True)
class FinishedMember:
    """The folders of a member whose stages are all committed."""

    cut: Path | None
    repaired: Path | None
    rate: Path | None
    """The search for the learning rate."""
    distilled: Path
    evaluation: Path
    baselines: list[Row]
    lineage: list[Path] | None
    """The folders of the cuts from the parent to it; None where it was not cut from the parent."""
    candidates: list[Row] = field(default_factory=list)
    """Shapes that a search tried."""
    copies: list[RoundedCopy] = field(default_factory=list)


def teacher_row(recipe: Recipe, parent: ModelSource, evaluation: Path) -> Row:
    """The parent's row."""
    config = load_config(parent)
    axes, dims = probe_axes(config), dims_of(config)
    cost = read_cost(evaluation)
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
        "cost": {"seconds": cost["seconds"], "flops": None, "money": None},
        "stages": {"cut": None, "repaired": None, "recovered": None},
        "metrics": _read(evaluation / "eval.json")["metrics"],
        "speed": _speed(evaluation),
    }


def member_row(recipe: Recipe, members: list[ResolvedMember], member: ResolvedMember, finished: FinishedMember) -> Row:
    """A finished member's row."""
    stages = (finished.cut, finished.repaired, finished.rate, finished.distilled, finished.evaluation)
    folders = [folder for folder in stages if folder]
    teacher_flops = read_cost(finished.distilled)["teacher_flops_per_token"]
    chain, seed = member.num_tokens, member.seed
    by_name = {other.name: other for other in members}
    while seed in by_name:
        chain += by_name[seed].num_tokens
        seed = by_name[seed].seed
    return _row(member, "member", "done") | {
        "checkpoint": f"members/{member.name}",
        "bytes": weight_bytes(finished.distilled / CHECKPOINT),
        "tokens": {"hop": member.num_tokens, "cumulative": chain, "teacher_labelled": _labelled(recipe, member)},
        "cost": {
            "seconds": sum(read_cost(folder)["seconds"] for folder in folders),
            "flops": member.num_tokens * (3 * member.flops_per_token + teacher_flops),
            "money": None,
        },
        "stages": {
            "cut": _read(finished.cut / "losses.json") if finished.cut else None,
            "repaired": _read(finished.repaired / "losses.json") if finished.repaired else None,
            "recovered": _read(finished.distilled / "losses.json"),
        },
        "metrics": _read(finished.evaluation / "eval.json")["metrics"],
        "speed": _speed(finished.evaluation),
    }


def _labelled(recipe: Recipe, member: ResolvedMember) -> int:
    """Tokens whose probabilities the teacher has given."""
    return member.num_tokens if recipe.distill and recipe.distill.teacher == "parent" else 0


def baseline_row(member: ResolvedMember, kind: str, folders: list[Path]) -> Row:
    """A row to compare a member with, from its evaluation's folder and, if trained, its training's.

    Its weights stay inside the run. Tokens count from the cut that the member itself starts from.
    """
    tokens = member.num_tokens if kind == "ce" else 0
    return _row(member, "baseline", _BASELINES[kind]) | {
        "name": f"{member.name}-{kind}",
        "tokens": {"hop": tokens, "cumulative": tokens, "teacher_labelled": 0},
        "cost": {
            "seconds": sum(read_cost(folder)["seconds"] for folder in folders),
            "flops": tokens * 3 * member.flops_per_token,
            "money": None,
        },
        "metrics": _read(folders[0] / "eval.json")["metrics"],
    }


def copy_row(owner: Row, copy: RoundedCopy) -> Row:
    """The row of a copy, from that of what it is a copy of."""
    labelled, cumulative = copy.num_tokens, owner["tokens"]["cumulative"] + copy.num_tokens
    return owner | {
        "name": copy.name,
        "role": "quantised",
        "status": copy.kind,
        "checkpoint": f"members/{copy.name}",
        "bytes": weight_bytes(copy.made / CHECKPOINT),
        "tokens": {"hop": copy.num_tokens, "cumulative": cumulative, "teacher_labelled": labelled},
        "cost": {
            "seconds": sum(read_cost(folder)["seconds"] for folder in (copy.made, copy.evaluation)),
            "flops": None,
            "money": None,
        },
        "stages": {"cut": None, "repaired": None, "recovered": None},
        "metrics": _read(copy.evaluation / "eval.json")["metrics"],
        "speed": _speed(copy.evaluation),
    }


def publish_copies(
    run_folder: Path, recipe_yaml: str, owner: Row, copies: Sequence[RoundedCopy], teacher: Row, parent: ModelSource
) -> None:
    """members/NAME of each copy, with its card and results."""
    for copy in copies:
        row = copy_row(owner, copy)
        lineage = {
            "name": copy.name,
            "parent": parent.reference,
            "parent_sha256": fingerprint(parent),
            "teacher": parent.reference,
            "seed": None,
            "copy_of": owner["name"],
            "quantised": copy.kind,
            "auto_class": auto_class_of(load_config(ModelSource(copy.made / CHECKPOINT, copy.name))),
            "tokens": row["tokens"],
            "stages": {
                name: {"folder": f"stages/{folder.name}", "sha256": output_digest(folder)}
                for name, folder in (("quantised", copy.made), ("evaluation", copy.evaluation))
            },
        }
        card = member_card(row, teacher, lineage, recipe_yaml)
        _publish(run_folder / "members" / copy.name, copy.made / CHECKPOINT, copy.evaluation, lineage, card)


def publish_member(
    run_folder: Path,
    recipe: Recipe,
    members: list[ResolvedMember],
    member: ResolvedMember,
    finished: FinishedMember,
    teacher: Row,
    parent: ModelSource,
) -> None:
    """members/NAME: the checkpoint with its card, lineage and results, replaced in one step."""
    row = member_row(recipe, members, member, finished)
    lineage = {
        "name": member.name,
        "parent": parent.reference,
        "parent_sha256": fingerprint(parent),
        "teacher": parent.reference,
        "seed": member.seed or None,
        "auto_class": auto_class_of(member.config),
        "tokens": row["tokens"],
        "stages": {
            name: {"folder": f"stages/{folder.name}", "sha256": output_digest(folder)}
            for name, folder in vars(finished).items()
            if isinstance(folder, Path)
        },
        "plan": f"stages/{finished.cut.name}/plan.json" if finished.cut else None,
    }
    recipe_yaml = write_yaml(resolved_recipe(recipe, members))
    card = member_card(row, teacher, lineage, recipe_yaml)
    final = run_folder / "members" / member.name
    _publish(final, finished.distilled / CHECKPOINT, finished.evaluation, lineage, card)
    publish_copies(run_folder, recipe_yaml, row, finished.copies, teacher, parent)


def _publish(final: Path, checkpoint: Path, evaluation: Path, lineage: dict[str, Any], card: str) -> None:
    if is_committed(final) and _read(final / "cascade.json") == lineage:
        return  # the same as an earlier run published; what a user added stays
    with staged(final, {"stage": "publish", "member": lineage["name"]}) as staging:
        for file in sorted(checkpoint.iterdir()):
            shutil.copyfile(file, staging / file.name)
        for name in ("eval.json", "lm_eval.json"):
            shutil.copyfile(evaluation / name, staging / name)
        (staging / "cascade.json").write_text(json.dumps(lineage, indent=1) + "\n")
        (staging / "README.md").write_text(card)
    if not (final / "config.json").is_file():
        raise ReloadError(f"{final}: published without a config.json")


def write_report(
    run_folder: Path,
    recipe: Recipe,
    members: list[ResolvedMember],
    teacher: Row,
    finished: dict[str, FinishedMember],
    parent_copies: Sequence[RoundedCopy] = (),
) -> None:
    """family.json and the reports: rows made now, and those of members that an earlier run finished."""
    rows: dict[str, list[Row]] = _earlier_rows(run_folder, {member.name for member in members})
    for member in members:
        if member.name in finished:
            done = finished[member.name]
            row = member_row(recipe, members, member, done)
            copies = [copy_row(row, copy) for copy in done.copies]
            rows[member.name] = [row, *copies, *done.baselines, *done.candidates]
    family = [row for member in members for row in rows.get(member.name, [])]
    family = [*(copy_row(teacher, copy) for copy in parent_copies), *family]
    order = ("member", "quantised", "baseline", "candidate")
    ordered = sorted(family, key=lambda row: order.index(row["role"]))  # stable
    verdicts = judge([teacher, *ordered], recipe.evaluate.at_least)
    write_atomically(run_folder / VERDICTS, json.dumps(verdicts, indent=1) + "\n")
    write_family(run_folder, recipe.name, [teacher, *ordered], training_logs(run_folder))


def weight_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's weight files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


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


def _earlier_rows(run_folder: Path, names: set[str]) -> dict[str, list[Row]]:
    """Rows of an earlier family.json, members first in each list."""
    if not (run_folder / "family.json").exists():
        return {}
    rows: dict[str, list[Row]] = {}
    for row in load_family(run_folder)["rows"]:
        if row["role"] == "member" and row["name"] in names:
            rows[row["name"]] = [row]
        elif row["role"] in ("quantised", "baseline", "candidate") and row["name"].rpartition("-")[0] in rows:
            rows[row["name"].rpartition("-")[0]].append(row)
    return rows


def _speed(evaluation: Path) -> dict[str, Any]:
    measured = read_cost(evaluation).get("speed", {})
    return {name: measured.get(name) for name in _NO_SPEED}


def _read(path: Path) -> Any:
    return json.loads(path.read_text())
