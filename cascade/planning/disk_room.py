"""Room: what a member takes in a run directory, what a run has still to write there, the machine's memory."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

from cascade.planning.family import ResolvedMember
from cascade.store.lock import require_room

MARGIN = 1.1
"""Factor on the counted bytes, for manifests, statistics and evaluations, which come on top of the weights."""


def bytes_still_needed(run_folder: Path, members: Sequence[ResolvedMember]) -> int:
    """Bytes that unpublished members will still take: their total, less the weights that their stages hold already.

    One member trains at a time, so of the training states only the largest counts.
    """
    missing = _unpublished(run_folder, members)
    if not missing:
        return 0
    most = sum(member.disk_bytes for member in missing) + max(member.state_bytes for member in missing)
    held = sum(_weight_bytes(run_folder, member.name) for member in missing)
    return max(0, math.ceil(MARGIN * most - held))


def require_room_for(run_folder: Path, members: Sequence[ResolvedMember]) -> None:
    """Refuse a run whose members will not fit on the disk.

    Raises:
        DiskError: less is free than the members still need.
    """
    names = ", ".join(member.name for member in _unpublished(run_folder, members))
    require_room(run_folder, bytes_still_needed(run_folder, members), f"the members {names}")


def memory_bytes() -> int | None:
    """Bytes of memory of the machine, or of the container where that has less; None where neither can be read."""
    try:
        held = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="utf-8").strip() if limit.exists() else "max"
    return min(held, int(text)) if text.isdigit() else held


def _unpublished(run_folder: Path, members: Sequence[ResolvedMember]) -> list[ResolvedMember]:
    return [member for member in members if not (run_folder / "members" / member.name).exists()]


def _weight_bytes(run_folder: Path, name: str) -> int:
    """Weights in the stages of a member, the finished ones and what another try goes on from."""
    folders = [folder for folder in run_folder.glob("stages/*") if _owner(folder) == name]
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*.safetensors"))


def _owner(stage_folder: Path) -> str:
    return stage_folder.name.removeprefix(".partial-").rpartition(".")[0]
