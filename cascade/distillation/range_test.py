"""The peak learning rate of one recovery, found by short trainings from its own start.

What a rate is worth depends on how much the cut has left to mend: a well repaired start is spoilt by a rate that a poor
one needs. Each try is the whole schedule on a few steps, from the same start; the divergence on selection text decides.
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from cascade.data.blocks import TokenBlocks
from cascade.data.examples import Examples
from cascade.distillation.options import Execution, Optimization
from cascade.distillation.supervision import Selection, Supervision
from cascade.distillation.trainer import (
    DEFAULT_EXECUTION,
    DEFAULT_OPTIMIZATION,
    DEFAULT_SUPERVISION,
    TrainingMetrics,
    distill,
)
from cascade.runtime.errors import DivergedError, NotFiniteError, TrainingError

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
    supervision: Supervision = DEFAULT_SUPERVISION,
    optimization: Optimization = DEFAULT_OPTIMIZATION,
    execution: Execution = DEFAULT_EXECUTION,
    on_try: Callable[[int, int], None] | None = None,
) -> RangeTest:
    """The peak rate for a `distill` of `num_tokens` tokens with these options; `student` is left as it is.

    Rates are doubled, or halved, as long as that helps; a parabola through the best and its neighbours (over the
    logarithm of the rate) gives the minimum. `optimization.learning_rate` and `ema_decay` have no part in it.
    `on_try(done, most)` is called after each try.

    Raises:
        TrainingError: the loss is finite at none of them.
    """
    started = time.perf_counter()
    num_steps = math.ceil(num_tokens / (optimization.batch_size * blocks.block_size))
    steps = _steps_of_a_try(num_steps)
    tokens = steps * optimization.batch_size * blocks.block_size
    first = _first_rate(optimization.optimizer)
    execution = replace(execution, remember_teacher=True)
    losses: dict[int, float] = {}

    def training_at(power: int) -> TrainingMetrics:
        return distill(
            copy.deepcopy(student),
            teacher,
            blocks,
            num_tokens=tokens,
            supervision=supervision,
            optimization=replace(optimization, learning_rate=first * _FACTOR**power, ema_decay=None),
            execution=execution,
            selection=Selection(blocks=selection, every=steps),
        )

    def loss_at(power: int) -> float:
        if power not in losses:
            losses[power] = _loss_after(partial(training_at, power), with_teacher=teacher is not None)
            if on_try is not None:
                on_try(len(losses), _MOST_TRIES)
        return losses[power]

    best = _lowest(losses, loss_at)
    if not math.isfinite(losses[best]):
        rates = ", ".join(f"{first * _FACTOR**power:g}" for power in sorted(losses))
        raise TrainingError(f"learning_rate: auto: the loss ran off at every rate tried ({rates}); give a rate")
    figures = ((first * _FACTOR**power, loss if math.isfinite(loss) else None) for power, loss in losses.items())
    return RangeTest(
        learning_rate=usual_rate(num_steps, optimization.optimizer) * _FACTOR ** (best + _vertex(losses, best)),
        tried=[{"learning_rate": rate, "loss": loss} for rate, loss in figures],
        num_tokens=tokens * len(losses),
        seconds=time.perf_counter() - started,
    )


def _lowest(losses: dict[int, float], loss_at: Callable[[int], float]) -> int:
    """The power whose loss is lowest, from 0 upwards or downwards as long as that helps; each try is in `losses`."""
    best = 0
    for direction in (1, -1):
        while len(losses) < _MOST_TRIES and loss_at(best) > loss_at(best + direction):
            best += direction
        if best > 0:
            break  # upwards it got better, so downwards it does not
    return best


def _loss_after(training: Callable[[], TrainingMetrics], *, with_teacher: bool) -> float:
    """A try's loss on selection text: KL to the teacher, or cross-entropy without one; infinite where it ran off."""
    try:
        metrics = training()
    except (NotFiniteError, DivergedError):  # what else stops a training stops the search
        return math.inf
    loss = metrics.selection_kl if with_teacher else metrics.selection_loss
    return math.inf if loss is None or not math.isfinite(loss) else loss


def usual_rate(num_steps: int, optimizer: str = "adamw") -> float:
    """The rate that the search starts from, for a training of that length."""
    return _first_rate(optimizer) * float((num_steps / _steps_of_a_try(num_steps)) ** GROWTH[optimizer])


def _first_rate(optimizer: str) -> float:
    return FIRST_RATE * _HIGHER.get(optimizer, 1.0)


def _steps_of_a_try(num_steps: int) -> int:
    return min(num_steps, MOST_STEPS, max(FEWEST_STEPS, round(SHARE * num_steps)))


def _vertex(losses: dict[int, float], best: int) -> float:
    """Where the parabola through the best try and its two neighbours is lowest, from the best, within half a step."""
    low, middle, high = (losses.get(power, math.inf) for power in (best - 1, best, best + 1))
    bend = low - 2 * middle + high
    if not math.isfinite(bend) or bend <= 0:
        return 0.0
    return max(-0.5, min(0.5, (low - high) / (2 * bend)))
