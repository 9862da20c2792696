"""The stage repair: the weights of a cut model, refitted in closed form.

Depends on: `prune.repair`, the cut, the model that was cut, the parent and the data.
Leaves: `checkpoint/` in float32, `losses.json`, and `repair.json` with the result of each method.
"""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cascade.evaluation.evaluate import default_device
from cascade.models.checkpoint.load import CHECKPOINT, load_model, save_checkpoint
from cascade.pipeline.context import Run
from cascade.pipeline.stage_output import Made
from cascade.pipeline.stages.cut import Base, losses_on_selection, write_losses
from cascade.pipeline.stages.data import load_calibration, selection_size
from cascade.planning.family import ResolvedMember
from cascade.pruning.plan import load_plan
from cascade.pruning.repair.refit import Repair, repair
from cascade.runtime.progress import OnStep

REPAIRS = {
    "sequential": Repair(),
    "independent": Repair(sequential=False),
}
"""The methods of the recipe's prune.repair.method, by name."""


def repair_cut(run: Run, member: ResolvedMember, base: Base, cut: Made) -> Made | None:
    """The stage repair of a cut; None where the recipe repairs nothing."""
    settings = run.recipe.prune.repair
    if settings.method == "none":
        return None
    batch_size, num_selected = run.recipe.calibration.batch_size, selection_size(run.recipe)
    return run.runner.make(
        "repair",
        member.name,
        settings=settings.model_dump() | {"batch_size": batch_size, "selection_blocks": num_selected},
        inputs={"cut": cut, "seed": base.model, "teacher": run.parent, "data": run.data},
        write=partial(make_repaired, run, base, cut),
    )


def make_repaired(run: Run, base: Base, cut: Made, folder: Path, on_step: OnStep) -> None:
    """Refit a cut model; write the best checkpoint in float32, its losses, and the losses of each method."""
    settings, batch_size = run.recipe.prune.repair, run.recipe.calibration.batch_size
    device, teacher = default_device(), run.teacher()
    model, plan = load_model(base.model.source).to(device), load_plan(cut.folder / "plan.json")
    blocks = load_calibration(run, settings.num_blocks)
    source = cut.model(str(cut.folder)).source
    best = load_model(source).to(device)
    losses = cut.json("losses.json")
    trials: dict[str, Any] = {"none": losses}
    chosen = "none"
    names = list(REPAIRS) if settings.method == "auto" else [settings.method]
    for number, name in enumerate(names):
        student = load_model(source).to(device)
        report = repair(student, model, plan, blocks, REPAIRS[name], batch_size=batch_size)
        repaired = losses_on_selection(run, student, teacher)
        trials[name] = repaired | asdict(report)
        if settings.method != "auto" or repaired["kl_to_teacher"] < losses["kl_to_teacher"]:
            best, losses, chosen = student, repaired, name
        on_step(number + 1, len(names))
    save_checkpoint(best, folder / CHECKPOINT, companions=None, dtype=torch.float32)
    write_losses(folder / "losses.json", losses)
    write_losses(folder / "repair.json", {"chosen": chosen, "tried": trials})
