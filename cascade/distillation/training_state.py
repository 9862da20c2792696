"""A training's state on disk: weights, optimizer, step. Safetensors and JSON, whole or not at all, the last two kept.

Data order and dropout are pure functions of the step, so there is nothing else to remember.
"""

import json
import logging
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cascade.distillation import sharding
from cascade.distillation.average import Average
from cascade.distillation.optimizer import Optimizer
from cascade.runtime import ranks
from cascade.runtime.errors import DiskError
from cascade.runtime.failpoints import at, failpoint
from cascade.runtime.files import read_json
from cascade.runtime.stopping import stop, stop_requested
from cascade.store.commits import is_committed, staged, verify_folder

logger = logging.getLogger(__name__)

FORMAT = 1


@dataclass
class Progress:
    """How far a training has come."""

    step: int
    """Steps that are done."""
    microbatch_size: int
    curve: list[dict[str, float]]
    settings: dict[str, Any]
    """The settings that the training was started with; a state with other settings is not gone on from."""
    left_out: list[int] = field(default_factory=list)
    """Steps without an optimizer step: their losses or gradients, or a later one's, were not finite."""
    skips: int = 0
    """How often the training has skipped a step or gone back."""


@dataclass(frozen=True)
class Trained:
    """All that a training's steps change."""

    student: nn.Module
    optimizer: Optimizer
    average: Average | None = None
    buffer: dict[str, Tensor] = field(default_factory=dict)
    """Other tensors by name: the batches that the student has written."""


def save_state(folder: Path, trained: Trained, progress: Progress, num_states: int = 2) -> None:
    """Commit a state as FOLDER/step-N and drop all but the last `num_states`; every process has to call this."""
    tensors = dict(_tensors(trained))
    if ranks.rank() == 0:
        provenance = {"stage": "training state", "threads": torch.get_num_threads(), "torch": torch.__version__}
        with at("state"), staged(folder / f"step-{progress.step:09d}", provenance) as staging:
            save_file(tensors, staging / "state.safetensors")
            record = {"format": FORMAT} | vars(progress)
            (staging / "state.json").write_text(json.dumps(record, allow_nan=False) + "\n", encoding="utf-8")
            failpoint("state.tensors")
        newest = folder / f"step-{progress.step:09d}"
        if not is_committed(newest):
            raise DiskError(f"{newest}: was written and is not there as it was; the states before it are kept")
        states = [state for state in _states(folder) if state.name <= newest.name]
        # Later states are of no use: damaged, of other settings, or from before a return to an earlier step.
        for old in {*_states(folder)} - {*states[-num_states:]}:
            shutil.rmtree(old)
        failpoint("state.dropped")
    ranks.barrier()


class States:
    """Saves a training's states: by the clock, and before a signal stops it."""

    def __init__(self, folder: Path, every_minutes: float, num_states: int) -> None:
        self.folder, self.every_minutes, self.num_states = folder, every_minutes, num_states
        self.saved = time.perf_counter()

    def save(self, trained: Trained, progress: Progress) -> None:
        """Save the state now."""
        save_state(self.folder, trained, progress, self.num_states)
        self.saved = time.perf_counter()

    def begin(self, trained: Trained, progress: Progress) -> None:
        """Save the state before the first step, for a training that may have to come back to it."""
        if progress.step == 0:
            self.save(trained, progress)

    def step(self, trained: Trained, progress: Progress, last: bool) -> None:
        """Save after a step if the first process says that it is time, or if a signal has come to any process.

        Raises:
            Stopped: a signal has come.
        """
        stopping = ranks.any_process(stop_requested())
        due = not last and time.perf_counter() - self.saved >= 60 * self.every_minutes
        if stopping or ranks.broadcast_flag(due):
            self.save(trained, progress)
        if stopping:
            stop()


def load_state(folder: Path, trained: Trained, settings: dict[str, Any]) -> Progress | None:
    """The progress of the newest undamaged state, which is written into `trained`; None: no state has `settings`."""
    for candidate in reversed(_states(folder)):
        damaged = verify_folder(candidate)
        if damaged:
            logger.warning("%s: damaged (%s); an earlier state is taken", candidate, ", ".join(damaged))
            continue
        record = read_json(candidate / "state.json")
        if record.pop("format") != FORMAT or record["settings"] != settings:
            logger.warning("%s: belongs to a training with other settings; it is not gone on with", candidate)
            continue
        made_with = read_json(candidate / "MANIFEST.json")
        if (made_with["threads"], made_with["torch"]) != (torch.get_num_threads(), torch.__version__):
            logger.warning("%s: made with other threads or another torch; the result may differ in the bits", candidate)
        _restore(load_file(candidate / "state.safetensors"), trained)
        return Progress(**record)
    return None


def _states(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def _tensors(trained: Trained) -> dict[str, Tensor]:
    """Full tensors by name; parameters that share their storage once."""
    tensors = {f"weight.{name}": weight.contiguous() for name, weight in sharding.whole_weights(trained.student)}
    names: dict[Tensor, str] = {weight: name for name, weight in trained.student.named_parameters()}
    for key, parameter, state in trained.optimizer.tensors():
        tensors[f"optimizer.{key}.{names[parameter]}"] = sharding.whole(state).contiguous()
    if trained.average is not None:
        for name, average in trained.average.values.items():
            tensors[f"average.{name}"] = sharding.whole(average).contiguous()
    return tensors | {f"buffer.{name}": tensor.contiguous() for name, tensor in trained.buffer.items()}


@torch.no_grad()
def _restore(tensors: dict[str, Tensor], trained: Trained) -> None:
    if any(name.startswith("optimizer.") for name in tensors):
        trained.optimizer.prepare_state()
    else:  # a state of the start
        trained.optimizer.forget()
    for name, weight in trained.student.named_parameters():
        sharding.copy_into(weight, tensors[f"weight.{name}"])
    names: dict[Tensor, str] = {weight: name for name, weight in trained.student.named_parameters()}
    for key, parameter, state in trained.optimizer.tensors():
        sharding.copy_into(state, tensors[f"optimizer.{key}.{names[parameter]}"])
    if trained.average is not None:
        for name, average in trained.average.values.items():
            sharding.copy_into(average, tensors[f"average.{name}"])
    trained.buffer.clear()
    names_in_buffer = [name for name in tensors if name.startswith("buffer.")]
    trained.buffer.update({name.removeprefix("buffer."): tensors[name] for name in names_in_buffer})
