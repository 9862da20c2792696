"""events.jsonl, the history of a run line by line, for its readers; no stage depends on it."""

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from cascade.runtime.failpoints import failpoint
from cascade.runtime.secrets import redact_all

logger = logging.getLogger(__name__)


def append_event(run_folder: Path, event: str, **fields: Any) -> None:
    """Append an event to events.jsonl; where it cannot be written, a warning says so and the run goes on."""
    record = {"time": round(time.time(), 3), "event": event} | redact_all(fields)
    try:
        failpoint("event.begun")
        append_line(run_folder / "events.jsonl", json.dumps(record))
    except OSError as error:
        logger.warning("%s: an event is not recorded: %s", run_folder / "events.jsonl", error)


def append_line(path: Path, line: str, *, sync: bool = True) -> None:
    """Append a line to a file and sync it; a line that a killed process has cut off is ended first."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else "\n" + line
        file.write(line.encode() + b"\n")
        file.flush()
        if sync:
            os.fsync(file.fileno())
