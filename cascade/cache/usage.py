"""How often a root's windows were asked for and found, and what a cache's folder holds."""

import json
import time
from pathlib import Path
from typing import Any

from cascade.store import write_atomically

_FILE = "usage.json"


def note_usage(folder: Path, *, asked: int, made: int) -> None:
    """Count windows that a training asked for, and those of them that had to be labelled."""
    before = usage(folder)
    counted = {"asked": before["asked"] + asked, "made": before["made"] + made, "last": round(time.time())}
    write_atomically(folder / _FILE, json.dumps(counted) + "\n")


def usage(folder: Path) -> dict[str, int]:
    """{'asked', 'made', 'last'}: windows, and when that was (seconds since 1970); zeros where nothing was noted."""
    try:
        found: dict[str, Any] = json.loads((folder / _FILE).read_text())
        return {name: int(found[name]) for name in ("asked", "made", "last")}
    except (OSError, ValueError, KeyError, TypeError):
        return {"asked": 0, "made": 0, "last": 0}
