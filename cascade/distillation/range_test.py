"""The peak learning rate of one recovery, found by short trainings from its own start.

What a rate is worth depends on how much the cut has left to mend: a well repaired start is spoilt by a rate that a poor
one needs. Each try is the whole schedule on a few steps, from the same start; the divergence on selection text decides.
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from cascade.data.blocks import TokenBlocks
from cascade.data.examples import Examples
from cascade.distillation.trainer import distill
from cascade.errors import DivergedError, NotFiniteError, TrainingError

FIRST_RATE = 1e-3
"""Where the search starts: AdamW on a model of a few hundred channels."""

_HIGHER = {"muon": 4.0}
"""Optimizers whose best rates are higher by this factor; Muon's are on stories260K and pico-python."""

SHARE, FEWEST_STEPS, MOST_STEPS = 0.06, 8, 150
"""Steps of a try, as a share of the training's, and their limits."""

GROWTH = {"adamw": 0.16, "adamw_8bit": 0.16, "muon": 0.0}
"""A longer training takes a higher rate: by (its steps / a try's) to this power. Measured with AdamW on pico-python,
cut to 60% and 35%: the best rates after 8k and 100k tokens differ by a factor of 1.5 to 2. With Muon they do not: on
the stories family 1.4 to 1.9 times the tries' best rate costs 3 to 7% of the KL.
"""

_FACTOR, _MOST_TRIES = 2.0, 6

_OF_WHOLE_TRAININGS = (
    *("learning_rate", "selection_every", "ema_decay"),
    *("save_every_minutes", "keep_states", "on_nan", "max_skipped", "on_divergence"),
)
"""Options of `distill` that a try has no use for, some of which would end it."""


@dataclass(frozen=True)
class RangeTest:
    """What was tried, and the rate that follows."""

    learning_rate: float
    tried: list[dict[str, float | None]]
    """learning_rate and selection loss (KL to the teacher; without one, cross-entropy) of each try, in order; a
    loss that is not finite is None."""
    num_tokens: int
    """Tokens that all tries together were trained on."""
    seconds: float


def find_learning_rate(
    student: nn.Module,
    teacher: nn.Module | None,
    blocks: TokenBlocks | Examples,
    *,
    num_tokens: int,
    selection: TokenBlocks | Examples,
    batch_size: int = 8,
    on_try: Callable[[int, int], None] | None = None,
    **options: Any,
) -> RangeTest:
    """The peak rate for a `distill` of `num_tokens` tokens with these options; `student` is left as it is.

    Those that only a whole training has a use for, such as what to do where it diverges, are passed over.

    Rates are doubled, or halved, as long as that helps; a parabola through the best and its neighbours (over the
    logarithm of the rate) gives the minimum.

    Raises:
        TrainingError: the loss is finite at none of them.
    """
    started = time.perf_counter()
    options = {name: value for name, value in options.items() if name not in _OF_WHOLE_TRAININGS}
    num_steps = math.ceil(num_tokens / (batch_size * blocks.block_size))
    steps, optimizer = _steps_of_a_try(num_steps), options.get("optimizer", "adamw")
    first = _first_rate(optimizer)
    tokens = steps * batch_size * blocks.block_size
    found: dict[int, float] = {}

    def selection_after(rate: float) -> float:
        try:
            metrics = distill(
                copy.deepcopy(student),
                teacher,
                blocks,
                num_tokens=tokens,
                batch_size=batch_size,
                learning_rate=rate,
                selection=selection,
                selection_every=steps,
                keep=True,
                **options,
            )
        except (NotFiniteError, DivergedError):  # it ran off; what else stops a training stops the search
            return math.inf
        loss = metrics.selection_loss if teacher is None else metrics.selection_kl
        return math.inf if loss is None or not math.isfinite(loss) else loss

    def tried(power: int) -> float:
        if power not in found:
            found[power] = selection_after(first * _FACTOR**power)
            if on_try is not None:
                on_try(len(found), _MOST_TRIES)
        return found[power]

    best = 0
    for direction in (1, -1):
        while len(found) < _MOST_TRIES and tried(best) > tried(best + direction):
            best += direction
        if best > 0:
            break  # upwards it got better, so downwards it does not
    rate = usual_rate(num_steps, optimizer) * _FACTOR ** (best + _vertex(found, best))
    if not math.isfinite(found[best]):
        rates = ", ".join(f"{first * _FACTOR**power:g}" for power in sorted(found))
        raise TrainingError(f"learning_rate: auto: the loss ran off at every rate tried ({rates}); give a rate")
    record = [
        {"learning_rate": first * _FACTOR**power, "loss": loss if math.isfinite(loss) else None}
        for power, loss in found.items()
    ]
    return RangeTest(rate, record, tokens * len(found), time.perf_counter() - started)


def usual_rate(num_steps: int, optimizer: str = "adamw") -> float:
    """The rate that the search starts from, for a training of that length."""
    return _first_rate(optimizer) * float((num_steps / _steps_of_a_try(num_steps)) ** GROWTH[optimizer])


def _first_rate(optimizer: str) -> float:
    return FIRST_RATE * _HIGHER.get(optimizer, 1.0)


def _steps_of_a_try(num_steps: int) -> int:
    return min(num_steps, MOST_STEPS, max(FEWEST_STEPS, round(SHARE * num_steps)))


def _vertex(found: dict[int, float], best: int) -> float:
    """Where the parabola through the best try and its two neighbours is lowest, from the best, within half a step."""
    low, middle, high = (found.get(power, math.inf) for power in (best - 1, best, best + 1))
    bend = low - 2 * middle + high
    if not math.isfinite(bend) or bend <= 0:
        return 0.0
    return max(-0.5, min(0.5, (low - high) / (2 * bend)))
