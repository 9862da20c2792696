"""Which tensor of a checkpoint is which parameter of the model."""

import re
from typing import Any

from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from cascade.errors import UserError
from cascade.models.architecture import build_on_meta, model_class_of
from cascade.models.axes import ModelAxes
from cascade.models.checkpoint import ModelSource
from cascade.models.tensor_file import Entry


def stored_parameters(
    entries: dict[str, Entry], config: Any, axes: ModelAxes, source: ModelSource
) -> dict[str, tuple[str, Entry]]:
    """(name in the checkpoint, entry) of every tensor, by the model's own parameter names.

    Raises:
        UserError: a tensor that is neither a parameter nor known to be ignored.
    """
    kind = model_class_of(config)
    prefix = f"{kind.base_model_prefix}."
    ignored = [re.compile(pattern) for pattern in getattr(kind, "_keys_to_ignore_on_load_unexpected", None) or []]
    buffers = {name for name, _ in build_on_meta(config).named_buffers()}
    found: dict[str, tuple[str, Entry]] = {}
    for name, entry in entries.items():
        for candidate in (name, prefix + name, name.removeprefix(prefix), _as_loaded(name, config)):
            if axes.template(candidate) in axes.weights:
                found[candidate] = (name, entry)
                break
        else:
            if name in axes.tied or name in buffers or any(pattern.search(name) for pattern in ignored):
                continue
            raise UserError(
                f"{source.reference}: tensor '{name}' is no parameter of {kind.__name__} here; this checkpoint needs "
                "converting first (load it with transformers and save it)"
            )
    return found


def _as_loaded(name: str, config: Any) -> str:
    """A tensor's name after the plain renamings that transformers does while loading."""
    known = (
        get_checkpoint_conversion_mapping(key) or [] for key in (config.model_type, model_class_of(config).__name__)
    )
    for renaming in (one for mapping in known for one in mapping):
        if isinstance(renaming, WeightRenaming):
            for pattern, target in zip(renaming.source_patterns, renaming.target_patterns, strict=True):
                name = re.sub(pattern, target, name)
    return name
