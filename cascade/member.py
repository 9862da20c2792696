"""One member: its stages, and what each of them depends on."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from cascade.evaluating import evaluation_settings, make_baseline, make_evaluation
from cascade.family import ResolvedMember
from cascade.models.checkpoint import (
    CHECKPOINT,
    ModelSource,
    fingerprint,
)
from cascade.quantising import make_copies
from cascade.recipe.distill import WITHOUT_EFFECT
from cascade.recipe.schema import Recipe
from cascade.report.rates import rate_of
from cascade.rows import FinishedMember, baseline_row
from cascade.runner import StageRunner
from cascade.seeding import Shared, Start, kept_settings, make_start, shared_by
from cascade.stages import make_labels, make_rate, make_recovered
from cascade.store import output_digest


def make_member(
    runner: StageRunner,
    recipe: Recipe,
    shared: Shared,
    member: ResolvedMember,
    seed: FinishedMember | None,
    labels: Path | None,
) -> FinishedMember:
    """All stages of one member; `seed` is None where that is the parent, `labels` of `make_label_stage`."""
    shared = shared_by(shared, member)
    begun = make_start(runner, recipe, shared, member, seed)
    inputs = {
        "start": begun.digest,
        "teacher": shared.digests["parent"],
        "data": shared.digests["data"],
    }
    distilled, rate, learning_rate = _train(runner, recipe, shared, member, begun, inputs, "distill")
    rows, rates = [], {member.name: rate_of(learning_rate, rate)}
    measured: dict[str, Path] = {}
    for kind in recipe.baseline_kinds:
        made = {"cut": begun.cut, "repaired": begun.repaired}.get(kind)
        if made is None and kind != "ce":
            continue
        trained: list[Path] = []
        if kind == "ce":
            made, search, own_rate = _train(runner, recipe, shared, member, begun, inputs, "baseline-ce")
            trained, rates[f"{member.name}-ce"] = [made, *([search] if search else [])], rate_of(own_rate, search)
        checkpoint = begun.source if made is None else ModelSource(made / CHECKPOINT, member.name)
        heldout = _make_baseline(runner, recipe, shared, member, kind, checkpoint, made)
        rows.append(baseline_row(member, kind, [heldout, *trained]))
        measured[rows[-1].name] = heldout
    evaluation = _make_evaluation(runner, recipe, shared, member, distilled)
    checkpoint = ModelSource(distilled / CHECKPOINT, member.name)
    copies = make_copies(runner, recipe, shared, member.name, checkpoint, output_digest(distilled))
    return FinishedMember(
        begun.cut,
        begun.repaired,
        rate,
        distilled,
        evaluation,
        rows,
        begun.lineage,
        labels=labels,
        copies=copies,
        rates=rates,
        measured={member.name: evaluation} | measured,
    )


def _make_evaluation(
    runner: StageRunner, recipe: Recipe, shared: Shared, member: ResolvedMember, distilled: Path
) -> Path:
    """The folder of a recovered member's evaluation."""
    return runner.run(
        member.name,
        "evaluate",
        evaluation_settings(recipe) | _compared(member),
        shared.digests
        | {"checkpoint": output_digest(distilled), "parent_evaluation": output_digest(shared.evaluation)},
        lambda folder, on_step: make_evaluation(
            folder,
            recipe,
            ModelSource(distilled / CHECKPOINT, member.name),
            teacher=shared.teacher(),
            parent_evaluation=shared.evaluation,
            reference=distilled / "reference.safetensors",
            trained_with=shared.parent,
            vocab_size=member.vocab_size,
        ),
    )


def _expert(recipe: Recipe, shared: Shared) -> nn.Module | None:
    """Whose probabilities the members learn; None where they learn from the text alone."""
    return shared.teacher() if recipe.distill and recipe.distill.teacher == "parent" else None


def make_label_stage(runner: StageRunner, recipe: Recipe, shared: Shared, member: ResolvedMember) -> Path | None:
    """The folder of what it took to label all that a member reads; None where nothing is kept of the teacher."""
    cache = shared_by(shared, member).cache
    if cache is None:
        return None
    return runner.run(
        member.name,
        "label",
        {"root": cache.windows.root, "first_position": member.first_position, "num_steps": member.num_steps}
        | {"batch_size": recipe.distill.batch_size if recipe.distill else 0, "seed": recipe.seed}
        | ({"on_policy": recipe.distill.on_policy.fraction} if recipe.distill and recipe.distill.on_policy else {}),
        {"data": shared.digests["data"]},
        lambda folder, on_step: make_labels(
            folder, recipe, member, shared.parent, shared.data, shared.teacher(), cache, on_step
        ),
    )


def _train(
    runner: StageRunner,
    recipe: Recipe,
    shared: Shared,
    member: ResolvedMember,
    begun: Start,
    inputs: dict[str, str],
    stage: str,
) -> tuple[Path, Path | None, float]:
    """(the folder of a training, that of the search for its rate, the rate).

    `stage` is distill, or baseline-ce: the same start on the same tokens, without a teacher, at a rate of its own.
    """
    learns = stage == "distill"
    if not learns and recipe.ce_learning_rate != "auto" and recipe.distill and recipe.distill.optimizer == "auto":
        member = replace(member, optimizer="adamw")  # a rate that is given was tried with AdamW
    search, learning_rate = _make_rate(runner, recipe, shared, member, begun, inputs, stage=stage)
    settings = _training_settings(recipe, member) | {"learning_rate": learning_rate}
    made = runner.run(
        member.name,
        stage,
        settings | kept_settings(shared) if learns else settings,
        inputs,
        lambda folder, on_step: make_recovered(
            folder,
            recipe,
            member,
            begun.source,
            shared.parent,
            shared.data,
            _expert(recipe, shared) if learns else None,
            on_step,
            cache=shared.cache,
            stage=stage,
            lineage=begun.lineage,
            learning_rate=learning_rate,
        ),
    )
    return made, search, learning_rate


def _make_rate(
    runner: StageRunner,
    recipe: Recipe,
    shared: Shared,
    member: ResolvedMember,
    begun: Start,
    inputs: dict[str, str],
    *,
    stage: str,
) -> tuple[Path | None, float]:
    """(the folder of the search, the rate) of a training; no folder where the recipe gives a rate for it.

    A rate that is given for distillation is none for its cross-entropy baseline: that is searched for as long.
    """
    learns = stage == "distill"
    given = (recipe.distill.learning_rate if recipe.distill else 0.0) if learns else recipe.ce_learning_rate
    if given != "auto":
        return None, given
    settings = _training_settings(recipe, member)
    if member.optimizer == "muon":  # searched for by other rules than before
        settings |= {"search": 2}
    folder = runner.run(
        member.name,
        "rate" if learns else "ce-rate",
        settings | kept_settings(shared) if learns else settings | {"learning_rate": "auto"},
        inputs,
        lambda folder, on_step: make_rate(
            folder,
            recipe,
            member,
            begun.source,
            shared.parent,
            shared.data,
            _expert(recipe, shared) if learns else None,
            on_step,
            cache=shared.cache,
            stage=stage,
            lineage=begun.lineage,
        ),
    )
    return folder, float(json.loads((folder / "rate.json").read_text(encoding="utf-8"))["learning_rate"])


def _make_baseline(
    runner: StageRunner,
    recipe: Recipe,
    shared: Shared,
    member: ResolvedMember,
    kind: str,
    checkpoint: ModelSource,
    made: Path | None,
) -> Path:
    """The folder of a baseline's held-out metrics; `made` is that of the stage that wrote its checkpoint."""
    return runner.run(
        member.name,
        f"heldout-{kind}",
        evaluation_settings(recipe, heldout_only=True) | _compared(member),
        {
            "checkpoint": output_digest(made) if made else fingerprint(checkpoint),
            "source": shared.digests["source"],
            "parent": shared.digests["parent"],
        },
        lambda folder, on_step: make_baseline(
            folder, recipe, checkpoint, shared.parent, shared.teacher(), member.vocab_size
        ),
    )


def _training_settings(recipe: Recipe, member: ResolvedMember) -> dict[str, Any]:
    settings = (
        recipe.distill.model_dump(exclude={"tokens", "examples", "cache", *WITHOUT_EFFECT}) if recipe.distill else {}
    )
    return (
        settings
        | {
            "optimizer": member.optimizer,
            "num_tokens": member.num_tokens,
            "first_position": member.first_position,
            "seed": recipe.seed,
            "dtype": recipe.save.dtype,
        }
        | _compared(member)
    )


def _compared(member: ResolvedMember) -> dict[str, int]:
    """What results depend on where a member is compared with its teacher over some ids alone."""
    return {} if member.vocab_size is None else {"vocab_size": member.vocab_size}
