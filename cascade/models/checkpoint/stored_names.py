"""Which tensor of a checkpoint is which parameter of the model, for readers that take them one at a time from disk."""

from typing import Any

from cascade.models.architecture.axes import ModelAxes
from cascade.models.architecture.model_class import build_on_meta, model_class_of
from cascade.models.checkpoint.load import ModelSource, check_weights
from cascade.models.checkpoint.tensor_file import Entry
from cascade.runtime.errors import UserError


def stored_parameters(config: Any, axes: ModelAxes, source: ModelSource) -> dict[str, tuple[str, Entry]]:
    """(name in the checkpoint, entry) of every parameter, by the model's own names, in the order of the files.

    Of tied parameters only the owner is there.

    Raises:
        UserError: the checkpoint is not exactly what its config asks for, or needs more than reading: tensors computed
            from several, buffers with values of their own, packed weights.
    """
    match = check_weights(source, config)
    kind = model_class_of(config).__name__
    if match.absent or not match.stored:
        what = ", ".join(sorted(match.absent)[:5]) or "weights that are stored packed"
        raise UserError(f"{source.reference}: {what}: not read from disk one tensor at a time; load it into memory")
    parameters: dict[str, tuple[str, Entry]] = {}
    for name, stored in match.stored.items():
        owner = axes.tied.get(name, name)
        if axes.template(owner) not in axes.weights:
            raise UserError(
                f"{source.reference}: tensor '{name}' is no parameter of {kind} that can be read from disk on its own; "
                "load the model into memory instead"
            )
        if owner == name:
            parameters[owner] = stored
        elif owner not in match.stored:  # only the tied name is stored
            parameters[owner] = (owner, stored[1])
    lacking = [name for name, _ in build_on_meta(config).named_parameters() if name not in parameters]
    lacking = [name for name in lacking if name not in axes.tied]
    if lacking:
        raise UserError(
            f"{source.reference}: {', '.join(lacking[:5])}: made from several tensors of the checkpoint; load it with "
            "transformers and save it, then give that folder"
        )
    return parameters
