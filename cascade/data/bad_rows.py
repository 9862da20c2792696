"""Rows that cannot be used: counted and named with file and line, and left out as long as they are few."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from cascade.data.rows import Place
from cascade.runtime.errors import UserError

logger = logging.getLogger(__name__)

NAMED = 1000
"""A record names at most so many bad rows by file and line, and counts all."""

_LEAST_ROWS = 200
"""Fewest rows that a share is taken of where only the start of the files was read."""


_sentences: set[str] = set()


def tell_once(log: logging.Logger, sentence: str) -> None:
    """Log a warning once a process, as every stage reads the data again and finds the same."""
    if sentence not in _sentences:
        _sentences.add(sentence)
        log.warning("%s", sentence)


@dataclass
class BadRows:
    """Counts the rows that were read and those left out. A file may be read again; no row counts twice."""

    policy: str = "skip"
    """'skip' or 'stop', as `data.bad_rows`"""
    most: float = 0.01
    """The largest share that is left out, as `data.max_bad_rows`"""
    recipe: bool = True
    """Whether messages may name a recipe's keys"""
    last_row: dict[str, int] = field(default_factory=dict)
    """By file: the number of the last row that was read"""
    num_empty: dict[str, int] = field(default_factory=dict)
    """By file: texts without a letter, which say nothing and do no harm"""
    reasons: dict[str, dict[int, tuple[str, str]]] = field(default_factory=dict)
    """By file and row: (unit of its place, why it was left out)"""
    num_told: int = 0
    """Rows left out at the last warning"""

    def read(self, place: Place, *, empty: bool = False) -> None:
        """Count a row that was read."""
        if place.number > self.last_row.get(place.file, 0):
            self.last_row[place.file] = place.number
            if empty:
                self.num_empty[place.file] = self.num_empty.get(place.file, 0) + 1

    def skip(self, place: Place, reason: str, *, key: str = "data") -> None:
        """Leave a row out.

        Raises:
            UserError: the recipe says to stop.
        """
        if self.policy == "stop":
            raise UserError(
                f"{key}: {place}: {reason}. Mend or remove the row; with data.bad_rows: skip it is left out and counted"
            )
        self.reasons.setdefault(place.file, {})[place.number] = (place.unit, reason)

    def require_few(
        self, files: Iterable[str], *, key: str = "data", whole: bool = True, share: float | None = None
    ) -> None:
        """Refuse files of which too many rows were left out; `whole`: they were read to their ends.

        The share is that of the rows that were read, where no other is given.

        Raises:
            UserError: the share is above `most`.
        """
        names = list(dict.fromkeys(files))
        bad = sum(len(self.reasons.get(name, {})) for name in names)
        rows = sum(self.last_row.get(name, 0) for name in names)
        if bad == 0:
            return
        share = bad / max(rows, 1 if whole else _LEAST_ROWS) if share is None else share
        first = self.named(names)[0]
        complaint = f"{key}: {bad:,} of {rows:,} rows cannot be used, the first: {first['place']}: {first['reason']}"
        if share > self.most:
            allows, more = (
                ("data.max_bad_rows allows", ", or raise data.max_bad_rows to leave them out")
                if self.recipe
                else ("a command leaves out at most", "")
            )
            raise UserError(
                f"{complaint}. That is {share:.1%}, and {allows} {self.most:.1%}; mend or remove these rows{more}"
            )
        count = sum(map(len, self.reasons.values()))
        if count > self.num_told:
            tell_once(logger, f"{complaint}; left out")
            self.num_told = count

    def named(self, files: Iterable[str] | None = None) -> list[dict[str, str]]:
        """{'place', 'reason'} of each row that was left out, in the order of the files."""
        names = list(self.reasons) if files is None else [name for name in files if name in self.reasons]
        return [
            {"place": str(Place(name, number, unit)), "reason": reason}
            for name in names
            for number, (unit, reason) in sorted(self.reasons[name].items())
        ]

    def record(self) -> dict[str, Any]:
        """{'rows', 'skipped', 'empty', 'named'} for a report: counts, and the first rows by file and line."""
        named = self.named()
        return {
            "rows": sum(self.last_row.values()),
            "skipped": len(named),
            "empty": sum(self.num_empty.values()),
            "named": named[:NAMED],
        }

    def state(self) -> dict[str, Any]:
        """The counts as a JSON value, for `restore`."""
        reasons = {name: [[number, *reason] for number, reason in rows.items()] for name, rows in self.reasons.items()}
        return {"last_row": self.last_row, "num_empty": self.num_empty, "reasons": reasons}

    def restore(self, state: dict[str, Any]) -> None:
        """Add the counts that an earlier process kept with `state`."""
        for name, number in state["last_row"].items():
            self.last_row[name] = max(number, self.last_row.get(name, 0))
        for name, count in state["num_empty"].items():
            self.num_empty[name] = max(count, self.num_empty.get(name, 0))
        for name, rows in state["reasons"].items():
            known = self.reasons.setdefault(name, {})
            known |= {number: (unit, reason) for number, unit, reason in rows}
