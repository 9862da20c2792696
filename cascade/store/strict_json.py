"""Strict JSON files: no NaN, nothing that only Python can read."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Write a value as strict JSON; `plain` turns what JSON lacks into what it has."""
    path.write_text(json.dumps(plain(value), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def plain(value: Any) -> Any:
    """The value in JSON's types: lm-eval's results also hold arrays, functions, dataclasses and NaN (null here)."""
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str | int | bool) or value is None:
        return value
    return plain(asdict(value)) if hasattr(value, "__dataclass_fields__") else str(value)
