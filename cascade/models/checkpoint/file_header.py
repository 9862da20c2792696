"""The header of a safetensors file, read by hand, to judge the file before a library opens it.

Tensors are read with `safe_open` (`tensor_file`). This reader stays for what `safe_open` does not do: it accepts two
tensors of the same name and keeps the last, where other readers keep the first; and its errors name neither the file
nor, mostly, the tensor. `tensor_file.sort_metadata` needs it, too: the library writes metadata in any order.

The format: 8 bytes of header length (little-endian), a JSON header with dtype, shape and place of each tensor, data.
"""

import json
from pathlib import Path
from typing import Any

import torch

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
"""The format's names of the dtypes that are read and written here."""

_MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
_MAX_DIMS, _MAX_ELEMENTS = 16, 1 << 48


def check_header(path: Path) -> None:
    """Refuse a safetensors file whose header is not exactly what the format allows.

    The bytes of every tensor are as many as its shape takes, tensors follow each other without holes or overlaps, and
    they fill the file.

    Raises:
        UserError: the file is damaged, cut off, or made to deceive; with its name and the first place that is wrong.
    """
    header, data_bytes = read_header(path)
    places = sorted(_place(path, name, entry) for name, entry in header.items() if name != "__metadata__")
    end = 0
    for start, stop, name in places:
        if start != end:
            raise UserError(f"{path}: '{name}' begins at byte {start:,}, where {end:,} is due; the file is damaged")
        end = stop
    if end != data_bytes:
        raise UserError(f"{path}: its tensors have {end:,} bytes, the file holds {data_bytes:,}; it is damaged")


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header's table, in the file's order, and the number of bytes behind the header.

    Raises:
        UserError: the header is longer than the file or the format allows, is no JSON table, or has a name twice.
    """
    total = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if total < 8 or length > min(_MAX_HEADER_BYTES, total - 8):
            raise UserError(f"{path}: its header claims {length:,} bytes, the file has {total:,}; it is damaged")
        try:
            header = json.loads(file.read(length), object_pairs_hook=unique_names)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: its header cannot be read: {error}") from error
    if not isinstance(header, dict):
        raise UserError(f"{path}: its header is no table of tensors; it is damaged")
    return header, total - 8 - length


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON table for `object_pairs_hook`: of two entries with the same name, different readers take different ones.

    Raises:
        ValueError: a name stands twice.
    """
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name stands twice")
    return table


def _place(path: Path, name: str, entry: Any) -> tuple[int, int, str]:
    """(first byte, byte behind the last, name) of a tensor, counted from the end of the header.

    Raises:
        UserError: the entry is malformed, or its bytes are not as many as its shape takes.
    """
    try:
        (start, stop), shape, dtype = entry["data_offsets"], entry["shape"], entry["dtype"]
        sound = all(type(number) is int and number >= 0 for number in (start, stop, *shape))
        if not sound or not isinstance(dtype, str) or len(shape) > _MAX_DIMS or start > stop:
            raise ValueError
        elements = 1
        for length in shape:
            elements *= length
            if elements > _MAX_ELEMENTS:
                raise ValueError
        if (elements == 0) != (start == stop):
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: what it says of '{name}' cannot be; the file is damaged") from error
    if dtype in DTYPES and elements * DTYPES[dtype].itemsize != stop - start:
        place = f"[{start}, {stop})"
        raise UserError(f"{path}: '{name}' {tuple(shape)} does not fit its place {place}; the file is damaged")
    return start, stop, name
