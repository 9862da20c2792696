"""A training's state on disk: weights, optimizer, step. Safetensors and JSON, whole or not at all, the last two kept.

Data order and dropout are pure functions of the step, so there is nothing else to remember.
"""

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cascade.distillation import parallel
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


def save_state(folder: Path, student: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Commit a state as FOLDER/step-N and drop all but the last two; every process has to call it."""
    tensors = dict(_tensors(student, optimizer))
    if parallel.rank() == 0:
        provenance = {"stage": "training state", "threads": torch.get_num_threads(), "torch": torch.__version__}
        with staged(folder / f"step-{progress.step:09d}", provenance) as staging:
            save_file(tensors, staging / "state.safetensors")
            record = {"format": FORMAT} | vars(progress)
            (staging / "state.json").write_text(json.dumps(record, allow_nan=False) + "\n")
        for old in _states(folder)[:-_KEPT]:
            shutil.rmtree(old)
    parallel.barrier()


def load_state(
    folder: Path, student: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]
) -> Progress | None:
    """The newest state that is whole, written into student and optimizer; None if there is none for `settings`."""
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
        _restore(load_file(candidate / "state.safetensors"), student, optimizer)
        return Progress(**record)
    return None


def _states(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def _named(student: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in student.named_parameters() if parameter.requires_grad}


def _tensors(student: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Full tensors by name; parameters that share their storage once."""
    tensors = {f"weight.{name}": value.contiguous() for name, value in parallel.whole_weights(student)}
    for parameter, name in _named(student).items():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = parallel.whole(torch.as_tensor(value)).contiguous()
    return tensors


@torch.no_grad()
def _restore(tensors: dict[str, Tensor], student: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for name, parameter in student.named_parameters():
        parallel.copy_into(parameter, tensors[f"weight.{name}"])
    of_parameter: dict[str, dict[str, Tensor]] = {}
    for full_name, value in tensors.items():
        if full_name.startswith("optimizer."):
            _, key, name = full_name.split(".", 2)
            of_parameter.setdefault(name, {})[key] = value
    for parameter, name in _named(student).items():
        for key, value in of_parameter[name].items():
            if value.ndim:
                moment = torch.zeros_like(parameter)
                parallel.copy_into(moment, value)
                optimizer.state[parameter][key] = moment
            else:  # the count of steps
                optimizer.state[parameter][key] = value.to(parameter.device)
