"""What a student starts from besides a cut by scores: random weights of any shape, or whole layers of its seed."""

from typing import Any

import torch
from torch import Tensor

from cascade.models.architecture.dims import ModelDims, dims_of
from cascade.models.architecture.model_class import (
    as_classifier,
    as_masked,
    config_from_values,
    guesses,
    is_classifier,
    own_names,
    reads_images,
    require_single_label,
)
from cascade.pruning.choose import plan_pruning
from cascade.pruning.importance.scores import Scores
from cascade.pruning.plan import PruningPlan
from cascade.runtime.errors import UserError

_OF_THE_TEXT = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "dtype")
_OF_THE_IMAGE = ("image_size", "num_channels", "dtype")


def student_config(values: dict[str, object], teacher_config: Any, name: str) -> Any:
    """The transformers config of a member's `config`; its classes, and what it leaves out of the input, the teacher's.

    Raises:
        UserError: no or an unknown model_type, or values that its config class refuses.
    """
    place, images = f"members: {name}: config", reads_images(teacher_config)
    inherited = {key: getattr(teacher_config, key, None) for key in (_OF_THE_IMAGE if images else _OF_THE_TEXT)}
    names = own_names(str(values.get("model_type")))
    inherited = {key: value for key, value in inherited.items() if names.get(key, key) not in values}
    config = config_from_values(inherited | values, place)
    if guesses(teacher_config):
        return as_masked(config, place)
    if not is_classifier(teacher_config):
        return config
    task = "image_classification" if images else "text_classification"
    return as_classifier(config, task, list(teacher_config.id2label.values()), place)


def require_same_classes(config: Any, parent_config: Any, name: str) -> None:
    """Refuse a classifier of other classes, or of images of another size, than its teacher.

    Raises:
        UserError: it is one.
    """
    if not is_classifier(parent_config):
        return
    ours, theirs = config.num_labels, parent_config.num_labels
    images = reads_images(parent_config)
    require_single_label(config, "image_classification" if images else "text_classification", f"members: {name}")
    if ours != theirs:
        raise UserError(f"members: {name}: the student has {ours} classes, the teacher {theirs}")
    for key in ("image_size", "num_channels") if images else ():
        ours, theirs = getattr(config, key, None), getattr(parent_config, key, None)
        if ours != theirs:
            raise UserError(f"members: {name}: the student's {key} is {ours}, the teacher's {theirs}")


def even_layers(num_layers: int, num_kept: int) -> list[int]:
    """Layers spread evenly, first and last among them, as DistilBERT's students take them: 0, 2, 4, 7, 9, 11 of 12."""
    if num_kept == 1:
        return [0]
    return [round(number * (num_layers - 1) / (num_kept - 1)) for number in range(num_kept)]


def plan_layers(config: Any, target: ModelDims, name: str) -> PruningPlan:
    """The plan that keeps evenly spread layers whole.

    Raises:
        UserError: the target cuts something else than layers.
    """
    source = dims_of(config)
    before, after = source.as_dict(), target.as_dict()
    changed = [key for key in before if key != "num_hidden_layers" and before[key] != after[key]]
    if changed:
        raise UserError(
            f"members: {name}: init 'layers' copies whole layers, and its target also changes {', '.join(changed)}; "
            "give target: {dims: {num_hidden_layers: N}}, or init: prune"
        )
    scores = torch.zeros(source.num_hidden_layers)
    scores[even_layers(source.num_hidden_layers, target.num_hidden_layers)] = 1.0
    return plan_pruning(_equal_scores(source, scores), config, target)


def _equal_scores(dims: ModelDims, layers: Tensor) -> Scores:
    count = dims.num_hidden_layers
    return Scores(
        layers=layers,
        heads=torch.ones(count, dims.num_attention_heads),
        neurons=torch.ones(count, dims.intermediate_size),
        hidden=torch.ones(dims.hidden_size),
    )
