"""A stage's output on the disk, as the stages after it read it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade.models.checkpoint.load import CHECKPOINT, ModelSource
from cascade.runtime.files import read_json
from cascade.store.commits import COST_FILE, output_digest


@dataclass(frozen=True)
class Checkpoint:
    """A model that stages read."""

    source: ModelSource
    digest: str
    """Digest of the model's files, for the keys of the stages that read it."""


@dataclass(frozen=True)
class Made:
    """The committed output of a stage."""

    folder: Path
    digest: str
    """Digest of the folder's files, for the keys of the stages that read it."""

    def json(self, name: str) -> Any:
        """A JSON file of the folder."""
        return read_json(self.folder / name)

    def model(self, reference: str) -> Checkpoint:
        """The checkpoint in the folder; messages call it by `reference`."""
        return Checkpoint(ModelSource(self.folder / CHECKPOINT, reference), self.digest)

    def cost(self) -> dict[str, Any]:
        """`seconds` that the stage took, and what else it has measured of its own cost."""
        return read_cost(self.folder)


Input = Made | Checkpoint | str
"""What a stage reads, or its digest."""


def committed(folder: Path) -> Made:
    """The output of a stage that is committed in a folder.

    Raises:
        OSError: nothing is committed there.
        ValueError: the manifest is not as it was written.
    """
    return Made(folder, output_digest(folder))


def digest_of(stage_input: Input) -> str:
    """The digest of a stage's input, for the stage's key."""
    return stage_input if isinstance(stage_input, str) else stage_input.digest


def read_cost(folder: Path) -> dict[str, Any]:
    """A stage's cost.json; empty where it has none."""
    path = folder / COST_FILE
    cost: dict[str, Any] = read_json(path) if path.exists() else {}
    return cost


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a member's training starts from."""

    model: Checkpoint
    cut: Made | None = None
    repaired: Made | None = None
    lineage: list[Made] | None = None
    """The cuts from the parent to it; None where it was not cut from the parent."""
