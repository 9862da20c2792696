"""A teacher's targets of windows, computed once and kept: windows that have a record already are passed over.

The teacher reads windows in groups of one size, and its head each window by itself, so that a window's record does not
depend on which other windows are labelled with it, in which order, or by how many processes.

Shapes: G = windows of a group, S = tokens of a window, P = places of a window that predict, T = those that count,
D = the teacher's hidden size, V = vocabulary.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cascade.data.blocks import IGNORE_INDEX, TokenBlocks
from cascade.distillation.losses.batch import autocast
from cascade.distillation.losses.features import watching_points
from cascade.distillation.losses.fused import CPU_ROWS_BYTES, chunk_rule, raw_logits, transform_logits
from cascade.models.architecture.head import Head, head_of, last_hidden, logits_of
from cascade.runtime import ranks
from cascade.runtime.errors import UserError
from cascade.teacher.targets.keys import window_keys
from cascade.teacher.targets.record import Layout, pack_hidden, pack_sample, pack_top, require_layout, through_record
from cascade.teacher.targets.sampling import Sample, sampled, shifts
from cascade.teacher.targets.shards import Windows, Writer

_GROUP_TOKENS = {"cpu": 2048, "cuda": 16_384}
_CHECKED_TOKENS = 256


@dataclass(frozen=True)
class Labelling:
    """What a labelling came to."""

    windows: int
    """Different windows among the blocks."""
    made: int
    """Windows that were labelled now; the others had their records."""
    tokens: int
    """Tokens of the windows that were labelled now."""
    seconds: float
    num_bytes: int
    """Bytes of all the root's shards."""


@torch.no_grad()
def label(
    windows: Windows,
    layout: Layout,
    teacher: nn.Module,
    blocks: TokenBlocks,
    *,
    check_records: bool = True,
    on_step: Callable[[int, int], None] | None = None,
) -> Labelling:
    """Label the windows of `blocks` that are missing or damaged; several processes share them out.

    With `check_records` every record of these windows is read. Without it the shards' indexes say which windows have
    one, for a training that reads its records itself and has damaged ones labelled again (`CachedTargets`).

    Raises:
        RunError: the disk is full; what was written before stays.
        UserError: the root is laid out in another way, the vocabulary is larger than the teacher's, or an id of
            `exact_ids` is beyond it.
    """
    started = time.perf_counter()
    _require_fitting(windows.refresh(), layout, teacher)
    keys = window_keys(blocks)
    first = {key: row for row, key in reversed(list(enumerate(keys)))}
    present = {key for key in first if (windows.read(key) is not None if check_records else key in windows)}
    missing = torch.tensor([row for key, row in first.items() if key not in present], dtype=torch.int64)
    missing = ranks.broadcast_ints(missing)
    teacher.eval()
    group = _group_size(teacher, blocks)
    steps = -(-len(missing) // (group * ranks.world_size()))
    of_process = missing[ranks.rank() :: ranks.world_size()]
    writer, num_labelled = Writer(windows.folder, windows.root), 0
    for step in range(steps):
        rows = of_process[step * group : (step + 1) * group]
        if ranks.world_size() == 1:  # another run may have labelled some of them meanwhile
            rows = torch.tensor([row for row in rows.tolist() if keys[row] not in windows], dtype=torch.int64)
        if len(rows) or ranks.world_size() > 1:
            records = _records(layout, windows.root, teacher, blocks, rows, keys, group)
            for row, record in zip(rows.tolist(), records, strict=True):
                if writer.add(keys[row], record):
                    windows.refresh()
        num_labelled += len(rows)
        if on_step is not None:
            on_step(step + 1, steps)
    writer.flush()
    ranks.barrier()
    windows.refresh()  # before: of a shard that was labelled again, the index is the new one
    if ranks.rank() == 0:
        windows.save_indexes()
    num_labelled = int(ranks.sum_numbers({"labelled": num_labelled}, torch.device("cpu"))["labelled"])
    return Labelling(
        windows=len(first),
        made=num_labelled,
        tokens=num_labelled * blocks.block_size,
        seconds=time.perf_counter() - started,
        num_bytes=windows.num_bytes(),
    )


@torch.no_grad()
def records_of(windows: Windows, layout: Layout, teacher: nn.Module, blocks: TokenBlocks) -> dict[bytes, bytes]:
    """The records of these blocks by key, computed anew whether the cache has them or not."""
    keys, by_key = window_keys(blocks), dict[bytes, bytes]()
    group = _group_size(teacher, blocks)
    for rows in torch.arange(len(blocks)).split(group):
        records = _records(layout, windows.root, teacher, blocks, rows, keys, group)
        by_key |= {keys[row]: record for row, record in zip(rows.tolist(), records, strict=True)}
    return by_key


@torch.no_grad()
def rounding_kl(layout: Layout, teacher: nn.Module, block: TokenBlocks) -> float:
    """KL in nats per token from the teacher's live logits to those rebuilt from its hidden states as they are kept."""
    device = _device(teacher)
    with autocast(device):
        hidden_BPD = block.predicting(last_hidden(teacher, **block.inputs(device), use_cache=False))
    hidden = hidden_BPD.flatten(0, 1)[:_CHECKED_TOKENS].float()
    head = head_of(teacher).narrowed(layout.vocab_size)
    live, rebuilt = (
        logits_of(states, head).float().log_softmax(-1) for states in (hidden, through_record(layout, hidden))
    )
    return float((live.exp() * (live - rebuilt)).sum(-1).mean())


def _records(
    layout: Layout,
    root: str,
    teacher: nn.Module,
    blocks: TokenBlocks,
    rows: Tensor,
    keys: Sequence[bytes],
    group: int,
) -> list[bytes]:
    """The records of the windows `rows`, at most `group` of them; the first one fills the group up."""
    device = _device(teacher)
    filler = rows[:1] if len(rows) else torch.zeros(1, dtype=torch.int64)  # a process without work takes part
    filled = blocks.rows(torch.cat([rows, filler.expand(group - len(rows))]))
    with autocast(device), watching_points(teacher, set(layout.points)) as seen:
        hidden_GSD = last_hidden(teacher, **filled.inputs(device), use_cache=False)
    hidden_GPD, targets_GP = filled.predicting(hidden_GSD), filled.targets()
    points = {number: filled.predicting(states) for number, states in seen.items()}
    head = head_of(teacher).narrowed(layout.vocab_size)
    records = []
    for place, row in enumerate(rows.tolist()):
        counted = (targets_GP[place] != IGNORE_INDEX).nonzero()[:, 0]
        hidden_TD, targets_T = hidden_GPD[place][counted.to(device)], targets_GP[place][counted].to(device)
        if layout.kind == "hidden":
            of_window = {number: states[place][counted.to(device)] for number, states in points.items()}
            records.append(pack_hidden(layout, hidden_TD, of_window))
        else:
            records.append(_of_logits(layout, root, head, hidden_TD, targets_T, keys[row]))
    return records


def _of_logits(layout: Layout, root: str, head: Head, hidden_TD: Tensor, targets_T: Tensor, key: bytes) -> bytes:
    """A window's record from its probabilities, formed for a chunk of tokens at a time."""
    tokens, device = len(targets_T), hidden_TD.device
    if tokens == 0:
        return b""
    shift = shifts(bytes.fromhex(root), key, tokens).to(device)
    exact = torch.tensor(layout.exact_ids, dtype=torch.int64, device=device)
    head = Head(head.weight.to(hidden_TD.dtype), head.bias, head.scale, head.softcap)
    chunk = chunk_rule(tokens, layout.vocab_size, device)
    block = chunk if device.type != "cpu" else max(1, CPU_ROWS_BYTES // (4 * layout.vocab_size))
    buffers = [torch.empty(0, device=device)]
    samples: list[Sample] = []
    target_log_p: list[Tensor] = []
    top: list[tuple[Tensor, Tensor]] = []
    for start in range(0, tokens, chunk):
        part = slice(start, min(start + chunk, tokens))
        logits = raw_logits(hidden_TD[part], head, buffers, 0)
        transform_logits(logits, head)
        at_target = logits.gather(-1, targets_T[part, None])[:, 0]
        if layout.kind == "top_k":
            log_sum = logits.logsumexp(-1)
            values, ids = logits.topk(layout.top_k, dim=-1)
            top.append((ids, values - log_sum[:, None]))
            target_log_p.append(at_target - log_sum)
            continue
        for first in range(0, len(logits), block):
            rows = slice(first, first + block)
            samples.append(sampled(logits[rows], shift[part][rows], layout.draws, exact))
            target_log_p.append(at_target[rows] - samples[-1].logsumexp)
    if layout.kind == "top_k":
        ids, values = (torch.cat(parts) for parts in zip(*top, strict=True))
        return pack_top(layout, ids, values, torch.cat(target_log_p))
    whole = Sample(*(torch.cat(parts) for parts in zip(*samples, strict=True)))
    return pack_sample(layout, whole, torch.cat(target_log_p))


def _require_fitting(windows: Windows, layout: Layout, teacher: nn.Module) -> None:
    require_layout(windows, layout)
    rows = len(head_of(teacher).weight)
    if layout.vocab_size > rows:
        raise UserError(f"a vocabulary of {layout.vocab_size} is more than the teacher's head has: {rows}")
    beyond = [number for number in layout.exact_ids if not 0 <= number < layout.vocab_size]
    if beyond:
        raise UserError(f"exact_ids: {beyond[0]} is beyond the vocabulary of {layout.vocab_size}")


def _group_size(teacher: nn.Module, blocks: TokenBlocks) -> int:
    """Windows that the teacher reads at once: the same number whatever there is to label."""
    return max(1, _GROUP_TOKENS.get(_device(teacher).type, 2048) // blocks.block_size)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
