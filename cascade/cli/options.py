"""What the commands have in common: options, error messages, and the printing of results."""

import errno
import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from typing import Any, TypeVar

import click

from cascade.runtime.errors import DiskError, RunError, Stopped, UserError, is_disk_error
from cascade.runtime.permissions import NO_PERMISSIONS
from cascade.runtime.secrets import redact
from cascade.runtime.stopping import handled

_Command = TypeVar("_Command", bound=Callable[..., Any])
_Record = TypeVar("_Record")

_PLACES = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP)
"""Errors of the operating system that a path from the user causes; shown where no message says more."""
NOTHING_KEPT = "Nothing is left of it."
_WORK_KEPT = "What is finished is kept; the same command goes on from there."

POSITIVE = click.IntRange(min=1)
ABOVE_ZERO = click.FloatRange(min=0, min_open=True, max=1e15)
RECIPE = click.argument("recipe", type=click.Path(dir_okay=False))
SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key, such as distill.tokens=100_000.",
)
OUTPUT = click.option(
    "--output",
    type=click.Path(file_okay=False),
    help="Run directory (default: the recipe's, else runs/NAME).",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
DATA = click.option(
    "--data",
    help="Text like that which the model was trained on: a file, folder or pattern of JSON, Parquet or text files, or "
    "'stdlib', the Python standard library's source. Required except for builtin:pico-python.",
)


def _permission(option: str, name: str, help_text: str) -> Callable[[_Command], _Command]:
    """A flag that sets a permission, which no recipe can ask for; a command gets them with `click.pass_obj`."""

    def give(context: click.Context, parameter: click.Parameter, allowed: bool) -> None:
        context.obj = replace(context.obj or NO_PERMISSIONS, **{name: allowed})

    return click.option(option, is_flag=True, expose_value=False, callback=give, help=help_text)


TASK_CODE = _permission(
    "--allow-task-code",
    "task_code",
    "Allow Python functions of tasks; they run in a process of their own, without keys in its environment.",
)
PRIVATE = _permission("--allow-private", "private_networks", "Allow an endpoint on a private network.")
BLOCK = click.option(
    "--block-size", default=256, type=click.IntRange(min=8), show_default=True, help="Tokens per block."
)


def as_record(record: Callable[..., _Record]) -> Callable[[Callable[[_Record], None]], Callable[..., None]]:
    """Hand a command its options as one record, a dataclass whose fields have the options' names."""

    def decorate(command: Callable[[_Record], None]) -> Callable[..., None]:
        @wraps(command)
        def with_options(**options: Any) -> None:
            command(record(**options))

        return with_options

    return decorate


class CommandGroup(click.Group):
    """Turns the program's own errors into messages and exit codes."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line, and exit with a message and the code of each of the program's errors."""
        try:
            return super().main(*args, **kwargs)
        except UserError as error:
            click.echo(redact(f"Error: {error}"), err=True)
            sys.exit(error.exit_code)
        except RunError as error:
            click.echo(redact(f"Stopped: {error}\n{_WORK_KEPT}"), err=True)
            sys.exit(error.exit_code)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _PLACES:
                click.echo(redact(f"Error: {error.filename}: {error.strerror}; give another place"), err=True)
                sys.exit(UserError.exit_code)
            if not is_disk_error(error):
                raise
            click.echo(redact(f"Stopped: {error}\n{_WORK_KEPT}"), err=True)
            sys.exit(DiskError.exit_code)


@contextmanager
def interruptible(message: str = _WORK_KEPT) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM saves a training's state, then stops with `message`; the second stops it at once."""
    try:
        with handled():
            yield
    except Stopped as error:
        click.echo(f"\nStopped. {message}", err=True)
        sys.exit(error.exit_code)


def dims_of_texts(texts: tuple[str, ...]) -> dict[str, int]:
    """Dims from texts of the form NAME=N.

    Raises:
        UserError: a text has another form.
    """
    dims = {}
    for text in texts:
        name, _, value = text.partition("=")
        if not (value.isascii() and value.isdigit()):
            raise UserError(f"--dim {text}: not of the form NAME=N, such as num_hidden_layers=4")
        dims[name] = int(value)
    return dims


def finish(result: dict[str, Any], as_json: bool) -> None:
    """Print a result, as JSON or a line per key."""
    if as_json:
        click.echo(json.dumps(result))
        return
    for key, value in result.items():
        click.echo(f"{key}: {value:,}" if isinstance(value, int) else f"{key}: {value}")


def quiet_libraries() -> None:
    """Silence the libraries' progress bars and warnings, so that the user sees only the program's messages."""
    for name in ("torchao", "torch.utils._pytree"):  # what they say when they are imported is not about the run
        logging.getLogger(name).setLevel(logging.ERROR)
    from datasets import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    disable_progress_bars()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
