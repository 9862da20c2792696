"""Training logs of a run's members, for the curves."""

import json
from pathlib import Path


def training_logs(run_folder: Path) -> dict[str, list[dict[str, float]]]:
    """Each published member's training log, found through its cascade.json."""
    logs = {}
    for path in sorted(run_folder.glob("members/*/cascade.json")):
        lineage = json.loads(path.read_text(encoding="utf-8"))
        log = (
            run_folder
            / lineage["stages"]["quantised" if "quantised" in lineage else "distilled"]["folder"]
            / "log.jsonl"
        )
        if log.is_file():
            logs[path.parent.name] = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return logs
