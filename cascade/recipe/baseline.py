"""The entries of `baselines`: rows to compare each member with."""

from typing import Annotated, Literal

from pydantic import Discriminator, Tag

from cascade.recipe.section import PositiveFloat, Section

Kind = Literal["cut", "repaired", "ce"]


class CrossEntropy(Section):
    """How the cross-entropy baseline is trained."""

    learning_rate: Literal["auto"] | PositiveFloat = "auto"
    """Peak learning rate. `auto`: found by short trainings with cross-entropy, judged by the loss on selection text."""


class CrossEntropyBaseline(Section):
    """The cross-entropy baseline with options."""

    ce: CrossEntropy
    """Options of the cross-entropy baseline."""


def _branch(entry: object) -> str:
    return "[section]" if isinstance(entry, dict | CrossEntropyBaseline) else "[kind]"


Baseline = Annotated[
    Annotated[Kind, Tag("[kind]")] | Annotated[CrossEntropyBaseline, Tag("[section]")], Discriminator(_branch)
]
"""A kind, or {ce: {learning_rate: ...}}."""
