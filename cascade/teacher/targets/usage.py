"""How often a root's windows were asked for and found, and when that was last."""

import json
import logging
import time
from pathlib import Path
from typing import Any

from cascade.runtime.files import write_atomically

logger = logging.getLogger(__name__)

_FILE = "usage.json"


def note_usage(folder: Path, *, asked: int, made: int) -> None:
    """Count windows that a training asked for, and those of them that had to be labelled; where that can be written."""
    before = usage(folder)
    counted = {"asked": before["asked"] + asked, "made": before["made"] + made, "last": round(time.time())}
    try:
        write_atomically(folder / _FILE, json.dumps(counted) + "\n")
    except OSError as error:
        logger.warning("%s: its use is not noted: %s", folder, error.strerror)


def usage(folder: Path) -> dict[str, int]:
    """{'asked', 'made', 'last'}: windows, and when it was last asked or written (seconds since 1970)."""
    try:
        found: dict[str, Any] = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        counted = {name: int(found[name]) for name in ("asked", "made", "last")}
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
