"""Paths and models in a recipe: relative to its folder when it is read, and without folders when it is published."""

import os
from glob import escape, has_magic
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, PlainSerializer, SerializationInfo, ValidationInfo

from cascade.recipe.section import as_list

FOLDER = "recipe_folder"
"""Key in a validation's context: the folder that relative paths start from; without it they stay as they are."""

PUBLIC = {"public": True}
"""Context of a `model_dump` for publishing: local paths become names without folders."""


def absolute_path(path: str, info: ValidationInfo) -> str:
    """The path, made absolute where the recipe's folder is known.

    Raises:
        ValueError: the path has a NUL in it, or the home of an unknown user.
    """
    folder = (info.context or {}).get(FOLDER)
    return path if folder is None or not path else _absolute(path, folder)


def public_path(path: str, info: SerializationInfo) -> str:
    """The path; only its last part when the recipe is published."""
    return Path(path).name if _is_public(info) else path


def public_model(reference: str) -> str:
    """A model's reference for publishing: a hub id or builtin:NAME unchanged, a local path by its last part."""
    return Path(reference).name if is_local(reference) else reference


def without_folders(record: Any) -> Any:
    """Nested lists and dicts in which paths that exist on this machine are cut down to their last part."""
    if isinstance(record, dict):
        return {key: without_folders(part) for key, part in record.items()}
    if isinstance(record, list):
        return [without_folders(part) for part in record]
    here = isinstance(record, str) and len(record) < 4096 and "\0" not in record and Path(record).is_absolute()
    return Path(record).name or record if here and Path(record).exists() else record


def served_model(name: str) -> str:
    """The name that a server knows a model by, for publishing: of a path, its last part."""
    return Path(name).name if name.startswith((".", "/", "~")) else name


def is_local(reference: str) -> bool:
    """Whether a model's reference is a folder or file on this machine, and no hub id."""
    if not reference or reference.startswith("builtin:"):
        return False
    placed = reference.startswith((".", "/", "~")) or Path(reference).expanduser().exists()
    return placed or reference.count("/") != 1 or reference.endswith(".gguf")


def _resolved_model(reference: str, info: ValidationInfo) -> str:
    """A local path made absolute; builtin and hub names as they are."""
    if reference.startswith("builtin:"):
        return reference
    path = absolute_path(reference, info)
    return path if reference.startswith((".", "/", "~")) or Path(path).exists() else reference


def _dump_model(reference: str, info: SerializationInfo) -> str:
    return public_model(reference) if _is_public(info) else reference


def _dump_served(name: str, info: SerializationInfo) -> str:
    return served_model(name) if _is_public(info) else name


def _is_public(info: SerializationInfo) -> bool:
    context: Any = info.context
    return bool(context and context.get("public"))


def _absolute(text: str, folder: Path) -> str:
    if "\0" in text:
        raise ValueError(f"{text!r}: no path has a NUL in it")
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{text}: {error}") from error
    if path.is_absolute():
        return str(path)
    if has_magic(text) and not (folder / path).exists():  # signs of a pattern in the folder's own name are none
        return os.path.normpath(Path(escape(str(folder))) / path)
    return str((folder / path).resolve())


RecipePath = Annotated[str, AfterValidator(absolute_path), PlainSerializer(public_path)]
"""A file or folder."""

RecipePaths = Annotated[list[RecipePath], BeforeValidator(as_list)]

RunPath = Annotated[str, PlainSerializer(public_path)]
"""A folder, relative to where the command runs."""

ServedModel = Annotated[str, PlainSerializer(_dump_served)]
"""The name that a server knows a model by, often the path that the server was started with."""

ModelReference = Annotated[str, AfterValidator(_resolved_model), PlainSerializer(_dump_model)]
"""builtin:NAME, a hub id, or the path of a folder or GGUF file."""
