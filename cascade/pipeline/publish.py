"""Publishing: members/NAME with checkpoint, card and results for each member and copy, and the run's report."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cascade.evaluation.reload import ReloadError
from cascade.models.architecture.model_class import auto_class_of
from cascade.models.checkpoint.load import CHECKPOINT, ModelSource, fingerprint, load_config
from cascade.models.checkpoint.older_keys import add_older_keys
from cascade.models.checkpoint.sentence_files import copy_sentence_files
from cascade.pipeline.ancestry import provenance_of, provenance_of_copy
from cascade.pipeline.kept_targets import LABELS, taught_steps
from cascade.pipeline.rows import FinishedMember, RoundedCopy, copy_row, member_row
from cascade.pipeline.stage_output import Made
from cascade.planning.family import ResolvedMember
from cascade.planning.ownership import resolved_recipe
from cascade.recipe.names import owner_of
from cascade.recipe.places import without_folders
from cascade.recipe.schema import Recipe
from cascade.report.block_sums import BLOCK_SUMS, load_block_sums
from cascade.report.card import member_card
from cascade.report.logs import training_logs
from cascade.report.provenance import Provenance
from cascade.report.rates import RATES, load_rates
from cascade.report.records import Row, family_of, load_family
from cascade.report.tail_tables import TAIL, load_tails
from cascade.report.target_costs import TARGETS, load_targets
from cascade.report.verdicts import VERDICTS, judge
from cascade.report.write import resealed, write_family
from cascade.runtime.files import read_json, write_atomically
from cascade.store.commits import staged, verify_folder
from cascade.store.strict_json import write_json
from cascade.store.strict_yaml import write_yaml
from cascade.store.user_files import CARD, carry_over


def publish_copies(
    run_folder: Path,
    recipe: Recipe,
    members: list[ResolvedMember],
    owner: Row,
    copies: Sequence[RoundedCopy],
    teacher: Row,
    parent: ModelSource,
) -> None:
    """Publish members/NAME for each copy in fewer bits, with its card and results."""
    for copy in copies:
        row = copy_row(owner, copy)
        provenance = provenance_of_copy(recipe, members, owner.name, copy, parent.reference, row.tokens)
        lineage = {
            **_lineage(provenance, parent),
            "seed": None,
            "copy_of": owner.name,
            "quantised": copy.kind,
            "auto_class": auto_class_of(load_config(copy.rounded.model(copy.name).source)),
            "tokens": vars(row.tokens),
            "stages": {
                name: {"folder": f"stages/{stage.folder.name}", "sha256": stage.digest}
                for name, stage in (("quantised", copy.rounded), ("evaluation", copy.evaluation))
            },
        }
        card = member_card(row, teacher, provenance, lineage, _public_recipe(recipe, members))
        final = run_folder / "members" / copy.name
        _publish(
            final, copy.rounded.folder / CHECKPOINT, copy.evaluation.folder, lineage, card, _sentences(recipe, parent)
        )


def publish_member(
    run_folder: Path,
    recipe: Recipe,
    members: list[ResolvedMember],
    member: ResolvedMember,
    finished: FinishedMember,
    teacher: Row,
    parent: ModelSource,
) -> None:
    """Publish members/NAME: checkpoint, card, lineage and results, replaced in one step; then the member's copies."""
    row = member_row(recipe, members, member, finished)
    provenance = provenance_of(recipe, members, member, parent.reference, row.tokens)
    lineage = {
        **_lineage(provenance, parent),
        "seed": member.seed or None,
        "auto_class": auto_class_of(member.sized.config),
        "tokens": vars(row.tokens),
        "stages": {
            name: {"folder": f"stages/{stage.folder.name}", "sha256": stage.digest}
            for name, stage in vars(finished).items()
            if isinstance(stage, Made)
        },
        "plan": f"stages/{finished.cut.folder.name}/plan.json" if finished.cut else None,
    }
    card = member_card(row, teacher, provenance, lineage, _public_recipe(recipe, members))
    final = run_folder / "members" / member.name
    checkpoint, evaluation = finished.distilled.folder / CHECKPOINT, finished.evaluation.folder
    _publish(final, checkpoint, evaluation, lineage, card, _sentences(recipe, parent))
    publish_copies(run_folder, recipe, members, row, finished.copies, teacher, parent)


def _lineage(provenance: Provenance, parent: ModelSource) -> dict[str, Any]:
    """The keys that cascade.json has for every published model."""
    return {
        "name": provenance.name,
        "parent": provenance.parent,
        "parent_sha256": fingerprint(parent),
        "teacher": provenance.teacher or None,
        "origins": list(provenance.origins),
        "provenance": provenance.record(),
    }


def _public_recipe(recipe: Recipe, members: list[ResolvedMember]) -> str:
    return write_yaml(resolved_recipe(recipe, members, public=True))


def _sentences(recipe: Recipe, parent: ModelSource) -> Path | None:
    """The folder whose sentence-transformers files accompany every model of the family; None for other tasks."""
    return parent.folder if recipe.task == "embedding" else None


def _publish(
    final: Path, checkpoint: Path, evaluation: Path, lineage: dict[str, Any], card: str, sentences: Path | None
) -> None:
    if final.exists() and not _damaged(final) and read_json(final / "cascade.json") == lineage:
        return  # the same as an earlier run published; what a user added stays, and what he wrote on the card
    with staged(final, {"stage": "publish", "member": lineage["name"]}, carry=carry_over) as staging:
        for file in sorted(checkpoint.iterdir()):
            shutil.copyfile(file, staging / file.name)
        if sentences is not None:
            copy_sentence_files(sentences, staging)
        add_older_keys(staging)  # of members that an earlier version saved
        shutil.copyfile(evaluation / "eval.json", staging / "eval.json")
        write_json(staging / "lm_eval.json", without_folders(read_json(evaluation / "lm_eval.json")))
        (staging / "cascade.json").write_text(json.dumps(lineage, indent=1) + "\n", encoding="utf-8")
        (staging / CARD).write_text(card, encoding="utf-8")
    if not (final / "config.json").is_file():
        raise ReloadError(f"{final}: published without a config.json")


def _damaged(folder: Path) -> list[str]:
    return [name for name in verify_folder(folder) if name != CARD]


def write_report(
    run_folder: Path,
    recipe: Recipe,
    members: list[ResolvedMember],
    teacher: Row,
    finished: dict[str, FinishedMember],
    parent_copies: Sequence[RoundedCopy] = (),
) -> None:
    """Write family.json and the reports, with the rows of this run and of members that an earlier run finished."""
    suffixes = tuple(f"-{entry.suffix}" for entry in recipe.finish)
    rows: dict[str, list[Row]] = _earlier_rows(run_folder, {member.name for member in members}, suffixes)
    for member in members:
        if member.name in finished:
            stages = finished[member.name]
            row = member_row(recipe, members, member, stages)
            copy_rows = [copy_row(row, copy) for copy in stages.copies]
            rows[member.name] = [row, *copy_rows, *stages.baselines, *stages.candidates]
    family = [row for member in members for row in rows.get(member.name, [])]
    family = [*(copy_row(teacher, copy) for copy in parent_copies), *family]
    order = ("member", "quantised", "baseline", "candidate")
    ordered = sorted(family, key=lambda row: order.index(row.role))  # stable
    verdicts = judge([teacher, *ordered], recipe.evaluate.at_least)
    copies = [*(copy for stages in finished.values() for copy in stages.copies), *parent_copies]
    evaluations = {name: stages.evaluation for name, stages in finished.items()}
    evaluations |= {copy.name: copy.evaluation for copy in copies}
    tails = load_tails(run_folder)
    tails |= {name: tail for name, stage in evaluations.items() if (tail := stage.json("eval.json").get("tail"))}
    tails = {row.name: tails[row.name] for row in ordered if row.name in tails}
    blocks = load_block_sums(run_folder)
    for stages in finished.values():
        paths = {name: stage.folder / BLOCK_SUMS for name, stage in stages.measured.items()}
        blocks |= {name: read_json(path) for name, path in paths.items() if path.exists()}
    blocks = {row.name: blocks[row.name] for row in ordered if row.name in blocks}
    with resealed(run_folder):
        write_atomically(run_folder / BLOCK_SUMS, json.dumps(blocks) + "\n")
        write_atomically(run_folder / VERDICTS, json.dumps(verdicts, indent=1) + "\n")
        write_atomically(run_folder / TAIL, json.dumps(tails, indent=1) + "\n")
        _write_targets(run_folder, recipe, members, finished)
        rates = load_rates(run_folder)
        rates |= {name: rate for stages in finished.values() for name, rate in stages.rates.items()}
        rates = {row.name: rates[row.name] for row in ordered if row.name in rates}
        write_atomically(run_folder / RATES, json.dumps(rates, indent=1) + "\n")
        write_family(run_folder, recipe.name, [teacher, *ordered], training_logs(run_folder))


def _write_targets(
    run_folder: Path, recipe: Recipe, members: list[ResolvedMember], finished: dict[str, FinishedMember]
) -> None:
    """Write targets.json with the figures of each member's cached targets; remove it where the run caches none."""
    labelling = load_targets(run_folder).get("members", {})
    about: dict[str, Any] = {}
    for member in members:
        stages = finished.get(member.name)
        if stages is None:
            continue
        labelling.pop(member.name, None)
        if stages.labels is None:
            continue
        about = stages.labels.json(LABELS)
        searched = stages.rate.json("rate.json")["num_tokens"] if stages.rate else 0
        angles = stages.distilled.cost().get("angles_degrees", [])
        figures = {name: about[name] for name in ("windows", "made", "tokens", "seconds", "num_bytes")}
        search = recipe.prune.search if member.member.start == "prune" else None
        search_tokens = search.tokens * sum(row.status != "candidate" for row in stages.candidates) if search else 0
        taught = member.num_tokens * len(taught_steps(recipe, member.num_steps)) // max(1, member.num_steps)
        read = {"tokens_read": taught + searched + search_tokens, "angles_degrees": angles}
        labelling[member.name] = figures | read | {"rounding_kl": about.get("rounding_kl")}
    ordered = {member.name: labelling[member.name] for member in members if member.name in labelling}
    about = about or load_targets(run_folder)
    if not ordered:
        (run_folder / TARGETS).unlink(missing_ok=True)
        return
    record = {name: about[name] for name in ("kind", "why", "root")} | {"members": ordered}
    write_atomically(run_folder / TARGETS, json.dumps(record, indent=1) + "\n")


def _earlier_rows(run_folder: Path, names: set[str], suffixes: tuple[str, ...]) -> dict[str, list[Row]]:
    """Rows of an earlier family.json by member, the member's own first; of copies those with one of `suffixes`."""
    if not (run_folder / "family.json").exists():
        return {}
    rows: dict[str, list[Row]] = {}
    for row in family_of(load_family(run_folder)).rows:
        if row.role == "member" and row.name in names:
            rows[row.name] = [row]
        elif row.role == "quantised" and not row.name.endswith(suffixes):
            continue  # no longer asked for
        elif row.role in ("quantised", "baseline", "candidate") and (owner := owner_of(row.name, rows)):
            rows[owner].append(row)
    return rows
