"""python tests/tools/write_reference.py [--check]: docs/recipe.md, docs/experiment.md and docs/cli.md from the code.

Keys, accepted values, defaults and descriptions come from the pydantic models of cascade/recipe; commands, options and
their help from click. With --check nothing is written; exit code 1 where a page differs from the code.
"""

import argparse
import ast
import inspect
import json
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import annotated_types
import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cascade.recipe.data import Splits
from cascade.recipe.experiment import Experiment, Overrides
from cascade.recipe.places import ModelReference, RecipePath, RunPath, ServedModel
from cascade.recipe.schema import Recipe
from cascade.recipe.section import Names, OneOf

ROOT = Path(__file__).resolve().parents[2]
HEAD = "<!-- Written by `python tests/tools/write_reference.py`; change the code and run it again. -->\n\n"
ENTRIES = {
    "members": "An entry of",
    "baselines": "An entry of",
    "finish": "An entry of",
    "arms": "The value of an entry of",
}

WORDS: list[tuple[Any, str]] = [
    (Splits, "a path or name, or a list of them"),
    (Overrides, "a mapping, or a list of `KEY=VALUE`"),
    (Names, "a text, or a list of texts"),
    (RecipePath, "a path"),
    (RunPath, "a path"),
    (ModelReference, "a model"),
    (ServedModel, "a text"),
    (str, "a text"),
    (bool, "true or false"),
    (int, "a whole number"),
    (float, "a number"),
    (object, "any value"),
]
"""What a type accepts, in words."""

ARGUMENTS = {
    "recipe": "A recipe file; see [recipe.md](recipe.md).",
    "file": "An experiment file; see [experiment.md](experiment.md).",
    "run_folder": "The run directory of `cascade run`.",
    "model": "The model to cut: `builtin:NAME`, a folder, a GGUF file, or a Hub id that is in the local cache.",
    "student": "The model to train, given as MODEL of `cascade prune` is.",
    "checkpoint": "The model to measure, given as MODEL of `cascade prune` is.",
}


@dataclass(frozen=True)
class Key:
    """A row of a table."""

    name: str
    accepts: str
    default: str
    text: str


def pages() -> dict[Path, str]:
    """Every generated page with its text."""
    return {
        ROOT / "docs" / "recipe.md": recipe_page(),
        ROOT / "docs" / "experiment.md": experiment_page(),
        ROOT / "docs" / "cli.md": cli_page(),
    }


def recipe_page() -> str:
    """The keys of a recipe."""
    intro = (
        "# Recipe reference\n\n"
        "A recipe is a YAML file (YAML 1.2 numbers; `20_000_000` is one) that describes a family. Unknown keys, keys "
        "that stand twice and values of another type are errors, reported all at once with file, line and column. "
        "Paths count from the recipe's folder. `--set distill.tokens=100_000` replaces a key on the command line; "
        "entries of lists are numbered from 0 (`members.0.name`). `cascade plan RECIPE` checks a recipe without "
        "running it.\n\nHow to use the keys is shown in the guides, starting with "
        "[cutting a model](guides/cut-a-model.md); complete recipes are in [recipes/](../recipes). The file "
        "of `cascade experiment` is described in [experiment.md](experiment.md).\n\n"
    )
    return HEAD + intro + _reference(Recipe, "the top level", "Recipe")


def experiment_page() -> str:
    """The keys of an experiment."""
    intro = (
        "# Experiment reference\n\n"
        "An experiment is a YAML file for `cascade experiment FILE`: it makes one family per arm, seed and token "
        "budget, and compares the arms. [The guide](guides/experiments.md) shows how to use it; "
        "[stories.yaml](../recipes/experiments/stories.yaml) is a complete experiment. The keys that `set` changes "
        "are those of the [recipe](recipe.md); `seed`, `output`, `name`, `baselines`, `finish`, `distill.tokens` and "
        "`members.*.tokens` cannot be set there, and `evaluate` only for all arms.\n\n"
    )
    return HEAD + intro + _reference(Experiment, "the top level", "Experiment")


def sections(model: type[BaseModel], place: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section below a model with its dotted place, in the order of its keys; the model itself at ''."""
    yield place, model
    for name, hint in get_type_hints(model, include_extras=True).items():
        if name in model.model_fields:
            for part in _models_in(hint):
                yield from sections(part, f"{place}.{name}" if place else name)


def descriptions(model: type[BaseModel]) -> dict[str, str]:
    """The docstrings under the fields of a section."""
    (tree,) = ast.parse(inspect.getsource(model)).body
    assert isinstance(tree, ast.ClassDef)
    texts = {}
    for statement, after in zip(tree.body, tree.body[1:], strict=False):
        is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and is_text:
            texts[statement.target.id] = " ".join(str(after.value.value).split())
    return texts


def keys_of(model: type[BaseModel], place: str) -> list[Key]:
    """The rows of a section's table."""
    texts, hints = descriptions(model), get_type_hints(model, include_extras=True)
    return [
        Key(name, _accepts(hints[name], f"{place}.{name}".strip(".")), _default(field), texts.get(name, ""))
        for name, field in model.model_fields.items()
    ]


def cli_page() -> str:
    """The commands."""
    main = load_command()
    text = (
        "# Command line reference\n\n"
        "`cascade COMMAND --help` prints the same. Exit codes: 0 done, 1 a stage could not be done (or `verify`, "
        "`doctor` and `cache verify` found a fault), 2 a recipe or arguments that cannot be used, 65 numbers that are "
        "not finite or a loss that diverged, 73 the run directory is in use by another run, 75 the disk takes no "
        "more, 130 and 143 stopped by Ctrl-C and SIGTERM. What they promise: [reliability](reliability.md).\n\n"
    )
    listed = [f"- [`{path}`](#{_anchor(path)}): {_escaped(_first(command))}" for path, command in commands(main)]
    parts = [_command(path, command) for path, command in commands(main)]
    return HEAD + text + "\n".join(listed) + "\n\n" + "\n".join(parts)


def load_command() -> click.Group:
    """The command `cascade`, as pyproject.toml installs it."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["cascade"].partition(":")
    return getattr(import_module(module), name)


def commands(group: click.Group, path: str = "cascade") -> Iterator[tuple[str, click.Command]]:
    """Every command that does something, with the words that call it."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def options_of(command: click.Command) -> list[Key]:
    """The rows of a command's table; an option without help has no text."""
    rows = []
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            rows.append(Key(parameter.make_metavar(_context(command)), "", "", ARGUMENTS[parameter.name]))
        elif isinstance(parameter, click.Option):
            names = "` / `".join([", ".join(parameter.opts), *parameter.secondary_opts])
            rows.append(Key(names, _option_type(parameter), _option_default(parameter), parameter.help or ""))
    return rows


def _reference(model: type[BaseModel], top: str, title: str) -> str:
    places = dict(sections(model))
    contents = " · ".join(f"[{place or top}](#{_anchor(place or top)})" for place in places)
    parts = [contents + "\n"]
    for place, section in places.items():
        doc = " ".join((inspect.getdoc(section) or "").split())
        parent, _, last = place.rpartition(".")
        entry = f"{ENTRIES[last]} `{place}`. " if last in ENTRIES else ""
        parts += [f"## {place or top}\n", _escaped(entry + doc) + "\n", _table("key", keys_of(section, place))]
    return "\n".join(parts)


def _table(first: str, rows: list[Key]) -> str:
    lines = [f"| {first} | accepts | default | description |", "|---|---|---|---|"]
    lines += [f"| `{row.name}` | {row.accepts} | {row.default} | {_escaped(row.text)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _command(path: str, command: click.Command) -> str:
    usage = f"{path} {' '.join(command.collect_usage_pieces(_context(command)))}"
    help_text = inspect.cleandoc(command.help or "")
    return f"## {path}\n\n```text\n{usage}\n```\n\n{_escaped(help_text)}\n\n{_table('argument or option', options_of(command))}"


def _first(command: click.Command) -> str:
    return inspect.cleandoc(command.help or "").split("\n\n")[0].replace("\n", " ")


def _context(command: click.Command) -> click.Context:
    return click.Context(command, info_name=command.name)


def _option_type(option: click.Option) -> str:
    if option.is_flag:
        return "flag"
    kind: Any = option.type
    if isinstance(kind, click.Choice):
        text = ", ".join(f"`{choice}`" for choice in kind.choices)
    elif option.metavar:
        text = f"`{option.metavar}`"
    elif isinstance(kind, click.IntRange | click.FloatRange):
        number = "a whole number" if isinstance(kind, click.IntRange) else "a number"
        text = f"{number} above {kind.min:g}" if kind.min_open else f"{number} from {kind.min:g}"
    else:
        text = {"integer": "a whole number", "text": "a text", "file": "a file", "directory": "a folder"}[kind.name]
    return f"{text}; repeatable" if option.multiple else text


def _option_default(option: click.Option) -> str:
    if option.required:
        return "required"
    if option.is_flag and option.secondary_opts:
        return f"`{option.opts[0] if option.default else option.secondary_opts[0]}`"
    value = option.to_info_dict()["default"]
    return "" if option.is_flag or value in (None, "", (), []) or "Sentinel" in str(value) else f"`{value}`"


def _accepts(hint: Any, place: str) -> str:
    """What a field's type accepts, in words; sections are links to their tables."""
    for known, words in WORDS:
        if hint == known:
            return words
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _annotated(parts[0], parts[1:], place)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in parts if value)
    if origin in (Union, UnionType):
        return " or ".join(_accepts(part, place) for part in parts if part is not NoneType)
    if origin is list:
        return f"a list: {_plain(parts[0], place)}"
    if origin is dict:
        return _mapping(parts, place)
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return f"[section](#{_anchor(place)})"
    raise TypeError(f"{place}: no words for {hint}")


def _annotated(kind: Any, marks: tuple[Any, ...], place: str) -> str:
    for mark in marks:
        if isinstance(mark, OneOf):
            return ", ".join(f"`{name}`" for name in mark.names)
    return _accepts(kind, place) + _limits(marks)


def _limits(marks: tuple[Any, ...]) -> str:
    limits: dict[str, float] = {}
    for mark in marks:
        for part in mark.metadata if isinstance(mark, FieldInfo) else [mark]:
            for kind, name in ((annotated_types.Gt, "gt"), (annotated_types.Ge, "ge"), (annotated_types.Lt, "lt"), (annotated_types.Le, "le")):  # fmt: skip
                if isinstance(part, kind):
                    limits[name] = getattr(part, name)
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    return "".join(f", {words[name]} {value:g}" for name, value in limits.items())


def _plain(hint: Any, place: str) -> str:
    """The words for an entry of a list, without its article."""
    words = _accepts(hint, place)
    if words.startswith("["):
        return words.replace("[section]", "[sections]")
    plural = {"a text": "texts", "a number": "numbers", "a whole number": "whole numbers", "a path": "paths"}
    for single, several in plural.items():
        if words.startswith(single):
            return several + words.removeprefix(single)
    return words


def _mapping(parts: tuple[Any, ...], place: str) -> str:
    keys = f" of {_accepts(parts[0], place)}" if get_origin(parts[0]) is Literal else ""
    if parts[1] is object:
        return "a mapping"
    return f"a mapping{keys} to {_plain(parts[1], place)}"


def _models_in(hint: Any) -> Iterator[type[BaseModel]]:
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        yield hint
    for part in get_args(hint):
        yield from _models_in(part)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if isinstance(value, BaseModel):
        return "its defaults"
    if value is None or value == "":
        return "not given"
    return f"`{json.dumps(value) if isinstance(value, list | dict | bool) else _number(value)}`"


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:_}" if isinstance(value, int) and value >= 10_000 else f"{value:g}"


def _anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    kept = "".join(letter for letter in heading.lower() if letter.isalnum() or letter in " -_")
    return kept.replace(" ", "-")


def _escaped(text: str) -> str:
    """Text for a table's cell or a paragraph; what stands between backticks stays as it is but for bars."""
    parts = text.split("`")
    for number in range(0, len(parts), 2):
        parts[number] = parts[number].replace("<", "&lt;").replace("*", "\\*")
    return "`".join(parts).replace("|", "\\|")


def main() -> None:
    """Write the pages, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a page is stale")
    check = parser.parse_args().check
    stale = [path for path, text in pages().items() if not path.is_file() or path.read_text() != text]
    for path in stale:
        if check:
            print(f"{path.relative_to(ROOT)} is stale; run python tests/tools/write_reference.py")
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(pages()[path])
            print(f"{path.relative_to(ROOT)} written")
    sys.exit(int(check and bool(stale)))


if __name__ == "__main__":
    main()
