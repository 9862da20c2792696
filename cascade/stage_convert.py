"""A GGUF parent as a safetensors checkpoint: the stage convert."""

from pathlib import Path

import torch

from cascade.models.checkpoint import (
    CHECKPOINT,
    ModelSource,
    load_model,
    load_tokenizer,
    save_checkpoint,
)
from cascade.progress import OnStep


def make_converted(source: ModelSource, folder: Path, on_step: OnStep) -> None:
    """A GGUF parent as a safetensors checkpoint, in float32: exactly the values that the file stands for."""
    save_checkpoint(load_model(source), folder / CHECKPOINT, companions=None, dtype=torch.float32)
    load_tokenizer(source).save_pretrained(folder / CHECKPOINT)
