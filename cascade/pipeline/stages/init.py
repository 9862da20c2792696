"""The stage init: random weights of a member's config.

Depends on: the config and the recipe's seed. Leaves: `checkpoint/` in float32.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from cascade.models.architecture.model_class import (
    model_from_config,
)
from cascade.models.checkpoint.load import CHECKPOINT, save_checkpoint
from cascade.pipeline.context import Run
from cascade.pipeline.stage_output import Made
from cascade.planning.family import ResolvedMember
from cascade.runtime.progress import OnStep


def draw_weights(run: Run, member: ResolvedMember) -> Made:
    """The stage init of a member that starts from random weights, with its checkpoint."""
    return run.runner.make(
        "init",
        member.name,
        settings={"config": member.sized.config.to_dict(), "seed": run.recipe.seed},
        inputs={},
        write=partial(make_random, member.sized.config, run.recipe.seed),
    )


def make_random(config: Any, seed: int, folder: Path, on_step: OnStep) -> None:
    """Write a checkpoint of the config in float32, initialised as transformers does it."""
    torch.manual_seed(seed)
    save_checkpoint(model_from_config(config), folder / CHECKPOINT, companions=None, dtype=torch.float32)
