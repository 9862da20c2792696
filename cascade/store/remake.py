"""The stages that --from makes again: a run that stops meanwhile goes on with them and does not start them anew."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cascade.runtime.files import make_folder, read_json, write_atomically

_FILE = "stages/from.json"


@dataclass
class Remake:
    """Stages that are made again although they are there; recorded in the run directory until all are made."""

    path: Path
    stage: str
    """The first stage that is made again, as --from names it."""
    members: list[str]
    started: list[str] = field(default_factory=list)
    """Names of the stage folders whose making was started."""
    finished: list[str] = field(default_factory=list)
    """Names of the stage folders that are made."""

    def begin(self, name: str) -> bool:
        """Note that the making of a stage starts; True where it starts for the first time."""
        first = name not in self.started
        if first:
            self.started.append(name)
            self._write()
        return first

    def done(self, name: str) -> None:
        """Note that a stage is made."""
        self.finished.append(name)
        self._write()

    def end(self) -> None:
        """Remove the record: all stages are made."""
        self.path.unlink(missing_ok=True)

    def _write(self) -> None:
        record = {"stage": self.stage, "members": self.members, "begun": self.started, "made": self.finished}
        write_atomically(self.path, json.dumps(record) + "\n")


def forced_stages(run_folder: Path, stage: str | None, members: Iterable[str]) -> Remake | None:
    """The stages that --from makes again, with those that an earlier start of it has made; None without --from."""
    path, names = run_folder / _FILE, sorted(members)
    if stage is None:
        path.unlink(missing_ok=True)
        return None
    earlier = _read(path)
    if earlier is not None and (earlier.stage, earlier.members) == (stage, names):
        return earlier
    make_folder(path.parent)
    path.unlink(missing_ok=True)
    return Remake(path, stage, names)


def _read(path: Path) -> Remake | None:
    """The record of an earlier start; None where there is none that can be read, and all is made again."""
    try:
        record = read_json(path)
        return Remake(path, str(record["stage"]), *(list(record[name]) for name in ("members", "begun", "made")))
    except (OSError, ValueError, KeyError, TypeError):
        return None
