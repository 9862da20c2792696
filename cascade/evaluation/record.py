"""One metric of the held-out split, as family.json has it."""

from typing import Any


def heldout_record(name: str, value: float, stderr: float | None, count: int, *, higher: bool) -> dict[str, Any]:
    """A record without chance level and retention; `count` tokens or examples."""
    return {
        "task": "heldout",
        "metric": name,
        "filter": None,
        "value": value,
        "stderr": stderr,
        "n": count,
        "higher_is_better": higher,
        "chance": None,
        "num_fewshot": None,
        "limit": None,
        "retention": None,
        "retention_interval": None,
    }
