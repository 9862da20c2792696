"""What a training does where a loss or a gradient is not finite: always before the optimizer's step."""

import json
import logging
import math
from pathlib import Path

from torch import Tensor, nn

from cascade.distillation import sharding
from cascade.distillation.options import Safekeeping
from cascade.distillation.training_log import TrainingLog
from cascade.distillation.training_state import Progress, States, Trained, load_state
from cascade.runtime import ranks
from cascade.runtime.errors import DivergedError, NotFiniteError
from cascade.runtime.files import make_folder, write_atomically
from cascade.store.health import DIVERGED_STEPS, EARLY_STEPS, HIGH_LOSS_FACTOR, diverged

logger = logging.getLogger(__name__)

RECORD = "not_finite.json"


def gradient_norm(trained: Trained, max_grad_norm: float) -> float:
    """The norm of a step's gradients, which are clipped to at most `max_grad_norm`."""
    clipped = nn.utils.clip_grad_norm_(trained.student.parameters(), max_grad_norm)
    return float(sharding.whole(clipped))


def is_finite(losses: dict[str, float]) -> bool:
    """Whether a step's `loss` and `grad_norm` are finite; other figures may be infinite."""
    return math.isfinite(losses["loss"]) and math.isfinite(losses["grad_norm"])


def finite_figures(entry: dict[str, float]) -> dict[str, float]:
    """A log's entry without figures that are not finite (on selection text, or a part of the loss).

    `not_finite` says how many were left out, where any were.
    """
    figures = {name: figure for name, figure in entry.items() if math.isfinite(figure)}
    lost = len(entry) - len(figures)
    return figures | ({"not_finite": float(lost)} if lost else {})


def require_no_divergence(progress: Progress) -> None:
    """Stop a training whose loss has climbed and stays high.

    Raises:
        DivergedError: the loss has climbed.
    """
    since = diverged(progress.curve) if progress.step % DIVERGED_STEPS == 0 else None
    if since is not None:
        raise DivergedError(
            f"step {progress.step}: the loss has been over {HIGH_LOSS_FACTOR:g} times its first {EARLY_STEPS} steps' "
            f"since step {since}. Try a lower learning_rate, or on_divergence: warn"
        )


def leave_out(
    progress: Progress,
    trained: Trained,
    safekeeping: Safekeeping,
    states: States | None,
    rows: Tensor,
    losses: dict[str, float],
    log: TrainingLog,
) -> Progress:
    """The progress to go on from after a step whose loss or gradient is not finite: the step is left out.

    Raises:
        NotFiniteError: the training is to stop; blocks and losses are in a file beside the training's states.
    """
    for parameter in trained.student.parameters():
        parameter.grad = None
    step = progress.step
    message = f"step {step}: loss {losses['loss']}, gradient norm {losses['grad_norm']}"
    if safekeeping.on_nan == "stop" or progress.skips >= safekeeping.max_skipped:
        place = _record(None if states is None else states.folder, progress, rows, losses)
        skips = f" after {progress.skips} that were left out" if progress.skips else ""
        raise NotFiniteError(
            f"{message}; stopped before the optimizer step{skips}. Blocks of this batch: {rows.tolist()}{place}. "
            "Try a lower learning_rate, look at those blocks, or on_nan: skip"
        )
    if safekeeping.on_nan == "rollback" and states is not None:
        earlier = load_state(states.folder, trained, progress.settings)
        if earlier is not None:
            logger.warning("%s; back to step %d, and steps up to this one are left out", message, earlier.step)
            earlier.left_out = sorted({*earlier.left_out, *range(earlier.step, step + 1)})
            earlier.skips = progress.skips + 1
            states.save(trained, earlier)
            log.again(earlier.curve)
            return earlier
    logger.warning("%s; the step is left out (%d of %d)", message, progress.skips + 1, safekeeping.max_skipped)
    progress.left_out = [*progress.left_out, step]
    progress.skips += 1
    return progress


def _record(state_folder: Path | None, progress: Progress, rows: Tensor, losses: dict[str, float]) -> str:
    """Write the step's blocks, losses and settings to `RECORD`; returns where, for the message."""
    if state_folder is None or ranks.rank() > 0:
        return ""
    make_folder(state_folder)
    figures = {name: repr(loss) for name, loss in losses.items()}
    record = {"step": progress.step, "blocks": rows.tolist(), "losses": figures, "settings": progress.settings}
    write_atomically(state_folder / RECORD, json.dumps(record, indent=1) + "\n")
    return f" (all figures: {state_folder / RECORD})"
