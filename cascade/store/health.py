"""Signs of trouble in a training's log: steps left out, a loss that climbs, gradients that are zero."""

from collections.abc import Sequence

EARLY_STEPS = 10
"""Number of first steps whose mean loss later losses are compared with."""
HIGH_LOSS_FACTOR = 2.0
"""A loss above this multiple of its early mean counts as high."""
DIVERGED_STEPS = 20
"""Number of steps in a row with a high loss that count as divergence."""


def findings(log: Sequence[dict[str, float]]) -> list[str]:
    """A sentence for each problem in a training's log, whose entries are those that `distill` writes."""
    problems = []
    skipped = sum("skipped" in entry for entry in log)
    if skipped:
        problems.append(f"{skipped} of {len(log)} steps were left out: losses or gradients were not finite")
    trained = [entry for entry in log if "loss" in entry]
    since = diverged(trained)
    if since is not None:
        problems.append(
            f"the loss has climbed to over {HIGH_LOSS_FACTOR:g} times its first {EARLY_STEPS} steps' "
            f"from step {since} on"
        )
    lost = [entry["step"] for entry in log if entry.get("not_finite")]
    if lost:
        problems.append(f"{len(lost)} entries, the first at step {lost[0]:.0f}, had other figures that were not finite")
    dead = max((entry.get("zero_matrices", 0.0) for entry in log), default=0.0)
    if dead:
        problems.append(f"{dead:.0f} weight matrices were all zero before the first step: nothing flows through them")
    still = sum(entry.get("grad_norm", 1.0) == 0.0 and entry["loss"] > 0.0 for entry in trained)
    if still:
        problems.append(f"{still} steps had gradients that are all zero: nothing was learned in them")
    return problems


def diverged(log: Sequence[dict[str, float]]) -> int | None:
    """The step from which on the loss stays high to the end of the log; None for fewer than `DIVERGED_STEPS` steps.

    Steps on the student's own text do not count.
    """
    trained = [entry for entry in log if "loss" in entry and not entry.get("on_policy")]
    if len(trained) < EARLY_STEPS + DIVERGED_STEPS:
        return None
    limit = HIGH_LOSS_FACTOR * sum(entry["loss"] for entry in trained[:EARLY_STEPS]) / EARLY_STEPS
    num_high = 0
    for entry in reversed(trained):
        if entry["loss"] <= limit:
            break
        num_high += 1
    return int(trained[-num_high]["step"]) if num_high >= DIVERGED_STEPS else None
