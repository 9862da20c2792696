"""Tasks whose files name Python functions of their own (`!function`): only if this process was told to, and apart.

A permission belongs to the process, which the command line gives it to; a recipe cannot ask for it. The functions run
in a process of their own, whose environment holds no keys.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade.errors import RunError, UserError
from cascade.secrets import without_secrets

_FUNCTION = re.compile(r"!\s*function\b|!<function>|!!python|tag:yaml\.org,2002:python")

_allowed = False


@dataclass(frozen=True)
class CodeTask:
    """A task file that names functions."""

    path: Path

    def digest(self) -> str:
        """sha256 of the file and of all that lies beside and below it: code, and the data that it reads."""
        digest = hashlib.sha256()
        others = [path for path in self.path.parent.rglob("*") if path.is_file() and path.suffix != ".pyc"]
        for path in [self.path, *sorted(others)]:
            digest.update(path.read_bytes())
        return digest.hexdigest()


def allow() -> None:
    """From now on this process runs such tasks."""
    global _allowed
    _allowed = True


def holds_code(path: Path) -> bool:
    """Whether a task file names functions."""
    return _FUNCTION.search(path.read_text(errors="replace")) is not None


def code_task(path: Path) -> CodeTask:
    """The task of a file that names functions.

    Raises:
        UserError: nobody has allowed that.
    """
    if not _allowed:
        raise UserError(
            f"{path}: names Python functions of its own (!function), which would run on this machine. Read them; if "
            "you trust them, give --allow-task-code"
        )
    return CodeTask(path)


def measure_apart(task: CodeTask, request: dict[str, Any]) -> dict[str, Any]:
    """{'metrics', 'items', 'raw'} of one task, from a process without this one's keys.

    Raises:
        RunError: it failed; with the end of what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        asked = request | {"path": str(task.path), "answer": str(answer)}
        done = subprocess.run(
            [sys.executable, "-m", "cascade.evaluation.apart"], input=json.dumps(asked), text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=without_secrets(dict(os.environ)),
        )  # fmt: skip
        if done.returncode or not answer.is_file():
            raise RunError(f"{task.path}: its process ended with {done.returncode}:\n{done.stderr[-2000:]}")
        found: dict[str, Any] = json.loads(answer.read_text())
    return found
