"""safetensors files read by position and written in order, one tensor at a time: memory stays that of one tensor.

The format: 8 bytes of header length (little-endian), a JSON header with dtype, shape and place of each tensor, data.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade.runtime.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The file of weights, and the list of shards where there are several."""


@dataclass(frozen=True)
class Entry:
    """One tensor in a checkpoint."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Byte in the file."""
    size: int
    """Bytes."""

    def read(self) -> Tensor:
        """The tensor, in memory of its own."""
        data = bytearray(self.size)
        view, done = memoryview(data), 0
        with self.path.open("rb", buffering=0) as file:
            while done < self.size:
                count = os.preadv(file.fileno(), [view[done : done + (1 << 26)]], self.start + done)
                if count == 0:
                    raise UserError(f"{self.path}: ends before its tensor data does; the file is cut off")
                done += count
        if not data:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(data, dtype=self.dtype).view(self.shape)


def sort_metadata(path: Path) -> None:
    """Put a file's metadata into an order: the library writes it in any, and equal content should be equal bytes.

    In place, for files that nobody reads yet.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            raise ValueError(f"{path}: its header is not written as expected")
        file.seek(8)
        file.write(text.ljust(length))  # the format pads with spaces


def checkpoint_entries(folder: Path) -> dict[str, Entry]:
    """Every tensor of a checkpoint folder by name, from the headers alone.

    Raises:
        UserError: a header is damaged, or says something that the file cannot hold.
    """
    index, single = folder / INDEX, folder / SINGLE
    if single.is_file():  # as transformers does, also where an index lies beside it
        paths = {single}
    elif index.is_file():
        paths = {folder / str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
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
    """Shards named as transformers does, with their index; `values` come in the order of `tensors`."""
    shards: list[list[tuple[str, tuple[int, ...], torch.dtype]]] = [[]]
    held = 0
    for item in tensors:
        size = _size(item[1], item[2])
        if shards[-1] and held + size > max_shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(item)
        held += size
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    )
    for file_name, shard in zip(names, shards, strict=True):
        _write_shard(folder / file_name, shard, values)
    if len(shards) > 1:
        total = sum(_size(shape, dtype) for shard in shards for _, shape, dtype in shard)
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name, _, _ in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def entries_of(path: Path) -> Iterator[tuple[str, Entry]]:
    """(name, entry) of every tensor of one file, from its header alone.

    Raises:
        UserError: the header is damaged, or says something that the file cannot hold.
    """
    total = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(_MAX_HEADER, total - 8):
            raise UserError(f"{path}: its header claims {length:,} bytes, the file has {total:,}; it is damaged")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
        except ValueError as error:
            raise UserError(f"{path}: its header cannot be read: {error}") from error
    for name, record in header.items():
        if name == "__metadata__":
            continue
        if record["dtype"] not in DTYPES:
            raise UserError(f"{path}: '{name}' has dtype {record['dtype']}; known: {', '.join(DTYPES)}")
        start, end = record["data_offsets"]
        shape, dtype = tuple(record["shape"]), DTYPES[record["dtype"]]
        if not 0 <= start <= end <= total - 8 - length or end - start != _size(shape, dtype):
            raise UserError(f"{path}: '{name}' {shape} does not fit its place [{start}, {end}); the file is damaged")
        yield name, Entry(path, dtype, shape, 8 + length + start, end - start)


def _size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    count = dtype.itemsize
    for length in shape:
        count *= length
    return count


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
            name, value = next(values)
            if (name, tuple(value.shape), value.dtype) != (expected, shape, dtype):
                raise ValueError(
                    f"'{name}' {tuple(value.shape)} {value.dtype} where '{expected}' {shape} {dtype} was due"
                )
            flat = value.contiguous().view(-1)
            file.write(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
            del value, flat
