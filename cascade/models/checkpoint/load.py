"""Finding, checking, loading and saving Hugging Face checkpoints. safetensors (or GGUF) only, no remote code."""

import copy
import hashlib
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from cascade.models.architecture.model_class import model_class_of
from cascade.models.architecture.vocabulary import require_embedded
from cascade.models.checkpoint.contents import WeightMatch, match_weights
from cascade.models.checkpoint.gguf_file import check_gguf
from cascade.models.checkpoint.hub import fetch
from cascade.models.checkpoint.loading_messages import relay_warnings, require_whole, tell_once
from cascade.models.checkpoint.older_keys import add_older_keys
from cascade.models.checkpoint.quantised import is_rounded, unpacked
from cascade.models.checkpoint.revision import COMMIT
from cascade.models.checkpoint.safety import check_model_folder, check_settings
from cascade.models.checkpoint.tensor_file import checkpoint_entries
from cascade.models.checkpoint.value_range import require_held
from cascade.models.checkpoint.weight_files import check_weight_files, refuse_adapters
from cascade.runtime.errors import UserError
from cascade.runtime.file_digests import sha256_once

_LOADING_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    ImportError,
    AttributeError,
    TypeError,
    SafetensorError,
)
"""Errors that transformers raises about a checkpoint that it cannot load."""

BUILTIN_FOLDER = Path(__file__).parents[1] / "builtin"

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
        with relay_warnings(source.reference):
            return AutoConfig.from_pretrained(
                source.folder, gguf_file=source.gguf_file or None, trust_remote_code=False
            )
    except Exception as error:  # whatever its values make transformers trip over
        raise UserError(f"{source.reference}: its config cannot be read: {_cause(source, error)}") from error


def load_tokenizer(source: ModelSource, *, vocab_size: int | None = None) -> Any:
    """The tokenizer; checked against the model's vocabulary where `vocab_size` is given.

    Raises:
        UserError: the folder has no tokenizer, or the model's embedding lacks some of its ids (`require_embedded`).
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.folder, gguf_file=source.gguf_file or None, trust_remote_code=False
        )
    except Exception as error:  # as for the config; and the tokenizers library has no class for its errors
        raise UserError(f"{source.reference}: its tokenizer cannot be read: {_cause(source, error)}") from error
    if vocab_size is not None:
        require_embedded(tokenizer, vocab_size, source.reference)
    return tokenizer


def check_weights(source: ModelSource, config: Any, *, new_head: bool = False) -> WeightMatch:
    """The weights matched with the architecture, from headers alone; warns once of tensors that are rightly not read.

    Raises:
        UserError: the checkpoint is not exactly what its config asks for; with what differs.
    """
    if source.gguf_file is None:
        match = match_weights(source.folder, config, source.reference, new_head=new_head)
    else:
        try:
            match = WeightMatch({}, check_gguf(source.folder / source.gguf_file, config, source.reference))
        except ImportError as error:
            raise UserError(f"{source.reference}: the model cannot be loaded: {_cause(source, error)}") from error
    for note in match.notes:
        tell_once(note)
    return match


def load_model(source: ModelSource, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model, of the class that its config names, in evaluation mode, in `dtype` whatever it is stored in.

    Weights that torchao has rounded are plain ones here, of the same values.

    Raises:
        UserError: the model cannot be loaded, or the checkpoint is not exactly what its config asks for.
    """
    model: nn.Module
    config = load_config(source)
    match = check_weights(source, config)
    try:
        with relay_warnings(source.reference):
            if source.gguf_file:
                return _load_gguf(source, dtype)
            rounded = is_rounded(config)
            model, report = model_class_of(config).from_pretrained(
                source.folder, dtype="auto" if rounded else dtype, use_safetensors=True, output_loading_info=True
            )
    except _LOADING_ERRORS as error:
        raise UserError(f"{source.reference}: the model cannot be loaded: {_cause(source, error)}") from error
    require_whole(report, source.reference, left_out=match.left_out, absent=match.absent)
    return (unpacked(model, dtype) if rounded else model).eval()


def load_with_new_head(source: ModelSource, config: Any) -> nn.Module:
    """The body of a model under a new, random head of `config`, in float32.

    Raises:
        UserError: more than the head is missing, or of another shape.
    """
    kind = model_class_of(config)
    match = check_weights(source, config, new_head=True)
    try:
        with relay_warnings(source.reference):
            model, report = kind.from_pretrained(
                source.folder, config=config, dtype=torch.float32, use_safetensors=True, ignore_mismatched_sizes=True,
                output_loading_info=True,
            )  # fmt: skip
    except _LOADING_ERRORS as error:
        raise UserError(f"{source.reference}: the model cannot be loaded: {_cause(source, error)}") from error
    require_whole(report, source.reference, left_out=match.left_out, absent=match.absent)
    result: nn.Module = model
    return result


def save_checkpoint(model: nn.Module, folder: Path, *, companions: Path | None, dtype: torch.dtype) -> nn.Module:
    """Write a stock checkpoint in `dtype`; returns the rounded copy that was written, in `dtype`.

    `companions` is a folder whose tokenizer, chat template, generation config and licence are copied unchanged.

    Raises:
        UserError: `dtype` cannot hold a weight; nothing is written.
    """
    require_held(model.named_parameters(), dtype, str(folder))
    rounded: Any = copy.deepcopy(model)
    for parameter in rounded.parameters():  # not .to(dtype): that would round the rotary frequencies, too
        parameter.data = parameter.data.to(dtype)
    rounded.config.dtype = dtype
    # The parent's generation config is copied byte for byte below; transformers refuses to write some that it reads.
    rounded.generation_config = GenerationConfig.from_model_config(rounded.config)
    rounded.save_pretrained(folder, max_shard_size="4GB")
    add_older_keys(folder)
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
    """The dtype that most bytes of the weights are stored in, as their headers say; float32 for GGUF files.

    config.json is no proof: its dtype may be missing, or be that of another save.
    """
    if source.gguf_file:
        return torch.float32
    config = load_config(source)
    if getattr(config, "quantization_config", None):  # packed: the dtype that it computes in
        return _torch_dtype(getattr(config, "dtype", None)) or torch.float32
    sizes: Counter[torch.dtype] = Counter()
    for entry in checkpoint_entries(source.folder).values():
        if entry.dtype.is_floating_point:
            sizes[entry.dtype] += entry.size
    return sizes.most_common(1)[0][0] if sizes else torch.float32


def _torch_dtype(value: Any) -> torch.dtype | None:
    """The dtype that a config names, or holds itself; None where it does neither."""
    if isinstance(value, str):
        value = getattr(torch, value.removeprefix("torch."))
    return value if isinstance(value, torch.dtype) else None


def fingerprint(source: ModelSource) -> str:
    """sha256 over the names and contents of config, weights and tokenizer.

    A run needs it many times and reads each file once (`sha256_once`).
    """
    digest = hashlib.sha256()
    patterns = ["config.json", "*.safetensors", "*.model", *_COMPANIONS]
    files = {file for pattern in patterns for file in source.folder.glob(pattern) if file.is_file()}
    for file in [source.folder / source.gguf_file] if source.gguf_file else sorted(files):
        digest.update(f"{file.name}:{sha256_once(file)}\n".encode())
    return digest.hexdigest()


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
    refuse_adapters(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json; this is not a Hugging Face model folder")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        hint = f" (found {', '.join(pickles)}, which can run code when read)" if pickles else ""
        raise UserError(
            f"{folder}: no safetensors weights{hint}. Convert the model once with "
            "transformers' save_pretrained, in a place you trust."
        )
    check_model_folder(folder)
    check_weight_files(folder)


def _fetched(repository: str, revision: str | None) -> Path:
    folder = fetch(repository, revision)
    _require_safetensors(folder)
    return folder


def _load_gguf(source: ModelSource, dtype: torch.dtype) -> nn.Module:
    """A GGUF file through transformers' reader, as a plain model (the reader's own counts as quantised)."""
    read: Any
    read, report = AutoModelForCausalLM.from_pretrained(
        source.folder, gguf_file=source.gguf_file, dtype=dtype, output_loading_info=True
    )
    require_whole(report, source.reference)
    values = read.config.to_dict()
    values.pop("quantization_config", None)
    config = type(read.config)(**values)
    config.architectures = [type(read).__name__]
    plain: Any = type(read)(config).to(dtype)
    plain.load_state_dict(read.state_dict(), strict=True)
    plain.generation_config = read.generation_config
    result: nn.Module = plain.eval()
    return result
