"""What a window and a root are named by: contents alone; order, batch, recipe and processes do not matter.

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
from cascade.runtime.files import write_atomically
from cascade.teacher.targets.index import KEY_BYTES
from cascade.teacher.targets.record import Layout
from cascade.teacher.targets.sampling import SAMPLER
from cascade.teacher.targets.shards import Windows, root_folder

logger = logging.getLogger(__name__)

FORMAT = 1
"""Raised when records, keys or checksums are made in another way."""

_MEMO = "weights.json"
_NOT_THE_MODEL = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
"""Of a config: what changes no logit, or is said elsewhere."""


def window_keys(blocks: TokenBlocks) -> list[bytes]:
    """16 bytes a window: of its ids, where its documents start, and which tokens count where not all do."""
    ids, labels = blocks.input_ids.to(torch.int32), blocks.labels.to(torch.int32)
    places = None if blocks.position_ids is None else blocks.position_ids.to(torch.int32)
    all_count = (ids == labels).all(1).tolist()
    keys = []
    for row, plain in enumerate(all_count):
        digest = hashlib.blake2b(b"masked" if blocks.masked else b"causal", digest_size=KEY_BYTES)
        for name, values in (("ids", ids), ("positions", places), ("labels", None if plain else labels)):
            if values is not None:
                digest.update(f"{name}:{values.shape[1]}:".encode() + values[row].numpy().tobytes())
        keys.append(digest.digest())
    return keys


def root_record(
    weights: str, config: Any, tokenizer: Any, layout: Layout, *, dtype: str, attn_implementation: str
) -> dict[str, Any]:
    """All that the targets of a window depend on, but for the window itself and rounding; `weights` is their digest."""
    own = {name: value for name, value in config.to_dict().items() if name not in _NOT_THE_MODEL}
    return {
        "format": FORMAT,  # and `version` in the targets
        "weights": weights,
        "config": _digest(own),
        "model_type": config.model_type,
        "tokenizer": None if tokenizer is None else _digest(tokenizer.get_vocab()),
        "targets": layout.as_dict(),
        "dtype": dtype,
        "attn_implementation": attn_implementation,
        "sampler": SAMPLER if layout.kind == "sampled" else None,
    }


def open_windows(cache: str | Path, teacher: nn.Module, tokenizer: Any, layout: Layout) -> Windows:
    """What is kept in a folder of this very model, by the weights that it has now; nothing yet, where nothing is.

    `label` fills it and `CachedTargets` reads it. Runs name roots by checkpoint files, and so differently.
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
    """sha256 of a checkpoint's tensors by name, whatever files they are in.

    Remembered in the cache's folder by each file's path, size, time and inode; `again` reads them anyway.
    """
    entries = checkpoint_entries(folder)
    files = sorted({entry.path.resolve() for entry in entries.values()})
    stats = [(str(path), path.stat()) for path in files]
    known = json.dumps([(name, one.st_size, one.st_mtime_ns, one.st_ino) for name, one in stats])
    memo = _read_memo(cache / _MEMO)
    if not again and known in memo:
        return memo[known]
    found = tensors_digest((name, entry.read()) for name, entry in sorted(entries.items()))
    try:
        cache.mkdir(parents=True, exist_ok=True)
        write_atomically(cache / _MEMO, json.dumps(_read_memo(cache / _MEMO) | {known: found}, indent=1))
    except OSError as error:  # then they are read again the next time
        logger.warning("%s: the weights' digest is not remembered: %s", cache, error.strerror)
    return found


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 of tensors in the order given: names, dtypes, shapes and contents."""
    digest = hashlib.sha256()
    for name, value in tensors:
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}:".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def default_folder() -> Path:
    """Where runs share their caches, if a recipe names no folder: `cascade/teacher` among the user's caches."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "cascade" / "teacher"


def _read_memo(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
