"""The run directory: stage keys, outputs that appear whole or not at all, one writer at a time.

A stage writes into a staging folder beside its final place; the folder is synced, given a manifest with the size
and sha256 of every file, and renamed. A folder under its final name is therefore always complete.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cascade.errors import UserError

MANIFEST = "MANIFEST.json"

COST_FILE = "cost.json"

_VOLATILE = (COST_FILE, "log.jsonl", "lm_eval.json")
"""Files with times and dates, which differ from run to run: kept out of a stage's digest."""


def stage_key(stage: str, stage_format: int, settings: dict[str, Any], inputs: dict[str, str]) -> str:
    """What a stage's output depends on, as a sha256: its settings, its inputs' digests, its format number."""
    record = {"stage": stage, "format": stage_format, "settings": settings, "inputs": inputs}
    return hashlib.sha256(json.dumps(record, sort_keys=True, default=str).encode()).hexdigest()


def is_committed(folder: Path) -> bool:
    """Whether the folder holds all the files of its manifest, at their sizes (contents: `verify_folder`)."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return all((folder / name).stat().st_size == entry["size"] for name, entry in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def verify_folder(folder: Path) -> list[str]:
    """Names of files whose content is no longer what was committed (empty: all well)."""
    files = json.loads((folder / MANIFEST).read_text())["files"]
    return [
        name
        for name, entry in files.items()
        if not (folder / name).is_file() or _sha256(folder / name) != entry["sha256"]
    ]


def output_digest(folder: Path) -> str:
    """sha256 over the committed files' contents, but for those with times in them, for a later stage's key."""
    files = json.loads((folder / MANIFEST).read_text())["files"]
    lines = [f"{name}:{entry['sha256']}" for name, entry in sorted(files.items()) if Path(name).name not in _VOLATILE]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@contextmanager
def staged(final: Path, provenance: dict[str, Any]) -> Iterator[Path]:
    """A folder to write into that becomes `final` when the block ends well, and vanishes when it does not.

    An older folder of that name is replaced; there is no moment at which a reader finds half of one.
    """
    staging = final.parent / f".staging-{final.name}-{os.getpid()}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        _write_manifest(staging, provenance)
        _replace_folder(staging, final)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def partial_of(staging: Path) -> Path:
    """Beside a stage's staging folder: where it keeps what another try can go on from."""
    name = staging.name.removeprefix(".staging-").rpartition("-")[0]
    return staging.with_name(f".partial-{name}")


def drop_partials(final: Path) -> None:
    """Remove what tries of a stage have left beside its place, under whatever key."""
    stage = final.name.rpartition("-")[0]
    for leftover in final.parent.glob(f".partial-{stage}-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file in one step."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def append_event(run_folder: Path, event: str, **fields: Any) -> None:
    """One more line of events.jsonl."""
    record = {"time": round(time.time(), 3), "event": event} | fields
    with (run_folder / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


@contextmanager
def locked(run_folder: Path) -> Iterator[None]:
    """Hold the run directory against a second run; the kernel lets go when the holder dies.

    Raises:
        UserError: another run holds it.
    """
    run_folder.mkdir(parents=True, exist_ok=True)
    with (run_folder / ".cascade.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise UserError(
                f"{run_folder}: another run is writing here (process {file.read().strip() or 'unknown'}); "
                "wait for it, stop it, or give another --output"
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        for leftover in run_folder.glob("**/.staging-*"):  # of runs that were killed
            shutil.rmtree(leftover, ignore_errors=True)
        yield


def require_empty(folder: Path) -> None:
    """Refuse to write where something is.

    Raises:
        UserError: the path is a file or a folder with something in it.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"--output {folder}: there is something there already; give a new folder")


def _write_manifest(folder: Path, provenance: dict[str, Any]) -> None:
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
            name = path.relative_to(folder).as_posix()
            files[name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    write_atomically(folder / MANIFEST, json.dumps(provenance | {"files": files}, indent=1, default=str))
    _sync_folder(folder)


def _replace_folder(staging: Path, final: Path) -> None:
    if final.exists():
        old = final.parent / f".staging-old-{final.name}-{os.getpid()}"
        final.rename(old)
        staging.rename(final)
        shutil.rmtree(old)
    else:
        staging.rename(final)
    _sync_folder(final.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
