"""The stage prune: a smaller model, cut by importance scores or made of whole layers.

Depends on: the recipe's `prune`, the target dims, the source model, its statistics, the parent and the data.
Leaves: `plan.json`, `checkpoint/` in float32, and `losses.json` on selection blocks.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cascade.distillation.losses.batch import selection_losses
from cascade.evaluation.evaluate import default_device
from cascade.models.architecture.dims import dims_of
from cascade.models.checkpoint.load import (
    CHECKPOINT,
    load_model,
    save_checkpoint,
)
from cascade.pipeline.context import Run
from cascade.pipeline.stage_output import Checkpoint, Input, Made
from cascade.pipeline.stages.data import load_calibration, load_selection, selection_size
from cascade.planning.family import FoundShape, ResolvedMember
from cascade.planning.starts import plan_layers
from cascade.pruning.choose import plan_pruning
from cascade.pruning.cut import prune
from cascade.pruning.importance.scores import score_importance
from cascade.pruning.importance.statistics import load_statistics
from cascade.pruning.plan import PruningPlan, load_plan, save_plan
from cascade.runtime.progress import OnStep


@dataclass(frozen=True, kw_only=True)
class Base:
    """The model that a member is cut from."""

    model: Checkpoint
    lineage: list[Made] | None
    """The cuts that lead from the parent to this model; None where it was not cut from the parent."""
    statistics: Made | None = None
    """The statistics that importance scores are computed from; None where nothing is scored."""


def take_layers(run: Run, member: ResolvedMember, base: Base) -> Made:
    """The stage prune of a member that starts from whole layers, spread evenly."""
    dims, num_selected = member.sized.dims.as_dict(), selection_size(run.recipe)
    return run.runner.make(
        "prune",
        member.name,
        settings={"init": "layers", "dims": dims, "selection_blocks": num_selected},
        inputs={"seed": base.model, "teacher": run.parent, "data": run.data},
        write=partial(make_layers, run, member, base),
    )


def cut_by_scores(run: Run, member: ResolvedMember, base: Base) -> Made:
    """The stage prune of a member that starts from the best-scored units of its base."""
    return run.runner.make(
        "prune",
        member.name,
        settings=run.recipe.prune.model_dump(exclude={"repair", "search"})
        | {
            "hidden": member.hidden,
            "dims": member.sized.dims.as_dict(),
            "selection_blocks": selection_size(run.recipe),
        },
        inputs=cut_inputs(run, base),
        write=partial(make_cut, run, member, base),
    )


def cut_inputs(run: Run, base: Base) -> dict[str, Input]:
    """The inputs of a cut by scores.

    Raises:
        ValueError: the base has no statistics.
    """
    if base.statistics is None:
        raise ValueError("a cut by scores needs statistics")
    return {"statistics": base.statistics, "seed": base.model, "teacher": run.parent, "data": run.data}


def make_layers(run: Run, member: ResolvedMember, base: Base, folder: Path, on_step: OnStep) -> None:
    """Write a model of whole layers, spread evenly over the depth: plan, checkpoint and losses, as `make_cut` does."""
    teacher, model = run.teacher(), load_model(base.model.source).to(default_device())
    plan = plan_layers(model.config, member.sized.dims, member.name)
    _save_cut(run, model, plan, teacher, folder)


def make_cut(run: Run, member: ResolvedMember, base: Base, folder: Path, on_step: OnStep) -> None:
    """Cut the base by importance scores; write the plan, the checkpoint and its losses."""
    teacher, model = run.teacher(), load_model(base.model.source).to(default_device())
    plan = plan_shape(run, base, model, FoundShape(member.sized.dims, member.hidden))
    _save_cut(run, model, plan, teacher, folder)


def _save_cut(run: Run, model: nn.Module, plan: PruningPlan, teacher: nn.Module, folder: Path) -> None:
    save_plan(plan, folder / "plan.json")
    pruned = prune(model, plan).to(default_device())
    save_checkpoint(pruned, folder / CHECKPOINT, companions=None, dtype=torch.float32)
    write_losses(folder / "losses.json", losses_on_selection(run, pruned, teacher))


def plan_shape(run: Run, base: Base, model: nn.Module, shape: FoundShape) -> PruningPlan:
    """The plan of a cut of `model` to a shape: which units stay, by the recipe's scores.

    Raises:
        ValueError: the base has no statistics.
    """
    if base.statistics is None:
        raise ValueError("a cut by scores needs statistics")
    settings = run.recipe.prune
    statistics = load_statistics(base.statistics.folder / "statistics.safetensors")
    scores = score_importance(
        statistics,
        layers=settings.layers,
        heads=settings.heads,
        neurons=settings.neurons,
        hidden=shape.hidden,
        model=model,
        blocks=load_calibration(run, run.recipe.calibration.num_blocks),
        num_removed=dims_of(model.config).num_hidden_layers - shape.dims.num_hidden_layers,
    )
    return plan_pruning(scores, model.config, shape.dims, statistics=statistics, merge_heads=settings.merge_heads)


def losses_on_selection(run: Run, model: nn.Module, teacher: nn.Module) -> dict[str, Any]:
    """Cross-entropy (`loss`) and `kl_to_teacher` on selection blocks, in nats per token."""
    settings = run.recipe.distill
    if settings is None:
        raise ValueError("a recipe with members has a distill section")
    losses = selection_losses(model, teacher, load_selection(run), settings.microbatch_size, vocab_size=run.vocab_size)
    model.eval()
    return {"loss": losses["selection_loss"], "kl_to_teacher": losses.get("selection_kl")}


def write_losses(path: Path, losses: Any) -> None:
    """Write losses as JSON.

    Raises:
        ValueError: a loss is not finite.
    """
    path.write_text(json.dumps(losses, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def load_plans(lineage: Sequence[Made] | None) -> list[PruningPlan] | None:
    """The plans of these prune stages; None for a model that was not cut from the parent."""
    return None if lineage is None else [load_plan(cut.folder / "plan.json") for cut in lineage]
