"""For `cascade cache`: what a cache's folder holds, whether it is undamaged, and making room in it."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cascade.runtime.errors import UserError
from cascade.runtime.files import read_json
from cascade.teacher.targets.index import INDEX_SUFFIX, shard_path
from cascade.teacher.targets.shards import ROOT_FILE, Windows, damaged_shards, root_name
from cascade.teacher.targets.usage import usage

_LEFT_OVER_AFTER = 3600.0
"""Seconds after which a file that was being written has no writer any more."""


def roots_in(folder: Path, prefixes: Sequence[str] = ()) -> list[Path]:
    """The roots' folders, by name; where `prefixes` are given, those whose names begin with one of them.

    Raises:
        UserError: the folder is not there, or no root's name begins with one of the prefixes.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; nothing was kept there yet, or give another --folder")
    roots = sorted(path.parent for path in folder.glob(f"*/{ROOT_FILE}") if _is_root(path.parent))
    for prefix in prefixes:
        if not any(path.name.startswith(prefix) for path in roots):
            raise UserError(f"--root {prefix}: no root in {folder} begins so; known: {_names(roots)}")
    return [path for path in roots if not prefixes or path.name.startswith(tuple(prefixes))]


def describe(root: Path) -> dict[str, Any]:
    """A root's teacher, form, windows, bytes and use, without reading any record; unreadable shards are counted."""
    windows = Windows(root, root_name(root)).refresh()
    record, used = _record(root), usage(root)
    shards = list(root.glob("*.safetensors"))
    return {
        "root": root.name,
        "model_type": record.get("model_type"),
        "weights": str(record.get("weights", ""))[:16],
        "targets": record.get("targets"),
        "windows": len(windows),
        "shards": len(shards),
        "unreadable_shards": len(windows.passed_over),
        "bytes": windows.num_bytes(),
        "windows_asked": used["asked"],
        "hit_rate": (used["asked"] - used["made"]) / used["asked"] if used["asked"] else None,
        "last_used": used["last"] or None,
    }


def damage(root: Path) -> dict[str, Any]:
    """{'record', 'shards', 'windows'}: what is wrong with a root's own record, its files and its windows.

    Every byte of every shard is read, and no index is believed.
    """
    windows = Windows(root, root_name(root), from_shards=True).refresh()
    broken = [key.hex() for key in windows.keys() if windows.read(key) is None]
    record = [] if root_name(root)[:16] == root.name else [f"{root / ROOT_FILE} is not what the folder is named after"]
    shards = sorted({*damaged_shards(root), *windows.passed_over})
    return {"record": record, "shards": [path.name for path in shards], "windows": broken}


def remove_roots(roots: Sequence[Path]) -> int:
    """Remove whole roots; returns the bytes that this freed."""
    freed = 0
    for root in roots:
        freed += sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
        shutil.rmtree(root)
    return freed


def remove_damaged(root: Path) -> int:
    """Remove damaged and foreign shards, their indexes, and what dead writers have left; returns the bytes freed."""
    old = time.time() - _LEFT_OVER_AFTER
    leftovers = [path for path in root.glob(".*") if path.is_file() and path.stat().st_mtime < old]
    freed = 0
    foreign = Windows(root, root_name(root), from_shards=True).refresh().passed_over
    shards = {*damaged_shards(root), *foreign}
    indexes = [
        path for path in root.glob(f"*{INDEX_SUFFIX}") if shard_path(path) in shards or not shard_path(path).exists()
    ]
    for path in {*shards, *indexes, *leftovers}:
        freed += path.stat().st_size
        path.unlink(missing_ok=True)
    return freed


def to_fit(roots: Sequence[Path], max_bytes: float) -> list[Path]:
    """The roots to remove, longest unused first, so that the others take at most so many bytes."""
    sizes = {root: Windows(root, "").num_bytes() for root in roots}
    held, removed = sum(sizes.values()), []
    for root in sorted(roots, key=lambda root: usage(root)["last"]):
        if held <= max_bytes:
            break
        removed.append(root)
        held -= sizes[root]
    return removed


def unused_since(roots: Sequence[Path], days: float) -> list[Path]:
    """The roots that no training has read for so many days."""
    return [root for root in roots if usage(root)["last"] < time.time() - 86_400 * days]


def _is_root(folder: Path) -> bool:
    """Whether a folder is one of ours: nothing else is ever removed."""
    named = len(folder.name) == 16 and all(sign in "0123456789abcdef" for sign in folder.name)
    return named and not folder.is_symlink() and {"format", "weights", "targets"} <= _record(folder).keys()


def _record(root: Path) -> dict[str, Any]:
    try:
        record = read_json(root / ROOT_FILE)
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _names(roots: Sequence[Path]) -> str:
    return ", ".join(path.name for path in roots) or "none"
