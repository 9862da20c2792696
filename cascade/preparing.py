"""The stages that all members share: the parent, the text, the parent's evaluation, production text."""

from cascade.context import Run
from cascade.inputs import (
    data_fingerprint,
    production_fingerprint,
    task_fingerprint,
)
from cascade.models.checkpoint import (
    ModelSource,
    fingerprint,
)
from cascade.parent import existing_parent
from cascade.pretraining import pretrained_parent
from cascade.recipe.schema import Recipe
from cascade.runner import StageRunner
from cascade.stage_convert import converted_parent
from cascade.stage_data import pack_text
from cascade.stage_fit import fitted_parent
from cascade.stage_output import Checkpoint


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
    """What all members of a run read, but for the parent's evaluation: above all the packed text."""
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
