"""What a plan tells of and does not refuse: memory and disk beyond the machine's, rows that are not compared."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cascade.family import ResolvedMember
from cascade.lock import existing
from cascade.models.dims import dims_of
from cascade.room import bytes_still_needed, memory_bytes


def cautions(
    members: Sequence[ResolvedMember], parent_config: Any, run_folder: Path, *, cache_folder: Path, cache_bytes: float
) -> list[str]:
    """A sentence for each, those about a member beginning with its name; `cache_bytes` are of targets to be kept."""
    return [
        *_of_memory(members),
        *_of_disk(members, run_folder, cache_folder, cache_bytes),
        *_of_vocabularies(members, parent_config),
    ]


def _of_memory(members: Sequence[ResolvedMember]) -> list[str]:
    """Where the estimate of a training's peak is above all the memory that its device has."""
    if torch.cuda.is_available():
        held, what = torch.cuda.get_device_properties(0).total_memory, "GPU"
    else:
        held, what = memory_bytes() or 0, "machine"
    return [
        f"{one.name}: its training takes about {one.peak_memory_bytes / 1e9:,.1f} GB of memory, {times:.1f} times what "
        f"this {what} has ({held / 1e9:,.1f} GB): it will be stopped. What helps: a smaller "
        "distill.microbatch_size or data.block_size, gradient_checkpointing: true, optimizer: adamw_8bit, a larger "
        "machine."
        for one in members
        if held and (times := one.peak_memory_bytes / held) > 1
    ]


def _of_disk(members: Sequence[ResolvedMember], run_folder: Path, cache_folder: Path, cache_bytes: float) -> list[str]:
    told = []
    needed, free = bytes_still_needed(run_folder, members), shutil.disk_usage(existing(run_folder)).free
    if needed > free:
        told.append(
            f"{run_folder}: the members need {needed / 1e9:,.2f} GB of disk and {free / 1e9:,.2f} GB are free: "
            "`cascade run` will refuse to start. Make room, or give an --output on another disk."
        )
    free = shutil.disk_usage(existing(cache_folder)).free
    if cache_bytes > free:
        told.append(
            f"{cache_folder}: {cache_bytes / 1e9:,.2f} GB of the teacher's targets are to be kept and "
            f"{free / 1e9:,.2f} GB are free: labelling will stop. Make room (`cascade cache prune`), or give another "
            "distill.cache.folder or distill.cache.kind."
        )
    return told


def _of_vocabularies(members: Sequence[ResolvedMember], parent_config: Any) -> list[str]:
    rows = dims_of(parent_config).vocab_size
    return [
        f"{one.name}: compared with its teacher over {one.vocab_size:,} token ids that both have; its embedding has "
        f"{one.dims.vocab_size:,} rows, the teacher's {rows:,}, and no loss reads the others."
        for one in members
        if one.vocab_size is not None
    ]
