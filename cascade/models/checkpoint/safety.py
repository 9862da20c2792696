"""Checks of a model's folder before anything reads it: it may hold data, but neither code nor paths out of it.

The flag that turns remote code off is no boundary by itself: a key inside config.json has turned it on again
(CVE-2026-5241). These checks therefore run before transformers sees the folder.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from cascade.models.checkpoint.file_header import check_header, unique_names
from cascade.runtime.errors import UserError
from cascade.runtime.files import read_json

_CODE_KEYS = ("auto_map", "custom_pipelines", "trust_remote_code")
_KERNELS = ("attn_implementation", "experts_implementation")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_]*")
_MAX_JSON_BYTES = 200_000_000


def check_model_folder(folder: Path) -> None:
    """Refuse a folder that would run code, reads files of other folders, or has damaged or malicious weights.

    Raises:
        UserError: with the file, what is wrong in it, and what to do.
    """
    check_settings(folder)
    for index in sorted(folder.glob("*.index.json")):
        _check_index(index)
    for path in sorted(folder.glob("*.safetensors")):
        check_header(path)


def check_settings(folder: Path, pattern: str = "*") -> None:
    """Refuse settings, of the files that match `pattern`, as `check_model_folder` does; weights are not looked at.

    Raises:
        UserError: a config asks for code, or a file is a link out of the folder.
    """
    for path in sorted(folder.glob(pattern)):
        if path.is_symlink() and path.suffix != ".safetensors":
            _check_link(path)
        if path.suffix == ".json":
            _check_json(path)


def _check_link(path: Path) -> None:
    """Refuse a link out of the model's folder: files are copied with a model and published.

    Links of the hub's cache, from snapshots/COMMIT into the blobs beside it, are allowed.
    """
    folder = path.parent.resolve()
    homes = [folder, *([folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [])]
    if not any(path.resolve().is_relative_to(home) for home in homes):
        raise UserError(f"{path}: is a link to {path.resolve()}, out of the model's folder; put the file itself there")


def plain_name(name: object) -> bool:
    """Whether a name is that of a file in the same folder on every system: no path, no drive, no device."""
    if not isinstance(name, str) or not name or "\0" in name or name in (".", ".."):
        return False
    return PurePosixPath(name).name == name and PureWindowsPath(name).name == name


def _check_json(path: Path) -> None:
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise UserError(f"{path}: has {path.stat().st_size:,} bytes; no config or tokenizer is that large")
    if path.name.endswith(".index.json"):
        return
    try:
        settings = read_json(path)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is no JSON: {error}") from error
    if path.name in ("tokenizer.json", "vocab.json"):
        return  # tables of tokens, in which any word may stand
    for place, key, value in _entries(settings, ()):
        if key in _CODE_KEYS and value not in (None, False, {}, []):
            raise UserError(
                f"{path}: {'.'.join([*place, key])} asks for code that is not transformers' own; this program runs "
                "none that comes with a model. If transformers has this architecture itself, remove the key from a "
                "copy of the model, and give that"
            )
        if key == "transformers_weights" and value is not None:
            raise UserError(f"{path}: {'.'.join([*place, key])} names other weights than model.safetensors; remove it")
        texts = [text for text in (value.values() if isinstance(value, dict) else [value]) if isinstance(text, str)]
        if key.lstrip("_") in _KERNELS and not all(_PLAIN_NAME.fullmatch(text) for text in texts):
            raise UserError(
                f"{path}: {'.'.join([*place, key])}: {value} would be fetched and run; remove the key from a copy of "
                "the model, and give that"
            )


def _entries(value: Any, place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str, Any]]:
    """(place, key, value) of every key at any depth, without recursion."""
    waiting = [(place, value)]
    while waiting:
        path, node = waiting.pop()
        if isinstance(node, dict):
            for key, child in node.items():
                yield path, key, child
                waiting.append(((*path, key), child))
        elif isinstance(node, list):
            waiting += [((*path, str(number)), child) for number, child in enumerate(node)]


def _check_index(path: Path) -> None:
    try:
        names = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_names)["weight_map"].values()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: is no index of weights: {error}") from error
    for name in sorted({str(name) for name in names}):
        if not plain_name(name) or not name.endswith(".safetensors"):
            raise UserError(f"{path}: names '{name}'; shards are .safetensors files of the same folder")
        shard = path.parent / name
        if not shard.is_file():
            raise UserError(f"{path.parent}: the index names shards that are missing: {name}")
