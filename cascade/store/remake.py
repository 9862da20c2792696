"""What --from asks for, until it is done: a run that stops meanwhile goes on with it, and does not begin it again."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cascade.runtime.files import make_folder, write_atomically

_FILE = "stages/from.json"


@dataclass
class Forced:
    """Stages to be made again though they are there."""

    path: Path
    stage: str
    """The first of them."""
    members: list[str]
    begun: list[str] = field(default_factory=list)
    """Names of stages' folders."""
    made: list[str] = field(default_factory=list)

    def begin(self, name: str) -> bool:
        """Note that a stage is begun; whether it is for the first time."""
        first = name not in self.begun
        if first:
            self.begun.append(name)
            self._write()
        return first

    def done(self, name: str) -> None:
        """Note that a stage is made."""
        self.made.append(name)
        self._write()

    def end(self) -> None:
        """All is made."""
        self.path.unlink(missing_ok=True)

    def _write(self) -> None:
        record = {name: value for name, value in vars(self).items() if name != "path"}
        write_atomically(self.path, json.dumps(record) + "\n")


def forced_stages(run_folder: Path, stage: str | None, members: Iterable[str]) -> Forced | None:
    """What is asked for, with what an earlier start that asked for the same has made of it; None without --from."""
    path, wanted = run_folder / _FILE, sorted(members)
    if stage is None:
        path.unlink(missing_ok=True)
        return None
    found = _read(path)
    if found is not None and (found.stage, found.members) == (stage, wanted):
        return found
    make_folder(path.parent)
    path.unlink(missing_ok=True)
    return Forced(path, stage, wanted)


def _read(path: Path) -> Forced | None:
    """None where there is no record, or none that can be read: then all is made again."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return Forced(path, str(record["stage"]), *(list(record[name]) for name in ("members", "begun", "made")))
    except (OSError, ValueError, KeyError, TypeError):
        return None
