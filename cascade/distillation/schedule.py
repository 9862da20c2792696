"""The learning rate as a pure function of the step."""

import math


def cosine_schedule(step: int, *, num_steps: int, warmup_steps: int, final_fraction: float) -> float:
    """Factor on the peak rate, in [0, 1]: linear warm-up from 0, then a half cosine down to `final_fraction`."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
