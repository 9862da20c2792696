"""Whole numbers in few bits, and back, many at a time.

Shapes: M = numbers.
"""

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Integers = NDArray[np.int64]


def pack_rising(values: Integers, universe: int) -> bytes:
    """Numbers 0 <= v < universe in rising order, in about 2 + log2(universe / M) bits each.

    Elias and Fano's code (https://doi.org/10.1145/321812.321820): the low bits side by side, the high ones as steps.
    """
    count = len(values)
    low = _low_bits(count, universe)
    bits = ((values[:, None] >> np.arange(low)) & 1).astype(np.uint8)
    steps = np.zeros(_num_steps(count, universe), dtype=np.uint8)
    steps[(values >> low) + np.arange(count)] = 1
    return np.packbits(bits, bitorder="little").tobytes() + np.packbits(steps, bitorder="little").tobytes()


def unpack_rising(data: Bytes, count: int, universe: int) -> Integers:
    """[M]: what `pack_rising` packed into `data`, of `rising_size` bytes."""
    low = _low_bits(count, universe)
    size = -(-count * low // 8)
    high = np.flatnonzero(np.unpackbits(data[size:], count=_num_steps(count, universe), bitorder="little"))
    return ((high[:count] - np.arange(count)) << low) | _unpack_fixed(data[:size], count, low)


def rising_size(count: int, universe: int) -> int:
    """Bytes that `pack_rising` needs for so many numbers."""
    return -(-count * _low_bits(count, universe) // 8) - (-_num_steps(count, universe) // 8)


def pack_marks(places: Integers, length: int) -> bytes:
    """A bit for each of `length` places, set at these."""
    marks = np.zeros(length, dtype=np.uint8)
    marks[places] = 1
    return np.packbits(marks, bitorder="little").tobytes()


def unpack_marks(data: Bytes, length: int) -> Integers:
    """The places that `pack_marks` marked."""
    return np.flatnonzero(np.unpackbits(data, count=length, bitorder="little"))


def _low_bits(count: int, universe: int) -> int:
    return max(0, (universe // max(1, count)).bit_length() - 1)


def _num_steps(count: int, universe: int) -> int:
    return count + (max(0, universe - 1) >> _low_bits(count, universe)) + 1


def _unpack_fixed(data: Bytes, count: int, width: int) -> Integers:
    """[M] numbers of `width` bits each, one after another; each is read as a part of the 8 bytes that it starts in."""
    if width == 0 or count == 0:
        return np.zeros(count, dtype=np.int64)
    padded = np.concatenate([data, np.zeros(8, dtype=np.uint8)])
    words = np.ndarray((len(padded) - 7,), dtype="<u8", buffer=padded, strides=(1,))
    starts = np.arange(count, dtype=np.int64) * width
    fields = (words[starts >> 3] >> (starts & 7).astype(np.uint64)) & np.uint64((1 << width) - 1)
    numbers: Integers = fields.astype(np.int64)
    return numbers
