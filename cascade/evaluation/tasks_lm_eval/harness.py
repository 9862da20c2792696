"""Tasks through lm-eval itself: the only file that imports it."""

import contextlib
import difflib
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from torch import nn

from cascade.evaluation.tasks_lm_eval.items import TASK_FOLDER
from cascade.evaluation.tasks_lm_eval.results import TaskResults, results_of
from cascade.evaluation.tasks_lm_eval.task_code import (
    DATA_BUILDERS,
    CodeTask,
    measure_apart,
    read_task,
    require_allowed,
)
from cascade.evaluation.tasks_lm_eval.task_options import HarnessOptions, TaskOptions
from cascade.models.architecture.positions import usable_context
from cascade.models.checkpoint.load import ModelSource
from cascade.report.records import metrics_of
from cascade.runtime.errors import DiskError, RunError, UserError, is_disk_error
from cascade.runtime.failpoints import at, failpoint
from cascade.runtime.files import make_folder, write_atomically
from cascade.runtime.retry_smaller import in_parts_that_fit
from cascade.store.strict_json import plain

logger = logging.getLogger(__name__)


Task = str | dict[str, Any] | CodeTask


def find_tasks(names: Sequence[str], folders: Sequence[Path]) -> list[Task]:
    """What to hand lm-eval for each name: a task's config from a folder, or the name of one of its own tasks.

    A task that could run code is found, too; `require_allowed` refuses it.

    The package's own tasks are always there. Paths of data files in a task file are relative to that file.

    Raises:
        UserError: nobody knows the name, or a task's file or data cannot be used.
    """
    known: dict[str, Path] = {}
    for folder in (TASK_FOLDER, *folders):
        if not folder.is_dir():
            raise UserError(f"evaluate.task_folders: {folder}: no such folder")
        for path in sorted(folder.rglob("*.yaml")):
            named = re.search(
                r"^task: *['\"]?([^\s'\"#]+)", path.read_text(errors="replace", encoding="utf-8"), flags=re.M
            )
            if named:
                known[named[1]] = path
    # Only what is asked for is read: another task's missing data must not stop this run.
    return [_local_task(known[name]) if name in known else _own_task(name, list(known)) for name in names]


def run_tasks(
    model: nn.Module, tokenizer: Any, tasks: TaskOptions, *, source: ModelSource | None = None
) -> TaskResults:
    """Evaluate with `lm_eval.simple_evaluate`, task by task: one that fails does not take the others with it.

    `source` is where tasks with code of their own find the model.

    Raises:
        UserError: a task is unknown, or may not run.
    """
    results = TaskResults([], {}, {})
    if tasks.names:
        _tell_suffix(tokenizer, model)
    found = find_tasks(tasks.names, tasks.folders)
    require_allowed(found, tasks.allow_code)
    for name, task in zip(tasks.names, found, strict=True):
        try:
            result = _task_result(name, task, model, tokenizer, source, tasks)
        except (DiskError, UserError):
            raise
        except RunError as error:
            logger.warning("%s: could not be measured; the other tasks are. %s", name, error)
            results.failed[name] = str(error)
            continue
        results.metrics.extend(metrics_of(result["metrics"]))
        results.items.update(result["items"])
        for key, value in result["raw"].items():
            if isinstance(value, dict) and isinstance(results.raw.get(key), dict):
                results.raw[key] = results.raw[key] | value
            else:
                results.raw.setdefault(key, value)
    return results


def _task_result(
    name: str, task: Task, model: nn.Module, tokenizer: Any, source: ModelSource | None, tasks: TaskOptions
) -> dict[str, Any]:
    """{'metrics', 'items', 'raw'} of one task, from the results' folder where it was measured before."""
    folder = tasks.results_folder
    path = None if folder is None else folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"
    saved = None if path is None else _saved_result(path)
    if saved is not None:
        return saved
    with at("task"):
        result = in_parts_that_fit(
            partial(_measure_task, task, model, tokenizer, source, tasks.harness),
            tasks.harness.batch_size,
            "evaluation",
        )
    if path is not None:
        make_folder(path.parent)
        text = json.dumps(result)
        write_atomically(path, f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")
    return result


def _tell_suffix(tokenizer: Any, model: Any) -> None:
    """Log, once a process, that lm-eval's contexts end with a token that the tokenizer writes behind each text."""
    ids = tokenizer("a", verbose=False)["input_ids"]
    suffix = ids[-1] if len(ids) > 1 and ids[-1] in tokenizer.all_special_ids else None
    if suffix is not None and model.can_generate():
        _tell_once(str(tokenizer.convert_ids_to_tokens(suffix)))


@lru_cache(maxsize=8)
def _tell_once(token: str) -> None:
    logger.warning(
        "the tokenizer writes '%s' behind every text, and lm-eval does so behind a task's contexts: a continuation is "
        "scored from its second token on, and with this token at its end; scores of tasks are the harness's as it is",
        token,
    )


def _saved_result(path: Path) -> dict[str, Any] | None:
    """What an earlier try has measured; None if there is nothing, or it is no longer what was written."""
    sha256, _, text = (
        path.read_text(encoding="utf-8", errors="replace").partition("\n") if path.exists() else ("", "", "")
    )
    if not sha256 or hashlib.sha256(text.encode()).hexdigest() != sha256:
        return None
    result: dict[str, Any] = json.loads(text)
    return result


def measure_code_task(model: nn.Module, tokenizer: Any, path: Path, options: HarnessOptions) -> dict[str, Any]:
    """{'metrics', 'items', 'raw'} of a task file with functions of its own, which are imported here."""
    from lm_eval.tasks._yaml_loader import load_yaml

    return asdict(_measure(model, tokenizer, _with_places(load_yaml(path), path), options))


def _measure_task(
    task: Task, model: nn.Module, tokenizer: Any, source: ModelSource | None, options: HarnessOptions, batch_size: int
) -> dict[str, Any]:
    """{'metrics', 'items', 'raw'} in JSON's own types."""
    options = replace(options, batch_size=batch_size)
    if not isinstance(task, CodeTask):
        result: dict[str, Any] = plain(asdict(_measure(model, tokenizer, task, options)))
        return result
    if source is None:
        raise UserError(f"{task.path}: brings code of its own; such tasks read a checkpoint from its folder")
    place = {"folder": str(source.folder), "reference": source.reference, "gguf_file": source.gguf_file}
    return measure_apart(task, place | {"options": asdict(options)})


def _measure(model: nn.Module, tokenizer: Any, config: str | dict[str, Any], options: HarnessOptions) -> TaskResults:
    limit, seed = options.limit, options.seed
    with _quiet():
        failpoint("begun")
        import lm_eval.utils
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        if isinstance(config, dict) or not isinstance(lm_eval.utils.env, ImmutableSandboxedEnvironment):
            lm_eval.utils.env = _sandboxed(lm_eval.utils.env)
        adapter = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size,
                       max_length=_context_length(model))  # fmt: skip
        raw: Any = simple_evaluate(
            model=adapter,
            tasks=[config],
            limit=limit,
            num_fewshot=options.num_fewshot,
            bootstrap_iters=0,
            log_samples=True,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            task_manager=_task_manager(config),
        )
    return results_of(_without_places(raw), limit)


def _without_places(raw: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's result with files and models by their names: members are published with it."""
    configs = {
        name: config | {"dataset_kwargs": _last_parts(config["dataset_kwargs"])}
        if "dataset_kwargs" in config
        else config
        for name, config in raw.get("configs", {}).items()
    }
    about = raw.get("config") or {}
    return raw | {"configs": configs, "config": about | {"model": _last_parts(about.get("model"))}}


def _last_parts(value: Any) -> Any:
    """The last part of each text that is a whole path."""
    if isinstance(value, dict):
        return {name: _last_parts(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_last_parts(part) for part in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _sandboxed(environment: Any) -> Any:
    """lm-eval's templates as templates: a task file's Jinja cannot reach Python's insides."""
    sandbox = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    sandbox.filters.update(environment.filters)
    return sandbox


def _local_task(path: Path) -> Task:
    import lm_eval.api.metrics  # noqa: F401
    from lm_eval.api.registry import metric_registry

    task = read_task(path, sorted(metric_registry))
    return task if isinstance(task, CodeTask) else _with_places(task, path)


def _with_places(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """A task whose data files are looked for beside its own file."""
    if "include" in config:
        raise UserError(f"{path}: `include` is not supported here; write the task in one file")
    arguments = dict(config.get("dataset_kwargs") or {})
    files, place = arguments.get("data_files"), arguments.get("data_dir")
    if place and not Path(str(place)).is_absolute() and config.get("dataset_path") in DATA_BUILDERS:
        raise UserError(
            f"{path}: dataset_kwargs.data_dir: {place} is looked for where lm-eval is started, not beside the task; "
            "name the files with data_files, or give the whole path"
        )
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


def measured_names(tasks: Sequence[Task]) -> set[str] | None:
    """'task/metric', with '/filter' where it has a name, of all that these tasks report; None where one hides that."""
    configs = _configs(tasks)
    if any("class" in config for config in configs) or any(isinstance(task, CodeTask) for task in tasks):
        return None
    return {f"{config.get('group') or config.get('task')}/{name}" for config in configs for name in _metrics_of(config)}


def require_datasets(tasks: Sequence[Task]) -> None:
    """Refuse tasks whose datasets are not on this machine while the hub may not be asked.

    Raises:
        UserError: with the first of them.
    """
    from datasets import config, load_dataset_builder

    if not config.HF_HUB_OFFLINE:
        return
    datasets: set[tuple[str, str]] = set()
    for task in _configs(tasks):
        path, name = str(task.get("dataset_path") or ""), str(task.get("dataset_name") or "")
        if not path or path in DATA_BUILDERS or (path, name) in datasets:
            continue
        datasets.add((path, name))
        try:
            with _quiet():
                load_dataset_builder(path, name or None, revision=(task.get("dataset_kwargs") or {}).get("revision"))
        except RunError as error:
            raise UserError(
                f"evaluate.tasks: {task.get('task')}: its dataset {path} {name} is not on this machine, and the hub is "
                "not asked (HF_HUB_OFFLINE is set); fetch it once where there is a network, or leave the task out"
            ) from error


def _configs(tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """The tasks' settings, groups with their own and those of all tasks in them; of tasks with code nothing."""
    configs = [task for task in tasks if isinstance(task, dict)]
    names = [task for task in tasks if isinstance(task, str)]
    index = builtin_tasks().task_index if names else {}
    for name in names:  # grows while it is read
        entry = index[name]
        if entry.cfg is None:  # a tag
            names += sorted(tagged for tagged, child in index.items() if name in child.tags and tagged not in names)
            continue
        config: dict[str, Any] = {"task": name} | dict(entry.cfg)
        configs.append(config)
        inside = config.get("task") if "group" in config else None
        children = inside if isinstance(inside, list) else []
        configs += [child for child in children if isinstance(child, dict) and "dataset_path" in child]
        names += [child for child in children if isinstance(child, str) and child in index and child not in names]
    return configs


def _metrics_of(config: dict[str, Any]) -> list[str]:
    from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY

    group = "group" in config
    metrics = config.get("aggregate_metric_list" if group else "metric_list")
    if metrics is None:
        metrics = [] if group else DEFAULT_METRIC_REGISTRY.get(config.get("output_type") or "generate_until", [])
    listed = metrics if isinstance(metrics, list) else [metrics]
    full_names = []
    for metric in listed:
        name = metric.get("metric") if isinstance(metric, dict) else metric
        filters = metric.get("filter_list") if group and isinstance(metric, dict) else config.get("filter_list")
        names = [filters] if isinstance(filters, str) else filters or ["none"]
        names = [str(entry.get("name")) if isinstance(entry, dict) else str(entry) for entry in names]
        full_names += [f"{name}" if entry == "none" else f"{name}/{entry}" for entry in names]
    return full_names


@lru_cache(maxsize=1)
def builtin_tasks() -> Any:
    """lm-eval's own tasks; indexing its thousands of task files takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _own_task(name: str, known: list[str]) -> str:
    manager = builtin_tasks()
    if name in manager.all_tasks:
        return name
    close = difflib.get_close_matches(name, [*known, *manager.all_tasks], n=3)
    hint = f"Did you mean {' or '.join(close)}? " if close else ""
    raise UserError(
        f"evaluate.tasks: unknown task '{name}'. {hint}In the package and the recipe's task folders: "
        f"{', '.join(sorted(known))}; besides, all of lm-eval's own."
    )


def _task_manager(config: str | dict[str, Any]) -> Any:
    from lm_eval.tasks import TaskManager

    # Indexing lm-eval's thousands of task files takes seconds; needed only when one of them is asked for.
    return TaskManager(include_defaults=isinstance(config, str))


def _context_length(model: Any) -> int:
    return usable_context(model.config) or 2048


@contextlib.contextmanager
def _quiet() -> Any:
    """lm-eval and datasets print bars and notices of their own; ours would drown."""
    names = ("lm_eval", "lm-eval", "datasets", "transformers", "httpx", "httpx2")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    previous = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    captured = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
    # Programs that lm-eval starts (git, for its version) write to the process's own stderr, not Python's.
    own_stderr = os.dup(2)
    try:
        os.dup2(captured.fileno(), 2)
        with contextlib.redirect_stderr(captured):
            yield
    except UserError:
        raise
    except Exception as error:
        if is_disk_error(error):
            raise DiskError(f"lm-eval: {error}") from error
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
