"""The gradients of one step, in microbatches that fit into memory."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cascade.data.blocks import IGNORE_INDEX, TokenBlocks
from cascade.data.examples import Examples
from cascade.distillation import sharding
from cascade.distillation.losses.batch import batch_losses, sums_of
from cascade.distillation.losses.features import FeatureLoss
from cascade.distillation.options import Objective
from cascade.runtime import ranks
from cascade.runtime.errors import TrainingError
from cascade.runtime.failpoints import failpoint
from cascade.runtime.files import read_json, write_atomically
from cascade.runtime.retry_smaller import is_out_of_memory

logger = logging.getLogger(__name__)

_FITTING = "microbatch.json"


@dataclass(frozen=True)
class Task:
    """One step's models, batch and losses."""

    student: nn.Module
    teacher: nn.Module | None
    batch: TokenBlocks | Examples
    """The whole step's blocks or examples, of all processes."""
    objective: Objective
    features: FeatureLoss | None
    scales: dict[str, float] | None
    """The factor of each feature loss; None: from this step's own losses, which are measured first."""
    rows: Tensor
    """The blocks' numbers, for messages."""
    strength: float = 1.0
    """Share of the feature losses' weight at this step (`FeatureLoss.strength`)."""
    keep: bool = False
    """Whether the batch will be read again, by another training."""

    @property
    def taught(self) -> bool:
        """Whether a teacher or its targets teach, besides the text."""
        return self.teacher is not None or (isinstance(self.batch, TokenBlocks) and self.batch.known is not None)


def fitting_step(task: Task, microbatch_size: int, state_folder: Path | None) -> tuple[dict[str, float], int]:
    """(losses, microbatch that fitted): out of memory it is halved, and the step done again from its start.

    Several processes cannot do so in the middle of an exchange: there the smaller size is noted beside the training's
    state, and the training ends, to go on with it when it is started again.
    """
    while True:
        try:
            return _accumulate(task, microbatch_size), microbatch_size
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            smaller = min(microbatch_size, len(task.batch)) // 2
            if smaller < 1:
                raise TrainingError(_nothing_fits(task)) from error
            if ranks.world_size() > 1:
                raise TrainingError(_note(state_folder, microbatch_size, smaller)) from error
        # Outside the except clause, where nothing holds the step's tensors any more.
        for parameter in task.student.parameters():
            parameter.grad = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        microbatch_size = smaller
        logger.warning("out of memory: going on with microbatch_size %d, the same batches", microbatch_size)


def fitting_microbatch(state_folder: Path | None, microbatch_size: int) -> int:
    """The microbatch of the training's options, or a smaller one that an earlier attempt has noted."""
    noted = None if state_folder is None else state_folder / _FITTING
    if noted is None or not noted.exists():
        return microbatch_size
    return min(microbatch_size, int(read_json(noted)["microbatch_size"]))


def _note(state_folder: Path | None, microbatch_size: int, smaller: int) -> str:
    """Note the smaller size beside the training's state; returns the message for the error."""
    message = f"out of memory with microbatch_size {microbatch_size} on process {ranks.rank()}; "
    if state_folder is None:
        return message + f"give microbatch_size {smaller}"
    state_folder.mkdir(parents=True, exist_ok=True)
    write_atomically(state_folder / _FITTING, json.dumps({"microbatch_size": smaller}) + "\n")
    return message + f"run the same command again: it goes on with {smaller}, the same batches"


def _nothing_fits(task: Task) -> str:
    size = task.batch.block_size
    if isinstance(task.batch, Examples):
        return "out of memory with a single example; a shorter data.max_length, or a larger machine, would help"
    return (
        f"out of memory with a single block of {size} tokens; what would help: data.block_size {size // 2}, "
        "gradient_checkpointing: true, optimizer: adamw_8bit, more processes, or a larger machine"
    )


def _accumulate(task: Task, microbatch_size: int) -> dict[str, float]:
    """Gradients of one step into `.grad`; its losses in nats per token, over all processes' tokens that count."""
    total_valid = task.batch.num_counted()
    if total_valid == 0:
        raise TrainingError(
            f"no token of blocks {task.rows.tolist()} counts for the loss (all labels are {IGNORE_INDEX})"
        )
    of_process = torch.arange(len(task.batch))[ranks.rank() :: ranks.world_size()]
    parts = [task.batch.rows(rows) for rows in of_process.split(microbatch_size)]
    scales = task.scales
    if scales is None and task.features is not None:
        with torch.no_grad():
            last = _losses(task, parts, None, total_valid)
            scales = task.features.scales(last, task.strength)
    return _losses(task, parts, scales, total_valid)


def _losses(
    task: Task, parts: Sequence[TokenBlocks | Examples], scales: dict[str, float] | None, total_valid: int
) -> dict[str, float]:
    """Mean losses of a step; with `scales` also its gradients."""
    sums: dict[str, float] = {}
    # Gradients are averaged over processes: each has its share of a sum, so it counts as often as there are processes.
    share = ranks.world_size() / total_valid
    for number, part in enumerate(parts):
        failpoint("distill.microbatch")
        sharding.sync_gradients(task.student, number == len(parts) - 1)
        losses = batch_losses(task.student, task.teacher, part, task.objective, task.features, keep=task.keep)
        if scales is not None:
            loss: Any = losses.fused.loss
            if failpoint("distill.loss"):
                loss = loss * float("nan")
            for name, feature_loss in losses.features.items():
                loss = loss + scales[name] * feature_loss
            (loss * share).backward()
        for name, summed in sums_of(losses, task.taught).items():
            sums[name] = sums.get(name, 0.0) + summed / total_valid
    return ranks.sum_numbers(sums, next(task.student.parameters()).device)
