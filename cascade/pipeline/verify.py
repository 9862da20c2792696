"""`cascade verify`: compares a run directory, byte for byte, with the manifests of what was written."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cascade.models.checkpoint.safety import check_model_folder
from cascade.report.write import DERIVED
from cascade.runtime.errors import UserError
from cascade.runtime.files import read_json
from cascade.store.commits import INCOMPLETE, MANIFEST, added_weights, output_digest, verify_folder
from cascade.teacher.writing.answers import damaged_lines

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")


@dataclass(frozen=True)
class Fault:
    """A difference between a run directory and what was written into it."""

    place: str
    """Path inside the run directory."""
    what: str
    cure: str


def verify_run(run_folder: Path) -> tuple[int, list[Fault]]:
    """(number of files hashed, faults) of a run directory, over stages, training states, members, reports and events.

    Raises:
        UserError: the folder has no recipe.yaml.
    """
    if not (run_folder / "recipe.yaml").is_file():
        raise UserError(f"{run_folder}: no recipe.yaml; give a run directory, as `cascade run` prints it")
    faults: list[Fault] = []
    count = 0
    again = "run the same command again: it is made again from what is whole"
    for kind in ("stages", "members"):
        for folder in sorted((run_folder / kind).glob("[!.]*/")):
            folder_faults, files = _committed(folder, run_folder, again)
            faults += folder_faults
            count += files
    for folder in sorted((run_folder / "members").glob("[!.]*/")):
        faults += _member(folder, run_folder)
    for folder in sorted((run_folder / "stages").glob(".partial-*/step-*/")):
        folder_faults, files = _committed(folder, run_folder, "nothing: the state before it is taken")
        faults += folder_faults
        count += files
    if (run_folder / MANIFEST).exists():
        damaged = verify_folder(run_folder)
        for name in damaged:
            cure = f"`cascade report {run_folder}`" if name in DERIVED else again
            remedy = f"{again}; what it is now is set aside" if name == "recipe.yaml" else cure
            faults.append(Fault(name, "is not as the run left it", remedy))
        count += len(read_json(run_folder / MANIFEST).get("files", {})) if MANIFEST not in damaged else 0
    elif (run_folder / "family.json").exists():
        faults.append(Fault(MANIFEST, "is missing: a run ended while it wrote its reports", again))
    faults += _missing(run_folder, again)
    faults += _events(run_folder)
    for path in sorted(run_folder.glob("answers/**/answers.jsonl")):
        for number in damaged_lines(path):
            damage = "is not as it was written, or was cut off"
            faults.append(Fault(f"{_inside(path, run_folder)}:{number}", damage, "nothing: it is asked for again"))
    for pattern in _PICKLED:
        for path in sorted(run_folder.rglob(pattern)):
            faults.append(Fault(_inside(path, run_folder), "can hold code; no run writes such files", "remove it"))
    return count, faults


def _committed(folder: Path, run_folder: Path, cure: str) -> tuple[list[Fault], int]:
    damaged = verify_folder(folder)
    faults = [
        Fault(f"{_inside(folder, run_folder)}/{name}", _damage_of(folder / name), cure)
        for name in damaged
        if not (name == "README.md" and folder.parent.name == "members")  # a card may be written on
    ]
    if MANIFEST in damaged:
        return faults, 0
    files = read_json(folder / MANIFEST)["files"]
    if folder.parent.name != "members":  # `_member` looks at those
        damage = "is not of this stage, and would be loaded with it"
        faults += [
            Fault(f"{_inside(folder, run_folder)}/{name}", damage, "remove it") for name in added_weights(folder)
        ]
    if (folder / INCOMPLETE).exists() and INCOMPLETE not in damaged:
        missing = ", ".join(read_json(folder / INCOMPLETE))
        faults.append(Fault(_inside(folder, run_folder), f"not measured: {missing}", "run the same command again"))
    return faults, len(files)


def _damage_of(path: Path) -> str:
    if not path.exists():
        return "is missing"
    return "is not as it was written" if path.name == MANIFEST else "has another content than was written"


def _member(folder: Path, run_folder: Path) -> Iterator[Fault]:
    """Faults that a manifest cannot show: added files, an index that leads elsewhere, stages changed since."""
    try:
        known = read_json(folder / MANIFEST)["files"]
        lineage = read_json(folder / "cascade.json")
        stages = {stage["folder"]: stage["sha256"] for stage in lineage["stages"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # told already
    for path in sorted(folder.rglob("*.safetensors*")):
        if path.relative_to(folder).as_posix() not in known:
            yield Fault(_inside(path, run_folder), "is not of this member, and would be loaded with it", "remove it")
    try:
        check_model_folder(folder)
    except UserError as error:
        yield Fault(_inside(folder, run_folder), str(error), "run the same command again")
    for name, sha256 in stages.items():
        place = run_folder / name
        try:
            if not place.exists():
                yield Fault(name, "is missing; the member was made from it", "run it again")
                continue
            same = output_digest(place) == sha256
        except (OSError, ValueError):
            continue  # told already
        if not same:
            yield Fault(_inside(folder, run_folder), f"was not made from what {name} holds now", "run it again")


def _missing(run_folder: Path, cure: str) -> Iterator[Fault]:
    """Faults for members that family.json lists and that have no folder."""
    try:
        rows = read_json(run_folder / "family.json")["rows"]
        names = [row["name"] for row in rows if row["role"] == "member" and row["status"] == "done"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # none yet, or told already
    for name in names:
        if not (run_folder / "members" / name).is_dir():
            yield Fault(f"members/{name}", "is missing", cure)


def _events(run_folder: Path) -> Iterator[Fault]:
    path = run_folder / "events.jsonl"
    if not path.exists():
        return
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            json.loads(line)
        except ValueError:
            yield Fault(f"events.jsonl:{number}", "is no JSON: cut off or changed", "nothing: no stage depends on it")


def _inside(path: Path, run_folder: Path) -> str:
    return path.relative_to(run_folder).as_posix()
