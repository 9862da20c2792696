"""A training's targets, read from the cache block by block, the next step's while this one computes.

Shapes: N = blocks, P = places of a block that predict, T = those that count, K = ids at a place, at most,
D = the teacher's hidden size.
"""

from collections.abc import Callable, Sequence
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
    """The targets that a cache holds for the blocks of a training.

    `head` is the teacher's, for hidden states; on the device that trains. `label_again` labels the blocks of the
    numbers that it is given, where their records turn out to be damaged when they are read; without it that is an
    error.
    """

    def __init__(
        self,
        windows: Windows,
        layout: Layout,
        blocks: TokenBlocks,
        head: Head | None = None,
        label_again: Callable[[Tensor], None] | None = None,
    ) -> None:
        require_layout(windows, layout)
        if layout.kind == "hidden" and head is None:
            raise ValueError("hidden states need the teacher's head")
        self.windows, self.layout, self.blocks, self.head = windows, layout, blocks, head
        self.label_again = label_again
        self._keys: dict[int, bytes] = {}
        self._reads = ThreadPoolExecutor(1, "targets")
        self._ahead: dict[int, Future[_Parts | None]] = {}

    @property
    def name(self) -> str:
        """The root's name, which stands for all that the targets depend on."""
        return self.windows.root

    def of(self, rows: Tensor) -> StoredTargets:
        """The targets of the blocks of these numbers, read when they are needed."""
        return StoredTargets(rows, self.read)

    def ahead(self, now: Tensor, after: Tensor) -> None:
        """Begin to read the blocks of this step and of the next; what was read for earlier ones is forgotten.

        What is not there any more when the next step does not come about is no error.
        """
        labelled = [row for row in after.tolist() if self._key(row) in self.windows]
        rows = dict.fromkeys([*now.tolist(), *labelled])
        self._ahead = {row: self._ahead.get(row) or self._reads.submit(self._parts, row) for row in rows}

    def read(self, rows: Tensor) -> KnownTargets:
        """The targets of these blocks.

        Raises:
            RunError: a record is missing or damaged, and nothing can label its block again.
        """
        parts = self._all_parts(rows.tolist())
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

    def _all_parts(self, rows: Sequence[int]) -> list[_Parts]:
        """Each block's targets; blocks whose records are missing or damaged are labelled again first."""
        parts = {row: self._ahead[row].result() if row in self._ahead else self._parts(row) for row in rows}
        missing = [row for row, part in parts.items() if part is None]
        if missing and self.label_again is not None:
            self.label_again(torch.tensor(missing))
            parts |= {row: self._parts(row) for row in missing}
        whole = {row: part for row, part in parts.items() if part is not None}
        lost = [row for row in missing if row not in whole]
        if lost:
            self.windows.save_indexes()  # without the damaged records, which the next labelling makes again
            raise RunError(
                f"{self.windows.folder}: what was kept of block {lost[0]} is missing or damaged; run the same command "
                "again: it is labelled anew, and the training goes on from its last state"
            )
        return [whole[row] for row in rows]

    def _parts(self, row: int) -> _Parts | None:
        """One block's targets at its P places; None where its record is missing or damaged."""
        counts = self.blocks.rows(torch.tensor([row])).targets()[0] != IGNORE_INDEX
        record, tokens = self.windows.read(self._key(row)), int(counts.sum())
        if record is None:
            return None
        parts: Sequence[Tensor]
        empty: tuple[float, ...]
        if self.layout.kind == "sampled":
            drawn = unpack_sample(self.layout, record, tokens)
            parts, empty = (drawn.ids, drawn.shares, drawn.entropy), (-1, 0, 0)
        elif self.layout.kind == "top_k":
            top = unpack_top(self.layout, record, tokens)
            parts, empty = (top.ids, top.log_p), (-1, -torch.inf)
        else:
            parts = unpack_hidden(self.layout, record, tokens)
            empty = (0,) * len(parts)
        if tokens == len(counts):
            return tuple(parts)
        return tuple(_placed(part, counts, filler) for part, filler in zip(parts, empty, strict=True))


def _placed(part: Tensor, counts: Tensor, empty: float) -> Tensor:
    """[P, ...]: [T, ...] put where tokens count."""
    whole = torch.full((len(counts), *part.shape[1:]), empty, dtype=part.dtype)
    whole[counts] = part
    return whole


def _stacked(parts: Sequence[_Parts], empty: Sequence[float]) -> list[Tensor]:
    """[N, P, ...] each: blocks whose last axes differ are filled up."""
    stacked = []
    for column, filler in zip(zip(*parts, strict=True), empty, strict=True):
        if column[0].ndim > 1:
            width = max(part.shape[-1] for part in column)
            column = tuple(pad(part, (0, width - part.shape[-1]), value=filler) for part in column)
        stacked.append(torch.stack(column))
    return stacked
