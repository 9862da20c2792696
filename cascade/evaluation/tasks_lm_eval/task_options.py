"""Which tasks a checkpoint is measured on, and how."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class HarnessOptions:
    """How lm-eval measures a task."""

    limit: int | None = None
    """Items per task; None: all."""
    num_fewshot: int | None = None
    """Examples in front of each item; None: as the task says."""
    seed: int = 0
    batch_size: int = 16
    """Items per forward pass; halved where they do not fit into memory."""


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """The tasks by name, and how lm-eval measures them."""

    names: Sequence[str] = ()
    folders: Sequence[Path] = ()
    """Folders of task files, beside the package's own."""
    harness: HarnessOptions = HarnessOptions()
    allow_code: bool = False
    """Whether tasks may run Python functions of their own, in a process without keys in its environment."""
    results_folder: Path | None = None
    """Where each task's result is saved as soon as it is there, and taken from by another try; None: nowhere."""
