"""The parent of a run, as far as it is known before any weight: where it is, and its config."""

from typing import Any

from cascade.models.architecture.model_class import as_masked, config_from_values, require_body, require_masked
from cascade.models.checkpoint.load import (
    ModelSource,
    check_weights,
    load_config,
    resolve_model,
    stored_dtype,
)
from cascade.planning.classifier import checked_classes, fitted_config, made_dtype
from cascade.recipe.schema import Recipe


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


def pretrained_config(values: dict[str, Any], *, vocab_size: int, end_token_id: int = 0) -> Any:
    """The transformers config of a recipe's `pretrain.config`.

    Raises:
        UserError: no or an unknown model_type, or values that its config class refuses.
    """
    special = {"bos_token_id": end_token_id, "eos_token_id": end_token_id, "pad_token_id": None}
    return config_from_values(special | values | {"vocab_size": vocab_size}, "parent.pretrain.config")
