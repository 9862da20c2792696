"""A training's targets, read from the cache block by block, the next step's while this one computes.

Shapes: N = blocks, P = places of a block that predict, T = those that count, K = ids at a place, at most,
D = the teacher's hidden size.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor
from torch.nn.functional import pad

from cascade.data.blocks import IGNORE_INDEX, TokenBlocks
from cascade.data.token_targets import DrawnTargets, HiddenTargets, KnownTargets, ListedTargets, StoredTargets
from cascade.models.architecture.head import Head
from cascade.runtime.errors import RunError
from cascade.teacher.targets.keys import window_keys
from cascade.teacher.targets.record import Layout, require_layout, unpack_hidden, unpack_sample, unpack_top
from cascade.teacher.targets.shards import Windows

_Parts = tuple[Tensor, ...]


class CachedTargets:
    """What is kept of a teacher for these blocks.

    `head` is the teacher's, for hidden states; on the device that trains.
    """

    def __init__(self, windows: Windows, layout: Layout, blocks: TokenBlocks, head: Head | None = None) -> None:
        require_layout(windows, layout)
        if layout.kind == "hidden" and head is None:
            raise ValueError("hidden states need the teacher's head")
        self.windows, self.layout, self.blocks, self.head = windows, layout, blocks, head
        self._keys: dict[int, bytes] = {}
        self._reads = ThreadPoolExecutor(1, "targets")
        self._ahead: dict[int, Future[_Parts]] = {}

    @property
    def name(self) -> str:
        """The root's: of what all targets depend on."""
        return self.windows.root

    def of(self, rows: Tensor) -> StoredTargets:
        """Of the blocks of these numbers, to be read when they are needed."""
        return StoredTargets(rows, self.read)

    def ahead(self, now: Tensor, after: Tensor) -> None:
        """Begin to read the blocks of this step and of the next; what was read for earlier ones is forgotten.

        What is not there any more when the next step does not come about is no error.
        """
        there = [row for row in after.tolist() if self._key(row) in self.windows]
        wanted = dict.fromkeys([*now.tolist(), *there])
        self._ahead = {row: self._ahead.get(row) or self._reads.submit(self._parts, row) for row in wanted}

    def read(self, rows: Tensor) -> KnownTargets:
        """The targets of these blocks.

        Raises:
            RunError: one is missing or damaged.
        """
        parts = [self._ahead[row].result() if row in self._ahead else self._parts(row) for row in rows.tolist()]
        if self.layout.kind == "sampled":
            return DrawnTargets(*_stacked(parts, (-1, 0.0, 0.0)))
        if self.layout.kind == "top_k":
            ids, log_p = _stacked(parts, (-1, -torch.inf))
            if not self.blocks.masked:  # of the token that stands there, as labels are
                ids, log_p = pad(ids, (0, 0, 1, 0), value=-1), pad(log_p, (0, 0, 1, 0), value=-torch.inf)
            return ListedTargets(ids, log_p)
        if self.head is None:
            raise ValueError("hidden states need the teacher's head")
        states = [torch.stack(column) for column in zip(*parts, strict=True)]
        return HiddenTargets(states[0], self.head, dict(zip(self.layout.points, states[1:], strict=True)))

    def _key(self, row: int) -> bytes:
        if row not in self._keys:
            self._keys[row] = window_keys(self.blocks.rows(torch.tensor([row])))[0]
        return self._keys[row]

    def _parts(self, row: int) -> _Parts:
        """One block's targets at its P places."""
        counts = self.blocks.rows(torch.tensor([row])).targets()[0] != IGNORE_INDEX
        record, tokens = self.windows.read(self._key(row)), int(counts.sum())
        if record is None:
            raise RunError(
                f"{self.windows.folder}: what was kept of block {row} is missing or damaged; run the same command "
                "again: it is labelled anew, and the training goes on from its last state"
            )
        found: Sequence[Tensor]
        empty: tuple[float, ...]
        if self.layout.kind == "sampled":
            drawn = unpack_sample(self.layout, record, tokens)
            found, empty = (drawn.ids, drawn.shares, drawn.entropy), (-1, 0, 0)
        elif self.layout.kind == "top_k":
            top = unpack_top(self.layout, record, tokens)
            found, empty = (top.ids, top.log_p), (-1, -torch.inf)
        else:
            found = unpack_hidden(self.layout, record, tokens)
            empty = (0,) * len(found)
        if tokens == len(counts):
            return tuple(found)
        return tuple(_placed(part, counts, value) for part, value in zip(found, empty, strict=True))


def _placed(part: Tensor, counts: Tensor, empty: float) -> Tensor:
    """[P, ...]: [T, ...] put where tokens count."""
    whole = torch.full((len(counts), *part.shape[1:]), empty, dtype=part.dtype)
    whole[counts] = part
    return whole


def _stacked(parts: Sequence[_Parts], empty: Sequence[float]) -> list[Tensor]:
    """[N, P, ...] each: blocks whose last axes differ are filled up."""
    stacked = []
    for column, value in zip(zip(*parts, strict=True), empty, strict=True):
        if column[0].ndim > 1:
            width = max(one.shape[-1] for one in column)
            column = tuple(pad(one, (0, width - one.shape[-1]), value=value) for one in column)
        stacked.append(torch.stack(column))
    return stacked
