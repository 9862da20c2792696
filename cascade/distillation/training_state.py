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
from cascade.runtime.stopping import stop, stop_requested
from cascade.store.commits import is_committed, staged, verify_folder

logger = logging.getLogger(__name__)

FORMAT = 1


@dataclass
class Progress:
    """How far a training has come."""

    step: int
    """Steps done."""
    microbatch_size: int
    curve: list[dict[str, float]]
    settings: dict[str, Any]
    """What the training was started with; a state of another training is refused."""
    left_out: list[int] = field(default_factory=list)
    """Steps without an optimizer step: their losses or gradients, or a later one's, were not finite."""
    skips: int = 0
    """How often that has been decided."""


@dataclass(frozen=True)
class Trained:
    """What a training changes."""

    student: nn.Module
    optimizer: Optimizer
    average: Average | None = None
    buffer: dict[str, Tensor] = field(default_factory=dict)
    """Other tensors, by name."""


def save_state(folder: Path, trained: Trained, progress: Progress, kept: int = 2) -> None:
    """Commit a state as FOLDER/step-N and drop all but the last `kept`; every process has to call it."""
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
        own = [one for one in _states(folder) if one.name <= f"step-{progress.step:09d}"]
        # Later ones are of no use: damaged, of other settings, or from before a return to an earlier step.
        for old in {*_states(folder)} - {*own[-kept:]}:
            shutil.rmtree(old)
        failpoint("state.dropped")
    ranks.barrier()


class States:
    """When a training's states are saved: by the clock, and before it stops because it was asked to."""

    def __init__(self, folder: Path, every_minutes: float, kept: int) -> None:
        self.folder, self.every_minutes, self.kept = folder, every_minutes, kept
        self.saved = time.perf_counter()

    def save(self, trained: Trained, progress: Progress) -> None:
        """Now."""
        save_state(self.folder, trained, progress, self.kept)
        self.saved = time.perf_counter()

    def begin(self, trained: Trained, progress: Progress) -> None:
        """Before the first step, for a training that may have to come back to it."""
        if progress.step == 0:
            self.save(trained, progress)

    def step(self, trained: Trained, progress: Progress, last: bool) -> None:
        """After a step, on every process: save if the first one says it is time, or to any of them a signal has come.

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
    """The newest state that is whole, written into `trained`; None if there is none for `settings`."""
    for candidate in reversed(_states(folder)):
        damaged = verify_folder(candidate)
        if damaged:
            logger.warning("%s: damaged (%s); an earlier state is taken", candidate, ", ".join(damaged))
            continue
        record = json.loads((candidate / "state.json").read_text(encoding="utf-8"))
        if record.pop("format") != FORMAT or record["settings"] != settings:
            logger.warning("%s: belongs to a training with other settings; it is not gone on with", candidate)
            continue
        made_with = json.loads((candidate / "MANIFEST.json").read_text(encoding="utf-8"))
        if (made_with["threads"], made_with["torch"]) != (torch.get_num_threads(), torch.__version__):
            logger.warning("%s: made with other threads or another torch; the result may differ in the bits", candidate)
        _restore(load_file(candidate / "state.safetensors"), trained)
        return Progress(**record)
    return None


def _states(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def _tensors(trained: Trained) -> dict[str, Tensor]:
    """Full tensors by name; parameters that share their storage once."""
    tensors = {f"weight.{name}": value.contiguous() for name, value in sharding.whole_weights(trained.student)}
    names: dict[Tensor, str] = {value: name for name, value in trained.student.named_parameters()}
    for key, parameter, value in trained.optimizer.tensors():
        tensors[f"optimizer.{key}.{names[parameter]}"] = sharding.whole(value).contiguous()
    if trained.average is not None:
        for name, value in trained.average.values.items():
            tensors[f"average.{name}"] = sharding.whole(value).contiguous()
    return tensors | {f"buffer.{name}": value.contiguous() for name, value in trained.buffer.items()}


@torch.no_grad()
def _restore(tensors: dict[str, Tensor], trained: Trained) -> None:
    if any(name.startswith("optimizer.") for name in tensors):
        trained.optimizer.prepare_state()
    else:  # a state of the start
        trained.optimizer.forget()
    for name, weight in trained.student.named_parameters():
        sharding.copy_into(weight, tensors[f"weight.{name}"])
    names: dict[Tensor, str] = {value: name for name, value in trained.student.named_parameters()}
    for key, parameter, value in trained.optimizer.tensors():
        sharding.copy_into(value, tensors[f"optimizer.{key}.{names[parameter]}"])
    if trained.average is not None:
        for name, value in trained.average.values.items():
            sharding.copy_into(value, tensors[f"average.{name}"])
    trained.buffer.clear()
    kept = {name.removeprefix("buffer."): value for name, value in tensors.items() if name.startswith("buffer.")}
    trained.buffer.update(kept)
