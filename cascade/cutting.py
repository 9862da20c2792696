"""The stages that turn a seed into a smaller model before any training: statistics, cut, repair."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cascade.data.blocks import load_blocks
from cascade.distillation.trainer import selection_losses
from cascade.evaluation.evaluate import default_device
from cascade.family import ResolvedMember
from cascade.importance.scores import score_importance
from cascade.importance.statistics import collect_statistics, load_statistics, save_statistics
from cascade.models.checkpoint import CHECKPOINT, ModelSource, load_model, save_checkpoint
from cascade.progress import OnStep
from cascade.pruning.cut import prune
from cascade.pruning.plan import load_plan, plan_pruning, save_plan
from cascade.pruning.repair import Repair, repair
from cascade.recipe.schema import Recipe

REPAIRS = {
    "sequential": Repair(),
    "independent": Repair(sequential=False),
}
"""What the recipe's prune.repair.method names."""


def make_statistics(folder: Path, recipe: Recipe, seed: ModelSource, data: Path, on_step: OnStep) -> None:
    """Statistics of the seed on calibration blocks."""
    model = load_model(seed).to(default_device())
    blocks = load_blocks(data / "calibration.safetensors").take(recipe.calibration.num_blocks)
    statistics = collect_statistics(model, blocks, batch_size=recipe.calibration.batch_size, on_batch=on_step)
    save_statistics(statistics, folder / "statistics.safetensors")


def make_cut(
    folder: Path,
    recipe: Recipe,
    member: ResolvedMember,
    seed: ModelSource,
    statistics: Path,
    data: Path,
    teacher: nn.Module,
) -> None:
    """plan.json, the cut checkpoint in float32, and its losses on selection blocks."""
    found = load_statistics(statistics / "statistics.safetensors")
    model = load_model(seed)
    plan = plan_pruning(score_importance(found), model.config, member.dims, statistics=found)
    save_plan(plan, folder / "plan.json")
    pruned = prune(model, plan).to(default_device())
    save_checkpoint(pruned, folder / CHECKPOINT, companions=None, dtype=torch.float32)
    _write(folder / "losses.json", _selection(pruned, teacher, recipe, data))


def make_repaired(
    folder: Path, recipe: Recipe, seed: ModelSource, cut: Path, data: Path, teacher: nn.Module, on_step: OnStep
) -> None:
    """The repaired checkpoint in float32, its losses on selection blocks, and what was tried (repair.json)."""
    settings = recipe.prune.repair
    device = default_device()
    model, plan = load_model(seed).to(device), load_plan(cut / "plan.json")
    blocks = load_blocks(data / "calibration.safetensors").take(settings.num_blocks)
    best = load_model(ModelSource(cut / CHECKPOINT, str(cut))).to(device)
    losses = json.loads((cut / "losses.json").read_text())
    tried: dict[str, Any] = {"none": losses}
    chosen = "none"
    names = list(REPAIRS) if settings.method == "auto" else [settings.method]
    for number, name in enumerate(names):
        student = load_model(ModelSource(cut / CHECKPOINT, str(cut))).to(device)
        report = repair(student, model, plan, blocks, REPAIRS[name], batch_size=recipe.calibration.batch_size)
        found = _selection(student, teacher, recipe, data)
        tried[name] = found | asdict(report)
        if settings.method != "auto" or found["kl_to_teacher"] < losses["kl_to_teacher"]:
            best, losses, chosen = student, found, name
        on_step(number + 1, len(names))
    save_checkpoint(best, folder / CHECKPOINT, companions=None, dtype=torch.float32)
    _write(folder / "losses.json", losses)
    _write(folder / "repair.json", {"chosen": chosen, "tried": tried})


def _selection(model: nn.Module, teacher: nn.Module, recipe: Recipe, data: Path) -> dict[str, Any]:
    settings = recipe.distill
    if settings is None:
        raise ValueError("a recipe with members has a distill section")
    blocks = load_blocks(data / "selection.safetensors").take(settings.selection_blocks)
    losses = selection_losses(model, teacher, blocks, settings.microbatch_size)
    model.eval()
    return {"loss": losses["selection_loss"], "kl_to_teacher": losses.get("selection_kl")}


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
