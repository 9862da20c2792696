"""The `prune` section: what units are scored by, and what is done to the weights that stay."""

from typing import Literal

from cascade.recipe.section import PositiveInt, Section


class Repair(Section):
    """Refitting the weights that stay, in closed form, before any training."""

    method: Literal["auto", "sequential", "independent", "none"] = "auto"
    """sequential: each weight on the already cut stream, also towards what the stream has lost; independent: each on
    the parent's own activations; auto: both, and the better one on selection blocks (or neither)."""
    num_blocks: PositiveInt = 32
    """Calibration blocks, spread over the split."""


class Prune(Section):
    """How a member is cut from its seed."""

    repair: Repair = Repair()
