"""The stages that turn a seed into a smaller model before any training: statistics, cut, repair."""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cascade import parallel
from cascade.caching import training_rows
from cascade.context import Run
from cascade.data.blocks import TokenBlocks, load_blocks
from cascade.data.examples import Examples, load_training
from cascade.distillation.batch import selection_losses
from cascade.distillation.features import FeatureLoss
from cascade.distillation.options import Features, Hooks
from cascade.distillation.origin import Origin, even_origin, origin_of
from cascade.distillation.range_test import usual_rate
from cascade.distillation.trainer import distill
from cascade.errors import DivergedError, NotFiniteError
from cascade.evaluation.evaluate import default_device
from cascade.family import FoundShape, ResolvedMember
from cascade.fitting import in_parts_that_fit
from cascade.importance.scores import score_importance
from cascade.importance.statistics import Statistics, collect_statistics, load_statistics, save_statistics
from cascade.models.checkpoint import CHECKPOINT, load_model, save_checkpoint
from cascade.models.dims import dims_of
from cascade.progress import OnStep
from cascade.pruning.choose import plan_pruning
from cascade.pruning.cut import prune
from cascade.pruning.plan import PruningPlan, load_plan, save_plan
from cascade.pruning.repair import Repair, repair
from cascade.recipe.distill import Distill
from cascade.recipe.schema import Recipe
from cascade.stage_output import Checkpoint, Input, Made
from cascade.starts import plan_layers
from cascade.training_options import execution_of, optimization_of, safekeeping_of, supervision_of

logger = logging.getLogger(__name__)

REPAIRS = {
    "sequential": Repair(),
    "independent": Repair(sequential=False),
}
"""What the recipe's prune.repair.method names."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """The model that a member is cut from."""

    model: Checkpoint
    lineage: list[Made] | None
    """The cuts from the parent to it; None where it was not cut from the parent."""
    statistics: Made | None = None
    """What its importance scores are computed from; None where nothing is scored."""


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
    guided = recipe.task == "language" and bool(plans)
    features = Features(
        hidden=hidden,
        embedding=embedding,
        relations=tuple(section.relations),
        relation_heads=section.relation_heads,
        weights={str(name): weight for name, weight in section.weights.items()},
        balanced=section.balanced,
        fade_fraction=settings.fade_fraction(num_tokens / num_parameters, num_parameters / of_teacher, guided=guided),
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


def make_statistics(run: Run, member: ResolvedMember, base: Base, folder: Path, on_step: OnStep) -> None:
    """Statistics of the model that a member is cut from, on calibration blocks."""
    calibration = run.recipe.calibration
    model = load_model(base.model.source).to(default_device())
    blocks = _calibration(run, calibration.num_blocks)
    options = statistics_options(run.recipe, member.hidden_choices)

    def collected(size: int) -> Statistics:
        return collect_statistics(model, blocks, batch_size=size, on_batch=on_step, **options)

    if parallel.world_size() > 1:  # batches are shared out: one process alone cannot change their size
        statistics = collected(calibration.batch_size)
    else:
        statistics = in_parts_that_fit(collected, calibration.batch_size, "statistics")
    save_statistics(statistics, folder / "statistics.safetensors")


def statistics_options(recipe: Recipe, hidden_choices: Sequence[str]) -> dict[str, Any]:
    """What the recipe's scores need beyond the usual statistics; second moments are taken on a quarter of the text."""
    options: dict[str, Any] = {}
    if recipe.prune.heads == "contribution":
        options["head_contributions"] = True
    if "pca" in hidden_choices:
        options["covariance_blocks"] = -(-recipe.calibration.num_blocks // 4)
    return options


def make_cut(run: Run, member: ResolvedMember, base: Base, folder: Path, on_step: OnStep) -> None:
    """plan.json, the cut checkpoint in float32, and its losses on selection blocks."""
    teacher, model = run.teacher(), load_model(base.model.source).to(default_device())
    plan = _plan(run, base, model, FoundShape(member.dims, member.hidden))
    _save_cut(run, model, plan, teacher, folder)


def make_layers(run: Run, member: ResolvedMember, base: Base, folder: Path, on_step: OnStep) -> None:
    """What make_cut writes, of whole layers that are spread evenly: no statistics, nothing scored."""
    teacher, model = run.teacher(), load_model(base.model.source).to(default_device())
    plan = plan_layers(model.config, member.dims, member.name)
    _save_cut(run, model, plan, teacher, folder)


def _save_cut(run: Run, model: nn.Module, plan: PruningPlan, teacher: nn.Module, folder: Path) -> None:
    save_plan(plan, folder / "plan.json")
    pruned = prune(model, plan).to(default_device())
    save_checkpoint(pruned, folder / CHECKPOINT, companions=None, dtype=torch.float32)
    _write(folder / "losses.json", _selection(run, pruned, teacher))


def make_repaired(run: Run, base: Base, cut: Made, folder: Path, on_step: OnStep) -> None:
    """The repaired checkpoint in float32, its losses on selection blocks, and what was tried (repair.json)."""
    settings, batch_size = run.recipe.prune.repair, run.recipe.calibration.batch_size
    device, teacher = default_device(), run.teacher()
    model, plan = load_model(base.model.source).to(device), load_plan(cut.folder / "plan.json")
    blocks = _calibration(run, settings.num_blocks)
    source = cut.model(str(cut.folder)).source
    best = load_model(source).to(device)
    losses = cut.json("losses.json")
    trials: dict[str, Any] = {"none": losses}
    chosen = "none"
    names = list(REPAIRS) if settings.method == "auto" else [settings.method]
    for number, name in enumerate(names):
        student = load_model(source).to(device)
        report = repair(student, model, plan, blocks, REPAIRS[name], batch_size=batch_size)
        repaired = _selection(run, student, teacher)
        trials[name] = repaired | asdict(report)
        if settings.method != "auto" or repaired["kl_to_teacher"] < losses["kl_to_teacher"]:
            best, losses, chosen = student, repaired, name
        on_step(number + 1, len(names))
    save_checkpoint(best, folder / CHECKPOINT, companions=None, dtype=torch.float32)
    _write(folder / "losses.json", losses)
    _write(folder / "repair.json", {"chosen": chosen, "tried": trials})


def make_candidate(
    run: Run,
    member: ResolvedMember,
    base: Base,
    shape: FoundShape,
    num_tokens: int,
    folder: Path,
    on_step: OnStep,
) -> None:
    """losses.json of one shape on selection blocks: cut and repaired, then recovered on `num_tokens` tokens (or 0)."""
    teacher, device = run.teacher(), default_device()
    model = load_model(base.model.source).to(device)
    plan = _plan(run, base, model, shape)
    student = prune(model, plan).to(device)
    settings = run.recipe.prune.repair
    if settings.method != "none":
        blocks = _calibration(run, settings.num_blocks)
        how = REPAIRS["independent" if settings.method == "independent" else "sequential"]
        repair(student, model, plan, blocks, how, batch_size=run.recipe.calibration.batch_size)
    losses: dict[str, Any] = {"repaired": _selection(run, student, teacher), "recovered": None}
    if num_tokens and run.recipe.distill is not None:
        before = load_plans(base.lineage)
        plans = None if before is None else [*before, plan]
        losses["recovered"] = _recover_shortly(run, member, student, plans, num_tokens, on_step)
    _write(folder / "losses.json", losses)


def _recover_shortly(
    run: Run,
    member: ResolvedMember,
    student: nn.Module,
    plans: Sequence[PruningPlan] | None,
    num_tokens: int,
    on_step: OnStep,
) -> dict[str, Any]:
    """Losses of a candidate after a short recovery, None where it diverged; `plans` lead from the teacher to it."""
    recipe, settings = run.recipe, run.recipe.distill
    if settings is None:
        raise ValueError("a recipe with members has a distill section")
    expert = run.expert()
    train = load_training(run.data.folder / "train.safetensors")
    rate = _finalist_rate(settings, num_tokens / train.block_size, member.optimizer)
    supervision = supervision_of(settings, run.vocab_size)
    if run.cache is not None and expert is not None and isinstance(train, TokenBlocks):
        num_steps = math.ceil(num_tokens / (settings.batch_size * train.block_size))
        targets = run.cache.targets(expert, train, training_rows(recipe, 0, num_steps, len(train)))
        supervision = replace(supervision, objective=run.cache.objective(supervision.objective), targets=targets)
    features = feature_loss(recipe, plans, student, expert, num_tokens)
    try:
        distill(
            student,
            expert,
            train,
            num_tokens=num_tokens,
            supervision=replace(supervision, features=features),
            optimization=optimization_of(settings, learning_rate=rate, optimizer=member.optimizer, seed=recipe.seed),
            execution=execution_of(settings),
            safekeeping=safekeeping_of(settings),
            hooks=Hooks(on_step=on_step),
        )
        return _selection(run, student, run.teacher())
    except (NotFiniteError, DivergedError) as error:  # of one shape among several: it is the last of them
        logger.warning("a shape that was tried ran off when it was recovered shortly: %s", error)
        return {"loss": None, "kl_to_teacher": None}


def cut_inputs(run: Run, base: Base) -> dict[str, Input]:
    """What a cut by scores reads."""
    if base.statistics is None:
        raise ValueError("a cut by scores needs statistics")
    return {"statistics": base.statistics, "seed": base.model, "teacher": run.parent, "data": run.data}


def load_plans(lineage: Sequence[Made] | None) -> list[PruningPlan] | None:
    """The plans of these prune stages; None where a model was not cut from the parent."""
    return None if lineage is None else [load_plan(cut.folder / "plan.json") for cut in lineage]


def _finalist_rate(settings: Distill, num_blocks: float, optimizer: str) -> float:
    """A shape's rate is not searched for: all of them take the same."""
    if settings.learning_rate == "auto":
        return usual_rate(math.ceil(num_blocks / settings.batch_size), optimizer)
    return settings.learning_rate


def _plan(run: Run, base: Base, model: nn.Module, shape: FoundShape) -> PruningPlan:
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
        blocks=_calibration(run, run.recipe.calibration.num_blocks),
        num_removed=dims_of(model.config).num_hidden_layers - shape.dims.num_hidden_layers,
    )
    return plan_pruning(scores, model.config, shape.dims, statistics=statistics, merge_heads=settings.merge_heads)


def _calibration(run: Run, num_blocks: int) -> TokenBlocks:
    return load_blocks(run.data.folder / "calibration.safetensors").take(num_blocks)


def selection_size(recipe: Recipe) -> int:
    """Blocks, or examples, that choices are made on."""
    if recipe.distill is None:
        raise ValueError("a recipe with members has a distill section")
    return recipe.distill.selection_examples if recipe.counts_examples else recipe.distill.selection_blocks


def load_selection(run: Run) -> TokenBlocks | Examples:
    """The blocks, or the labelled examples, that choices are made on."""
    return load_training(run.data.folder / "selection.safetensors").take(selection_size(run.recipe))


def _selection(run: Run, model: nn.Module, teacher: nn.Module) -> dict[str, Any]:
    settings = run.recipe.distill
    if settings is None:
        raise ValueError("a recipe with members has a distill section")
    losses = selection_losses(model, teacher, load_selection(run), settings.microbatch_size, vocab_size=run.vocab_size)
    model.eval()
    return {"loss": losses["selection_loss"], "kl_to_teacher": losses.get("selection_kl")}


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
