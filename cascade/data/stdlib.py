"""The Python standard library's own source as training text: real, and on every machine with Python.

Files are split by *top-level module* (``email/parser.py`` goes wherever ``email`` goes), so that no package has
one file in training and another in held-out. Which split a module belongs to is a pure function of its
name, the same in every Python version; the held-out text itself is shipped frozen (``evaluation/items.py``).
"""

import gzip
import hashlib
import json
import sysconfig
from pathlib import Path

from cascade.runtime.errors import UserError

EXCLUDED = frozenset(
    "test tests idlelib lib2to3 distutils tkinter turtledemo pydoc_data ensurepip encodings "
    "site-packages dist-packages __pycache__ __phello__".split()
)
"""Folders left out: tests, bundled applications, and `encodings`, whose 122 files are near copies."""

FROZEN_HELDOUT = Path(__file__).parent / "stdlib_heldout.jsonl.gz"

# Chosen once so that each split has enough text from unrelated modules (see `split_of_module`).
SPLIT_SALT = "b"


def stdlib_documents(root: Path | None = None) -> list[tuple[str, str]]:
    """(path relative to the library, text) of every source file, in sorted order.

    Raises:
        UserError: the library has no readable sources (a zipped or stripped installation).
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if any(part in EXCLUDED or part.startswith("config-") for part in parts):
            continue
        if parts[-1].startswith("_sysconfigdata"):  # differs from machine to machine
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip():
            documents.append(("/".join(parts), text))
    if len(documents) < 50:
        raise UserError(
            f"data.source: stdlib: only {len(documents)} source files under {root}; this Python has no standard "
            "library sources (zipped or stripped installation). Use a Python with its .py files, or give "
            "data.source: files with text of your own."
        )
    return documents


def split_of_module(document_path: str) -> str:
    """'train', 'calibration', 'selection' or 'heldout', from the top-level module's name alone.

    Private twins go with their public module (``_pydecimal`` with ``decimal``), as they are near copies.
    """
    module = document_path.split("/")[0].removesuffix(".py").lstrip("_").removeprefix("py")
    bucket = int(hashlib.sha256((SPLIT_SALT + module).encode()).hexdigest(), 16) % 100
    if bucket < 6:
        return "heldout"
    if bucket < 9:
        return "selection"
    return "calibration" if bucket < 12 else "train"


def frozen_heldout() -> list[str]:
    """The held-out documents, shipped with the package, so that figures do not depend on the Python version."""
    with gzip.open(FROZEN_HELDOUT, "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]
