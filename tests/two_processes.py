"""What tests/distillation/test_parallel.py starts under torchrun: one training, its result written by the first process."""

import json
import sys
from pathlib import Path

import torch
from conftest import distill_with, make_blocks, make_model
from safetensors.torch import save_file

from cascade.data.blocks import IGNORE_INDEX, TokenBlocks
from cascade.distillation import sharding
from cascade.distillation.losses.features import FeatureLoss
from cascade.distillation.optimizer import Optimizer
from cascade.distillation.options import Features
from cascade.models.architecture.origin import Origin
from cascade.pruning.importance.statistics import collect_statistics, save_statistics
from cascade.runtime import ranks


def uneven_blocks() -> TokenBlocks:
    """Blocks in which different numbers of tokens count, in one of them none."""
    blocks = make_blocks(count=24)
    labels = blocks.labels.clone()
    for row in range(24):
        labels[row, : row % 16 + 1] = IGNORE_INDEX
    labels[5] = IGNORE_INDEX
    return TokenBlocks(blocks.input_ids, labels, 3.0)


def train(
    output: Path, *, tied: bool, state: Path | None, die_after: int | None, num_steps: int, rate: float, microbatch: int
) -> None:
    """A training with everything that sees sharded tensors; the process ends at once after step `die_after`."""
    import os

    gradients: dict[str, torch.Tensor] = {}
    step = Optimizer.step

    def noted_step(self: Optimizer) -> None:
        if not gradients:
            for name, parameter in student.named_parameters():
                gradients[name] = sharding.whole(parameter.grad).clone().contiguous()
        step(self)

    Optimizer.step = noted_step

    def on_step(done: int, total: int) -> None:
        if done == die_after:
            os._exit(9)

    ranks.join()
    student, teacher = make_model("llama", seed=2, tied=tied), make_model("llama", seed=1, tied=tied)
    # Second moments are taken of one batch only, which the second process does not see.
    statistics = collect_statistics(teacher, make_blocks(count=9, seed=3), batch_size=2, covariance_blocks=2)
    if ranks.rank() == 0:
        save_statistics(statistics, output / "statistics.safetensors")
    features = FeatureLoss(Features(hidden="cosine", relations=("vv",)), Origin((0, 1, 2, 3)), student, teacher)
    metrics = distill_with(
        student, teacher, uneven_blocks(), num_tokens=8 * 16 * num_steps, batch_size=8, microbatch_size=microbatch,
        learning_rate=rate, selection=make_blocks(count=4, seed=9), selection_every=5, state_folder=state,
        save_every_minutes=0, on_step=on_step, features=features, ema_decay=0.5,
    )  # fmt: skip
    weights = {name: value.clone().contiguous() for name, value in sharding.whole_weights(student)}
    if ranks.rank() == 0:
        save_file(weights, output / "weights.safetensors")
        save_file(gradients, output / "gradients.safetensors")
        (output / "curve.json").write_text(json.dumps(metrics.curve))
    ranks.leave()


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    settings["state"] = Path(settings["state"]) if settings["state"] else None
    train(Path(settings.pop("output")), **settings)
