"""Training logs of a run's members, for the curves."""

import json
from pathlib import Path

from cascade.runtime.files import read_json


def training_logs(run_folder: Path) -> dict[str, list[dict[str, float]]]:
    """Each published member's training log, found through its cascade.json."""
    logs = {}
    for path in sorted(run_folder.glob("members/*/cascade.json")):
        lineage = read_json(path)
        log = (
            run_folder
            / lineage["stages"]["quantised" if "quantised" in lineage else "distilled"]["folder"]
            / "log.jsonl"
        )
        if log.is_file():
            lines = (_entry(line) for line in log.read_text(encoding="utf-8", errors="replace").splitlines())
            logs[path.parent.name] = [entry for entry in lines if entry]
    return logs


def _entry(line: str) -> dict[str, float]:
    """The figures of one step; empty where a full disk cut the line off."""
    try:
        figures = json.loads(line)
    except ValueError:
        return {}
    return figures if isinstance(figures, dict) else {}
