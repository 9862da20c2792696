"""What a plan warns of without refusing it: too little memory or disk, few steps, rows that no loss reads."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cascade.models.architecture.dims import dims_of
from cascade.planning.cache_choice import Choice, cache_folder
from cascade.planning.disk_room import bytes_still_needed, memory_bytes
from cascade.planning.family import ResolvedMember
from cascade.recipe.schema import Recipe
from cascade.runtime import ranks
from cascade.store.lock import existing


def cautions(
    recipe: Recipe, members: Sequence[ResolvedMember], parent_config: Any, run_folder: Path, choice: Choice
) -> list[str]:
    """One sentence a warning, beginning with the member's name where it is about one; `choice`: the kept targets."""
    return [
        *_little_memory(members),
        *_little_disk(members, run_folder, cache_folder(recipe), choice.num_bytes),
        *_rows_without_loss(members, parent_config),
        *_few_steps(recipe, members),
        *_side_arms(members),
    ]


FEW_STEPS = 150
"""Optimizer steps below which a smaller batch is thought of: at 200k tokens of stories260K cut to 20%, 195 steps end at
0.91 times, and 391 at 0.87 times, the KL of 98 (AdamW, each at its best rate)."""


def _few_steps(recipe: Recipe, members: Sequence[ResolvedMember]) -> list[str]:
    """Members whose batch could be halved: language models on one process, as no others were measured."""
    batch_size = recipe.distill.batch_size if recipe.distill else 1
    if recipe.task != "language" or batch_size % 2 or ranks.world_size() > 1:
        return []
    fixed_rate = recipe.distill is not None and recipe.distill.learning_rate != "auto"
    return [
        f"{member.name}: its training has {member.num_steps:,} optimizer steps; more and smaller ones often recover "
        f"more: distill.batch_size: {batch_size // 2} makes twice as many of the same tokens"
        + (", at a rate of its own (learning_rate: auto finds it)." if fixed_rate else ".")
        for member in members
        if 0 < member.num_steps < FEW_STEPS
    ]


def _side_arms(members: Sequence[ResolvedMember]) -> list[str]:
    """Members whose seed is itself cut from the parent beside a larger member of the chain."""
    cut = {member.name: member for member in members if member.seed}
    names = list(cut)  # largest first
    beside = {
        name
        for number, name in enumerate(names)
        if cut[name].member.seed == "parent" and any(cut[larger].member.chain for larger in names[:number])
    }
    return [
        f"{member.name}: it is cut from {member.seed}, the next larger member, which is itself cut from the parent "
        f"(seed: parent). Where {member.seed} is a variant beside the chain, give it chain: false."
        for member in cut.values()
        if member.member.seed == "previous" and member.seed in beside
    ]


def _little_memory(members: Sequence[ResolvedMember]) -> list[str]:
    """Members whose estimated peak memory is above what the training device has."""
    if torch.cuda.is_available():
        held, what = torch.cuda.get_device_properties(0).total_memory, "GPU"
    else:
        held, what = memory_bytes() or 0, "machine"
    return [
        f"{member.name}: its training takes about {member.peak_memory_bytes / 1e9:,.1f} GB of memory, "
        f"{times:.1f} times what this {what} has ({held / 1e9:,.1f} GB): it will be stopped. What helps: a smaller "
        "distill.microbatch_size or data.block_size, gradient_checkpointing: true, optimizer: adamw_8bit, a larger "
        "machine."
        for member in members
        if held and (times := member.peak_memory_bytes / held) > 1
    ]


def _little_disk(members: Sequence[ResolvedMember], run_folder: Path, targets: Path, target_bytes: float) -> list[str]:
    sentences = []
    needed, free = bytes_still_needed(run_folder, members), shutil.disk_usage(existing(run_folder)).free
    if needed > free:
        sentences.append(
            f"{run_folder}: the members need {needed / 1e9:,.2f} GB of disk and {free / 1e9:,.2f} GB are free: "
            "`cascade run` will refuse to start. Make room, or give an --output on another disk."
        )
    free = shutil.disk_usage(existing(targets)).free
    if target_bytes > free:
        sentences.append(
            f"{targets}: {target_bytes / 1e9:,.2f} GB of the teacher's targets are to be kept and "
            f"{free / 1e9:,.2f} GB are free: labelling will stop. Make room (`cascade cache prune`), or give another "
            "distill.cache.folder or distill.cache.kind."
        )
    return sentences


def _rows_without_loss(members: Sequence[ResolvedMember], parent_config: Any) -> list[str]:
    rows = dims_of(parent_config).vocab_size
    return [
        f"{member.name}: compared with its teacher over {member.vocab_size:,} token ids that both have; its "
        f"embedding has {member.sized.dims.vocab_size:,} rows, the teacher's {rows:,}, and no loss reads the others."
        for member in members
        if member.vocab_size is not None
    ]
