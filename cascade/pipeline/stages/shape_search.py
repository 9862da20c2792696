"""The stages candidate and finalist: several shapes that meet a member's target, compared by their losses.

Depends on: `prune`, `distill`, the shape, the source model with its statistics, the parent and the data.
Leaves: `losses.json` on selection blocks, after cut and repair and, with a token budget, after a short recovery.

Without `prune.search` there may still be two candidates: the first shape for a rotated stream, and the first for one
that is not rotated. The shape that looks best right after the cut is often not the best after some training (Minitron,
table 13), so finalists are compared by short recoveries. Each candidate is a stage of its own, and a rerun finds it.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from cascade.data.blocks import TokenBlocks
from cascade.data.examples import load_training
from cascade.distillation.options import Hooks
from cascade.distillation.range_test import usual_rate
from cascade.distillation.trainer import distill
from cascade.evaluation.evaluate import default_device
from cascade.models.checkpoint.load import load_config, load_model
from cascade.pipeline.context import Run
from cascade.pipeline.kept_targets import training_rows
from cascade.pipeline.stage_output import Made
from cascade.pipeline.stages.cut import Base, cut_inputs, load_plans, losses_on_selection, plan_shape, write_losses
from cascade.pipeline.stages.data import load_calibration
from cascade.pipeline.stages.repair import REPAIRS
from cascade.pipeline.stages.training import feature_loss
from cascade.pipeline.training_options import execution_of, optimization_of, safekeeping_of, supervision_of
from cascade.planning.estimates import short_recovery
from cascade.planning.family import FoundShape, ResolvedMember, shape_config
from cascade.pruning.cut import prune
from cascade.pruning.plan import PruningPlan
from cascade.pruning.repair.refit import repair
from cascade.pruning.size.shape import diverse_shapes
from cascade.recipe.distill import WITHOUT_EFFECT, Distill
from cascade.recipe.schema import Recipe
from cascade.runtime.errors import DivergedError, NotFiniteError, UserError
from cascade.runtime.progress import OnStep

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """A shape of a search, with its stages."""

    shape: FoundShape
    config: Any
    """Config of the model that the shape is cut from; where the stream is rotated, with an untied head."""
    stages: list[Made]
    """The stage candidate and, for a finalist, the stage finalist with its short recovery."""

    def losses(self) -> dict[str, Any]:
        """Losses of its last stage on selection blocks."""
        losses: dict[str, Any] = self.stages[-1].json("losses.json")
        return losses

    def score(self) -> tuple[float, float]:
        """(KL to the teacher after its last stage, KL after repair), for sorting.

        The first is infinite where the short recovery diverged; the second decides where all recoveries diverged.
        """
        losses = self.losses()
        last_kl: float | None = (losses["recovered"] or losses["repaired"])["kl_to_teacher"]
        repaired_kl: float | None = losses["repaired"]["kl_to_teacher"]
        return math.inf if last_kl is None else last_kl, math.inf if repaired_kl is None else repaired_kl


def search_shape(run: Run, member: ResolvedMember, base: Base) -> list[Candidate]:
    """All candidates of a member, the chosen one first; `base` is the model that they are cut from.

    Raises:
        UserError: no shape meets the target.
    """
    search = run.recipe.prune.search
    first_tokens = short_recovery(run.recipe, member.num_tokens)
    candidates = [
        Candidate(
            shape=shape,
            config=config,
            stages=[_try_shape(run, member, base, "candidate", shape, first_tokens)],
        )
        for shape, config in _shapes(run.recipe, member, load_config(base.model.source))
    ]
    candidates.sort(key=Candidate.score)
    if search is None:
        return candidates
    finalists = []
    for candidate in candidates[: search.finalists]:
        stage = _try_shape(run, member, base, "finalist", candidate.shape, search.tokens)
        finalists.append(replace(candidate, stages=[*candidate.stages, stage]))
    return sorted(finalists, key=Candidate.score) + candidates[search.finalists :]


def _try_shape(run: Run, member: ResolvedMember, base: Base, stage: str, shape: FoundShape, num_tokens: int) -> Made:
    """The stage candidate or finalist of a shape, with a short recovery on `num_tokens` tokens."""
    shape_settings = {"dims": shape.dims.as_dict(), "hidden": shape.hidden, "tokens": num_tokens}
    return run.runner.make(
        stage,
        member.name,
        settings=candidate_settings(run.recipe)
        | run.target_settings()
        | shape_settings
        | {"optimizer": member.optimizer},
        inputs=cut_inputs(run, base),
        write=partial(make_candidate, run, member, base, shape, num_tokens),
    )


def candidate_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings, besides the shape, that a candidate's losses depend on."""
    distill = (
        recipe.distill.model_dump(exclude={"tokens", "examples", "cache", *WITHOUT_EFFECT}) if recipe.distill else {}
    )
    return recipe.prune.model_dump(exclude={"search"}) | {"distill": distill, "seed": recipe.seed}


def make_candidate(
    run: Run,
    member: ResolvedMember,
    base: Base,
    shape: FoundShape,
    num_tokens: int,
    folder: Path,
    on_step: OnStep,
) -> None:
    """Write the losses of a shape after cut and repair and, unless `num_tokens` is 0, after a short recovery."""
    teacher, device = run.teacher(), default_device()
    model = load_model(base.model.source).to(device)
    plan = plan_shape(run, base, model, shape)
    student = prune(model, plan).to(device)
    settings = run.recipe.prune.repair
    if settings.method != "none":
        blocks = load_calibration(run, settings.num_blocks)
        how = REPAIRS["independent" if settings.method == "independent" else "sequential"]
        repair(student, model, plan, blocks, how, batch_size=run.recipe.calibration.batch_size)
    losses: dict[str, Any] = {"repaired": losses_on_selection(run, student, teacher), "recovered": None}
    if num_tokens and run.recipe.distill is not None:
        before = load_plans(base.lineage)
        plans = None if before is None else [*before, plan]
        losses["recovered"] = _recover_shortly(run, member, student, plans, num_tokens, on_step)
    write_losses(folder / "losses.json", losses)


def _recover_shortly(
    run: Run,
    member: ResolvedMember,
    student: nn.Module,
    plans: Sequence[PruningPlan] | None,
    num_tokens: int,
    on_step: OnStep,
) -> dict[str, Any]:
    """Losses of a candidate after a short recovery, None if it diverged; `plans` are its cuts from the teacher on."""
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
        return losses_on_selection(run, student, run.teacher())
    except (NotFiniteError, DivergedError) as error:  # only this shape diverged, and it is sorted last
        logger.warning("a shape of the search diverged in its short recovery: %s", error)
        return {"loss": None, "kl_to_teacher": None}


def _finalist_rate(settings: Distill, num_blocks: float, optimizer: str) -> float:
    """The learning rate of a short recovery: the recipe's, or the usual rate; all shapes of a search have the same."""
    if settings.learning_rate == "auto":
        return usual_rate(math.ceil(num_blocks / settings.batch_size), optimizer)
    return settings.learning_rate


def _shapes(recipe: Recipe, member: ResolvedMember, base_config: Any) -> list[tuple[FoundShape, Any]]:
    """(shape, config of the model to cut) for each shape of the search.

    Raises:
        UserError: no shape meets the target.
    """
    search, target = recipe.prune.search, member.target
    if target is None:
        raise ValueError(f"{member.name} is not cut")
    count = search.candidates if search else len(member.hidden_choices)
    shapes: list[tuple[FoundShape, Any]] = []
    refusals: list[UserError] = []
    for number, hidden in enumerate(member.hidden_choices):
        share = (count - len(shapes)) // (len(member.hidden_choices) - number)
        config = shape_config(base_config, hidden)
        try:
            sizes = diverse_shapes(config, target, parent=member.parent_config, count=share)
        except UserError as error:  # an untied head can be too large for the target
            refusals.append(error)
            continue
        shapes += [(FoundShape(dims, hidden), config) for dims in sizes]
    if not shapes:
        raise refusals[0]
    return shapes
