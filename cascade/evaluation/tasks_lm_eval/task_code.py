"""Tasks whose files could run code (`!function`, metrics from elsewhere).

They run only with the permission of whoever starts the run, which a recipe cannot ask for, in a process of their own,
whose environment holds no keys.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade.models.checkpoint.revision import COMMIT
from cascade.runtime.errors import RunError, UserError
from cascade.runtime.files import read_json
from cascade.runtime.secrets import without_secrets
from cascade.store.strict_yaml import read_yaml

_KEYS = {
    "dataset_kwargs", "dataset_name", "dataset_path", "description", "doc_to_choice", "doc_to_decontamination_query",
    "doc_to_target", "doc_to_text", "fewshot_config", "fewshot_delimiter", "fewshot_split", "filter_list",
    "gen_prefix", "generation_kwargs", "include", "metadata", "metric_list", "num_fewshot", "output_type", "repeats",
    "should_decontaminate", "tag", "target_delimiter", "task", "task_alias", "test_split", "training_split",
    "validation_split",
}  # fmt: skip
DATA_BUILDERS = {"arrow", "csv", "json", "parquet", "text"}
_DATASET_KEYS = {"column_names", "data_dir", "data_files", "delimiter", "encoding", "field", "revision", "sep"}
_ON_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

_FUNCTION = re.compile(r"!\s*function\b|!<function>|!!python|tag:yaml\.org,2002:python")


@dataclass(frozen=True)
class CodeTask:
    """A task file that may run code."""

    path: Path
    why: str = ""
    """What in it could run code."""

    def digest(self) -> str:
        """sha256 of the file and of all that lies beside and below it: code, and the data that it reads."""
        digest = hashlib.sha256()
        paths = [path for path in self.path.parent.rglob("*") if path.is_file() and path.suffix != ".pyc"]
        for path in [self.path, *sorted(paths)]:
            digest.update(path.read_bytes())
        return digest.hexdigest()


def read_task(path: Path, metrics: Sequence[str]) -> dict[str, Any] | CodeTask:
    """A task file's content where it is data alone, with none but these `metrics`; else the task to measure apart.

    Raises:
        UserError: the file is no task file.
    """
    if _FUNCTION.search(path.read_text(encoding="utf-8", errors="replace")):
        why = "names Python functions of its own (!function)"
    else:
        config: dict[str, Any] = read_yaml(path).data
        why = _reason(config, metrics)
        if not why:
            return config
    return CodeTask(path, why)


def require_allowed(tasks: Sequence[object], allow_code: bool) -> None:
    """Refuse tasks that could run code, where that is not allowed.

    Raises:
        UserError: with the first of them.
    """
    for task in tasks:
        if isinstance(task, CodeTask) and not allow_code:
            raise UserError(
                f"{task.path}: {task.why}: code from elsewhere could run on this machine. Read what it names; if you "
                "trust it, give --allow-task-code"
            )


def _reason(config: dict[str, Any], metrics: Sequence[str]) -> str:
    """Why a task without functions is not data alone; '' where it is.

    lm-eval looks for a metric that it does not know, and datasets for a builder, on the hub and among Python files.
    """
    unknown = sorted(str(name) for name in config.keys() - _KEYS)
    if unknown:
        return f"has the key {unknown[0]!r}, which is none of a task that is data alone ({', '.join(sorted(_KEYS))})"
    listed = config.get("metric_list") or []
    for metric in listed if isinstance(listed, list) else [listed]:
        name = metric.get("metric") if isinstance(metric, dict) else metric
        if name not in metrics or (isinstance(metric, dict) and metric.get("hf_evaluate")):
            return f"names the metric {name!r}, which is not one of lm-eval's own ({', '.join(metrics)})"
    arguments = config.get("dataset_kwargs") or {}
    unknown_arguments = (
        sorted(str(name) for name in arguments.keys() - _DATASET_KEYS) if isinstance(arguments, dict) else ["?"]
    )
    if unknown_arguments:
        return f"has dataset_kwargs: {unknown_arguments[0]!r} (known: {', '.join(sorted(_DATASET_KEYS))})"
    path = config.get("dataset_path")
    if path is None or path in DATA_BUILDERS:
        return ""
    if not _ON_HUB.fullmatch(str(path)):
        return f"has dataset_path: {path!r}, neither {', '.join(sorted(DATA_BUILDERS))} nor a dataset on the hub"
    if not COMMIT.fullmatch(str(arguments.get("revision") or "")):
        return f"reads {path} from the hub without dataset_kwargs: {{revision: COMMIT}} (40 hexadecimal digits)"
    return ""


def measure_apart(task: CodeTask, request: dict[str, Any]) -> dict[str, Any]:
    """{'metrics', 'items', 'raw'} of one task, from a process without this one's keys.

    Raises:
        RunError: it failed; with the end of what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        whole_request = request | {"path": str(task.path), "answer": str(answer)}
        done = subprocess.run(
            [sys.executable, "-m", "cascade.evaluation.tasks_lm_eval.task_process"],
            input=json.dumps(whole_request), text=True, encoding="utf-8",
            errors="replace",
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=without_secrets(dict(os.environ)),
        )  # fmt: skip
        if done.returncode or not answer.is_file():
            raise RunError(f"{task.path}: its process ended with {done.returncode}:\n{done.stderr[-2000:]}")
        result: dict[str, Any] = read_json(answer)
    return result
