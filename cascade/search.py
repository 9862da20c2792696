"""Which shape a member gets: several that meet its target are cut and repaired, the best also recovered for a while.

Without `prune.search` there may still be two: the first shape for a rotated stream and that for one that is not.

A shape that looks best right after the cut is often not the best after some training (Minitron, table 13), so all are
judged by short recoveries. Each candidate is a stage of its own: found again by a rerun, and never tried twice.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from cascade.context import Run
from cascade.cutting import Base, cut_inputs, make_candidate
from cascade.errors import UserError
from cascade.estimates import short_recovery
from cascade.family import FoundShape, ResolvedMember, shape_config
from cascade.models.checkpoint import load_config
from cascade.pruning.shape import diverse_shapes
from cascade.recipe.distill import WITHOUT_EFFECT
from cascade.recipe.schema import Recipe
from cascade.stage_output import Made


@dataclass(frozen=True)
class Candidate:
    """One shape that was tried."""

    shape: FoundShape
    config: Any
    """Of the model that it is cut from, as this shape takes it: with a head of its own where the stream is rotated."""
    stages: list[Made]
    """Cut and repaired, and for a finalist also the short recovery."""

    def losses(self) -> dict[str, Any]:
        """What the last of its stages found on selection blocks."""
        losses: dict[str, Any] = self.stages[-1].json("losses.json")
        return losses

    def score(self) -> tuple[float, float]:
        """KL to the teacher at the last stage it went through, then as repaired.

        The first is infinite where the short recovery ran off; the second decides where all of them did.
        """
        losses = self.losses()
        value: float | None = (losses["recovered"] or losses["repaired"])["kl_to_teacher"]
        repaired: float | None = losses["repaired"]["kl_to_teacher"]
        return math.inf if value is None else value, math.inf if repaired is None else repaired


def search_shape(run: Run, member: ResolvedMember, base: Base) -> list[Candidate]:
    """All candidates, the chosen one first; `base` is the model that they are cut from, with its statistics.

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


def _shapes(recipe: Recipe, member: ResolvedMember, base_config: Any) -> list[tuple[FoundShape, Any]]:
    """(shape, the base's config as this shape is cut from it), for each shape to try."""
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
        except UserError as error:  # a head of its own can be too large for the size that is asked for
            refusals.append(error)
            continue
        shapes += [(FoundShape(dims, hidden), config) for dims in sizes]
    if not shapes:
        raise refusals[0]
    return shapes


def _try_shape(run: Run, member: ResolvedMember, base: Base, stage: str, shape: FoundShape, num_tokens: int) -> Made:
    """The stage that cuts and repairs a shape, and recovers it on `num_tokens` tokens."""
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
    """What a candidate's result depends on besides its shape."""
    distill = (
        recipe.distill.model_dump(exclude={"tokens", "examples", "cache", *WITHOUT_EFFECT}) if recipe.distill else {}
    )
    return recipe.prune.model_dump(exclude={"search"}) | {"distill": distill, "seed": recipe.seed}
