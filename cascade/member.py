"""One member: its stages, and what each of them depends on."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from cascade.context import Run
from cascade.evaluating import evaluate_checkpoint, make_baseline
from cascade.family import ResolvedMember
from cascade.inputs import evaluation_settings
from cascade.quantising import make_copies
from cascade.recipe.distill import WITHOUT_EFFECT
from cascade.recipe.schema import Recipe
from cascade.report.rates import Rate, rate_of
from cascade.report.records import Row
from cascade.rows import FinishedMember, baseline_row
from cascade.seeding import Start, make_start
from cascade.stage_output import Input, Made
from cascade.stages import make_labels, make_rate, make_recovered


@dataclass(frozen=True, kw_only=True)
class _Training:
    """A training that is finished."""

    output: Made
    search: Made | None
    """The search for its rate; None where the recipe gives that."""
    learning_rate: float

    def rate(self) -> Rate:
        """What it was done at, for the report."""
        return rate_of(self.learning_rate, self.search.folder if self.search else None)

    def stages(self) -> list[Made]:
        """The training, and the search before it."""
        return [self.output, *([self.search] if self.search else [])]


@dataclass(frozen=True, kw_only=True)
class _Baseline:
    """A model that a member is compared with."""

    row: Row
    evaluation: Made
    training: _Training | None
    """None where it is the member's own cut."""


def make_member(run: Run, member: ResolvedMember, seed: FinishedMember | None, labels: Made | None) -> FinishedMember:
    """All stages of one member; `seed` is None where that is the parent, `labels` of `make_label_stage`."""
    run = run.for_member(member)
    start = make_start(run, member, seed)
    recovery = _train(run, member, start, "distill")
    baselines = [_make_baseline(run, member, start, kind) for kind in _baseline_kinds(run.recipe, start)]
    evaluation = evaluate_checkpoint(run, "evaluate", member.name, recovery.output, member.name)
    copies = make_copies(run, member.name, recovery.output.model(member.name))
    trainings = {member.name: recovery}
    trainings |= {baseline.row.name: baseline.training for baseline in baselines if baseline.training}
    return FinishedMember(
        cut=start.cut,
        repaired=start.repaired,
        rate=recovery.search,
        distilled=recovery.output,
        evaluation=evaluation,
        labels=labels,
        lineage=start.lineage,
        baselines=[baseline.row for baseline in baselines],
        copies=copies,
        rates={name: training.rate() for name, training in trainings.items()},
        measured={member.name: evaluation} | {baseline.row.name: baseline.evaluation for baseline in baselines},
    )


def make_label_stage(run: Run, member: ResolvedMember) -> Made | None:
    """What it took to label all that a member reads; None where the teacher's targets are not kept."""
    run = run.for_member(member)
    distill, cache = run.recipe.distill, run.cache
    if cache is None:
        return None
    return run.runner.make(
        "label",
        member.name,
        settings={"root": cache.windows.root, "first_position": member.first_position, "num_steps": member.num_steps}
        | {"batch_size": distill.batch_size if distill else 0, "seed": run.recipe.seed}
        | ({"on_policy": distill.on_policy.fraction} if distill and distill.on_policy else {}),
        inputs={"data": run.data},
        write=partial(make_labels, run, member, cache),
    )


def _train(run: Run, member: ResolvedMember, start: Start, stage: str) -> _Training:
    """A training at the rate that the recipe gives, or at the one that is searched for.

    `stage` is distill, or baseline-ce: the same start on the same tokens, without a teacher, at a rate of its own.
    """
    recipe, learns = run.recipe, stage == "distill"
    if not learns and recipe.ce_learning_rate != "auto" and recipe.distill and recipe.distill.optimizer == "auto":
        member = replace(member, optimizer="adamw")  # a rate that is given was tried with AdamW
    search, learning_rate = _find_rate(run, member, start, stage)
    settings = _training_settings(run, member) | {"learning_rate": learning_rate}
    output = run.runner.make(
        stage,
        member.name,
        settings=settings | run.target_settings() if learns else settings,
        inputs=_training_inputs(run, start),
        write=partial(make_recovered, run, member, start, stage, learning_rate),
    )
    return _Training(output=output, search=search, learning_rate=learning_rate)


def _find_rate(run: Run, member: ResolvedMember, start: Start, stage: str) -> tuple[Made | None, float]:
    """(the search for a training's rate, the rate); no search where the recipe gives a rate for it.

    A rate that is given for distillation is none for its cross-entropy baseline: that is searched for as long.
    """
    learns, distill = stage == "distill", run.recipe.distill
    learning_rate = (distill.learning_rate if distill else 0.0) if learns else run.recipe.ce_learning_rate
    if learning_rate != "auto":
        return None, learning_rate
    settings = _training_settings(run, member)
    if member.optimizer == "muon":  # searched for by other rules than before
        settings |= {"search": 2}
    search = run.runner.make(
        "rate" if learns else "ce-rate",
        member.name,
        settings=settings | run.target_settings() if learns else settings | {"learning_rate": "auto"},
        inputs=_training_inputs(run, start),
        write=partial(make_rate, run, member, start, stage),
    )
    return search, float(search.json("rate.json")["learning_rate"])


def _baseline_kinds(recipe: Recipe, start: Start) -> list[str]:
    """The baselines that this member can have: only what was cut has a cut, only what was repaired a repair."""
    absent = {kind for kind, stage in (("cut", start.cut), ("repaired", start.repaired)) if stage is None}
    return [kind for kind in recipe.baseline_kinds if kind not in absent]


def _make_baseline(run: Run, member: ResolvedMember, start: Start, kind: str) -> _Baseline:
    training = _train(run, member, start, "baseline-ce") if kind == "ce" else None
    compared = training.output if training else {"cut": start.cut, "repaired": start.repaired}[kind]
    if compared is None:
        raise ValueError(f"{member.name} has no stage to be compared with: {kind}")
    evaluation = run.runner.make(
        f"heldout-{kind}",
        member.name,
        settings=evaluation_settings(run.recipe, heldout_only=True) | run.comparison_settings(),
        inputs={"checkpoint": compared, "source": run.source, "parent": run.parent},
        write=partial(make_baseline, run, compared.model(member.name).source),
    )
    row = baseline_row(member, kind, [evaluation, *(training.stages() if training else [])])
    return _Baseline(row=row, evaluation=evaluation, training=training)


def _training_inputs(run: Run, start: Start) -> dict[str, Input]:
    return {"start": start.model, "teacher": run.parent, "data": run.data}


def _training_settings(run: Run, member: ResolvedMember) -> dict[str, Any]:
    recipe = run.recipe
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
        | run.comparison_settings()
    )
