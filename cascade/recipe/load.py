"""A recipe file -> a validated recipe, or every problem at once with its file:line:column."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError

from cascade.recipe.generate import Generate
from cascade.recipe.places import FOLDER
from cascade.recipe.schema import Recipe
from cascade.runtime.errors import RecipeError, UserError
from cascade.runtime.paths import lead_to
from cascade.runtime.secrets import looks_secret, redact
from cascade.store.strict_yaml import YamlDocument, parse_yaml, read_yaml


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file, with `KEY=VALUE` overrides (dotted keys, list items by number) applied before checking.

    Paths in it become absolute; relative ones count from the recipe's folder.

    Raises:
        RecipeError: with every problem found.
    """
    path = Path(path)
    document = read_yaml(path)
    if not isinstance(document.data, dict):
        raise RecipeError(str(path), [f"{path}:1:1: a recipe is a mapping of keys, starting with `name:`"])
    overridden = [_override(document, text) for text in overrides]
    refuse_secrets(document, path, overridden)
    try:
        recipe = Recipe.model_validate(document.data, context={FOLDER: path.resolve().parent})
    except ValidationError as error:
        raise RecipeError(str(path), problems_of(document, error, overridden)) from error
    generate = recipe.generate
    if generate is not None and generate.endpoint is not None:
        if urlsplit(generate.endpoint.url).hostname not in _HERE:
            _require_near(generate, path.resolve().parent)
    return recipe


def problems_of(
    document: YamlDocument,
    error: ValidationError,
    overridden: Sequence[tuple[str, ...]] = (),
    model: type[BaseModel] = Recipe,
) -> list[str]:
    """The errors of a document as messages with file:line:column; `overridden` keys come from the command line."""
    problems = [_describe(document, problem, overridden, model) for problem in error.errors()]
    return list(dict.fromkeys(problems))


def refuse_secrets(document: YamlDocument, path: Path, overridden: Sequence[tuple[str, ...]] = ()) -> None:
    """Refuse documents with keys or passwords: recipes are shared, and written into every card.

    Raises:
        RecipeError: a value looks like a key; the message does not repeat it.
    """
    problems: list[str] = []
    waiting: list[tuple[tuple[Any, ...], Any]] = [((), document.data)]
    while waiting:
        place, value = waiting.pop()
        inner: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        waiting += [((*place, key), part) for key, part in inner]
        if isinstance(value, str) and looks_secret(value) or any(looks_secret(str(key)) for key, _ in inner):
            where = "--set" if tuple(map(str, place)) in overridden else document.where(place)
            name = ".".join(str(part) for part in place)
            problems.append(f"{where}: {redact(name)}: looks like a key or password; recipes are copied into cards and "
                         "reports. Put it into an environment variable (HF_TOKEN, or key_env's)")  # fmt: skip
    if problems:
        raise RecipeError(str(path), problems)


def _override(document: YamlDocument, text: str) -> tuple[str, ...]:
    """Apply an override to the document's data, and return its path of keys."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {text}", ["is not of the form KEY=VALUE, such as distill.tokens=100_000"])
    parts = tuple(key.split("."))
    target: Any = document.data
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        if isinstance(target, list):
            if not (part.isascii() and part.isdigit()) or int(part) >= len(target):
                place = ".".join(parts[:number])
                raise RecipeError(f"--set {text}", [f"{place} has {len(target)} items, numbered from 0; no '{part}'"])
            index: Any = int(part)
        elif isinstance(target, dict):
            index = part
        else:
            raise RecipeError(f"--set {text}", [f"{'.'.join(parts[:number])} is a value, not a section"])
        if last:
            target[index] = parse_yaml(value, source=f"--set {text}").data
        else:
            target = target.setdefault(index, {}) if isinstance(target, dict) else target[index]
    return parts


def _describe(
    document: YamlDocument, problem: Any, overridden: Sequence[tuple[str, ...]], model: type[BaseModel]
) -> str:
    place = tuple(part for part in problem["loc"] if not _is_branch(part))
    name = ".".join(str(part) for part in place)
    texts = tuple(str(part) for part in place)
    is_override = any(texts[: len(parts)] == parts for parts in overridden)
    where = f"--set {name}" if is_override else document.where(place)
    if problem["type"] == "extra_forbidden":
        return f"{where}: {_unknown_key(place, model)}"
    if problem["type"] == "missing":
        return f"{where}: key '{name}' is missing"
    message = problem["msg"].removeprefix("Value error, ")
    entry = problem["input"]
    received = f" (got {entry!r})" if isinstance(entry, str | int | float | bool) or entry is None else ""
    return f"{where}: {name + ': ' if name else ''}{message}{received if received not in message else ''}"


def _unknown_key(place: tuple[Any, ...], model: type[BaseModel]) -> str:
    known = _known_keys(place[:-1], model)
    close = difflib.get_close_matches(str(place[-1]), known, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"unknown key '{place[-1]}'; {hint}known here: {', '.join(known)}"


def _known_keys(place: tuple[Any, ...], model: Any) -> list[str]:
    """The keys of the section at a path of keys of a `model`."""
    for part in place:
        if isinstance(part, str) and part in model.model_fields:
            model = _section_of(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def _section_of(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((section for part in get_args(annotation) if (section := _section_of(part))), None)


_HERE = ("localhost", "127.0.0.1", "::1")


def _is_branch(part: Any) -> bool:
    # pydantic puts the name of a validator into the path, such as 'function-before[_as_list(), ...]'.
    return isinstance(part, str) and "[" in part


def _require_near(generate: Generate, folder: Path) -> None:
    """Refuse to send files that lie neither with the recipe nor in the working folder: a stranger may have written it.

    Raises:
        UserError: a file lies elsewhere, or is a link to a file elsewhere.
    """
    near = [place.resolve() for place in (folder, Path.cwd())]
    for name in ("prompts", "text"):
        for value in getattr(generate, name):
            url = generate.endpoint and generate.endpoint.url
            is_near = _is_near(value, near)  # and then what it stands for, which may be links
            if not (is_near and all(_is_near(file, near) for file in lead_to(value))):
                raise UserError(
                    f"generate.{name}: {value} would be sent to {url}, and lies neither beside or below the recipe nor "
                    f"where the command runs ({near[1]}); copy it there"
                )


def _is_near(path: str, near: Sequence[Path]) -> bool:
    return any(Path(path).resolve().is_relative_to(folder) for folder in near)
