"""What a student is trained towards, and the text that its training is judged on."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from cascade.data.blocks import TokenBlocks
from cascade.data.examples import Examples
from cascade.data.token_targets import StoredTargets
from cascade.distillation.losses.features import FeatureLoss
from cascade.distillation.options import Objective, OnPolicy, Optimization


class Targets(Protocol):
    """What was kept of a teacher for the blocks of a training (`cascade.teacher.targets.reader.CachedTargets`)."""

    @property
    def name(self) -> str:
        """Of what all targets depend on: a training that goes on must find the same."""

    def of(self, rows: Tensor) -> StoredTargets:
        """Of the blocks of these numbers."""

    def ahead(self, now: Tensor, after: Tensor) -> None:
        """Begin to read what this step and the next one will ask for."""


@dataclass(frozen=True, kw_only=True)
class Supervision:
    """What a student learns from: the teacher's probabilities and hidden states, on given text or on its own."""

    objective: Objective = Objective()
    """The loss on logits."""
    features: FeatureLoss | None = None
    """Losses on hidden states, embeddings and attention."""
    on_policy: OnPolicy | None = None
    """Batches that the student writes itself."""
    targets: Targets | None = None
    """Targets that were computed before, instead of a live teacher's; with both, the teacher has on-policy batches."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Text that a student's loss is measured on while it trains."""

    blocks: TokenBlocks | Examples
    every: int = 25
    """Optimizer steps between two measurements; the last step is always measured."""


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What a training and the search for its learning rate have in common."""

    student: nn.Module
    teacher: nn.Module | None
    """None where the text alone, or kept targets, teach."""
    blocks: TokenBlocks | Examples
    selection: TokenBlocks | Examples
    """Text that the student is judged on."""
    supervision: Supervision = Supervision()
    optimization: Optimization = Optimization()
    """Its learning rate has no part in the search for one."""
