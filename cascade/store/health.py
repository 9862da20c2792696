"""What a training's log tells of its health: steps left out, a loss that climbs, gradients that are zero."""

from collections.abc import Sequence

FIRST = 10
"""Steps whose mean loss the later ones are compared with."""
CLIMBED = 2.0
"""Times that mean."""
LONG = 20
"""So many steps in a row make a divergence."""


def findings(log: Sequence[dict[str, float]]) -> list[str]:
    """What is wrong in a training's log, in words; empty: nothing. Entries as `distill` writes them."""
    found = []
    skipped = sum("skipped" in entry for entry in log)
    if skipped:
        found.append(f"{skipped} of {len(log)} steps were left out: losses or gradients were not finite")
    trained = [entry for entry in log if "loss" in entry]
    since = diverged(trained)
    if since is not None:
        found.append(f"the loss has climbed to over {CLIMBED:g} times its first {FIRST} steps' from step {since} on")
    lost = [entry["step"] for entry in log if entry.get("not_finite")]
    if lost:
        found.append(f"{len(lost)} entries, the first at step {lost[0]:.0f}, had other figures that were not finite")
    dead = max((entry.get("zero_matrices", 0.0) for entry in log), default=0.0)
    if dead:
        found.append(f"{dead:.0f} weight matrices were all zero before the first step: nothing flows through them")
    still = sum(entry.get("grad_norm", 1.0) == 0.0 and entry["loss"] > 0.0 for entry in trained)
    if still:
        found.append(f"{still} steps had gradients that are all zero: nothing was learned in them")
    return found


def diverged(log: Sequence[dict[str, float]]) -> int | None:
    """The step from which on the loss stays high to the end of the log, for `LONG` steps or more."""
    trained = [entry for entry in log if "loss" in entry and not entry.get("on_policy")]
    if len(trained) < FIRST + LONG:
        return None
    limit = CLIMBED * sum(entry["loss"] for entry in trained[:FIRST]) / FIRST
    last = 0
    for entry in reversed(trained):
        if entry["loss"] <= limit:
            break
        last += 1
    return int(trained[-last]["step"]) if last >= LONG else None
