"""Tasks through lm-eval itself: the only file that imports it."""

import contextlib
import difflib
import logging
import math
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from cascade.errors import RunError, UserError
from cascade.evaluation.items import TASK_FOLDER
from cascade.yaml_reader import read_yaml


@dataclass(frozen=True)
class TaskResults:
    """What lm-eval measured."""

    metrics: list[dict[str, Any]]
    """One record per task, metric and filter, as in family.json."""
    items: dict[str, list[float]]
    """'task/metric/filter' -> the score of each item in order, for paired comparisons."""
    raw: dict[str, Any]
    """lm-eval's own result, without the samples."""


def find_tasks(names: Sequence[str], folders: Sequence[Path]) -> list[str | dict[str, Any]]:
    """What to hand lm-eval for each name: a task's config from a folder, or the name of one of its own tasks.

    The package's own tasks are always there. Paths of data files in a task file are relative to that file.

    Raises:
        UserError: nobody knows the name.
    """
    known: dict[str, Path] = {}
    for folder in (TASK_FOLDER, *folders):
        if not folder.is_dir():
            raise UserError(f"evaluate.task_folders: {folder}: no such folder")
        for path in sorted(folder.rglob("*.yaml")):
            named = re.search(r"^task: *['\"]?([^\s'\"#]+)", path.read_text(errors="replace"), flags=re.M)
            if named:
                known[named[1]] = path
    # Only what is asked for is read: another task's missing data must not stop this run.
    return [_local_task(known[name]) if name in known else _own_task(name, list(known)) for name in names]


def run_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    task_folders: Sequence[Path] = (),
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> TaskResults:
    """Evaluate with `lm_eval.simple_evaluate`.

    Raises:
        UserError: a task is unknown.
    """
    if not tasks:
        return TaskResults([], {}, {})
    configs = find_tasks(tasks, task_folders)
    with _quiet():
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        adapter = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=_context_length(model))
        raw: Any = simple_evaluate(
            model=adapter,
            tasks=configs,
            limit=limit,
            num_fewshot=num_fewshot,
            bootstrap_iters=0,
            log_samples=True,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            task_manager=_task_manager(configs),
        )
    samples = raw.pop("samples")
    metrics, items = [], {}
    for task, values in raw["results"].items():
        for key in list(values):
            metric, _, filter_name = key.partition(",")
            if not filter_name or metric.endswith("_stderr"):
                continue
            scores = _item_scores(samples.get(task, []), metric, filter_name)
            if scores and not math.isclose(sum(scores) / len(scores), values[key], rel_tol=1e-6, abs_tol=1e-9):
                scores = []  # the metric is no mean of its items' numbers (perplexity, for one)
            items[f"{task}/{metric}/{filter_name}"] = scores
            metrics.append(_record(raw, task, metric, filter_name, scores, samples.get(task, []), limit))
    return TaskResults(metrics, items, raw)


def _record(
    raw: dict[str, Any],
    task: str,
    metric: str,
    filter_name: str,
    scores: list[float],
    samples: list[Any],
    limit: Any,
) -> dict[str, Any]:
    values = raw["results"][task]
    higher = raw.get("higher_is_better", {}).get(task, {}).get(metric)
    return {
        "task": task,
        "metric": metric,
        "filter": filter_name,
        "value": _number(values[f"{metric},{filter_name}"]),
        "stderr": _standard_error(scores) if scores else _number(values.get(f"{metric}_stderr,{filter_name}")),
        "n": raw["n-samples"].get(task, {}).get("effective"),
        "higher_is_better": higher,
        "chance": _chance(raw["configs"].get(task, {}), metric, samples),
        "num_fewshot": raw.get("n-shot", {}).get(task),
        "limit": limit,
        "retention": None,
        "retention_interval": None,
    }


def _chance(config: dict[str, Any], metric: str, samples: list[Any]) -> float | None:
    """What guessing scores: one over the number of choices, 0 for an exact match; unknown for other metrics."""
    if metric.startswith("acc"):
        if config.get("output_type") == "multiple_choice" and samples:
            return sum(1 / max(1, len(sample["filtered_resps"])) for sample in samples) / len(samples)
        return 0.0
    return 0.0 if metric.startswith("exact_match") else None


def _item_scores(samples: list[Any], metric: str, filter_name: str) -> list[float]:
    """One number per item where the metric is a mean of such, else nothing."""
    chosen = [sample for sample in samples if sample.get("filter", filter_name) == filter_name]
    values = [sample.get(metric) for sample in sorted(chosen, key=lambda sample: int(sample["doc_id"]))]
    if all(isinstance(value, int | float) for value in values):
        return [float(value) for value in values]
    return []


def _standard_error(scores: list[float]) -> float | None:
    count = len(scores)
    if count < 2:
        return None
    mean = sum(scores) / count
    return float((sum((score - mean) ** 2 for score in scores) / (count * (count - 1))) ** 0.5)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and value == value else None


def _local_task(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = read_yaml(path).data
    if "include" in config:
        raise UserError(f"{path}: `include` is not supported here; write the task in one file")
    arguments = dict(config.get("dataset_kwargs") or {})
    files = arguments.get("data_files")
    if isinstance(files, dict):
        arguments["data_files"] = {split: _absolute(value, path) for split, value in files.items()}
    elif files:
        arguments["data_files"] = _absolute(files, path)
    return config | {"dataset_kwargs": arguments}


def _absolute(value: Any, path: Path) -> Any:
    if isinstance(value, list):
        return [_absolute(part, path) for part in value]
    file = Path(value) if Path(value).is_absolute() else (path.parent / value).resolve()
    if not file.is_file():
        raise UserError(f"{path}: its data file {value} is missing (looked at {file})")
    return str(file)


def _own_task(name: str, known: list[str]) -> str:
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    if name in manager.all_tasks:
        return name
    close = difflib.get_close_matches(name, [*known, *manager.all_tasks], n=3)
    hint = f"Did you mean {' or '.join(close)}? " if close else ""
    raise UserError(
        f"evaluate.tasks: unknown task '{name}'. {hint}In the package and the recipe's task folders: "
        f"{', '.join(sorted(known))}; besides, all of lm-eval's own."
    )


def _task_manager(configs: list[str | dict[str, Any]]) -> Any:
    from lm_eval.tasks import TaskManager

    # Indexing lm-eval's thousands of task files takes seconds; needed only when one of them is asked for.
    return TaskManager(include_defaults=any(isinstance(config, str) for config in configs))


def _context_length(model: Any) -> int:
    return int(getattr(model.config, "max_position_embeddings", None) or 2048)


@contextlib.contextmanager
def _quiet() -> Any:
    """lm-eval and datasets print bars and notices of their own; ours would drown."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets", "transformers", "httpx")]
    levels = [logger.level for logger in loggers]
    previous = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    captured = tempfile.TemporaryFile("w+", errors="replace")
    # Programs that lm-eval starts (git, for its version) write to the process's own stderr, not Python's.
    own_stderr = os.dup(2)
    try:
        os.dup2(captured.fileno(), 2)
        with contextlib.redirect_stderr(captured):
            yield
    except UserError:
        raise
    except Exception as error:
        captured.seek(0)
        raise RunError(f"lm-eval failed: {error}\n{captured.read()[-2000:]}") from error
    finally:
        os.dup2(own_stderr, 2)
        os.close(own_stderr)
        captured.close()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if previous is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = previous
