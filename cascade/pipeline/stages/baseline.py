"""The stages heldout-cut, heldout-repaired and heldout-ce: what a member is compared with."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cascade.evaluation.evaluate import default_device
from cascade.evaluation.heldout import (
    heldout_report,
)
from cascade.models.checkpoint.load import (
    ModelSource,
    load_model,
)
from cascade.pipeline.context import Run
from cascade.pipeline.rows import baseline_row
from cascade.pipeline.stage_output import Made, Start
from cascade.pipeline.stages.heldout import heldout_text
from cascade.pipeline.stages.recover import Training, train
from cascade.planning.family import ResolvedMember
from cascade.planning.inputs import evaluation_settings
from cascade.recipe.schema import Recipe
from cascade.report.block_sums import BLOCK_SUMS
from cascade.report.records import Row
from cascade.runtime.progress import OnStep
from cascade.store.strict_json import write_json


def make_baseline(run: Run, checkpoint: ModelSource, folder: Path, on_step: OnStep) -> None:
    """Held-out metrics of a model that is only there to be compared with, and its heldout_blocks.json."""
    teacher, model = run.teacher(), load_model(checkpoint).to(default_device())
    heldout = heldout_text(run, run.parent.source, vocab_size=run.vocab_size)
    report = heldout_report(model, teacher, heldout, vocab_size=run.vocab_size)
    write_json(folder / "eval.json", {"metrics": report.metrics, "items": {}})
    if report.blocks is not None:
        write_json(folder / BLOCK_SUMS, report.blocks)


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A model that a member is compared with."""

    row: Row
    evaluation: Made
    training: Training | None
    """None of the member's own cut or repaired model, which are not trained."""


def baseline_kinds(recipe: Recipe, start: Start) -> list[str]:
    """The baselines that this member can have: only what was cut has a cut, only what was repaired a repair."""
    absent = {kind for kind, stage in (("cut", start.cut), ("repaired", start.repaired)) if stage is None}
    return [kind for kind in recipe.baseline_kinds if kind not in absent]


def evaluate_baseline(run: Run, member: ResolvedMember, start: Start, kind: str) -> Baseline:
    """The held-out metrics of what a member is compared with; `kind` is cut, repaired or ce (trained for it first)."""
    training = train(run, member, start, "baseline-ce") if kind == "ce" else None
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
    return Baseline(row=row, evaluation=evaluation, training=training)
