"""Whether this machine has what a run needs, checked before it starts."""

import importlib.metadata
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement

from cascade.planning.disk_room import memory_bytes
from cascade.recipe.schema import Recipe
from cascade.runtime.errors import DiskError, UserError
from cascade.runtime.files import write_atomically
from cascade.runtime.permissions import NO_PERMISSIONS, Permissions
from cascade.runtime.secrets import redact

DISTRIBUTION = "cascade-distill"
_LITTLE_DISK, _LITTLE_MEMORY = 5e9, 4e9
_HUB_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    status: Literal["ok", "warning", "fault"]
    said: str
    do: str = ""


def examine(recipe: Recipe | None, output: str | Path | None, permissions: Permissions = NO_PERMISSIONS) -> list[Check]:
    """Machine, versions, disk, accelerator, and what a recipe needs where one is given.

    The network is only asked for what the recipe names.
    """
    folder = Path(output or (recipe.output if recipe else "") or "runs")
    checks = [_machine(), *_memory(recipe, output), *_versions(), *_disk(folder), _accelerator(), _environment()]
    if recipe is not None:
        checks += [*_hub(recipe), *_recipe(recipe, output, permissions)]
    return checks


def _machine() -> Check:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    hardware = f"{platform.system()} {platform.machine()}, {cores} cores, torch uses {torch.get_num_threads()}"
    return Check("machine", "ok", f"{hardware}, Python {platform.python_version()}")


def _memory(recipe: Recipe | None, output: str | Path | None) -> Iterator[Check]:
    held = memory_bytes()
    if held is None:
        yield Check("memory", "warning", "cannot be told here")
    elif held < _LITTLE_MEMORY:
        yield Check("memory", "warning", f"{held / 1e9:.1f} GB", "enough for models of a few million parameters")
    else:
        yield Check("memory", "ok", f"{held / 1e9:.1f} GB")


def _versions() -> Iterator[Check]:
    """Each dependency of this package: its installed version against the required one."""
    for text in importlib.metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Check(requirement.name, "fault", "not installed", f"pip install '{text}'")
            continue
        if requirement.specifier.contains(version, prereleases=True):
            yield Check(requirement.name, "ok", version)
        else:
            answer = f"{version}; {requirement.specifier} is needed"
            yield Check(requirement.name, "fault", answer, f"pip install '{text}'")


def _disk(folder: Path) -> Iterator[Check]:
    """Room, and whether files can be made, synced and renamed where runs will be."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if _can_see(path))
    free = shutil.disk_usage(place).free
    status: Literal["ok", "warning"] = "ok" if free > _LITTLE_DISK else "warning"
    yield Check("disk", status, f"{free / 1e9:.1f} GB free at {place}")
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=".cascade-doctor-") as trial:
            started = time.perf_counter()
            write_atomically(Path(trial) / "a", "probe")
            Path(trial, "a").rename(Path(trial, "b"))
            took = time.perf_counter() - started
        yield Check("write, sync, rename", "ok", f"{took * 1000:.0f} ms at {place}")
    except (OSError, DiskError) as error:
        yield Check("write, sync, rename", "fault", f"{place}: {error}", "make room, or give an --output elsewhere")


def _can_see(folder: Path) -> bool:
    try:
        return folder.exists()
    except OSError:  # below a folder that is closed to us, or a name that is too long
        return False


def _accelerator() -> Check:
    import torch

    if not torch.cuda.is_available():
        built = f"; this torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else ""
        return Check("GPU", "ok", f"none{built}; the CPU is used, in float32")
    free, total = torch.cuda.mem_get_info()
    names = {torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())}
    devices = f"{torch.cuda.device_count()} x {', '.join(sorted(names))}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    return Check("GPU", "ok" if free > total / 2 else "warning", devices, "" if free > total / 2 else "see who uses it")


def _environment() -> Check:
    if os.environ.get("CASCADE_FAILPOINT"):
        return Check("environment", "fault", "CASCADE_FAILPOINT is set: runs would be made to fail", "unset it")
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    token = "a token is set" if os.environ.get("HF_TOKEN") else "no token"
    return Check("environment", "ok", f"hub {'offline (HF_HUB_OFFLINE)' if offline else 'allowed'}, {token}")


def _hub(recipe: Recipe) -> Iterator[Check]:
    """Whether what the recipe names is on the hub, or already here."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    named = [("model", recipe.parent.model, recipe.parent.revision)] if recipe.parent.revision else []
    if recipe.data.source == "hub":
        named.append(("dataset", recipe.data.dataset, recipe.data.revision))
    if not named:
        yield Check("hub", "ok", "not asked: the recipe names nothing there")
    for kind, name, revision in named:
        folder = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}" / "snapshots" / str(revision)
        if folder.is_dir():
            yield Check(f"{kind} {name}", "ok", f"in the cache: {folder}")
            continue
        try:
            HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=_HUB_TIMEOUT_SECONDS)
            yield Check(f"{kind} {name}", "ok", "on the hub")
        except OfflineModeIsEnabled:
            yield Check(f"{kind} {name}", "fault", "not in the cache, and the hub is switched off",
                        "unset HF_HUB_OFFLINE, or fetch it where there is a network and copy the cache")  # fmt: skip
        except Exception as error:  # the client's own errors are those of whichever HTTP library it uses
            first = (str(error).splitlines() or [type(error).__name__])[0]
            yield Check(f"{kind} {name}", "fault", redact(first), "is the name right, is it gated, is a token set?")


def _recipe(recipe: Recipe, output: str | Path | None, permissions: Permissions) -> Iterator[Check]:
    """What `cascade plan` finds, against this machine."""
    from cascade.planning.preview import preview

    try:
        plan: dict[str, Any] = preview(recipe, output, permissions)
    except UserError as error:
        yield Check("recipe", "fault", str(error), "mend that first")
        return
    yield Check("recipe", "ok", f"{len(plan['members'])} members; every check of `cascade plan` passes")
    most = max((member["peak_memory_bytes"] for member in plan["members"]), default=0)
    held = memory_bytes() or 0
    if most > held > 0:
        yield Check("memory for the recipe", "warning", f"about {most / 1e9:.1f} GB of {held / 1e9:.1f} GB",
                    "a smaller distill.microbatch_size, or gradient_checkpointing: true")  # fmt: skip
    else:
        yield Check("memory for the recipe", "ok", f"about {most / 1e9:.2f} GB of {held / 1e9:.1f} GB")
    needed, free = plan["disk_needed_bytes"], plan["disk_free_bytes"]
    enough = needed <= free
    answer = f"about {needed / 1e9:.2f} GB more, {free / 1e9:.1f} GB free"
    yield Check("disk for the recipe", "ok" if enough else "fault", answer, "" if enough else "make room")
