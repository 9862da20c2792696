"""The stages that all members share: the parent, the text, the parent's evaluation, production text."""

from cascade.models.checkpoint.load import (
    ModelSource,
    fingerprint,
)
from cascade.pipeline.context import Run
from cascade.pipeline.runner import StageRunner
from cascade.pipeline.stage_output import Checkpoint
from cascade.pipeline.stages.convert import converted_parent
from cascade.pipeline.stages.data import pack_text
from cascade.pipeline.stages.fit import fitted_parent
from cascade.pipeline.stages.pretrain import pretrained_parent
from cascade.planning.inputs import (
    data_fingerprint,
    production_fingerprint,
    task_fingerprint,
)
from cascade.planning.parent import existing_parent
from cascade.recipe.schema import Recipe


def make_parent(runner: StageRunner, recipe: Recipe) -> ModelSource:
    """The parent as a folder of safetensors: as it is, trained, fitted to its classes, or converted."""
    if recipe.parent.pretrain is not None:
        return pretrained_parent(runner, recipe, recipe.parent.pretrain)
    if recipe.parent.fit is not None:
        return fitted_parent(runner, recipe)
    existing = existing_parent(recipe)
    if existing is None:
        raise ValueError("a parent is either there or trained")
    return converted_parent(runner, existing) if existing.gguf_file else existing


def prepare(runner: StageRunner, recipe: Recipe, parent: ModelSource) -> Run:
    """The run with its packed text, before the parent's evaluation is made."""
    model, source = Checkpoint(parent, fingerprint(parent)), data_fingerprint(recipe.data)
    return Run(
        recipe=recipe,
        runner=runner,
        parent=model,
        source=source,
        tasks=task_fingerprint(recipe),
        production=production_fingerprint(recipe.data) if recipe.data.production else "",
        data=pack_text(runner, recipe, model, source),
    )
