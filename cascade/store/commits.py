"""The run directory: stage keys, and outputs that appear whole or not at all.

A stage writes into a staging folder beside its final place; every file in it and every folder is synced, a manifest
with the size and sha256 of each file is added, and the folder is renamed. A folder under its final name is therefore
always complete, also after the power has failed.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cascade.runtime.errors import DiskError, UserError, is_disk_error
from cascade.runtime.failpoints import failpoint
from cascade.runtime.files import file_sha256, make_folder, no_room, read_json, sync_file, sync_folder, write_atomically
from cascade.runtime.paths import inside

logger = logging.getLogger(__name__)

MANIFEST = "MANIFEST.json"

COST_FILE = "cost.json"

INCOMPLETE = "incomplete.json"
"""In a stage's folder: what of it failed, and is tried again by the next run."""

_OLD_KEYS = {"stage", "key", "settings", "inputs", "made_with", "threads", "torch", "member", "files"}

_OWN_SHA256, _REPLACED = "sha256", ".replaced-"

_VOLATILE = (COST_FILE, "log.jsonl", "lm_eval.json", "skipped.json", "heldout_blocks.json")
"""Files with times and dates, which differ from run to run, and files that no later stage reads: kept out of a stage's
digest."""


def stage_key(stage: str, stage_format: int, settings: dict[str, Any], inputs: dict[str, str]) -> str:
    """What a stage's output depends on, as a sha256: its settings, its inputs' digests, its format number."""
    record = {"stage": stage, "format": stage_format, "settings": settings, "inputs": inputs}
    return hashlib.sha256(json.dumps(record, sort_keys=True, default=str).encode()).hexdigest()


def is_committed(folder: Path) -> bool:
    """Whether the folder holds all the files of its manifest, at their sizes (contents: `verify_folder`)."""
    try:
        return all((folder / name).stat().st_size == entry["size"] for name, entry in read_manifest(folder).items())
    except (OSError, ValueError):
        return False


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """The size and sha256 of each file of a committed folder, by name.

    Raises:
        OSError: the folder has no manifest.
        ValueError: the manifest is not as it was written, or names files outside of the folder.
    """
    manifest = read_json(folder / MANIFEST)
    try:
        # Manifests that were written before they had a sha256 of their own have these keys at most.
        sha256 = None if manifest.keys() <= _OLD_KEYS else manifest.pop(_OWN_SHA256)
        files = manifest["files"]
        outside = [name for name in files if not inside(name)]
        whole = all(isinstance(entry["size"], int) and isinstance(entry["sha256"], str) for entry in files.values())
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / MANIFEST}: is no manifest") from error
    if (sha256 is not None and sha256 != _text_sha256(_manifest_text(manifest))) or outside or not whole:
        raise ValueError(f"{folder / MANIFEST}: is not as it was written")
    entries: dict[str, dict[str, Any]] = files
    return entries


def verify_folder(folder: Path) -> list[str]:
    """Names of files whose content is not what was committed; empty where the folder is undamaged."""
    try:
        files = read_manifest(folder)
    except (OSError, ValueError):
        return [MANIFEST]
    return [
        name
        for name, entry in files.items()
        if not (folder / name).is_file() or file_sha256(folder / name) != entry["sha256"]
    ]


def added_weights(folder: Path) -> list[str]:
    """Names of weights, and indices of weights, that lie in a committed folder but not in its manifest.

    Whoever loads the folder would load them.
    """
    files = read_manifest(folder)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors*"))
    return [name for name in names if name not in files]


def output_digest(folder: Path) -> str:
    """sha256 over the contents of the committed files but `_VOLATILE`, for the keys of later stages."""
    files = read_manifest(folder)
    lines = [f"{name}:{entry['sha256']}" for name, entry in sorted(files.items()) if Path(name).name not in _VOLATILE]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@contextmanager
def staged(
    final: Path, provenance: dict[str, Any], *, carry: Callable[[Path, Path], object] | None = None
) -> Iterator[Path]:
    """A folder to write into that becomes `final` when the block ends well, and vanishes when it does not.

    An older folder of that name is replaced in one step, so a reader never finds half of either. `carry(older,
    newer)` brings over the files that are not the run's own, before the older folder goes.

    Raises:
        DiskError: the disk is full; the staging folder is removed, and an older folder stays as it was.
    """
    staging = final.parent / f".staging-{final.name}-{os.getpid()}"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        make_folder(staging)
        failpoint("store.begun")
        yield staging
        failpoint("store.written")
        _write_manifest(staging, provenance)
        failpoint("store.manifest")
        if carry is not None and final.is_dir():
            carry(final, staging)
        _replace_folder(staging, final)
    except BaseException as error:
        held = _held(staging)
        shutil.rmtree(staging, ignore_errors=True)
        if is_disk_error(error) and not isinstance(error, DiskError):
            raise DiskError(no_room(final, error, held)) from error
        raise


def take_over(source: Path, final: Path) -> bool:
    """Put a committed folder of another run at `final`, by links where the disk has them; whether that could be done.

    Both places then name the same files; runs never change a committed file, they replace whole folders.
    """
    if not source.is_dir() or (source / INCOMPLETE).exists() or verify_folder(source) or added_weights(source):
        return False
    staging = final.parent / f".staging-{final.name}-{os.getpid()}"
    shutil.rmtree(staging, ignore_errors=True)
    make_folder(final.parent)
    try:
        shutil.copytree(source, staging, copy_function=_link)
        for folder in (staging, *(path for path in staging.rglob("*") if path.is_dir())):
            sync_folder(folder)
        _replace_folder(staging, final)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return True


def _link(source: str, place: str) -> None:
    try:
        os.link(source, place)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, place)
        sync_file(Path(place))


def partial_of(staging: Path) -> Path:
    """The folder beside a stage's staging folder in which a stage leaves what its next attempt goes on from."""
    name = staging.name.removeprefix(".staging-").rpartition("-")[0]
    return staging.with_name(f".partial-{name}")


def drop_partials(final: Path, *, any_key: bool = False) -> None:
    """Remove what unfinished attempts at a stage have left; with `any_key` also those with other settings or inputs."""
    name = final.name.rpartition("-")[0]
    for leftover in final.parent.glob(f".partial-{name}-*" if any_key else f".partial-{final.name}"):
        if leftover.name.rpartition("-")[0] == f".partial-{name}":  # not of `evaluate-quantised` for `evaluate`
            shutil.rmtree(leftover, ignore_errors=True)


def sweep(run_folder: Path) -> None:
    """Clean up after killed runs: half-written folders go, and a folder that was being replaced comes back."""
    for leftover in run_folder.glob("**/.staging-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for old in run_folder.glob(f"**/{_REPLACED}*"):
        final = old.with_name(old.name.removeprefix(_REPLACED))
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(final)
    for folder in (run_folder, run_folder / "stages"):
        for leftover in folder.glob(".*.*-[0-9]*"):
            if leftover.is_file():  # of write_atomically
                leftover.unlink(missing_ok=True)


def require_empty(folder: Path) -> Path:
    """The place of a new folder with its links followed; refuses places that would fail at the end, after hours.

    Raises:
        UserError: something is there, a disk is mounted there, the command runs there, or nothing can be written.
    """
    try:
        place = folder.resolve()
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise UserError(f"--output {folder}: there is something there already; give a new folder")
        if place.is_dir() and (place.is_mount() or place == Path.cwd()):
            why = "a disk is mounted there" if place.is_mount() else "the command runs there"
            raise UserError(f"--output {folder}: {why}; give a new folder in it")
        make_folder(place.parent)
        with tempfile.TemporaryFile(dir=place.parent):
            return place
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written to: {error.strerror or error}") from error


def _write_manifest(folder: Path, provenance: dict[str, Any]) -> None:
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            sync_file(path)
            name = path.relative_to(folder).as_posix()
            files[name] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
        else:
            sync_folder(path)
    failpoint("store.synced")
    _write_files(folder, files, provenance)


def seal(folder: Path, names: Iterable[str], provenance: dict[str, Any]) -> None:
    """Write a manifest of files that lie side by side in a folder, each of which was replaced in one step."""
    files = {}
    for name in sorted(set(names) - {MANIFEST}):
        path = folder / name
        if path.is_file():
            files[name] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
    _write_files(folder, files, provenance)


def _write_files(folder: Path, files: dict[str, Any], provenance: dict[str, Any]) -> None:
    # In the form in which JSON gives it back, so that the sha256 is of the text that a reader sees.
    manifest = json.loads(json.dumps(provenance | {"files": files}, default=str))
    whole = {_OWN_SHA256: _text_sha256(_manifest_text(manifest))} | manifest
    write_atomically(folder / MANIFEST, json.dumps(whole, indent=1))


def _manifest_text(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, sort_keys=True)


def _text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _replace_folder(staging: Path, final: Path) -> None:
    old = final.with_name(f"{_REPLACED}{final.name}")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
        failpoint("store.aside")
    os.rename(staging, final)
    failpoint("store.renamed")
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)
    failpoint("store.committed")


def _held(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0
