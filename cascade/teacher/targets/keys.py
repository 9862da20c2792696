"""Names of windows and roots, from contents alone: order, batch, recipe and processes do not matter.

Shapes: N = windows, S = tokens of a window.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cascade.data.blocks import TokenBlocks
from cascade.models.checkpoint.tensor_file import checkpoint_entries
from cascade.runtime.file_digests import changed_just_now
from cascade.runtime.files import read_json, write_atomically
from cascade.teacher.targets.index import KEY_BYTES
from cascade.teacher.targets.record import Layout
from cascade.teacher.targets.sampling import SAMPLER
from cascade.teacher.targets.shards import Windows, root_folder

logger = logging.getLogger(__name__)

FORMAT = 1
"""Raised when records, keys or checksums are made in another way."""

_MEMO = "weights.json"
_NOT_THE_MODEL = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
"""Keys of a config that change no logit, or that a root's record has under another name."""


def window_keys(blocks: TokenBlocks) -> list[bytes]:
    """A digest of 16 bytes per window: of its ids, its documents' starts, and the tokens that count if not all do."""
    ids, labels = blocks.input_ids.to(torch.int32), blocks.labels.to(torch.int32)
    places = None if blocks.position_ids is None else blocks.position_ids.to(torch.int32)
    all_count = (ids == labels).all(1).tolist()
    keys = []
    for row, without_labels in enumerate(all_count):
        digest = hashlib.blake2b(b"masked" if blocks.masked else b"causal", digest_size=KEY_BYTES)
        for name, values in (("ids", ids), ("positions", places), ("labels", None if without_labels else labels)):
            if values is not None:
                digest.update(f"{name}:{values.shape[1]}:".encode() + values[row].numpy().tobytes())
        keys.append(digest.digest())
    return keys


def root_record(
    weights: str, config: Any, tokenizer: Any, layout: Layout, *, dtype: str, attn_implementation: str
) -> dict[str, Any]:
    """All that the targets of a window depend on besides the window and rounding; `weights` is `weights_digest`."""
    model_config = {name: setting for name, setting in config.to_dict().items() if name not in _NOT_THE_MODEL}
    return {
        "format": FORMAT,  # and `version` in the targets
        "weights": weights,
        "config": _digest(model_config),
        "model_type": config.model_type,
        "tokenizer": None if tokenizer is None else _digest(tokenizer.get_vocab()),
        "targets": layout.as_dict(),
        "dtype": dtype,
        "attn_implementation": attn_implementation,
        "sampler": SAMPLER if layout.kind == "sampled" else None,
    }


def open_windows(cache: str | Path, teacher: nn.Module, tokenizer: Any, layout: Layout) -> Windows:
    """The targets that a cache's folder holds of a teacher with these weights; none at first.

    `label` adds to them and `CachedTargets` reads them. Runs name roots by checkpoint files, and so differently.
    """
    model: Any = teacher
    first = next(teacher.parameters())
    record = root_record(
        tensors_digest(sorted(teacher.state_dict().items())),
        model.config,
        tokenizer,
        layout,
        dtype=f"{first.dtype} autocast bfloat16" if first.device.type == "cuda" else f"{first.dtype}",
        attn_implementation=getattr(model.config, "_attn_implementation", None) or "sdpa",
    )
    return Windows(*root_folder(Path(cache), record)).refresh()


def weights_digest(folder: Path, cache: Path, *, again: bool = False) -> str:
    """sha256 of a checkpoint's tensors in the order of their names, however they are split into files.

    The cache's folder remembers it by each file's path, size, inode, time of writing and time of change, of which no
    program can set the last; `again` reads the weights all the same.
    """
    entries = checkpoint_entries(folder)
    files = sorted({entry.path.resolve() for entry in entries.values()})
    stats = [(str(path), path.stat()) for path in files]
    known = json.dumps([(name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino) for name, stat in stats])
    settled = not any(changed_just_now(stat) for _, stat in stats)
    memo = _read_memo(cache / _MEMO)
    if settled and not again and known in memo:
        return memo[known]
    digest = tensors_digest((name, entry.read()) for name, entry in sorted(entries.items()))
    if not settled:
        return digest
    try:
        cache.mkdir(parents=True, exist_ok=True)
        write_atomically(cache / _MEMO, json.dumps(_read_memo(cache / _MEMO) | {known: digest}, indent=1))
    except OSError as error:  # then they are read again the next time
        logger.warning("%s: the weights' digest is not remembered: %s", cache, error.strerror)
    return digest


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 of the names, dtypes, shapes and contents of tensors, in their order."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def default_folder() -> Path:
    """Where runs share their caches, if a recipe names no folder: `cascade/teacher` among the user's caches."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "cascade" / "teacher"


def _read_memo(path: Path) -> dict[str, str]:
    try:
        digests = read_json(path)
    except (OSError, ValueError):
        return {}
    return digests if isinstance(digests, dict) else {}


def _digest(record: Any) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True, default=str).encode()).hexdigest()
