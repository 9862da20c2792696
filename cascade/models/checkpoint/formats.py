"""Formats of weights in fewer bits, by the names that a recipe has for them: a new one is a function and a line here.

Imports no torch: a recipe is checked against these names.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Format:
    """One format of `finish: [{quantise: ...}]`."""

    rounding: str
    """The place of the function that says how torchao rounds a model, stored and in training."""
    grouped: bool
    """Whether runs of columns share a scale, so that a group has to divide every weight's columns."""


FORMATS = {
    "int8": Format(rounding="cascade.models.checkpoint.quantised:int8_rounding", grouped=False),
    "int4": Format(rounding="cascade.models.checkpoint.quantised:int4_rounding", grouped=True),
}
