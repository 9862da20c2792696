"""A training's log: a line of JSON per step, and a function that is called with each entry."""

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from cascade.runtime import ranks
from cascade.runtime.failpoints import failpoint
from cascade.store.events import append_line
from cascade.store.health import findings

logger = logging.getLogger(__name__)


class TrainingLog:
    """A log's file and its listener; of several processes the first one writes."""

    def __init__(self, path: Path | None, on_log: Callable[[dict[str, float]], None] | None) -> None:
        self.path, self.on_log = path, on_log
        self.failed = False

    def add(self, entry: dict[str, float], *, show: bool = True) -> None:
        """Add a step's entry; a file that cannot be written is warned about once, and the training goes on."""
        if ranks.rank() > 0:
            return
        if self.path is not None:
            try:
                failpoint("distill.log")
                append_line(self.path, json.dumps(entry), sync=False)
            except OSError as error:
                if not self.failed:
                    logger.warning("%s: the training goes on without its log: %s", self.path, error)
                self.failed = True
        if show and self.on_log is not None:
            self.on_log(entry)

    def close(self, curve: Sequence[dict[str, float]]) -> None:
        """Warn of troubles that the whole log shows; a file that has lost entries is written again if that works."""
        if self.failed:
            self.again(curve)
        for finding in findings(curve) if ranks.rank() == 0 else []:
            logger.warning("%s%s", f"{self.path}: " if self.path else "", finding)

    def again(self, curve: Sequence[dict[str, float]]) -> None:
        """Write the file anew with these entries, of a training that goes on from a state."""
        if self.path is not None and ranks.rank() == 0:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)
        for entry in curve:
            self.add(entry, show=False)
