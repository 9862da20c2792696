"""Which files of a folder are the model's weights: exactly one set, whoever reads it."""

import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import torch

from cascade.models.checkpoint.tensor_file import INDEX, SINGLE, Entry, checkpoint_entries, entries_of
from cascade.runtime.errors import UserError
from cascade.runtime.files import read_json

_SHARD = re.compile(r"(model|pytorch_model)-\d{5}-of-\d{5}\.safetensors")
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_MAX_NAMES = 4


def check_weight_files(folder: Path) -> None:
    """Refuse a folder in which different readers take different weights for the model's.

    transformers takes model.safetensors before shards with an index, other programs the other way round, and with peft
    installed it applies an adapter that lies beside the weights.

    Raises:
        UserError: an adapter, two sets of weights that differ, or shards that the index does not name.
    """
    refuse_adapters(folder)
    names = {path.name for path in folder.glob("*.safetensors")}
    distributed = sorted(name for name in names if _DISTRIBUTED.fullmatch(name))
    if distributed:
        raise UserError(
            f"{folder}: {distributed[0]} is part of a distributed checkpoint, which is not read here; load it with "
            "transformers and save it with save_pretrained in another folder"
        )
    shards = {name for name in names if _SHARD.fullmatch(name)}
    listed = _listed_files(folder)
    if SINGLE in names and (listed | shards) - {SINGLE}:
        if not listed or not _equal_sets(folder, listed):
            raise UserError(
                f"{folder}: holds two sets of weights, {SINGLE} and {listed_names((listed | shards) - {SINGLE})}; "
                "some readers take the one, some the other. Move the one that is not meant elsewhere"
            )
    unlisted = shards - listed
    if unlisted:
        raise UserError(
            f"{folder}: {listed_names(unlisted)}: not named by {INDEX}, so of another save, or left out by mistake. "
            "Move what is not meant elsewhere, or put the index beside the shards that they were saved with"
        )
    if SINGLE not in names and not listed:
        raise UserError(
            f"{folder}: neither {SINGLE} nor {INDEX}, only {listed_names(names)}; no reader knows whether these are "
            "the model's. Give a folder that transformers' save_pretrained has written"
        )


def refuse_adapters(folder: Path) -> None:
    """Refuse a folder with a peft adapter, which some readers apply to the weights beside it and some do not.

    Raises:
        UserError: the folder holds an adapter; with what to do.
    """
    adapters = [name for name in _ADAPTERS if (folder / name).exists()]
    if adapters:
        raise UserError(
            f"{folder}: holds an adapter ({', '.join(adapters)}), which some readers apply to the weights and some do "
            "not. If it is merged into them already, move these files elsewhere; if not, merge it first (peft: "
            "merge_and_unload, then save_pretrained) and give the folder of the merged model"
        )


def equal_values(left: Entry, right: Entry) -> bool:
    """Whether two tensors on disk are the same, in shape and every value."""
    if left.shape != right.shape:
        return False
    if left.dtype != right.dtype:
        return bool(torch.equal(left.read().double(), right.read().double()))
    return _equal_bytes(left, right, left.path.stat().st_mtime_ns, right.path.stat().st_mtime_ns)


def listed_names(names: Iterable[str], limit: int = _MAX_NAMES) -> str:
    """Up to `limit` names in order, and the number of those that are not shown."""
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more


@lru_cache(maxsize=256)
def _equal_bytes(left: Entry, right: Entry, left_time: int, right_time: int) -> bool:
    """The times are those of the files' last change: a file that has changed is compared again."""
    return torch.equal(*(entry.read().flatten().view(torch.uint8) for entry in (left, right)))


def _listed_files(folder: Path) -> set[str]:
    """The files that the index names; none where there is no index."""
    index = folder / INDEX
    if not index.is_file():
        return set()
    return {str(name) for name in read_json(index)["weight_map"].values()}


def _equal_sets(folder: Path, listed: set[str]) -> bool:
    """Whether the shards hold what the single file does, tensor by tensor."""
    single = checkpoint_entries(folder)
    sharded = {name: entry for file in sorted(listed) for name, entry in entries_of(folder / file)}
    return single.keys() == sharded.keys() and all(
        entry.dtype == sharded[name].dtype and equal_values(entry, sharded[name]) for name, entry in single.items()
    )
