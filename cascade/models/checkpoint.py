"""Hugging Face checkpoints on disk: found, checked, loaded, saved. safetensors only, no remote code."""

import copy
import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from cascade.errors import UserError
from cascade.models.architecture import model_class_of
from cascade.models.hub import fetch
from cascade.models.quantised import is_rounded, unpacked
from cascade.models.safety import check_model_folder, check_settings
from cascade.models.vocabulary import require_embedded
from cascade.recipe.section import COMMIT

BUILTIN_FOLDER = Path(__file__).parent / "builtin"

CHECKPOINT = "checkpoint"
"""The folder inside a stage's that holds a model."""

# What travels with the weights, byte for byte.
_COMPANIONS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "preprocessor_config.json",
    "LICENSE*",
    "NOTICE*",
    "COPYING*",
    "USE_POLICY*",
)


@dataclass(frozen=True)
class ModelSource:
    """Where a model is: a local folder, and a GGUF file in it where that is the format."""

    folder: Path
    reference: str
    """What the user wrote: builtin:NAME, a path, or a hub id with its revision."""
    gguf_file: str | None = None


def resolve_model(reference: str, *, revision: str | None = None) -> ModelSource:
    """The local folder of a model: `builtin:NAME`, a folder, a GGUF file, or a hub id (also id@commit).

    Raises:
        UserError: there is no such model, a hub id has no revision, or the folder has no safetensors weights.
    """
    if reference.startswith("builtin:"):
        return ModelSource(_builtin(reference.removeprefix("builtin:")), reference)
    path = Path(reference).expanduser()
    if revision is not None and path.exists():
        raise UserError(f"{reference}: a local path has no `revision`; remove it")
    if path.is_file() and path.suffix == ".gguf":
        for name in ("*config.json", "*token*.json", "*.jinja"):  # what is read beside it, in a folder of anything
            check_settings(path.parent, name)
        return ModelSource(path.parent, str(reference), gguf_file=path.name)
    if path.is_dir():
        _require_safetensors(path)
        return ModelSource(path, str(reference))
    if path.exists():
        raise UserError(f"{reference}: a file, but not a .gguf file; give the model's folder")
    if reference.startswith((".", "/", "~")) or reference.count("/") != 1:
        raise UserError(f"{reference}: no such folder or .gguf file (looked at {path})")
    repository, _, commit = reference.partition("@")
    if commit and not COMMIT.fullmatch(commit):
        raise UserError(f"{reference}: '{commit}' can move; give a commit: {repository}@ and 40 hexadecimal digits")
    return ModelSource(_fetched(repository, revision or commit or None), f"{repository}@{revision or commit}")


def load_config(source: ModelSource) -> Any:
    """The transformers config, without loading weights."""
    try:
        return AutoConfig.from_pretrained(source.folder, gguf_file=source.gguf_file or None, trust_remote_code=False)
    except Exception as error:  # whatever its values make transformers trip over
        raise UserError(f"{source.reference}: its config cannot be read: {_cause(source, error)}") from error


def load_tokenizer(source: ModelSource, *, vocab_size: int | None = None) -> Any:
    """The tokenizer; checked against the model's vocabulary where `vocab_size` is given.

    Raises:
        UserError: there is none, or it has ids that the model's embedding has not (`require_embedded`).
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.folder, gguf_file=source.gguf_file or None, trust_remote_code=False
        )
    except Exception as error:  # as above; and the tokenizers library has no class of its own for its errors
        raise UserError(f"{source.reference}: its tokenizer cannot be read: {_cause(source, error)}") from error
    if vocab_size is not None:
        require_embedded(tokenizer, vocab_size, source.reference)
    return tokenizer


def load_model(source: ModelSource, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model, of the class that its config names, in evaluation mode, in `dtype` whatever it is stored in.

    Weights that torchao has rounded are plain ones here, of the same values.
    """
    model: nn.Module
    try:
        if source.gguf_file:
            return _load_gguf(source, dtype)
        config = load_config(source)
        rounded = is_rounded(config)
        model, found = model_class_of(config).from_pretrained(
            source.folder, dtype="auto" if rounded else dtype, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError, SafetensorError) as error:
        raise UserError(f"{source.reference}: the model cannot be loaded: {_cause(source, error)}") from error
    wrong = sorted(str(name) for kind in ("missing_keys", "mismatched_keys") for name in found[kind])
    if wrong:
        raise UserError(
            f"{source.reference}: its weights do not fill its architecture; missing or of another shape: "
            f"{', '.join(wrong[:5])}{' and more' if len(wrong) > 5 else ''}"
        )
    return (unpacked(model, dtype) if rounded else model).eval()


def load_with_new_head(source: ModelSource, config: Any) -> nn.Module:
    """The body of a model under a new, random head of `config`, in float32.

    Raises:
        UserError: more than the head is missing.
    """
    kind = model_class_of(config)
    try:
        model, found = kind.from_pretrained(
            source.folder, config=config, dtype=torch.float32, use_safetensors=True, ignore_mismatched_sizes=True,
            output_loading_info=True,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError, SafetensorError) as error:
        raise UserError(f"{source.reference}: the model cannot be loaded: {_cause(source, error)}") from error
    body = [name for name in found["missing_keys"] if name.startswith(f"{model.base_model_prefix}.")]
    body = [name for name in body if ".pooler." not in name]  # some are trained with it, some without
    if body:
        raise UserError(f"{source.reference}: its weights do not fill its body; missing: {', '.join(sorted(body)[:5])}")
    result: nn.Module = model
    return result


def save_checkpoint(model: nn.Module, folder: Path, *, companions: Path | None, dtype: torch.dtype) -> nn.Module:
    """Write a stock checkpoint in `dtype`; returns the rounded copy that was written, in `dtype`.

    `companions` is a folder whose tokenizer, chat template, generation config and licence are copied unchanged.
    """
    rounded: Any = copy.deepcopy(model)
    for parameter in rounded.parameters():  # not .to(dtype): that would round the rotary frequencies, too
        parameter.data = parameter.data.to(dtype)
    rounded.config.dtype = dtype
    # The parent's own is copied byte for byte below; transformers refuses to write some that it reads.
    rounded.generation_config = GenerationConfig.from_model_config(rounded.config)
    rounded.save_pretrained(folder, max_shard_size="4GB")
    if companions is not None:
        copy_companions(companions, folder)
    result: nn.Module = rounded
    return result


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template, generation config and licence files unchanged."""
    for pattern in _COMPANIONS:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, target / file.name)


def stored_dtype(source: ModelSource) -> torch.dtype:
    """The dtype that the weights are stored in (float32 for GGUF files, which store mixtures)."""
    dtype = None if source.gguf_file else getattr(load_config(source), "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."))
    return dtype or torch.float32


def fingerprint(source: ModelSource) -> str:
    """sha256 over the names and contents of config, weights and tokenizer."""
    digest = hashlib.sha256()
    patterns = ["config.json", "*.safetensors", "*.model", *_COMPANIONS]
    files = {file for pattern in patterns for file in source.folder.glob(pattern) if file.is_file()}
    for file in [source.folder / source.gguf_file] if source.gguf_file else sorted(files):
        digest.update(f"{file.name}:{file_sha256(file)}\n".encode())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cause(source: ModelSource, error: Exception) -> str:
    if source.gguf_file and isinstance(error, ImportError):
        return "reading GGUF files needs `pip install 'cascade-distill[gguf]'`"
    return str(error)


def _builtin(name: str) -> Path:
    folder = BUILTIN_FOLDER / name
    if not (folder / "config.json").is_file():
        known = sorted(path.parent.name for path in BUILTIN_FOLDER.glob("*/config.json"))
        raise UserError(f"builtin:{name}: no such built-in model; known: {', '.join(known) or 'none'}")
    return folder


def _require_safetensors(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json; this is not a Hugging Face model folder")
    if not any(folder.glob("*.safetensors")):
        others = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        found = f" (found {', '.join(others)}, which can run code when read)" if others else ""
        raise UserError(
            f"{folder}: no safetensors weights{found}. Convert the model once with "
            "transformers' save_pretrained, in a place you trust."
        )
    check_model_folder(folder)


def _fetched(repository: str, revision: str | None) -> Path:
    folder = fetch(repository, revision)
    _require_safetensors(folder)
    return folder


def _load_gguf(source: ModelSource, dtype: torch.dtype) -> nn.Module:
    """A GGUF file through transformers' reader, as a plain model (the reader's own counts as quantised)."""
    read: Any = AutoModelForCausalLM.from_pretrained(source.folder, gguf_file=source.gguf_file, dtype=dtype)
    values = read.config.to_dict()
    values.pop("quantization_config", None)
    config = type(read.config)(**values)
    config.architectures = [type(read).__name__]
    plain: Any = type(read)(config).to(dtype)
    plain.load_state_dict(read.state_dict(), strict=True)
    plain.generation_config = read.generation_config
    result: nn.Module = plain.eval()
    return result
