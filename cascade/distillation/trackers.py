"""Where a training's log goes besides log.jsonl: TensorBoard, trackio, Weights & Biases, MLflow; none by default."""

import importlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from cascade.runtime.errors import UserError

_logger = logging.getLogger(__name__)

Log = Callable[[dict[str, float]], None]

TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow")  # each the name of its package


def require_trackers(names: Sequence[str]) -> None:
    """Refuse trackers whose package is missing, before anything is computed.

    Raises:
        UserError: a tracker is unknown or not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"distill.trackers: unknown tracker '{name}'; known: {', '.join(TRACKERS)}")
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f"distill.trackers: {name} is not installed; pip install 'cascade-distill[{name}]', or leave it out"
            ) from error


@contextmanager
def tracked(
    names: Sequence[str], *, project: str, run: str, folder: Path, settings: dict[str, Any]
) -> Iterator[Log | None]:
    """A function that passes one entry of the log on to every tracker; None where there are no trackers.

    `folder` is for trackers that write files of their own (TensorBoard). A tracker that fails later on (a server that
    is gone) is left out with a warning: the training goes on, and log.jsonl has every entry.

    Raises:
        UserError: a tracker is unknown, not installed, or cannot be opened.
    """
    if not names:
        yield None
        return
    require_trackers(names)
    with ExitStack() as stack:
        logs = {name: _opened(name, stack, project, run, folder, settings) for name in names}

        def log(entry: dict[str, float]) -> None:
            figures = {key: figure for key, figure in entry.items() if key != "step"}
            for name, send in list(logs.items()):
                try:
                    send(figures, int(entry["step"]))
                except Exception as error:  # of any kind: they are other people's clients and networks
                    _logger.warning("distill.trackers: %s failed and is left out from here on: %s", name, error)
                    del logs[name]

        try:
            yield log
        finally:
            _close(stack.pop_all())


def _close(stack: ExitStack) -> None:
    """Close the trackers; one that cannot be closed must not cost the training that it logged."""
    try:
        stack.close()
    except Exception as error:
        _logger.warning("distill.trackers: one could not be ended: %s", error)


_Send = Callable[[dict[str, float], int], Any]


def _opened(name: str, *settings: Any) -> _Send:
    try:
        return OPENERS[name](*settings)
    except Exception as error:
        raise UserError(f"distill.trackers: {name} cannot be opened: {error}") from error


def _tensorboard(stack: ExitStack, project: str, run: str, folder: Path, settings: dict[str, Any]) -> _Send:
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(folder / "tensorboard" / run))
    stack.callback(writer.close)

    def send(figures: dict[str, float], step: int) -> None:
        for name, figure in figures.items():
            writer.add_scalar(name, figure, step)

    return send


def _trackio(stack: ExitStack, project: str, run: str, folder: Path, settings: dict[str, Any]) -> _Send:
    import trackio

    trackio.init(project=project, name=run, config=settings, embed=False)
    stack.callback(trackio.finish)
    return lambda figures, step: trackio.log(figures, step=step)


def _wandb(stack: ExitStack, project: str, run: str, folder: Path, settings: dict[str, Any]) -> _Send:
    import wandb

    opened: Any = wandb.init(project=project, name=run, config=settings, dir=str(folder))
    stack.callback(opened.finish)
    return lambda figures, step: opened.log(figures, step=step)


def _mlflow(stack: ExitStack, project: str, run: str, folder: Path, settings: dict[str, Any]) -> _Send:
    import mlflow

    mlflow.set_experiment(project)
    stack.enter_context(mlflow.start_run(run_name=run))
    params = {name: setting for name, setting in settings.items() if isinstance(setting, str | int | float)}
    mlflow.log_params(params)
    return lambda figures, step: mlflow.log_metrics(figures, step=step)


OPENERS = {"tensorboard": _tensorboard, "trackio": _trackio, "wandb": _wandb, "mlflow": _mlflow}
