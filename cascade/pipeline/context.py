"""What all stages of a run read: its recipe, the parent, the text, the parent's evaluation and what is kept of it."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from cascade.distillation.teacher_memory import remember
from cascade.evaluation.evaluate import default_device
from cascade.models.checkpoint.load import fingerprint, load_model
from cascade.pipeline.kept_targets import TeacherCache
from cascade.pipeline.runner import StageRunner
from cascade.pipeline.stage_output import Checkpoint, Input, Made
from cascade.planning.family import ResolvedMember
from cascade.recipe.schema import Recipe
from cascade.runtime.errors import RunError


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run whose parent is there and whose text is packed."""

    recipe: Recipe
    runner: StageRunner
    parent: Checkpoint
    source: str
    """Digest of the text's files."""
    tasks: str
    """Digest of the evaluation's tasks."""
    production: str
    """Digest of the production text; empty where there is none."""
    data: Made
    """The packed text, or the labelled examples."""
    parent_evaluation: Made | None = None
    """The parent's own evaluation; None until it is made."""
    cache: TeacherCache | None = None
    """Cache of the teacher's targets; None where the teacher runs beside each training."""
    vocab_size: int | None = None
    """Ids, from 0 on, that the member at hand is compared with the parent over; None: all rows."""
    teachers: list[nn.Module] = field(default_factory=list, repr=False)
    """The parent's model as a list of one, empty until a stage needs it."""

    @property
    def folder(self) -> Path:
        """The run directory."""
        return self.runner.folder

    def teacher(self) -> nn.Module:
        """The parent's model, loaded once and frozen."""
        if not self.teachers:
            self.teachers.append(remember(load_model(self.parent.source).to(default_device()).requires_grad_(False)))
            self.require_same_parent()
        return self.teachers[0]

    def require_same_parent(self) -> None:
        """Stop where the parent's files are no longer those that the run began with.

        Raises:
            RunError: they have changed since.
        """
        if fingerprint(self.parent.source) != self.parent.digest:
            raise RunError(
                f"{self.parent.source.reference}: the parent's files have changed since this run began; members would "
                "be cut from one model and learn from another. Put the files back and run the same command again, or "
                "start with another --output"
            )

    def expert(self) -> nn.Module | None:
        """The model whose probabilities the members learn; None where they learn from the text alone."""
        return self.teacher() if self.recipe.distill and self.recipe.distill.teacher == "parent" else None

    def for_member(self, member: ResolvedMember) -> "Run":
        """The run as a member's stages read it: over the ids that the member has in common with the teacher."""
        if member.vocab_size is None:
            return self
        cache = None if self.cache is None else self.cache.narrowed(member.vocab_size)
        return replace(self, cache=cache, vocab_size=member.vocab_size)

    def comparison_settings(self) -> dict[str, int]:
        """The ids of the comparison with the teacher, for stage keys; empty where it is over all rows."""
        return {} if self.vocab_size is None else {"vocab_size": self.vocab_size}

    def target_settings(self) -> dict[str, Any]:
        """How cached targets were made, for stage keys; empty where the teacher runs beside each training."""
        return {"targets": self.cache.settings()} if self.cache else {}

    def evaluation_inputs(self) -> dict[str, Input]:
        """Inputs of an evaluation besides the checkpoint; the parent's own evaluation has fewer."""
        inputs: dict[str, Input] = {"source": self.source, "parent": self.parent, "tasks": self.tasks}
        if self.production:
            inputs["production"] = self.production
        if self.parent_evaluation is not None:
            inputs |= {"data": self.data, "parent_evaluation": self.parent_evaluation}
        return inputs
