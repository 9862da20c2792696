"""The cut from disk to disk, one tensor at a time, for models that do not fit in memory."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from cascade.models.architecture.model_class import build_on_meta, model_class_of
from cascade.models.architecture.sized import Sized
from cascade.models.checkpoint.load import ModelSource, copy_companions, load_config
from cascade.models.checkpoint.older_keys import add_older_keys
from cascade.models.checkpoint.stored_names import stored_parameters
from cascade.models.checkpoint.tensor_file import write_checkpoint
from cascade.pruning.cut import cut_weight, renumbered
from cascade.pruning.plan import PruningPlan, config_of
from cascade.runtime.errors import UserError


def prune_on_disk(
    source: ModelSource, plan: PruningPlan, folder: Path, *, max_shard_bytes: int = 4_000_000_000
) -> None:
    """Write to `folder` the checkpoint that `prune` and `save_checkpoint` would, in the dtype it is stored in.

    Memory: the largest tensor, its cut, and a slab of rows while it is rotated.

    Raises:
        UserError: the checkpoint is no safetensors folder, is damaged, or has a tensor that nobody explains.
        ValueError: the plan is for a model of another size.
    """
    if source.gguf_file:
        raise UserError(f"{source.reference}: a GGUF file is quantised; only safetensors are cut on disk")
    config = load_config(source)
    sized = Sized(config)
    axes = sized.axes
    if sized.dims != plan.source_dims:
        raise ValueError(f"the plan is for {plan.source_dims}, the model has {sized.dims}")
    stored = stored_parameters(config, axes, source)
    pruned_config = config_of(plan)
    shapes = {name: tuple(parameter.shape) for name, parameter in build_on_meta(pruned_config).named_parameters()}
    order = []
    for name, (stored_name, entry) in stored.items():
        new_name = renumbered(name, axes, plan)
        if new_name is not None and new_name in shapes:
            order.append((name, new_name, _renamed(stored_name, name, new_name), entry))
    for head, owner in axes.tied.items():
        if head in shapes:  # a rotated model has a head of its own
            order.append((head, head, head, stored[owner][1]))
    missing = sorted(set(shapes) - {new_name for _, new_name, _, _ in order})
    if missing:
        raise UserError(f"{source.reference}: the checkpoint lacks {', '.join(missing[:5])}")

    def values() -> Iterator[tuple[str, Tensor]]:
        for name, _, written_name, entry in order:
            weight = entry.read()
            cut = cut_weight(name, weight, axes, plan, lambda norm: stored[norm][1].read())
            if weight.isfinite().all() and not cut.isfinite().all():  # merged heads, rotated and rescaled weights grow
                raise UserError(
                    f"{source.reference}: {entry.dtype} cannot hold {name} once it is cut; store in bfloat16"
                )
            yield written_name, cut

    folder.mkdir(parents=True, exist_ok=True)
    pruned_config.dtype = order[0][3].dtype
    pruned_config.architectures = config.architectures or [model_class_of(config).__name__]
    pruned_config.save_pretrained(folder)
    add_older_keys(folder)
    copy_companions(source.folder, folder)
    tensors = [(written_name, shapes[new_name], entry.dtype) for _, new_name, written_name, entry in order]
    write_checkpoint(folder, tensors, values(), max_shard_bytes=max_shard_bytes)


def _renamed(stored_name: str, name: str, new_name: str) -> str:
    """The name to write: the checkpoint's own, with the new number of its layer."""
    if name == new_name:
        return stored_name
    if stored_name.endswith(name):
        return stored_name.removesuffix(name) + new_name
    return new_name.removeprefix(name.removesuffix(stored_name))
