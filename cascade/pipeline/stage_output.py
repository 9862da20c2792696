"""What a stage leaves on the disk, and how the stages after it read that."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade.models.checkpoint.load import CHECKPOINT, ModelSource
from cascade.store.commits import COST_FILE, output_digest
from cascade.store.strict_json import read_json


@dataclass(frozen=True)
class Checkpoint:
    """A model that stages read."""

    source: ModelSource
    digest: str
    """Of its content, for the keys of the stages that read it."""


@dataclass(frozen=True)
class Made:
    """The committed output of a stage."""

    folder: Path
    digest: str
    """Of its content, for the keys of the stages that read it."""

    def json(self, name: str) -> Any:
        """A JSON file of the folder."""
        return read_json(self.folder / name)

    def model(self, reference: str) -> Checkpoint:
        """The checkpoint in the folder; messages call it by `reference`."""
        return Checkpoint(ModelSource(self.folder / CHECKPOINT, reference), self.digest)

    def cost(self) -> dict[str, Any]:
        """What making it took: `seconds`, and what else the stage has measured."""
        return read_cost(self.folder)


Input = Made | Checkpoint | str
"""What a stage reads, or the digest of it."""


def committed(folder: Path) -> Made:
    """The output in a folder that a stage has committed.

    Raises:
        OSError: there is none.
        ValueError: its manifest is not as it was written.
    """
    return Made(folder, output_digest(folder))


def digest_of(value: Input) -> str:
    """What a stage's key takes of one of its inputs."""
    return value if isinstance(value, str) else value.digest


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
