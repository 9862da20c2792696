"""The stage convert: the parent's GGUF file as a safetensors checkpoint in float32, with its tokenizer.

Depends on: the GGUF file. Leaves: `checkpoint/`.
"""

from functools import partial
from pathlib import Path

import torch

from cascade.models.checkpoint.load import (
    CHECKPOINT,
    ModelSource,
    fingerprint,
    load_model,
    load_tokenizer,
    save_checkpoint,
)
from cascade.pipeline.runner import StageRunner
from cascade.runtime.progress import OnStep


def converted_parent(runner: StageRunner, source: ModelSource) -> ModelSource:
    """The parent as a safetensors checkpoint, converted from its GGUF file."""
    converted = runner.make(
        "convert",
        "parent",
        settings={},
        inputs={"gguf": fingerprint(source)},
        write=partial(make_converted, source),
    )
    return converted.model(source.reference).source


def make_converted(source: ModelSource, folder: Path, on_step: OnStep) -> None:
    """Write the checkpoint; float32 holds exactly the values that the GGUF file stands for."""
    save_checkpoint(load_model(source), folder / CHECKPOINT, companions=None, dtype=torch.float32)
    load_tokenizer(source).save_pretrained(folder / CHECKPOINT)
