"""The parent of a run: found, or made as the run's first stage (pretrained, or converted from GGUF)."""

from pathlib import Path
from typing import Any

import torch

from cascade.classifier import checked_classes, fitted_config, made_dtype
from cascade.data.prepare import prepare_blocks
from cascade.data.sources import read_documents
from cascade.distillation.options import Execution, Hooks, Optimization, Safekeeping
from cascade.distillation.supervision import Selection
from cascade.inputs import as_guessed, text_data
from cascade.models.architecture import as_masked, require_body, require_masked
from cascade.models.checkpoint import (
    CHECKPOINT,
    ModelSource,
    check_weights,
    load_config,
    load_model,
    load_tokenizer,
    resolve_model,
    save_checkpoint,
    stored_dtype,
)
from cascade.models.positions import usable_context
from cascade.pretraining import pretrain, pretrained_config, train_tokenizer
from cascade.progress import OnStep
from cascade.recipe.schema import Pretrain, Recipe
from cascade.store import partial_of
from cascade.training_options import cosine_schedule


def existing_parent(recipe: Recipe) -> ModelSource | None:
    """The model that the recipe names; None if it is to be trained."""
    if recipe.parent.pretrain is not None or recipe.parent.fit is not None:
        return None
    return resolve_model(recipe.parent.model, revision=recipe.parent.revision)


def parent_config(recipe: Recipe) -> Any:
    """The parent's transformers config, known before any weight."""
    source = existing_parent(recipe)
    if source is not None:
        config = load_config(source)
        check_weights(source, config)
        config.dtype = stored_dtype(source)  # what config.json says of it may be left out, or wrong
        if recipe.task == "masked_language":
            require_masked(config, f"parent: {recipe.parent.model}")
        if recipe.task == "embedding":
            require_body(config, f"parent: {recipe.parent.model}")
        return checked_classes(recipe, config) if recipe.classifies else config
    if recipe.parent.fit is not None:
        return fitted_config(recipe, recipe.parent.fit)
    settings = recipe.parent.pretrain
    if settings is None:
        raise ValueError("a parent is either found or trained")
    config = pretrained_config(dict(settings.config), vocab_size=settings.tokenizer.vocab_size)
    config.dtype = made_dtype(recipe)
    return as_masked(config, "parent.pretrain.config") if recipe.task == "masked_language" else config


def make_pretrained(recipe: Recipe, folder: Path, on_step: OnStep) -> None:
    """Tokenizer and model trained on the recipe's training text; the log as JSON lines."""
    settings = recipe.parent.pretrain
    if settings is None:
        raise ValueError("the recipe's parent is not to be trained")
    data = text_data(recipe.data)
    texts = read_documents(data, "train")
    config = parent_config(recipe)
    tokenizer = train_tokenizer(
        texts,
        vocab_size=settings.tokenizer.vocab_size,
        model_max_length=usable_context(config) or config.max_position_embeddings,
        masks=recipe.task == "masked_language",
    )
    packing: dict[str, Any] = {"block_size": settings.block_size, "document_masks": recipe.data.masks_documents}
    selection = prepare_blocks(data, "selection", tokenizer, **packing)
    model, _ = pretrain(
        config,
        as_guessed(recipe, prepare_blocks(data, "train", tokenizer, **packing), "train", tokenizer),
        num_tokens=settings.tokens,
        optimization=_optimization(settings, recipe.seed),
        execution=Execution(microbatch_size=settings.microbatch_size),
        selection=Selection(
            blocks=as_guessed(recipe, selection.take(48), "selection", tokenizer), every=settings.selection_every
        ),
        safekeeping=Safekeeping(state_folder=partial_of(folder)),
        hooks=Hooks(log_path=folder / "log.jsonl", on_step=on_step),
    )
    save_checkpoint(model, folder / CHECKPOINT, companions=None, dtype=made_dtype(recipe))
    tokenizer.save_pretrained(folder / CHECKPOINT)


def _optimization(settings: Pretrain, seed: int) -> Optimization:
    return Optimization(
        batch_size=settings.batch_size,
        seed=seed,
        optimizer=settings.optimizer,
        learning_rate=settings.learning_rate,
        schedule=cosine_schedule(settings),
        weight_decay=settings.weight_decay,
    )


def make_converted(source: ModelSource, folder: Path, on_step: OnStep) -> None:
    """A GGUF parent as a safetensors checkpoint, in float32: exactly the values that the file stands for."""
    save_checkpoint(load_model(source), folder / CHECKPOINT, companions=None, dtype=torch.float32)
    load_tokenizer(source).save_pretrained(folder / CHECKPOINT)
