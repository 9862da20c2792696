"""How many windows trainings have asked a root for, how many of them had to be labelled, and the time of the last."""

import json
import logging
import time
from pathlib import Path
from typing import Any

from cascade.runtime.files import read_json, write_atomically

logger = logging.getLogger(__name__)

_FILE = "usage.json"


def note_usage(folder: Path, *, num_windows: int, num_labelled: int) -> None:
    """Count windows that a training asked for, and those of them that had to be labelled; a warning if it cannot."""
    before = usage(folder)
    added = {"asked": before["asked"] + num_windows, "made": before["made"] + num_labelled}
    counted = added | {"last": round(time.time())}
    try:
        write_atomically(folder / _FILE, json.dumps(counted) + "\n")
    except OSError as error:
        logger.warning("%s: its use is not noted: %s", folder, error.strerror)


def usage(folder: Path) -> dict[str, int]:
    """{'asked', 'made', 'last'}: windows asked for and labelled, and the last use or writing in seconds since 1970."""
    try:
        record: dict[str, Any] = read_json(folder / _FILE)
        counted = {name: int(record[name]) for name in ("asked", "made", "last")}
    except (OSError, ValueError, KeyError, TypeError):
        counted = {"asked": 0, "made": 0, "last": 0}
    return counted | {"last": max(counted["last"], _last_written(folder))}


def _last_written(folder: Path) -> int:
    times = []
    for path in folder.glob("*"):
        try:
            times.append(round(path.stat().st_mtime))
        except FileNotFoundError:  # removed meanwhile
            continue
    return max(times, default=0)
