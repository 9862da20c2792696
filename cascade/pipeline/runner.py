"""Runs a stage, or takes the output of an earlier run with the same settings and inputs."""

import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from cascade import __version__
from cascade.pipeline.stage_output import Input, Made, committed, digest_of, read_cost
from cascade.runtime import ranks
from cascade.runtime.errors import UserError
from cascade.runtime.failpoints import at
from cascade.runtime.files import read_json
from cascade.runtime.permissions import NO_PERMISSIONS, Permissions
from cascade.runtime.progress import OnStep, RunProgress
from cascade.store.commits import (
    COST_FILE,
    INCOMPLETE,
    added_weights,
    drop_partials,
    stage_key,
    staged,
    take_over,
    verify_folder,
)
from cascade.store.events import append_event
from cascade.store.remake import Remake
from cascade.store.stage_table import REMAKE_POINTS, STAGES, Stage
from cascade.store.user_files import carry_over

logger = logging.getLogger(__name__)

_DONE, _JOIN = 0, 1

Write = Callable[[Path, OnStep], None]
"""Writes a stage's output into a folder, and reports progress as (steps done, all steps)."""


@dataclass(frozen=True)
class StageRunner:
    """Where stages are committed, and which are to be made again."""

    folder: Path
    progress: RunProgress
    forced: Remake | None = None
    """The stages to make again though their outputs are there."""
    incomplete: list[str] = field(default_factory=list)
    """Measurements that failed: the run goes on without them, and the next run makes them again."""
    known: Sequence[Path] = ()
    """Other run directories: their finished stages with the same inputs and settings are taken over."""
    permissions: Permissions = NO_PERMISSIONS
    """The permissions of the command, which no recipe can give."""

    def make(
        self,
        stage: str,
        owner: str,
        *,
        settings: Mapping[str, Any],
        inputs: Mapping[str, Input],
        write: Write,
        label: str = "",
    ) -> Made:
        """The output of a stage: that of an earlier run, or one made now by `write(folder, on_step)`.

        The output depends on `settings` and the digests of `inputs` alone. The folder is named after the stage's owner,
        or `label` (statistics belong to the model that a member is cut from).
        """
        digests = {name: digest_of(stage_input) for name, stage_input in inputs.items()}
        key = stage_key(stage, STAGES[stage].format, dict(settings), digests)
        final = self.folder / "stages" / f"{label or owner}.{stage}-{key[:16]}"
        if ranks.rank() > 0:
            self._follow(final, write)
            return committed(final)
        forced = self.forced if self._is_forced(owner, stage, final.name) else None
        if forced is None and not final.exists():
            self._take_over(final, owner, stage)
        if forced is None and self._is_whole(final, owner, stage):
            drop_partials(final)  # left by a process that died right after the commit
            ranks.send(_DONE)
            self.progress.skip(owner, stage, "already done with the same inputs and settings")
            append_event(self.folder, "skipped", member=owner, stage=stage, key=key)
            return committed(final)
        if forced is not None and forced.begin(final.name):
            drop_partials(final)
        depends_on = {"stage": stage, "key": key, "settings": settings, "inputs": digests}
        seconds = self._commit(final, owner, STAGES[stage], depends_on, write)
        self._note_incomplete(final, owner, stage)
        if forced is not None:
            forced.done(final.name)
        ranks.send(_DONE)
        append_event(self.folder, "finished", member=owner, stage=stage, key=key, seconds=round(seconds, 3))
        return committed(final)

    def _commit(self, final: Path, owner: str, stage: Stage, depends_on: dict[str, Any], write: Write) -> float:
        """Make a stage and commit it; returns the seconds that this took."""
        if stage.every_rank:
            ranks.send(_JOIN)
        provenance = depends_on | {"made_with": _versions()}
        place = staged(final, provenance, carry=carry_over if stage.read_by_users else None)
        with at(stage.name), self.progress.stage(owner, stage.name) as on_step, place as staging:
            started = time.perf_counter()
            with nullcontext() if stage.every_rank else ranks.alone():
                write(staging, on_step)
            cost = read_cost(staging) | {"seconds": time.perf_counter() - started}
            (staging / COST_FILE).write_text(json.dumps(cost), encoding="utf-8")
        return float(cost["seconds"])

    def _note_incomplete(self, final: Path, owner: str, stage: str) -> None:
        """Note which measurements of a stage failed; where none did, remove what unfinished attempts have left."""
        if not (final / INCOMPLETE).exists():
            drop_partials(final, any_key=not STAGES[stage].several)
            return
        failed = read_json(final / INCOMPLETE)
        self.incomplete.extend(f"{owner}: {name}: {reason.splitlines()[0]}" for name, reason in failed.items())
        append_event(self.folder, "incomplete", member=owner, stage=stage, failed=sorted(failed))

    def _follow(self, final: Path, write: Write) -> None:
        """The part of all processes but the first: wait, or take part in a stage whose output the first one writes."""
        if ranks.receive() == _JOIN:
            # Beside the first one's, so that both find the same training state; nothing in it is kept.
            staging = final.with_name(f".staging-{final.name}-{os.getpid()}r{ranks.rank()}")
            staging.mkdir()
            try:
                write(staging, lambda done, total: None)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
            ranks.receive()

    def _take_over(self, final: Path, owner: str, stage: str) -> None:
        """Take a stage's output from another run: a folder of this name has the same inputs and settings."""
        for folder in self.known:
            if take_over(folder / "stages" / final.name, final):
                append_event(self.folder, "taken over", member=owner, stage=stage, run=str(folder))
                return

    def _is_whole(self, final: Path, owner: str, stage: str) -> bool:
        """Whether an earlier run has left this output, undamaged and with nothing added or missing."""
        if not final.exists():
            return False
        damaged = verify_folder(final)
        if damaged:
            logger.warning("%s: damaged (%s); it is made again", final, ", ".join(damaged[:3]))
            append_event(self.folder, "damaged", member=owner, stage=stage, files=damaged)
        added = [] if damaged else added_weights(final)
        if added:
            raise UserError(f"{final / added[0]}: no run has written this, and it would be loaded; remove it")
        return not damaged and not (final / INCOMPLETE).exists()

    def _is_forced(self, owner: str, stage: str, name: str) -> bool:
        if self.forced is None or owner not in self.forced.members or name in self.forced.finished:
            return False
        point = STAGES[stage].remade_from
        return bool(point) and REMAKE_POINTS.index(point) >= REMAKE_POINTS.index(self.forced.stage)


def _versions() -> dict[str, Any]:
    """Versions and hardware that bits may depend on: recorded, and not part of any key."""
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
