"""What would stop a run later, found before anything is computed."""

from typing import Any

import torch

from cascade.distillation.losses.relations import fitting_heads
from cascade.distillation.optimizer import require_optimizer
from cascade.distillation.trackers import require_trackers
from cascade.evaluation.heldout import production_documents
from cascade.evaluation.tokenizer_files import require_tokenizer_files
from cascade.models.architecture.dims import dims_of
from cascade.models.architecture.document_isolation import require_document_masks
from cascade.models.architecture.model_class import build_on_meta, guesses, is_classifier, model_class_of
from cascade.models.architecture.padding import require_rows_apart, set_padding
from cascade.models.architecture.positions import require_context
from cascade.models.architecture.sized import Sized
from cascade.models.checkpoint.formats import FORMATS
from cascade.models.checkpoint.load import load_config, load_tokenizer, resolve_model
from cascade.models.checkpoint.quantised import GROUPS, group_size, is_rounded, require_torchao
from cascade.models.checkpoint.sentence_files import require_mean_pooling
from cascade.models.checkpoint.value_range import require_stored_held
from cascade.planning.family import ResolvedMember
from cascade.planning.inputs import production_fingerprint, text_data
from cascade.pruning.proof import prove_cuts
from cascade.pruning.rotation import require_rotatable
from cascade.pruning.size.shape import CUT_DIMS
from cascade.recipe.distill import Distill
from cascade.recipe.schema import Recipe
from cascade.runtime import ranks
from cascade.runtime.errors import UserError


def check_family(recipe: Recipe, parent_config: Any, members: list[ResolvedMember]) -> dict[str, float]:
    """The proof of the cut, along every axis that some member is cut along, on a tiny twin; empty if none is cut.

    Raises:
        UserError: the cut is not exact for this architecture, or the blocks are longer than the parent's context.
    """
    if is_rounded(parent_config):
        raise UserError(
            f"parent: {recipe.parent.model}: its weights are rounded already (torchao); give the one it was made from, "
            "and `finish` for rounded copies"
        )
    _require_held_by_save_dtype(recipe, parent_config)
    _require_contexts(recipe, parent_config, members)
    if recipe.task == "embedding":
        source = resolve_model(recipe.parent.model, revision=recipe.parent.revision)
        require_mean_pooling(source.folder, f"parent: {recipe.parent.model}")
        _require_same_width(parent_config, members)
    if recipe.task in ("text_classification", "embedding"):
        _require_rows_apart(recipe, parent_config, members)
    if recipe.data.masks_documents:
        for config in [parent_config, *(member.sized.config for member in members if not member.seed)]:
            require_document_masks(config)
    _require_tokenizer_files(recipe, parent_config, members)
    if recipe.distill is not None:
        _require_trainable(recipe.distill, parent_config, members)
    if recipe.data.production:
        production_fingerprint(recipe.data)  # that its files are there
        production_documents(text_data(recipe.data), recipe.data.production)  # that they can be read
    if recipe.finish:
        _require_roundable(recipe, {"parent": parent_config} | {member.name: member.sized.config for member in members})
    if recipe.prune.hidden == "pca":
        require_rotatable(Sized(parent_config))
    trainable = is_classifier(parent_config) if recipe.classifies else model_class_of(parent_config).can_generate()
    trainable = trainable or (recipe.task == "masked_language" and guesses(parent_config)) or recipe.task == "embedding"
    if any(member.seed for member in members) and not trainable:
        raise UserError(
            f"parent: model type '{parent_config.model_type}' as {model_class_of(parent_config).__name__} is no causal "
            "language model; recipes recover and evaluate those. `cascade prune` cuts it on its own"
        )
    before = dims_of(parent_config).as_dict()
    sizes = [member.sized.dims.as_dict() for member in members if member.seed]
    cut = {name for name in CUT_DIMS if any(size[name] < before[name] for size in sizes)}
    for member in members:
        several_shapes = member.member.start == "prune" and (recipe.prune.search or len(member.hidden_choices) > 1)
        if several_shapes and member.target is not None and member.target.bounds():
            cut |= {name for name in CUT_DIMS if name not in (member.target.dims or {})}  # what may be tried
    rotated = any(member.seed and "pca" in (member.hidden, *member.hidden_choices) for member in members)
    return prove_cuts(parent_config, along=sorted(cut), rotated=rotated) if cut else {}


def _require_tokenizer_files(recipe: Recipe, parent_config: Any, members: list[ResolvedMember]) -> None:
    """Refuse members whose folders would make another tokenizer of the parent's files."""
    if recipe.parent.pretrain is not None or not recipe.parent.model or recipe.task == "image_classification":
        return
    source = resolve_model(recipe.parent.model, revision=recipe.parent.revision)
    types = {member.sized.config.model_type: member for member in reversed(members)}
    for model_type, member in types.items():
        if model_type != parent_config.model_type or source.gguf_file:
            require_tokenizer_files(member.sized.config, source, member.name)


def require_one_process(recipe: Recipe) -> None:
    """Refuse several processes where what is trained cannot be shared out.

    Raises:
        UserError: there are several.
    """
    if recipe.task == "image_classification" and ranks.world_size() > 1:
        raise UserError("task: image_classification: image models are not shared out to several processes; use one")


def _require_trainable(distill: Distill, parent_config: Any, members: list[ResolvedMember]) -> None:
    """Refuse trackers, optimizers and feature losses that would stop the training of a member later."""
    require_trackers(distill.trackers)
    if distill.optimizer != "auto":
        require_optimizer(distill.optimizer)
    on_policy = distill.on_policy
    if on_policy is not None:
        for whose, config in [
            ("parent", parent_config),
            *((f"member {member.name}", member.sized.config) for member in members),
        ]:
            require_context(config, on_policy.max_new_tokens + 1, "distill.on_policy.max_new_tokens", whose)
        if ranks.world_size() > 1:
            raise UserError("distill.on_policy: a student shared out to several processes cannot write; use one")
    if distill.features.relations:
        for member in members:
            fitting_heads(distill.features.relation_heads, [member.sized.dims, dims_of(parent_config)])


def _require_held_by_save_dtype(recipe: Recipe, parent_config: Any) -> None:
    """Refuse a `save.dtype` that cannot hold the parent's own weights."""
    dtype = parent_config.dtype if recipe.save.dtype == "parent" else getattr(torch, recipe.save.dtype)
    existing = recipe.parent.pretrain is None and recipe.parent.fit is None
    if dtype == torch.float16 and existing:
        source = resolve_model(recipe.parent.model, revision=recipe.parent.revision)
        if source.gguf_file is None:
            require_stored_held(source.folder, dtype, f"save.dtype: {source.reference}")


def _require_contexts(recipe: Recipe, parent_config: Any, members: list[ResolvedMember]) -> None:
    """Refuse texts that are longer than what the parent, or a member that is not cut from it, can read."""
    if recipe.task == "image_classification":
        return
    key, length = "data.block_size", recipe.data.block_size
    if recipe.counts_examples:
        key, length = "data.max_length", recipe.data.max_length
    require_context(parent_config, length, key)
    for member in members:
        if not member.seed:
            require_context(member.sized.config, length, key, whose=f"member {member.name}")


def _require_rows_apart(recipe: Recipe, parent_config: Any, members: list[ResolvedMember]) -> None:
    source = resolve_model(recipe.parent.model, revision=recipe.parent.revision)
    tokenizer = load_tokenizer(source)
    if recipe.parent.fit is not None:
        set_padding(load_config(source), tokenizer, f"parent.model: {recipe.parent.model}")
    configs = {f"parent: {recipe.parent.model}": parent_config}
    configs |= {f"members: {member.name}": member.sized.config for member in members if not member.seed}
    for place, config in configs.items():
        require_rows_apart(config, tokenizer, place)


def _require_same_width(parent_config: Any, members: list[ResolvedMember]) -> None:
    width = dims_of(parent_config).hidden_size
    for member in members:
        hidden_size = member.sized.dims.hidden_size
        if hidden_size != width:
            raise UserError(
                f"members: {member.name}: hidden size {hidden_size}; embeddings are compared number by number, "
                f"so it stays {width}: target: {{params: ..., dims: {{hidden_size: {width}}}}}, or init: layers"
            )


def _require_roundable(recipe: Recipe, configs: dict[str, Any]) -> None:
    """Refuse copies in fewer bits that the finished members could not be rounded to."""
    require_torchao()
    for entry in recipe.finish:
        for name in entry.members or configs:
            model = build_on_meta(configs[name])
            group_size(model, least=GROUPS[-1] if FORMATS[entry.quantise].grouped else None, place=f"finish: {name}")
