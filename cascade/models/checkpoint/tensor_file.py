"""safetensors files read with `safe_open` and written in order, one tensor at a time: memory stays that of one tensor.

Files that are larger than memory are written here, as safetensors' own `save_file` takes all tensors at once.
"""

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cascade.models.checkpoint.file_header import DTYPES, check_header, read_header
from cascade.runtime.errors import UserError
from cascade.runtime.files import read_json

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The file of weights, and the list of shards where there are several."""


@dataclass(frozen=True)
class Entry:
    """One tensor in a checkpoint."""

    path: Path
    name: str
    """As the file calls it."""
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return _size(self.shape, self.dtype)

    def read(self) -> Tensor:
        """The tensor, mapped from its file: bytes are read when they are looked at, and take no memory of the process.

        Raises:
            UserError: the file has become damaged since, or no longer has this tensor.
        """
        with opened(self.path) as file:
            tensor: Tensor = file.get_tensor(self.name)
        if tensor.dtype != self.dtype or tuple(tensor.shape) != self.shape:
            raise UserError(f"{self.path}: '{self.name}' has changed while it was in use; run the same command again")
        return tensor


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file as `safe_open` reads it into torch tensors; its errors name the file and what is wrong in it.

    Raises:
        UserError: the file is damaged, cut off, or lacks what is read from it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        check_header(path)  # says more, where the header is what is wrong
        raise UserError(f"{path}: {error}; the file is damaged") from error


def sort_metadata(path: Path) -> None:
    """Sort a file's metadata in place, so that equal content is equal bytes: the library writes it in any order.

    For files that nobody reads yet.
    """
    header, data_bytes = read_header(path)
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    length = path.stat().st_size - 8 - data_bytes
    if len(text) > length:
        raise ValueError(f"{path}: its header is not written as expected")
    with path.open("r+b") as file:
        file.seek(8)
        file.write(text.ljust(length))  # the format pads with spaces


def checkpoint_entries(folder: Path) -> dict[str, Entry]:
    """Every tensor of a checkpoint folder by name, from the headers alone, in the order in which they lie in the files.

    Raises:
        UserError: a header is damaged, or says something that the file cannot hold.
    """
    index, single = folder / INDEX, folder / SINGLE
    if single.is_file():  # as transformers does, also where an index lies beside it
        paths = {single}
    elif index.is_file():
        paths = {folder / str(name) for name in read_json(index)["weight_map"].values()}
    else:  # what else lies there, such as a copy in another format, is not the model
        raise UserError(f"{folder}: neither {SINGLE} nor {INDEX}")
    entries: dict[str, Entry] = {}
    for path in sorted(paths):
        for name, entry in entries_of(path):
            if name in entries:
                raise UserError(f"{path}: '{name}' is also in {entries[name].path.name}")
            entries[name] = entry
    return entries


def write_checkpoint(
    folder: Path,
    tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype]],
    values: Iterator[tuple[str, Tensor]],
    *,
    max_shard_bytes: int,
) -> None:
    """Write shards named as transformers names them, with their index; `values` come in the order of `tensors`."""
    shards: list[list[tuple[str, tuple[int, ...], torch.dtype]]] = [[]]
    shard_bytes = 0
    for name, shape, dtype in tensors:
        size = _size(shape, dtype)
        if shards[-1] and shard_bytes + size > max_shard_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append((name, shape, dtype))
        shard_bytes += size
    file_names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    )
    for file_name, shard in zip(file_names, shards, strict=True):
        _write_shard(folder / file_name, shard, values)
    if len(shards) > 1:
        total = sum(_size(shape, dtype) for shard in shards for _, shape, dtype in shard)
        weight_map = {name: file for file, shard in zip(file_names, shards, strict=True) for name, _, _ in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def entries_of(path: Path) -> Iterator[tuple[str, Entry]]:
    """(name, entry) of every tensor of one file, from its header alone, in the order in which their bytes lie there.

    Raises:
        UserError: the header is damaged, or says something that the file cannot hold.
    """
    with opened(path) as file:
        for name in file.offset_keys():
            tensor = file.get_slice(name)
            if tensor.get_dtype() not in DTYPES:
                raise UserError(f"{path}: '{name}' has dtype {tensor.get_dtype()}; known: {', '.join(DTYPES)}")
            yield name, Entry(path, name, DTYPES[tensor.get_dtype()], tuple(tensor.get_shape()))


def _size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return dtype.itemsize * math.prod(shape)


def _write_shard(
    path: Path, shard: list[tuple[str, tuple[int, ...], torch.dtype]], values: Iterator[tuple[str, Tensor]]
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape, dtype in shard:
        size = _size(shape, dtype)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for expected, shape, dtype in shard:
            name, tensor = next(values)
            if (name, tuple(tensor.shape), tensor.dtype) != (expected, shape, dtype):
                raise ValueError(
                    f"'{name}' {tuple(tensor.shape)} {tensor.dtype} where '{expected}' {shape} {dtype} was due"
                )
            flat = tensor.contiguous().view(-1)
            file.write(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
            del tensor, flat  # before the next is read
