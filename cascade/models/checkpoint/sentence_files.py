"""sentence-transformers' files in a folder: they say how a model's hidden states become an embedding.

transformers does not read them. Training and evaluation here use the mean of the last hidden states over a text's
tokens, before it is normalised: cosine similarity does not depend on the length.
"""

import shutil
from pathlib import Path
from typing import Any

from cascade.runtime.errors import UserError
from cascade.runtime.files import read_json
from cascade.runtime.paths import inside

MODULES, _PROMPTS, _TRANSFORMER = "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"
_MEAN = "mean"
_FLAG = "pooling_mode_"
_FLAGS = {"cls_token": "cls", "mean_tokens": _MEAN, "max_tokens": "max"}
"""Flags of older files -> the newer files' name of the pooling."""


def require_mean_pooling(folder: Path, place: str) -> None:
    """Refuse a folder whose files make an embedding other than the mean of the hidden states.

    Raises:
        UserError: another pooling, a module that changes the embedding, or a file that cannot be read.
    """
    learned = "this task learns the mean of the last hidden states"
    if not (folder / MODULES).is_file():
        for path in sorted(folder.glob("*_Pooling/config.json")):
            _require_mean(path, place, learned)
        return
    modules = _read(folder / MODULES)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise UserError(f"{place}: {folder / MODULES}: expected a list of modules")
    kinds = [str(module.get("type")).rpartition(".")[2] for module in modules]
    unknown = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if unknown or kinds[:2] != ["Transformer", "Pooling"] or kinds.count("Pooling") > 1:
        raise UserError(
            f"{place}: {MODULES} makes its embeddings by {', '.join(kinds)}; {learned} (Transformer, Pooling, and "
            "Normalize where it is wanted)"
        )
    pooling = str(modules[1].get("path"))
    if not inside(pooling):
        raise UserError(f"{place}: {folder / MODULES}: '{pooling}' is no folder inside it")
    _require_mean(folder / pooling / "config.json", place, learned)


def unlearned_settings(folder: Path, place: str) -> list[str]:
    """A sentence for each setting that changes a text before the model reads it, as such settings are not learned."""
    sentences = []
    prompts = _settings(folder / _PROMPTS)
    name = prompts.get("default_prompt_name")
    known = prompts.get("prompts")
    prompt = known.get(name) if isinstance(known, dict) and isinstance(name, str) else None
    if prompt:
        sentences.append(
            f"{place}: {_PROMPTS} puts {str(prompt)!r} before every text (default_prompt_name: {name}); here texts are "
            "read as they are: write it before the data's texts if the members are used with it."
        )
    if _settings(folder / _TRANSFORMER).get("do_lower_case") is True:
        sentences.append(
            f"{place}: {_TRANSFORMER} writes every text in lower case (do_lower_case); here texts are read as they are."
        )
    return sentences


def copy_sentence_files(source: Path, target: Path) -> None:
    """Copy the files that make a folder a sentence-transformers model; nothing where `source` is no such model."""
    if not (source / MODULES).is_file():
        return
    places = [str(module.get("path") or "") for module in _read(source / MODULES)]
    names = [MODULES, _PROMPTS, _TRANSFORMER, *(f"{place}/config.json" for place in places if place and inside(place))]
    for name in names:
        if (source / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)


def _require_mean(path: Path, place: str, learned: str) -> None:
    settings = _settings(path, missing_ok=False)
    modes = {_FLAGS.get(key.removeprefix(_FLAG), key.removeprefix(_FLAG)) for key, value in settings.items()
             if key.startswith(_FLAG) and value is True}  # fmt: skip
    named = settings.get("pooling_mode")
    modes |= {str(mode) for mode in (named if isinstance(named, list) else [named] if named else [])}
    if modes != {_MEAN}:
        raise UserError(f"{place}: pools by {', '.join(sorted(modes)) or 'nothing'} ({path}); {learned}")


def _settings(path: Path, *, missing_ok: bool = True) -> dict[str, Any]:
    if missing_ok and not path.is_file():
        return {}
    settings = _read(path)
    if not isinstance(settings, dict):
        raise UserError(f"{path}: expected keys and values")
    return settings


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
