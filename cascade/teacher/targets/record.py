"""One window's targets as bytes: ids drawn and how often, the likeliest ids, or hidden states.

Shapes: T = tokens of a window that count, n = draws, E = ids whose probability is kept exactly, K = ids of a token at
most, M = ids of all its tokens, D = the teacher's hidden size, V = vocabulary.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cascade.data.token_targets import DrawnTargets, ListedTargets
from cascade.runtime.errors import UserError
from cascade.teacher.targets.bit_packing import Bytes, pack_marks, pack_rising, rising_size, unpack_marks, unpack_rising
from cascade.teacher.targets.sampling import Sample
from cascade.teacher.targets.shards import Windows

KINDS = ("sampled", "top_k", "hidden")
_PER_NAT = 2048
"""Log-probabilities of the likeliest ids are kept in steps of 1 / 2048 nat, from 0 to 32 nats down."""


@dataclass(frozen=True)
class Layout:
    """What a record has of each token, and how it is packed: all that is needed to read records."""

    kind: str
    """One of `KINDS`."""
    vocab_size: int
    draws: int = 0
    """sampled"""
    exact_ids: tuple[int, ...] = ()
    """sampled: ids whose probability is kept as it is, drawn or not."""
    top_k: int = 0
    """top_k"""
    hidden_size: int = 0
    """hidden"""
    dtype: str = ""
    """hidden: bfloat16, or int8 with a scale per token."""
    points: tuple[int, ...] = ()
    """hidden: the layers whose input is kept besides (the number of layers: what leaves the last)."""
    version: int = 2
    """sampled and top_k: 1 has the log-probability of what follows in each record, and sampled the logits' logsumexp,
    which no training reads."""

    def as_dict(self) -> dict[str, Any]:
        """The layout as a root's record has it: what its kind needs, and no version where there was none yet."""
        versioned = self.kind != "hidden" and self.version > 1
        return {name: option for name, option in asdict(self).items() if option and (name != "version" or versioned)}

    def content(self) -> dict[str, Any]:
        """The part that the trainings which read it depend on: the same however records are packed."""
        return {name: option for name, option in self.as_dict().items() if name != "version"}


def require_layout(windows: Windows, layout: Layout) -> None:
    """Refuse to read or write records by another layout than their root's.

    Raises:
        UserError: the layouts differ.
    """
    of_root, expected = windows.targets(), json.loads(json.dumps(layout.as_dict()))
    if of_root != expected:
        raise UserError(f"{windows.folder}: keeps {of_root}, not {expected}; open the root of this layout")


def pack_sample(layout: Layout, sample: Sample, target_log_p: Tensor) -> bytes:
    """A window's record from a sample of its T tokens."""
    ids = sample.ids.cpu().numpy()
    tokens, draws = ids.shape
    ends = np.ones((tokens, draws), dtype=bool)
    ends[:, :-1] = ids[:, 1:] != ids[:, :-1]
    last = np.flatnonzero(ends)
    values = ids.reshape(-1)[last] + (last // draws) * layout.vocab_size
    stats = [_bytes(sample.entropy, torch.float16), _bytes(sample.exact_p, torch.float32)]
    if layout.version == 1:
        stats.insert(0, _bytes(target_log_p, torch.float32))
        stats.insert(2, _bytes(sample.logsumexp, torch.float16))
    count = np.array([len(values)], dtype="<u4").tobytes()
    marks = pack_marks(last, tokens * draws)
    return b"".join([count, *stats, marks, pack_rising(values, tokens * layout.vocab_size)])


def unpack_sample(layout: Layout, data: Bytes, tokens: int) -> DrawnTargets:
    """[T, K]: a window's sample; ids that are kept exactly come first."""
    if tokens == 0:
        nothing = torch.zeros(0, 1)
        return DrawnTargets(nothing.to(torch.int32), nothing, torch.zeros(0))
    cursor = _Cursor(data)
    count = int(cursor.take("<u4", 1)[0])
    if layout.version == 1:
        cursor.take("<f4", tokens)
    entropy = cursor.take("<f2", tokens)
    if layout.version == 1:
        cursor.take("<f2", tokens)
    exact = cursor.take("<f4", tokens * len(layout.exact_ids)).reshape(tokens, -1)
    last = unpack_marks(cursor.rest(-(-tokens * layout.draws // 8)), tokens * layout.draws)
    values = unpack_rising(
        cursor.rest(rising_size(count, tokens * layout.vocab_size)), count, tokens * layout.vocab_size
    )
    cursor.require_end()
    token, ids = np.divmod(values, layout.vocab_size)
    if len(last) != count or (last // layout.draws != token).any():
        raise ValueError("draws and ids do not belong together")
    num_exact, listed = len(layout.exact_ids), np.bincount(token, minlength=tokens)
    first = np.cumsum(listed) - listed
    place = num_exact + np.arange(count) - first[token]
    left = (1 - exact.sum(1)) / layout.draws
    width = num_exact + int(listed.max(initial=0))
    ids_TK = np.full((tokens, width), -1, dtype=np.int32)
    shares_TK = np.zeros((tokens, width), dtype=np.float32)
    ids_TK[:, :num_exact], shares_TK[:, :num_exact] = layout.exact_ids, exact
    ids_TK[token, place] = ids
    shares_TK[token, place] = np.diff(last, prepend=-1) * left[token]
    parts = (torch.from_numpy(part) for part in (ids_TK, shares_TK, entropy.astype(np.float32)))
    return DrawnTargets(*parts)


def pack_top(layout: Layout, ids: Tensor, log_p: Tensor, target_log_p: Tensor) -> bytes:
    """A window's record from the likeliest ids [T, K] of its tokens and their log-probabilities."""
    ids, order = ids.sort(-1)
    values = ids.cpu().numpy() + np.arange(len(ids))[:, None] * layout.vocab_size
    steps = (-log_p.gather(-1, order) * _PER_NAT).round().clamp(0, 65535)
    packed_steps = steps.cpu().numpy().astype("<u2").tobytes()
    first = _bytes(target_log_p, torch.float32) if layout.version == 1 else b""
    return first + packed_steps + pack_rising(values.reshape(-1), len(ids) * layout.vocab_size)


def unpack_top(layout: Layout, data: Bytes, tokens: int) -> ListedTargets:
    """[T, K]: a window's likeliest ids."""
    if tokens == 0:
        nothing = torch.zeros(0, layout.top_k)
        return ListedTargets(nothing.to(torch.int32), nothing)
    cursor, count = _Cursor(data), tokens * layout.top_k
    if layout.version == 1:
        cursor.take("<f4", tokens)
    steps = cursor.take("<u2", count).astype(np.float32)
    values = unpack_rising(
        cursor.rest(rising_size(count, tokens * layout.vocab_size)), count, tokens * layout.vocab_size
    )
    cursor.require_end()
    ids = (values % layout.vocab_size).astype(np.int32).reshape(tokens, layout.top_k)
    return ListedTargets(torch.from_numpy(ids), torch.from_numpy(-steps.reshape(ids.shape) / _PER_NAT))


def pack_hidden(layout: Layout, hidden: Tensor, points: dict[int, Tensor]) -> bytes:
    """A window's record from [T, D] hidden states."""
    parts = [hidden, *(points[number] for number in layout.points)]
    return b"".join(_pack_states(layout, part) for part in parts)


def unpack_hidden(layout: Layout, data: Bytes, tokens: int) -> list[Tensor]:
    """[T, D] each: what the head reads, then the layers' points; bfloat16, or float32 where they were kept as int8."""
    cursor = _Cursor(data)
    states = [_unpack_states(layout, cursor, tokens) for _ in range(1 + len(layout.points))]
    cursor.require_end()
    return states


def through_record(layout: Layout, hidden: Tensor) -> Tensor:
    """[T, D] float32: hidden states as a record gives them back, with its rounding."""
    packed = np.frombuffer(_pack_states(layout, hidden), dtype=np.uint8)
    return _unpack_states(layout, _Cursor(packed), len(hidden)).float().to(hidden.device)


def _pack_states(layout: Layout, states: Tensor) -> bytes:
    if layout.dtype == "bfloat16":
        return states.to(torch.bfloat16).contiguous().view(torch.uint8).cpu().numpy().tobytes()
    scale = states.float().abs().amax(-1).clamp_min(1e-30) / 127
    return _bytes(scale, torch.float32) + _bytes((states.float() / scale[:, None]).round(), torch.int8)


def _unpack_states(layout: Layout, cursor: "_Cursor", tokens: int) -> Tensor:
    size = tokens * layout.hidden_size
    if layout.dtype == "bfloat16":
        return torch.from_numpy(cursor.take("<i2", size).copy()).view(torch.bfloat16).view(tokens, layout.hidden_size)
    scale = torch.from_numpy(cursor.take("<f4", tokens).copy())
    return torch.from_numpy(cursor.take("<i1", size).copy()).view(tokens, layout.hidden_size) * scale[:, None]


def _bytes(values: Tensor, dtype: torch.dtype) -> bytes:
    return values.to(dtype).contiguous().cpu().numpy().tobytes()


class _Cursor:
    """Reads a record from its start to its end."""

    def __init__(self, data: Bytes) -> None:
        self.data, self.at = data, 0

    def rest(self, size: int) -> Bytes:
        if self.at + size > len(self.data):
            raise ValueError(f"a record of {len(self.data)} bytes ends before byte {self.at + size}")
        self.at += size
        return self.data[self.at - size : self.at]

    def take(self, dtype: str, count: int) -> NDArray[Any]:
        return self.rest(count * np.dtype(dtype).itemsize).view(dtype)

    def require_end(self) -> None:
        if self.at != len(self.data):
            raise ValueError(f"a record of {len(self.data)} bytes has {len(self.data) - self.at} too many")
