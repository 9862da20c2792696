"""The peak learning rate of one training, found by short trainings from the same start.

The best rate depends on how much a cut has left to recover: a rate that a damaged start needs spoils a well repaired
one. Each try is the whole schedule on a few steps, from the same start; the divergence on selection text decides.
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from cascade.distillation.options import Execution
from cascade.distillation.supervision import Lesson, Selection
from cascade.distillation.trainer import DEFAULT_EXECUTION, TrainingMetrics, distill
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
    """The rates that were tried, and the rate that follows from them."""

    learning_rate: float
    tried: list[dict[str, float | None]]
    """learning_rate and selection loss (KL to the teacher; cross-entropy without a teacher) of each try, in order;
    None stands for a loss that is not finite."""
    num_tokens: int
    """Tokens that all tries together were trained on."""
    seconds: float


def find_learning_rate(
    lesson: Lesson,
    *,
    num_tokens: int,
    execution: Execution = DEFAULT_EXECUTION,
    on_try: Callable[[int, int], None] | None = None,
) -> RangeTest:
    """The peak rate for a `distill` of the lesson over `num_tokens` tokens; the lesson's student is left as it is.

    Rates are doubled, or halved, as long as that helps; a parabola through the best and its neighbours (over the
    logarithm of the rate) gives the minimum. `optimization.learning_rate` and `ema_decay` have no part in it.
    `on_try(done, most)` is called after each try.

    Raises:
        TrainingError: the loss is finite at none of the rates that were tried.
    """
    started, optimization = time.perf_counter(), lesson.optimization
    step_tokens = optimization.batch_size * lesson.blocks.block_size
    num_steps = math.ceil(num_tokens / step_tokens)
    steps = _steps_of_a_try(num_steps)
    first = _first_rate(optimization.optimizer)
    execution = replace(execution, remember_teacher=True)
    losses: dict[int, float] = {}

    def training_at(power: int) -> TrainingMetrics:
        return distill(
            copy.deepcopy(lesson.student),
            lesson.teacher,
            lesson.blocks,
            num_tokens=steps * step_tokens,
            supervision=lesson.supervision,
            optimization=replace(optimization, learning_rate=first * _FACTOR**power, ema_decay=None),
            execution=execution,
            selection=Selection(blocks=lesson.selection, every=steps),
        )

    def loss_at(power: int) -> float:
        if power not in losses:
            losses[power] = _loss_after(partial(training_at, power), with_teacher=lesson.teacher is not None)
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
        num_tokens=steps * step_tokens * len(losses),
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
