"""The entries of `baselines`: rows to compare each member with."""

from typing import Annotated, Literal

from pydantic import Discriminator, Tag

from cascade.recipe.section import PositiveFloat, Section

Kind = Literal["cut", "repaired", "ce"]


class CrossEntropy(Section):
    """How the cross-entropy baseline is trained, where that is not found for it."""

    learning_rate: Literal["auto"] | PositiveFloat = "auto"
    """The schedule's peak. auto: found by short trainings of its own, on selection text by its own loss."""


class CrossEntropyBaseline(Section):
    """`ce` with keys of its own."""

    ce: CrossEntropy


def _branch(entry: object) -> str:
    return "[section]" if isinstance(entry, dict | CrossEntropyBaseline) else "[kind]"


Baseline = Annotated[
    Annotated[Kind, Tag("[kind]")] | Annotated[CrossEntropyBaseline, Tag("[section]")], Discriminator(_branch)
]
"""A kind, or {ce: {learning_rate: ...}}."""
