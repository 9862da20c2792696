"""A training's state on disk: weights, optimizer, step. Safetensors and JSON, whole or not at all, the last two kept.

Data order and dropout are pure functions of the step, so there is nothing else to remember.
"""

import json
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cascade import parallel
from cascade.distillation.average import Average
from cascade.distillation.optimizer import Optimizer
from cascade.store import is_committed, staged, verify_folder

logger = logging.getLogger(__name__)

FORMAT = 1
_KEPT = 2


@dataclass(frozen=True)
class Progress:
    """How far a training has come."""

    step: int
    """Steps done."""
    microbatch_size: int
    curve: list[dict[str, float]]
    settings: dict[str, Any]
    """What the training was started with; a state of another training is refused."""


@dataclass(frozen=True)
class Trained:
    """What a training changes."""

    student: nn.Module
    optimizer: Optimizer
    average: Average | None = None
    buffer: dict[str, Tensor] = field(default_factory=dict)
    """Other tensors, by name."""


def save_state(folder: Path, trained: Trained, progress: Progress) -> None:
    """Commit a state as FOLDER/step-N and drop all but the last two; every process has to call it."""
    tensors = dict(_tensors(trained))
    if parallel.rank() == 0:
        provenance = {"stage": "training state", "threads": torch.get_num_threads(), "torch": torch.__version__}
        with staged(folder / f"step-{progress.step:09d}", provenance) as staging:
            save_file(tensors, staging / "state.safetensors")
            record = {"format": FORMAT} | vars(progress)
            (staging / "state.json").write_text(json.dumps(record, allow_nan=False) + "\n")
        for old in _states(folder)[:-_KEPT]:
            shutil.rmtree(old)
    parallel.barrier()


def load_state(folder: Path, trained: Trained, settings: dict[str, Any]) -> Progress | None:
    """The newest state that is whole, written into `trained`; None if there is none for `settings`."""
    for candidate in reversed(_states(folder)):
        damaged = verify_folder(candidate) if is_committed(candidate) else ["MANIFEST.json"]
        if damaged:
            logger.warning("%s: damaged (%s); an earlier state is taken", candidate, ", ".join(damaged))
            continue
        record = json.loads((candidate / "state.json").read_text())
        if record.pop("format") != FORMAT or record["settings"] != settings:
            logger.warning("%s: belongs to a training with other settings; it is not gone on with", candidate)
            continue
        made_with = json.loads((candidate / "MANIFEST.json").read_text())
        if (made_with["threads"], made_with["torch"]) != (torch.get_num_threads(), torch.__version__):
            logger.warning("%s: made with other threads or another torch; the result may differ in the bits", candidate)
        _restore(load_file(candidate / "state.safetensors"), trained)
        return Progress(**record)
    return None


def _states(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def _tensors(trained: Trained) -> dict[str, Tensor]:
    """Full tensors by name; parameters that share their storage once."""
    tensors = {f"weight.{name}": value.contiguous() for name, value in parallel.whole_weights(trained.student)}
    names: dict[Tensor, str] = {value: name for name, value in trained.student.named_parameters()}
    for key, parameter, value in trained.optimizer.tensors():
        tensors[f"optimizer.{key}.{names[parameter]}"] = parallel.whole(value).contiguous()
    if trained.average is not None:
        for name, value in trained.average.values.items():
            tensors[f"average.{name}"] = parallel.whole(value).contiguous()
    return tensors | {f"buffer.{name}": value.contiguous() for name, value in trained.buffer.items()}


@torch.no_grad()
def _restore(tensors: dict[str, Tensor], trained: Trained) -> None:
    trained.optimizer.prepare_state()
    for name, weight in trained.student.named_parameters():
        parallel.copy_into(weight, tensors[f"weight.{name}"])
    names: dict[Tensor, str] = {value: name for name, value in trained.student.named_parameters()}
    for key, parameter, value in trained.optimizer.tensors():
        parallel.copy_into(value, tensors[f"optimizer.{key}.{names[parameter]}"])
    if trained.average is not None:
        for name, value in trained.average.values.items():
            parallel.copy_into(value, tensors[f"average.{name}"])
    kept = {name.removeprefix("buffer."): value for name, value in tensors.items() if name.startswith("buffer.")}
    trained.buffer.update(kept)
