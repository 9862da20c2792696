"""The stage fit: a classifier that learns its classes from the labels alone and becomes the parent.

Depends on: `parent.fit`, the labelled data and the weights it starts from. Leaves: `checkpoint/` and `log.jsonl`.
"""

from functools import partial
from pathlib import Path

import torch

from cascade.distillation.options import Execution, Hooks, Optimization, Safekeeping
from cascade.distillation.supervision import Selection
from cascade.distillation.trainer import distill
from cascade.models.architecture.model_class import (
    model_from_config,
)
from cascade.models.architecture.padding import set_padding, write_padding
from cascade.models.checkpoint.load import (
    CHECKPOINT,
    ModelSource,
    fingerprint,
    load_config,
    load_tokenizer,
    load_with_new_head,
    resolve_model,
    save_checkpoint,
)
from cascade.pipeline.runner import StageRunner
from cascade.pipeline.training_options import cosine_schedule
from cascade.planning.classifier import examples_of, fitted_config, new_padding
from cascade.planning.inputs import (
    data_fingerprint,
)
from cascade.recipe.schema import Fit, Recipe
from cascade.runtime.progress import OnStep
from cascade.store.commits import partial_of


def fitted_parent(runner: StageRunner, recipe: Recipe) -> ModelSource:
    """The parent, a classifier that this run trains."""
    data, model = recipe.data, recipe.parent.model
    settings = recipe.parent.fit.model_dump(exclude={"microbatch_size"}) if recipe.parent.fit else {}
    settings |= data.model_dump(include={"text_field", "label_field", "image_field", "max_length"})
    token = new_padding(recipe)
    settings |= {"pad_token": token} if token else {}
    fitted = runner.make(
        "fit",
        "parent",
        settings=settings | {"task": recipe.task, "seed": recipe.seed, "dtype": recipe.save.dtype},
        inputs={
            "source": data_fingerprint(data.model_copy(update={"unlabelled": []})),
            "model": fingerprint(resolve_model(model, revision=recipe.parent.revision)) if model else "",
        },
        write=partial(make_fitted, recipe),
    )
    return fitted.model(model or recipe.name).source


def make_fitted(recipe: Recipe, folder: Path, on_step: OnStep) -> None:
    """Train the classifier on the labels alone; write the checkpoint and the log."""
    settings = recipe.parent.fit
    if settings is None:
        raise ValueError("the recipe's parent is not to be fitted")
    config = fitted_config(recipe, settings)
    torch.manual_seed(recipe.seed)
    if settings.config:
        tokenizer, model, padded = None, model_from_config(config), False
    else:
        source = resolve_model(recipe.parent.model, revision=recipe.parent.revision)
        tokenizer = None if recipe.task == "image_classification" else load_tokenizer(source)
        model = load_with_new_head(source, config)
        padded = tokenizer is not None and set_padding(load_config(source), tokenizer, source.reference)
    train, selection = (
        examples_of(recipe, config, split, tokenizer, for_parent=True) for split in ("train", "selection")
    )
    distill(
        model.to("cuda" if torch.cuda.is_available() else "cpu"),
        None,
        train.labelled(),
        num_tokens=settings.examples,
        optimization=_optimization(settings, recipe.seed),
        execution=Execution(microbatch_size=settings.microbatch_size),
        selection=Selection(blocks=selection),
        safekeeping=Safekeeping(state_folder=partial_of(folder)),
        hooks=Hooks(log_path=folder / "log.jsonl", on_step=on_step),
    )
    companions = None if settings.config else source.folder
    save_checkpoint(model, folder / CHECKPOINT, companions=companions, dtype=config.dtype)
    if padded:
        write_padding(folder / CHECKPOINT, tokenizer)


def _optimization(settings: Fit, seed: int) -> Optimization:
    rate = settings.learning_rate
    return Optimization(
        batch_size=settings.batch_size,
        seed=seed,
        learning_rate=(1e-3 if settings.config else 5e-5) if rate == "auto" else rate,
        schedule=cosine_schedule(settings),
        weight_decay=settings.weight_decay,
    )
