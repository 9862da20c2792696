"""The stage statistics: block influence, norms and activations on calibration text, for the importance scores.

Depends on: the recipe's `calibration`, the model to be cut and the data. Leaves: `statistics.safetensors`.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from cascade.evaluation.evaluate import default_device
from cascade.models.checkpoint.load import load_model
from cascade.pipeline.context import Run
from cascade.pipeline.stages.cut import Base
from cascade.pipeline.stages.data import load_calibration
from cascade.planning.family import ResolvedMember
from cascade.pruning.importance.statistics import Statistics, collect_statistics, save_statistics
from cascade.recipe.schema import Recipe
from cascade.runtime import ranks
from cascade.runtime.progress import OnStep
from cascade.runtime.retry_smaller import in_parts_that_fit


def with_statistics(run: Run, member: ResolvedMember, base: Base) -> Base:
    """The base of a member together with its statistics."""
    statistics = run.runner.make(
        "statistics",
        member.name,
        settings=run.recipe.calibration.model_dump() | statistics_options(run.recipe, member.hidden_choices),
        inputs={"seed": base.model, "data": run.data},
        write=partial(make_statistics, run, member, base),
        label=member.seed,
    )
    return replace(base, statistics=statistics)


def make_statistics(run: Run, member: ResolvedMember, base: Base, folder: Path, on_step: OnStep) -> None:
    """Collect the base's statistics on calibration blocks, and write them."""
    calibration = run.recipe.calibration
    model = load_model(base.model.source).to(default_device())
    blocks = load_calibration(run, calibration.num_blocks)
    options = statistics_options(run.recipe, member.hidden_choices)

    def collected(size: int) -> Statistics:
        return collect_statistics(model, blocks, batch_size=size, on_batch=on_step, **options)

    if ranks.world_size() > 1:  # batches are shared out: one process alone cannot change their size
        statistics = collected(calibration.batch_size)
    else:
        statistics = in_parts_that_fit(collected, calibration.batch_size, "statistics")
    save_statistics(statistics, folder / "statistics.safetensors")


def statistics_options(recipe: Recipe, hidden_choices: Sequence[str]) -> dict[str, Any]:
    """Options of `collect_statistics` that the recipe's scores need; covariances use a quarter of the blocks."""
    options: dict[str, Any] = {}
    if recipe.prune.heads == "contribution":
        options["head_contributions"] = True
    if "pca" in hidden_choices:
        options["covariance_blocks"] = -(-recipe.calibration.num_blocks // 4)
    return options
