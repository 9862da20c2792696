"""Files that a user put into a folder that a run writes again: all are carried over into the new folder.

The folder's manifest lists the files that the run wrote. All other files are the user's and keep their places; a file
of the run that somebody has changed stays beside the new one, under another name. On a card the user's words come
first.
"""

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from cascade.runtime.files import file_sha256, sync_file, sync_folder
from cascade.store.commits import MANIFEST, read_manifest

logger = logging.getLogger(__name__)

CARD, NEW_CARD = "README.md", "README.new.md"
"""The card, which users may edit, and the name of the new card beside an edited one."""

_BEFORE = ".before"


def carry_over(earlier: Path, staging: Path) -> list[str]:
    """Bring the user's files of `earlier` into `staging`, which will replace it; returns their places in `staging`.

    To be called once the manifest of `staging` is written: files that are carried over are no part of it.
    """
    written = _written(earlier)
    carried = []
    renames: dict[Path, Path] = {}
    # The card first, whose successor moves, then what keeps its name, so that no other is given it.
    late = {name for name in _names(earlier) if name in (NEW_CARD, *written) or (staging / name).exists()}
    for name in sorted(_names(earlier), key=lambda name: (name != CARD, name in late)):
        source = earlier / name
        place = _folder_of(staging, name, renames) / source.name
        if source.is_dir() and not source.is_symlink():
            _as_folder(place, renames).mkdir(parents=True, exist_ok=True)
            continue
        is_run_file = name in written
        if is_run_file and _sha256(source) == written[name]:
            continue
        if name == NEW_CARD and _sha256(source) == written.get(CARD):
            continue  # the new card of an earlier time
        if not place.exists() and not is_run_file:
            target = place
        elif place.is_file() and _sha256(source) == file_sha256(place):
            continue
        elif name == CARD and place.exists():
            os.replace(place, staging / NEW_CARD)
            target = place
            logger.warning("%s: was written on and stays; the new card is %s beside it", earlier / name, NEW_CARD)
        else:
            target = free_name(place)
            logger.warning(
                "%s: is not as it was written; it stays as %s beside the new one", earlier / name, target.name
            )
        _bring(source, target)
        carried.append(target.relative_to(staging).as_posix())
    for folder in (staging, *(path for path in staging.rglob("*") if path.is_dir() and not path.is_symlink())):
        sync_folder(folder)
    return carried


def free_name(path: Path, suffix: str = _BEFORE) -> Path:
    """A free name beside a file: with the suffix, numbered from the second on.

    Weights lose the ending by which they would be loaded.
    """
    name = path.name.replace(".safetensors", ".weights") + suffix
    number, place = 1, path.with_name(name)
    while place.exists() or place.is_symlink():
        number += 1
        place = path.with_name(f"{name}-{number}")
    return place


def _names(folder: Path) -> Iterator[str]:
    """Relative paths of all files and folders below a folder, a folder before its content; links are not followed."""
    for root, folders, files in os.walk(folder):
        for name in sorted([*folders, *files]):
            relative = (Path(root) / name).relative_to(folder).as_posix()
            if relative != MANIFEST:
                yield relative


def _folder_of(staging: Path, name: str, renames: dict[Path, Path]) -> Path:
    """Where in `staging` the folder of a file goes."""
    place = staging
    for part in Path(name).parts[:-1]:
        place = _as_folder(place / part, renames)
    return place


def _as_folder(place: Path, renames: dict[Path, Path]) -> Path:
    """A folder's place; where the run has a file of that name, one beside it, noted in `renames`."""
    return renames.setdefault(place, free_name(place)) if place.is_file() else place


def _written(folder: Path) -> dict[str, str]:
    """File -> sha256 as the run wrote it; empty where there is no manifest, so that every file may be the user's."""
    try:
        return {name: str(entry["sha256"]) for name, entry in read_manifest(folder).items()}
    except (OSError, ValueError):
        return {}


def _sha256(path: Path) -> str:
    return file_sha256(path) if path.is_file() else ""


def _bring(source: Path, place: Path) -> None:
    """Put a file, or a link as it is, into a second place: by a hard link where the disk has hard links."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if source.is_symlink():
        place.symlink_to(source.readlink())
        return
    try:
        os.link(source, place)
    except OSError:
        shutil.copy2(source, place)
        sync_file(place)
