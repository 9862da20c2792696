"""Paths and models as a recipe names them: counted from its folder when it is read, told without their folders."""

import os
from glob import escape, has_magic
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, PlainSerializer, SerializationInfo, ValidationInfo

from cascade.recipe.section import as_list

FOLDER = "recipe_folder"
"""In the context of a validation: what relative paths count from; without it they stay as they are."""

PUBLIC = {"public": True}
"""The context of a `model_dump` that leaves this machine: of what lies here, names without folders."""


def absolute_path(path: str, info: ValidationInfo) -> str:
    """The path, absolute where the recipe's folder is known.

    Raises:
        ValueError: it has a NUL in it, or the home of an unknown user.
    """
    folder = (info.context or {}).get(FOLDER)
    return path if folder is None or not path else _absolute(path, folder)


def public_path(path: str, info: SerializationInfo) -> str:
    """The path; its last part alone where others will read it."""
    return Path(path).name if _is_public(info) else path


def public_model(reference: str) -> str:
    """A model as others may read of it: a hub id or builtin:NAME as it is, what lies here by its name alone."""
    return Path(reference).name if is_local(reference) else reference


def without_folders(record: Any) -> Any:
    """Lists and dicts with the paths of what lies on this machine cut down to names."""
    if isinstance(record, dict):
        return {key: without_folders(part) for key, part in record.items()}
    if isinstance(record, list):
        return [without_folders(part) for part in record]
    here = isinstance(record, str) and len(record) < 4096 and "\0" not in record and Path(record).is_absolute()
    return Path(record).name or record if here and Path(record).exists() else record


def served_model(name: str) -> str:
    """A model by the name that a server knows it by; where that is a path, its last part."""
    return Path(name).name if name.startswith((".", "/", "~")) else name


def is_local(reference: str) -> bool:
    """Whether a model's reference leads to a folder or file on this machine, and not to the hub."""
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
"""A folder that counts from where the command runs."""

ServedModel = Annotated[str, PlainSerializer(_dump_served)]
"""What a server knows a model by; often the path that it was started with."""

ModelReference = Annotated[str, AfterValidator(_resolved_model), PlainSerializer(_dump_model)]
"""builtin:NAME, a hub id, or the path of a folder or GGUF file."""
