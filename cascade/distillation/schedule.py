"""The learning rate as a pure function of the step."""

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Shares of the peak rate: linear warm-up from 0, then down to `final_fraction`."""

    kind: str = "cosine"
    """cosine: a half cosine from the warm-up's end on; wsd: the peak, then a linear decay over the last steps (warm-up,
    stable, decay: https://arxiv.org/abs/2404.06395)."""
    warmup_fraction: float = 0.05
    """Share of the steps."""
    final_fraction: float = 0.05
    decay_fraction: float = 0.2
    """wsd: share of the steps that decay."""

    def factor(self, step: int, num_steps: int) -> float:
        """The share of the peak rate at a step, in [0, 1].

        Raises:
            ValueError: an unknown kind.
        """
        if self.kind not in SCHEDULES:
            raise ValueError(f"unknown schedule '{self.kind}'; known: {', '.join(SCHEDULES)}")
        warmup_steps = round(self.warmup_fraction * num_steps)
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        left = SCHEDULES[self.kind](self, step, num_steps, warmup_steps)
        return self.final_fraction + (1 - self.final_fraction) * left


def cosine(schedule: Schedule, step: int, num_steps: int, warmup_steps: int) -> float:
    """A half cosine from 1 to 0 over all steps after the warm-up."""
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def wsd(schedule: Schedule, step: int, num_steps: int, warmup_steps: int) -> float:
    """1, then a straight line to 0 over the last steps."""
    decay_steps = max(1, min(round(schedule.decay_fraction * num_steps), num_steps - warmup_steps))
    return min(1.0, max(0.0, (num_steps - step) / decay_steps))


SCHEDULES: dict[str, Callable[[Schedule, int, int, int], float]] = {"cosine": cosine, "wsd": wsd}
"""By their name in a recipe: (schedule, step, number of steps, steps of warm-up) -> a share between 0 and 1."""
