"""The stages rate and ce-rate: the peak learning rate of a training, found by short trainings.

Depends on: what the training depends on, but for its rate. Leaves: `rate.json` with the rate and the loss at each
rate of the search.
"""

from dataclasses import asdict
from functools import partial
from pathlib import Path

from cascade.distillation.range_test import find_learning_rate
from cascade.pipeline.context import Run
from cascade.pipeline.stage_output import Made, Start
from cascade.pipeline.stages.training import distill_settings, lesson_of, training_inputs, training_settings
from cascade.pipeline.training_options import execution_of
from cascade.planning.family import ResolvedMember
from cascade.runtime.progress import OnStep
from cascade.store.strict_json import write_json


def find_rate(run: Run, member: ResolvedMember, start: Start, stage: str) -> tuple[Made | None, float]:
    """(the search for a training's rate, the rate); the search is None where the recipe gives the rate.

    A given rate for distillation does not apply to the cross-entropy baseline, which has a search of its own.
    """
    learns, distill = stage == "distill", run.recipe.distill
    learning_rate = (distill.learning_rate if distill else 0.0) if learns else run.recipe.ce_learning_rate
    if learning_rate != "auto":
        return None, learning_rate
    settings = training_settings(run, member)
    if member.optimizer == "muon":  # searched for by other rules than before
        settings |= {"search": 2}
    search = run.runner.make(
        "rate" if learns else "ce-rate",
        member.name,
        settings=settings | run.target_settings() if learns else settings | {"learning_rate": "auto"},
        inputs=training_inputs(run, start),
        write=partial(make_rate, run, member, start, stage),
    )
    return search, float(search.json("rate.json")["learning_rate"])


def make_rate(run: Run, member: ResolvedMember, start: Start, stage: str, folder: Path, on_step: OnStep) -> None:
    """Search the learning rate of a member's training, and write rate.json.

    `stage` is distill or baseline-ce; both searches work in the same way, each by its own loss on selection text.
    """
    lesson = lesson_of(run, member, start, stage)
    execution = execution_of(distill_settings(run))
    search = find_learning_rate(lesson, num_tokens=member.num_tokens, execution=execution, on_try=on_step)
    write_json(folder / "rate.json", {name: value for name, value in asdict(search).items() if name != "seconds"})
