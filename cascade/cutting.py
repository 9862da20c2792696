"""The stages that turn a seed into a smaller model before any training: statistics, cut, repair."""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cascade import parallel
from cascade.caching import TeacherCache, training_rows
from cascade.data.blocks import TokenBlocks, load_blocks
from cascade.data.examples import load_training
from cascade.distillation.batch import selection_losses
from cascade.distillation.features import FeatureLoss
from cascade.distillation.options import Features, Hooks
from cascade.distillation.origin import Origin, even_origin, origin_of
from cascade.distillation.range_test import usual_rate
from cascade.distillation.trainer import distill
from cascade.errors import DivergedError, NotFiniteError
from cascade.evaluation.evaluate import default_device
from cascade.family import ResolvedMember
from cascade.fitting import in_parts_that_fit
from cascade.importance.scores import score_importance
from cascade.importance.statistics import Statistics, collect_statistics, load_statistics, save_statistics
from cascade.models.checkpoint import CHECKPOINT, ModelSource, load_model, save_checkpoint
from cascade.models.dims import ModelDims, dims_of
from cascade.progress import OnStep
from cascade.pruning.cut import prune
from cascade.pruning.plan import PruningPlan, load_plan, plan_pruning, save_plan
from cascade.pruning.repair import Repair, repair
from cascade.recipe.distill import Distill
from cascade.recipe.schema import Recipe
from cascade.starts import plan_layers
from cascade.training_options import execution_of, optimization_of, safekeeping_of, supervision_of

logger = logging.getLogger(__name__)

REPAIRS = {
    "sequential": Repair(),
    "independent": Repair(sequential=False),
}
"""What the recipe's prune.repair.method names."""


def feature_loss(
    recipe: Recipe,
    plans: Sequence[PruningPlan] | None,
    student: nn.Module,
    teacher: nn.Module | None,
    num_tokens: int,
) -> FeatureLoss | None:
    """The recipe's distill.features for one student; `plans` lead from the teacher to it (None: it was not cut).

    `num_tokens` are those of its whole training (examples, where the recipe counts those).
    """
    settings = recipe.distill
    if settings is None:
        raise ValueError("a recipe with members has a distill section")
    if teacher is None:
        return None
    section = settings.features
    forms = (settings.hidden_features(bool(plans)), section.embedding)
    hidden, embedding = (None if form == "none" else form for form in forms)
    num_parameters, of_teacher = (sum(each.numel() for each in model.parameters()) for model in (student, teacher))
    length = 0.0 if recipe.counts_examples else num_tokens / num_parameters
    features = Features(
        hidden=hidden,
        embedding=embedding,
        relations=tuple(section.relations),
        relation_heads=section.relation_heads,
        weights={str(name): weight for name, weight in section.weights.items()},
        balanced=section.balanced,
        fade_fraction=settings.fade_fraction(length, num_parameters / of_teacher),
    )
    if not features.names():
        return None
    if plans:
        origin = origin_of(plans)
    elif hidden or embedding:
        origin = even_origin(dims_of(student.config), dims_of(teacher.config))
    else:
        origin = Origin(())
    return FeatureLoss(features, origin, student, teacher)


def make_statistics(
    folder: Path, recipe: Recipe, seed: ModelSource, data: Path, on_step: OnStep, hidden_choices: Sequence[str]
) -> None:
    """Statistics of the seed on calibration blocks."""
    model = load_model(seed).to(default_device())
    blocks = load_blocks(data / "calibration.safetensors").take(recipe.calibration.num_blocks)
    options = statistics_options(recipe, hidden_choices)

    def collected(size: int) -> Statistics:
        return collect_statistics(model, blocks, batch_size=size, on_batch=on_step, **options)

    if parallel.world_size() > 1:  # batches are shared out: one process alone cannot change their size
        statistics = collected(recipe.calibration.batch_size)
    else:
        statistics = in_parts_that_fit(collected, recipe.calibration.batch_size, "statistics")
    save_statistics(statistics, folder / "statistics.safetensors")


def statistics_options(recipe: Recipe, hidden_choices: Sequence[str]) -> dict[str, Any]:
    """What the recipe's scores need beyond the usual statistics; second moments are taken on a quarter of the text."""
    options: dict[str, Any] = {}
    if recipe.prune.heads == "contribution":
        options["head_contributions"] = True
    if "pca" in hidden_choices:
        options["covariance_blocks"] = -(-recipe.calibration.num_blocks // 4)
    return options


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
    model = load_model(seed).to(default_device())
    plan = _plan(recipe, model, member.dims, statistics, data, member.hidden)
    _save_cut(folder, recipe, model, plan, data, teacher, member.vocab_size)


def make_layers(
    folder: Path, recipe: Recipe, member: ResolvedMember, seed: ModelSource, data: Path, teacher: nn.Module
) -> None:
    """What make_cut writes, of whole layers that are spread evenly: no statistics, nothing scored."""
    model = load_model(seed).to(default_device())
    plan = plan_layers(model.config, member.dims, member.name)
    _save_cut(folder, recipe, model, plan, data, teacher, member.vocab_size)


def _save_cut(
    folder: Path,
    recipe: Recipe,
    model: nn.Module,
    plan: PruningPlan,
    data: Path,
    teacher: nn.Module,
    vocab_size: int | None,
) -> None:
    save_plan(plan, folder / "plan.json")
    pruned = prune(model, plan).to(default_device())
    save_checkpoint(pruned, folder / CHECKPOINT, companions=None, dtype=torch.float32)
    _write(folder / "losses.json", _selection(pruned, teacher, recipe, data, vocab_size))


def make_repaired(
    folder: Path,
    recipe: Recipe,
    seed: ModelSource,
    cut: Path,
    data: Path,
    teacher: nn.Module,
    on_step: OnStep,
    *,
    vocab_size: int | None = None,
) -> None:
    """The repaired checkpoint in float32, its losses on selection blocks, and what was tried (repair.json).

    `vocab_size` is that of `Objective`.
    """
    settings = recipe.prune.repair
    device = default_device()
    model, plan = load_model(seed).to(device), load_plan(cut / "plan.json")
    blocks = load_blocks(data / "calibration.safetensors").take(settings.num_blocks)
    best = load_model(ModelSource(cut / CHECKPOINT, str(cut))).to(device)
    losses = json.loads((cut / "losses.json").read_text(encoding="utf-8"))
    tried: dict[str, Any] = {"none": losses}
    chosen = "none"
    names = list(REPAIRS) if settings.method == "auto" else [settings.method]
    for number, name in enumerate(names):
        student = load_model(ModelSource(cut / CHECKPOINT, str(cut))).to(device)
        report = repair(student, model, plan, blocks, REPAIRS[name], batch_size=recipe.calibration.batch_size)
        found = _selection(student, teacher, recipe, data, vocab_size)
        tried[name] = found | asdict(report)
        if settings.method != "auto" or found["kl_to_teacher"] < losses["kl_to_teacher"]:
            best, losses, chosen = student, found, name
        on_step(number + 1, len(names))
    save_checkpoint(best, folder / CHECKPOINT, companions=None, dtype=torch.float32)
    _write(folder / "losses.json", losses)
    _write(folder / "repair.json", {"chosen": chosen, "tried": tried})


def make_candidate(
    folder: Path,
    recipe: Recipe,
    dims: ModelDims,
    seed: ModelSource,
    statistics: Path,
    data: Path,
    teacher: nn.Module,
    *,
    hidden: str,
    lineage: Sequence[Path] | None,
    num_tokens: int,
    optimizer: str,
    cache: TeacherCache | None,
    on_step: OnStep,
    vocab_size: int | None = None,
) -> None:
    """losses.json of one shape on selection blocks: cut and repaired, then recovered on `num_tokens` tokens (or 0)."""
    device = default_device()
    model = load_model(seed).to(device)
    plan = _plan(recipe, model, dims, statistics, data, hidden)
    student = prune(model, plan).to(device)
    settings = recipe.prune.repair
    if settings.method != "none":
        blocks = load_blocks(data / "calibration.safetensors").take(settings.num_blocks)
        how = REPAIRS["independent" if settings.method == "independent" else "sequential"]
        repair(student, model, plan, blocks, how, batch_size=recipe.calibration.batch_size)
    losses: dict[str, Any] = {"repaired": _selection(student, teacher, recipe, data, vocab_size), "recovered": None}
    before = load_plans(lineage)
    if num_tokens and recipe.distill is not None:
        expert = teacher if recipe.distill.teacher == "parent" else None
        train = load_training(data / "train.safetensors")
        rate = _finalist_rate(recipe.distill, num_tokens / train.block_size, optimizer)
        supervision = supervision_of(recipe.distill, vocab_size)
        if cache is not None and expert is not None and isinstance(train, TokenBlocks):
            num_steps = math.ceil(num_tokens / (recipe.distill.batch_size * train.block_size))
            targets = cache.targets(expert, train, training_rows(recipe, 0, num_steps, len(train)))
            supervision = replace(supervision, objective=cache.objective(supervision.objective), targets=targets)
        features = feature_loss(recipe, None if before is None else [*before, plan], student, expert, num_tokens)
        try:
            distill(
                student,
                expert,
                train,
                num_tokens=num_tokens,
                supervision=replace(supervision, features=features),
                optimization=optimization_of(recipe.distill, learning_rate=rate, optimizer=optimizer, seed=recipe.seed),
                execution=execution_of(recipe.distill),
                safekeeping=safekeeping_of(recipe.distill),
                hooks=Hooks(on_step=on_step),
            )
            losses["recovered"] = _selection(student, teacher, recipe, data, vocab_size)
        except (NotFiniteError, DivergedError) as error:  # of one shape among several: it is the last of them
            logger.warning("a shape that was tried ran off when it was recovered shortly: %s", error)
            losses["recovered"] = {"loss": None, "kl_to_teacher": None}
    _write(folder / "losses.json", losses)


def load_plans(lineage: Sequence[Path] | None) -> list[PruningPlan] | None:
    """The plans in these folders of prune stages; None where a model was not cut from the parent."""
    return None if lineage is None else [load_plan(folder / "plan.json") for folder in lineage]


def _finalist_rate(settings: Distill, num_blocks: float, optimizer: str) -> float:
    """A shape's rate is not searched for: all of them take the same."""
    if settings.learning_rate == "auto":
        return usual_rate(math.ceil(num_blocks / settings.batch_size), optimizer)
    return settings.learning_rate


def _plan(recipe: Recipe, model: nn.Module, dims: ModelDims, statistics: Path, data: Path, hidden: str) -> PruningPlan:
    found = load_statistics(statistics / "statistics.safetensors")
    wanted = recipe.prune
    scores = score_importance(
        found,
        layers=wanted.layers,
        heads=wanted.heads,
        neurons=wanted.neurons,
        hidden=hidden,
        model=model,
        blocks=load_blocks(data / "calibration.safetensors").take(recipe.calibration.num_blocks),
        num_removed=dims_of(model.config).num_hidden_layers - dims.num_hidden_layers,
    )
    return plan_pruning(scores, model.config, dims, statistics=found, merge_heads=wanted.merge_heads)


def selection_size(recipe: Recipe) -> int:
    """Blocks, or examples, that choices are made on."""
    if recipe.distill is None:
        raise ValueError("a recipe with members has a distill section")
    return recipe.distill.selection_examples if recipe.counts_examples else recipe.distill.selection_blocks


def _selection(
    model: nn.Module, teacher: nn.Module, recipe: Recipe, data: Path, vocab_size: int | None
) -> dict[str, Any]:
    settings = recipe.distill
    if settings is None:
        raise ValueError("a recipe with members has a distill section")
    blocks = load_training(data / "selection.safetensors").take(selection_size(recipe))
    losses = selection_losses(model, teacher, blocks, settings.microbatch_size, vocab_size=vocab_size)
    model.eval()
    return {"loss": losses["selection_loss"], "kl_to_teacher": losses.get("selection_kl")}


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
