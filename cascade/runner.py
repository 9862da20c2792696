"""Runs a stage, or finds that it was already run: the same stage, settings and inputs are the same output."""

import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from cascade import __version__, parallel
from cascade.carrying import carry_over
from cascade.errors import UserError
from cascade.events import append_event
from cascade.failpoints import at
from cascade.forcing import Forced
from cascade.progress import OnStep, RunProgress
from cascade.store import (
    COST_FILE,
    INCOMPLETE,
    added_weights,
    drop_partials,
    stage_key,
    staged,
    take_over,
    verify_folder,
)

logger = logging.getLogger(__name__)

STAGES = ("statistics", "prune", "repair", "label", "distill", "quantise", "evaluate", "report")
"""A member's stages in order, as --from takes them."""

STAGE_FORMATS = {
    "pretrain": 1,
    "fit": 2,
    "convert": 1,
    "generate": 2,
    "framing": 1,
    "data": 2,
    "statistics": 3,
    "candidate": 2,
    "finalist": 2,
    "init": 1,
    "prune": 3,
    "repair": 2,
    "label": 1,
    "rate": 1,
    "ce-rate": 1,
    "distill": 2,
    "evaluate": 3,
    "drift": 1,
    "baseline-ce": 3,
    "heldout-cut": 3,
    "heldout-repaired": 3,
    "heldout-ce": 3,
    "quantise": 1,
    "evaluate-quantised": 2,
}
"""Raised by hand when what a stage writes changes its meaning; older outputs are then made again."""

_TOGETHER = ("statistics", "label", "rate", "distill", "ce-rate", "baseline-ce")
"""Stages that several processes make together; the others are the first one's."""

_SEVERAL = ("candidate", "finalist", "quantise", "evaluate-quantised")
"""Stages that a member can have several of, with a key each."""

_READ_BY_USERS = ("generate",)
"""Stages whose folder is given to users to work with: what they changed in it is not lost where it is made again."""

_DONE, _JOIN = 0, 1

_MADE_WITH = {
    "init": "prune",
    "candidate": "prune",
    "finalist": "prune",
    "rate": "distill",
    "ce-rate": "distill",
    "baseline-ce": "distill",
    "drift": "evaluate",
    "heldout-cut": "evaluate",
    "heldout-repaired": "evaluate",
    "heldout-ce": "evaluate",
    "evaluate-quantised": "evaluate",
}


@dataclass(frozen=True)
class StageRunner:
    """Where stages are committed, and which are to be made again."""

    folder: Path
    progress: RunProgress
    forced: Forced | None = None
    """What is made again though it is there."""
    incomplete: list[str] = field(default_factory=list)
    """What could not be measured; all else goes on, and the next run tries it again."""
    known: Sequence[Path] = ()
    """Other run directories: a stage that they have finished with the same inputs and settings is taken over."""

    def run(
        self,
        member: str,
        stage: str,
        settings: Any,
        inputs: dict[str, str],
        make: Callable[[Path, OnStep], None],
        *,
        label: str = "",
    ) -> Path:
        """The committed folder of a stage: as an earlier run left it, or made now by `make(folder, on_step)`.

        `label` names the folder where it is not the member's own (statistics are the seed's).
        """
        key = stage_key(stage, STAGE_FORMATS[stage], settings, inputs)
        final = self.folder / "stages" / f"{label or member}.{stage}-{key[:16]}"
        if parallel.rank() > 0:
            return self._follow(final, make)
        forced = self.forced if self._is_forced(member, stage, final.name) else None
        if forced is None and not final.exists():
            self._take_over(final, member, stage)
        if forced is None and self._is_whole(final, member, stage):
            drop_partials(final)  # a death right after the commit has left them
            parallel.tell(_DONE)
            self.progress.skip(member, stage, "already done with the same inputs and settings")
            append_event(self.folder, "skipped", member=member, stage=stage, key=key)
            return final
        provenance = {
            "stage": stage,
            "key": key,
            "settings": settings,
            "inputs": inputs,
            "made_with": _versions(),
        }
        if forced is not None and forced.begin(final.name):
            drop_partials(final)
        together = stage in _TOGETHER
        if together:
            parallel.tell(_JOIN)
        place = staged(final, provenance, carry=carry_over if stage in _READ_BY_USERS else None)
        with at(stage), self.progress.stage(member, stage) as on_step, place as staging:
            started = time.perf_counter()
            with nullcontext() if together else parallel.alone():
                make(staging, on_step)
            cost = read_cost(staging) | {"seconds": time.perf_counter() - started}
            (staging / COST_FILE).write_text(json.dumps(cost), encoding="utf-8")
        if (final / INCOMPLETE).exists():
            failed = json.loads((final / INCOMPLETE).read_text(encoding="utf-8"))
            self.incomplete.extend(f"{member}: {name}: {why.splitlines()[0]}" for name, why in failed.items())
            append_event(self.folder, "incomplete", member=member, stage=stage, failed=sorted(failed))
        else:
            drop_partials(final, others=stage not in _SEVERAL)
        if forced is not None:
            forced.done(final.name)
        parallel.tell(_DONE)
        append_event(self.folder, "finished", member=member, stage=stage, key=key, seconds=round(cost["seconds"], 3))
        return final

    def _follow(self, final: Path, make: Callable[[Path, OnStep], None]) -> Path:
        """What a process other than the first does: wait, or take part and leave the writing to the first."""
        if parallel.told() == _JOIN:
            # Beside the first one's, so that both find the same training state; nothing in it is kept.
            staging = final.with_name(f".staging-{final.name}-{os.getpid()}r{parallel.rank()}")
            staging.mkdir()
            try:
                make(staging, lambda done, total: None)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
            parallel.told()
        return final

    def _take_over(self, final: Path, member: str, stage: str) -> None:
        """Have a stage's output as another run has made it: the folder's name is that of its inputs and settings."""
        for folder in self.known:
            if take_over(folder / "stages" / final.name, final):
                append_event(self.folder, "taken over", member=member, stage=stage, run=str(folder))
                return

    def _is_whole(self, final: Path, member: str, stage: str) -> bool:
        """Whether an earlier run left this output, and every byte of it is still as it was."""
        if not final.exists():
            return False
        damaged = verify_folder(final)
        if damaged:
            logger.warning("%s: damaged (%s); it is made again", final, ", ".join(damaged[:3]))
            append_event(self.folder, "damaged", member=member, stage=stage, files=damaged)
        added = [] if damaged else added_weights(final)
        if added:
            raise UserError(f"{final / added[0]}: no run has written this, and it would be loaded; remove it")
        return not damaged and not (final / INCOMPLETE).exists()

    def _is_forced(self, member: str, stage: str, name: str) -> bool:
        if self.forced is None or member not in self.forced.members or name in self.forced.made:
            return False
        stage = _MADE_WITH.get(stage, stage)
        return stage in STAGES and STAGES.index(stage) >= STAGES.index(self.forced.stage)


def read_cost(folder: Path) -> dict[str, Any]:
    """A stage's cost.json; empty where it has none."""
    path = folder / COST_FILE
    cost: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return cost


def _versions() -> dict[str, Any]:
    """What the bits may depend on, for the record: not part of any key."""
    return {
        "cascade": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "process": os.getpid(),
        # bitwise: the same bits with as many threads; seeded: the same random numbers, sums in any order.
        "determinism": "seeded" if torch.cuda.is_available() else "bitwise",
    }
