"""What a student starts from besides a cut by scores: random weights of any shape, or whole layers of its seed."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade.errors import UserError
from cascade.importance.scores import Scores
from cascade.models.architecture import config_from_values, model_from_config
from cascade.models.checkpoint import CHECKPOINT, save_checkpoint
from cascade.models.dims import ModelDims, dims_of
from cascade.pruning.plan import PruningPlan, plan_pruning

_OF_THE_TEXT = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "dtype")


def student_config(values: dict[str, object], teacher_config: Any, name: str) -> Any:
    """The transformers config of a member's `config`: what it does not say of vocabulary and context is the teacher's.

    Raises:
        UserError: no or an unknown model_type, or values that its config class refuses.
    """
    given = {key: getattr(teacher_config, key, None) for key in _OF_THE_TEXT} | values
    vocab_size = int(dims_of(teacher_config).vocab_size)
    return config_from_values({"vocab_size": vocab_size} | given, f"members: {name}: config")


def make_random(folder: Path, config: Any, seed: int) -> None:
    """A checkpoint of the config in float32, its weights as transformers initialises them."""
    torch.manual_seed(seed)
    save_checkpoint(model_from_config(config), folder / CHECKPOINT, companions=None, dtype=torch.float32)


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
    other = [key for key in before if key != "num_hidden_layers" and before[key] != after[key]]
    if other:
        raise UserError(
            f"members: {name}: init 'layers' copies whole layers, and its target also changes {', '.join(other)}; give "
            "target: {dims: {num_hidden_layers: N}}, or init: prune"
        )
    wanted = torch.zeros(source.num_hidden_layers)
    wanted[even_layers(source.num_hidden_layers, target.num_hidden_layers)] = 1.0
    return plan_pruning(_alike(source, wanted), config, target)


def _alike(dims: ModelDims, layers: Tensor) -> Scores:
    count = dims.num_hidden_layers
    return Scores(
        layers=layers,
        heads=torch.ones(count, dims.num_attention_heads),
        neurons=torch.ones(count, dims.intermediate_size),
        hidden=torch.ones(dims.hidden_size),
    )
