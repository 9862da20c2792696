"""Which shape a member gets: several that meet its target are cut and repaired, the best also recovered for a while.

Without `prune.search` there may still be two: the first shape for a rotated stream and that for one that is not.

A shape that looks best right after the cut is often not the best after some training (Minitron, table 13), so all are
judged by short recoveries. Each candidate is a stage of its own: found again by a rerun, and never tried twice.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cascade.errors import UserError
from cascade.estimates import short_recovery
from cascade.family import FoundShape, ResolvedMember, shape_config
from cascade.models.checkpoint import ModelSource, load_config
from cascade.progress import OnStep
from cascade.pruning.shape import diverse_shapes
from cascade.recipe.distill import WITHOUT_EFFECT
from cascade.recipe.schema import Recipe
from cascade.runner import StageRunner

Make = Callable[[Path, OnStep], None]


@dataclass(frozen=True)
class Candidate:
    """One shape that was tried."""

    shape: FoundShape
    config: Any
    """The seed's config as this shape is cut from it: with a head of its own where the stream is rotated."""
    folders: list[Path]
    """Its stages: cut and repaired, and for a finalist also the short recovery."""

    def losses(self) -> dict[str, Any]:
        """What the last of its stages found on selection blocks."""
        found: dict[str, Any] = json.loads((self.folders[-1] / "losses.json").read_text(encoding="utf-8"))
        return found

    def score(self) -> tuple[float, float]:
        """KL to the teacher at the last stage it went through, then as repaired.

        The first is infinite where the short recovery ran off; the second decides where all of them did.
        """
        losses = self.losses()
        value: float | None = (losses["recovered"] or losses["repaired"])["kl_to_teacher"]
        repaired: float | None = losses["repaired"]["kl_to_teacher"]
        return math.inf if value is None else value, math.inf if repaired is None else repaired


def search_shape(
    runner: StageRunner,
    recipe: Recipe,
    member: ResolvedMember,
    seed: ModelSource,
    inputs: dict[str, str],
    make: Callable[..., Make],
    kept: dict[str, Any],
) -> list[Candidate]:
    """All candidates, the chosen one first.

    `inputs` are the digests that a cut depends on; `make(shape, num_tokens)` gives the stage that tries a shape;
    `kept` is what its training depends on of targets that were kept of the teacher.
    """
    search, target = recipe.prune.search, member.target
    if target is None:
        raise ValueError(f"{member.name} is not cut")
    count = search.candidates if search else len(member.hidden_choices)
    found: list[tuple[FoundShape, Any]] = []
    refusals: list[UserError] = []
    for number, hidden in enumerate(member.hidden_choices):
        own = (count - len(found)) // (len(member.hidden_choices) - number)
        config = shape_config(load_config(seed), hidden)
        try:
            dims = diverse_shapes(config, target, parent=member.parent_config, count=own)
        except UserError as error:  # a head of its own can be too large for the size that is asked for
            refusals.append(error)
            continue
        found += [(FoundShape(one, hidden), config) for one in dims]
    if not found:
        raise refusals[0]
    settings = candidate_settings(recipe) | kept

    def stage(name: str, shape: FoundShape, num_tokens: int) -> Path:
        own = {"dims": shape.dims.as_dict(), "hidden": shape.hidden, "tokens": num_tokens}
        own |= {"optimizer": member.optimizer}
        return runner.run(member.name, name, settings | own, inputs, make(shape, num_tokens))

    first_tokens = short_recovery(recipe, member.num_tokens)
    tried = [Candidate(shape, config, [stage("candidate", shape, first_tokens)]) for shape, config in found]
    tried.sort(key=Candidate.score)
    if search is None:
        return tried
    finalists = [
        replace(one, folders=[*one.folders, stage("finalist", one.shape, search.tokens)])
        for one in tried[: search.finalists]
    ]
    return sorted(finalists, key=Candidate.score) + tried[search.finalists :]


def candidate_settings(recipe: Recipe) -> dict[str, Any]:
    """What a candidate's result depends on besides its shape."""
    distill = (
        recipe.distill.model_dump(exclude={"tokens", "examples", "cache", *WITHOUT_EFFECT}) if recipe.distill else {}
    )
    return recipe.prune.model_dump(exclude={"search"}) | {"distill": distill, "seed": recipe.seed}
