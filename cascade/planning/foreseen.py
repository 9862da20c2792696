"""What would stop a run after hours and can be known before: `cascade plan` and the start of a run check it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cascade.data.examples import image_examples, read_examples
from cascade.data.framing import require_end_token
from cascade.data.masking import mask_token
from cascade.data.packing import BlockFormat
from cascade.data.prepare import prepare_blocks
from cascade.distillation.losses.relations import attention_projections
from cascade.evaluation.heldout import (
    BLOCK_METRICS,
    CLASS_METRICS,
    EMBEDDING_METRICS,
    PRODUCTION_METRICS,
    heldout_documents,
    heldout_rows,
    require_heldout,
)
from cascade.evaluation.tasks_lm_eval.harness import find_tasks, measured_names, require_datasets
from cascade.evaluation.tasks_lm_eval.task_code import require_allowed
from cascade.models.architecture.dims import dims_of
from cascade.models.architecture.head import require_head
from cascade.models.architecture.model_class import build_on_meta
from cascade.models.architecture.origin import even_origin
from cascade.models.architecture.positions import require_context
from cascade.planning.cache_choice import exact_ids, require_exact
from cascade.planning.classifier import require_image_size
from cascade.planning.family import ResolvedMember, is_cut_from_parent
from cascade.planning.inputs import classes_of, labelled_data, text_data
from cascade.planning.vocabularies import require_common_text, text_tokenizer
from cascade.recipe.schema import Recipe
from cascade.runtime import ranks
from cascade.runtime.errors import UserError
from cascade.runtime.permissions import NO_PERMISSIONS, Permissions


def require_foreseen(
    recipe: Recipe,
    parent_config: Any,
    members: Sequence[ResolvedMember],
    permissions: Permissions = NO_PERMISSIONS,
) -> None:
    """Refuse at the start what a later stage would refuse; loads no weights.

    Raises:
        UserError: with the key, what is wrong and what is accepted.
    """
    _require_tasks(recipe, permissions)
    _require_models(recipe, parent_config, members)
    _require_processes(recipe)
    tokenizer = text_tokenizer(recipe)
    if recipe.counts_examples:
        _require_examples(recipe, parent_config)
    elif recipe.generate is None:
        _require_text(recipe, tokenizer)
    if tokenizer is not None:
        common = rows_of_all(parent_config, members)
        require_common_text(recipe, tokenizer, common)
        exact = recipe.distill.cache.exact_tokens if recipe.distill is not None else []
        if exact:
            require_exact(exact_ids(exact, tokenizer), common)
    _require_framing(recipe, tokenizer)


def rows_of_all(parent_config: Any, members: Sequence[ResolvedMember]) -> int:
    """Ids, from 0 on, that the parent and all members have."""
    return min([dims_of(parent_config).vocab_size, *(member.vocab_size for member in members if member.vocab_size)])


def _require_tasks(recipe: Recipe, permissions: Permissions) -> None:
    """Refuse tasks whose code is not allowed or whose datasets are missing, and thresholds on metrics of no task."""
    tasks = find_tasks(recipe.evaluate.tasks, [Path(folder) for folder in recipe.evaluate.task_folders])
    require_allowed(tasks, permissions.task_code)
    require_datasets(tasks)
    measured = measured_names(tasks) if recipe.evaluate.at_least else set()
    heldout_names = {f"heldout/{name}" for name in _heldout_metrics(recipe)}
    heldout_names |= {f"production/{name}" for name in (PRODUCTION_METRICS if recipe.data.production else ())}
    for name in recipe.evaluate.at_least:
        if name in heldout_names or (measured is not None and name in measured):
            continue
        if measured is None and name.partition("/")[0] not in ("heldout", "production") and "/" in name:
            continue  # of a task with code of its own: what it reports is known once it has run
        known = ", ".join(sorted(heldout_names | (measured or set())))
        raise UserError(f"evaluate.at_least: '{name}' is not measured here; known task/metric: {known}")


def _heldout_metrics(recipe: Recipe) -> tuple[str, ...]:
    if recipe.task == "embedding":
        return EMBEDDING_METRICS
    if recipe.classifies:
        return CLASS_METRICS
    if recipe.task == "masked_language" or recipe.data.messages_field or recipe.generate is not None:
        return tuple(name for name in BLOCK_METRICS if name != "bits_per_byte")
    return BLOCK_METRICS


def _require_models(recipe: Recipe, parent_config: Any, members: Sequence[ResolvedMember]) -> None:
    """Refuse models whose logits or hidden states the losses cannot compare."""
    settings = recipe.distill
    if recipe.parent.pretrain is not None:
        place = "parent.pretrain.block_size"
        require_context(parent_config, recipe.parent.pretrain.block_size, place)
    apart = [member for member in members if not member.seed]
    if settings is None or not members:
        return
    if not recipe.counts_examples:
        for config in [parent_config, *(member.sized.config for member in apart)]:
            require_head(config)
    if settings.teacher != "parent":
        return
    by_name = {member.name: member for member in members}
    for member in members:
        cut = is_cut_from_parent(member, by_name)
        forms = settings.hidden_features(cut), settings.features.embedding
        if not cut and forms != ("none", "none"):
            try:
                even_origin(member.sized.dims, dims_of(parent_config))
            except UserError as error:
                raise UserError(f"members: {member.name}: {error}") from error
    if settings.features.relations:
        for config in [parent_config, *(member.sized.config for member in apart)]:
            attention_projections(build_on_meta(config), dims_of(config).num_hidden_layers - 1)


def _require_processes(recipe: Recipe) -> None:
    """Refuse batches that cannot be shared out evenly to the processes."""
    sections = [recipe.distill, recipe.parent.pretrain, recipe.parent.fit]
    for section in sections:
        if section is not None:
            ranks.require_even(section.batch_size)


def _require_framing(recipe: Recipe, tokenizer: Any | None) -> None:
    """Refuse packed text in which neither an end token nor a begin token keeps documents apart."""
    if recipe.data.end_token != "none":
        return
    if tokenizer is not None:
        require_end_token(tokenizer)
    elif recipe.parent.pretrain is not None:
        raise UserError(
            "data.end_token: none: the tokenizer of a parent that is trained here begins no text with a token, so "
            "nothing else would keep documents apart; remove it"
        )


def _require_examples(recipe: Recipe, parent_config: Any) -> None:
    """Refuse missing held-out examples, and images of another size than the parent's."""
    data = labelled_data(recipe.data, recipe.task)
    heldout = heldout_rows(data)
    if recipe.task != "image_classification":
        return
    for raw in (read_examples(data, "train"), read_examples(data, "selection"), heldout):
        require_image_size(image_examples(raw, list(classes_of(recipe))), parent_config)


def _require_text(recipe: Recipe, tokenizer: Any) -> None:
    """Refuse held-out or production text below a block, and text that lacks mask tokens or log-probabilities."""
    if tokenizer is None:
        heldout_documents(text_data(recipe.data))
        return
    size = recipe.data.block_size
    require_heldout(text_data(recipe.data), recipe.data.production, tokenizer, block_size=size)
    if recipe.task == "masked_language":
        mask_token(tokenizer)
    if recipe.distill is not None and recipe.distill.teacher == "logprobs":
        listed = replace(text_data(recipe.data), listed=True)
        prepare_blocks(listed, "train", tokenizer, BlockFormat(block_size=size, max_blocks=1))
