"""Copies of a run's own task files that any lm-eval reads: `lm_eval --include_path RUN/tasks`."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from cascade.evaluation.tasks_lm_eval.harness import find_tasks
from cascade.runtime.files import make_folder, write_atomically
from cascade.store.strict_yaml import write_yaml

TASKS = "tasks"
"""The folder of a run with them; it stays there, as it names places on this machine."""


def write_task_files(run_folder: Path, names: Sequence[str], task_folders: Sequence[Path]) -> None:
    """NAME.yaml of each task that is neither lm-eval's own nor code, its data by absolute paths.

    lm-eval looks for a task's data from where it is started, and not beside the task's file.
    """
    folder = run_folder / TASKS
    local = [task for task in find_tasks(names, task_folders) if isinstance(task, dict)]
    shutil.rmtree(folder, ignore_errors=True)
    if not local:
        return
    make_folder(folder)
    for task in local:
        write_atomically(folder / f"{task['task'].replace('/', '_')}.yaml", write_yaml(task))
