"""A run's cache of its teacher's targets: opened once, and read by each training."""

import shutil
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cascade.data.blocks import TokenBlocks
from cascade.data.order import blocks_at
from cascade.distillation import sharding
from cascade.distillation.on_policy import is_due
from cascade.distillation.options import Objective
from cascade.models.architecture.head import Head, head_of
from cascade.models.checkpoint.load import ModelSource, load_config, load_tokenizer
from cascade.planning.cache_choice import Choice, bytes_per_token, cache_folder, exact_ids
from cascade.planning.family import ResolvedMember
from cascade.recipe.schema import Recipe
from cascade.runtime import ranks
from cascade.runtime.errors import DiskError
from cascade.runtime.progress import OnStep
from cascade.teacher.targets.keys import root_record, weights_digest, window_keys
from cascade.teacher.targets.label import label, rounding_kl
from cascade.teacher.targets.reader import CachedTargets
from cascade.teacher.targets.record import Layout
from cascade.teacher.targets.shards import Windows, disk_errors, has_root, root_folder
from cascade.teacher.targets.usage import note_usage

LABELS = "label.json"
"""The file in which the stage `label` leaves what its labelling came to."""


@dataclass(frozen=True)
class TeacherCache:
    """The kept targets of a run's teacher."""

    windows: Windows
    layout: Layout
    why: str
    """Why targets of this form were chosen, for the report."""

    def label(self, teacher: nn.Module, blocks: TokenBlocks, rows: Tensor, on_step: OnStep | None) -> dict[str, Any]:
        """Label the blocks that have no targets yet; returns the record for `LABELS`, with the cost of rounding.

        Raises:
            DiskError: the disk has no room for them.
        """
        self._require_room(blocks, rows)
        check = ranks.world_size() > 1  # as in `targets`
        labelling = label(self.windows, self.layout, teacher, blocks.rows(rows), check_records=check, on_step=on_step)
        record = asdict(labelling) | {"kind": self.layout.kind, "why": self.why, "root": self.windows.root}
        if ranks.rank() == 0:
            note_usage(self.windows.folder, num_windows=labelling.windows, num_labelled=labelling.made)
        if self.layout.kind == "hidden" and ranks.world_size() == 1:
            record["rounding_kl"] = rounding_kl(self.layout, teacher, blocks.rows(rows[:1]))
        return record

    def targets(self, teacher: nn.Module, blocks: TokenBlocks, rows: Tensor) -> CachedTargets:
        """The kept targets of these blocks; those that are missing are labelled first.

        A record is read once, by the training, and one that is damaged is labelled again there. Several processes
        cannot stop for that in the middle of a step: they read all records before the training as well.
        """
        several = ranks.world_size() > 1

        def label_missing(rows: Tensor, *, check_records: bool = True) -> None:
            device = next(teacher.parameters()).device
            with torch.autocast(device.type, enabled=False):  # the same bytes inside a step as before it
                labelling = label(self.windows, self.layout, teacher, blocks.rows(rows), check_records=check_records)
            if labelling.made and ranks.rank() == 0:
                note_usage(self.windows.folder, num_windows=0, num_labelled=labelling.made)

        label_missing(rows, check_records=several)
        label_again = None if several else label_missing
        return CachedTargets(self.windows, self.layout, blocks, self._head(teacher), label_again)

    def objective(self, objective: Objective) -> Objective:
        """The objective as these targets give it: the likeliest ids and their bucket are a forward KL of their own."""
        return replace(objective, divergence="forward_kl") if self.layout.kind == "top_k" else objective

    def narrowed(self, vocab_size: int) -> "TeacherCache":
        """The targets of the same teacher over its first `vocab_size` ids, under a root of their own.

        Probabilities over fewer ids are different numbers. Hidden states stay the same, and the reader cuts their head.
        """
        if self.layout.kind == "hidden" or vocab_size >= self.layout.vocab_size:
            return self
        layout = replace(self.layout, vocab_size=vocab_size, top_k=min(self.layout.top_k, vocab_size))
        record = self.windows.record() | {"targets": layout.as_dict()}
        windows = Windows(*root_folder(self.windows.folder.parent, record)).refresh()
        return replace(self, windows=windows, layout=layout)

    def settings(self) -> dict[str, Any]:
        """What the result of a training from these targets depends on, for its stage's key."""
        return self.layout.content()

    def _require_room(self, blocks: TokenBlocks, rows: Tensor) -> None:
        """Refuse a labelling that the disk has no room for, before its first hour.

        Raises:
            DiskError: the disk has too little room.
        """
        missing = sum(key not in self.windows for key in set(window_keys(blocks.rows(rows))))
        needed = missing * blocks.block_size * bytes_per_token(self.layout)
        free = shutil.disk_usage(self.windows.folder).free
        if needed > free:
            raise DiskError(
                f"{self.windows.folder}: {needed / 1e9:.1f} GB of {self.layout.kind} targets are to be kept, "
                f"{free / 1e9:.1f} GB are free; make room (`cascade cache prune`), or give another "
                "distill.cache.folder or distill.cache.kind"
            )

    def _head(self, teacher: nn.Module) -> Head | None:
        if self.layout.kind != "hidden":
            return None
        head = head_of(teacher)
        weights = head.weight, head.bias
        weight, bias = (None if tensor is None else sharding.whole(tensor.detach()) for tensor in weights)
        if weight is None:
            raise ValueError("a head has a weight")
        return Head(weight, bias, head.scale, head.softcap).narrowed(self.layout.vocab_size)


def open_cache(recipe: Recipe, choice: Choice, parent: ModelSource) -> TeacherCache | None:
    """The cache that a run uses; None where every training asks the teacher itself.

    Raises:
        UserError: a token of exact_tokens is not in the vocabulary.
        RunError: the folder cannot be written.
    """
    layout = choice.layout
    if layout is None or recipe.distill is None:
        return None
    config, tokenizer = load_config(parent), load_tokenizer(parent, vocab_size=layout.vocab_size)
    if layout.kind == "sampled":
        layout = replace(layout, exact_ids=exact_ids(recipe.distill.cache.exact_tokens, tokenizer))
    folder = cache_folder(recipe)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    weights = weights_digest(parent.folder, folder)

    def record_of(layout: Layout) -> dict[str, Any]:
        return root_record(
            weights,
            config,
            tokenizer,
            layout,
            dtype="autocast bfloat16" if torch.cuda.is_available() else "float32",
            attn_implementation=getattr(config, "_attn_implementation", None) or "sdpa",
        )

    earlier = replace(layout, version=1)
    if has_root(folder, record_of(earlier)):  # labelled by an older version: read on, and added to, as it is
        layout = earlier
    return TeacherCache(Windows(*root_folder(folder, record_of(layout))).refresh(), layout, choice.why)


def training_rows(recipe: Recipe, first_position: int, num_steps: int, num_blocks: int) -> Tensor:
    """int64: the blocks that steps read from a position on, each once, without the blocks of on-policy steps."""
    steps = [step_rows(recipe, first_position, step, num_blocks) for step in taught_steps(recipe, num_steps)]
    rows: Tensor = (torch.cat(steps) if steps else torch.zeros(0, dtype=torch.int64)).unique()
    return rows


def step_rows(recipe: Recipe, first_position: int, step: int, num_blocks: int) -> Tensor:
    """int64: the numbers of one step's blocks."""
    if recipe.distill is None:
        raise ValueError("a recipe with members has a distill section")
    size = recipe.distill.batch_size
    return blocks_at(first_position + step * size, size, num_blocks=num_blocks, seed=recipe.seed)


def taught_steps(recipe: Recipe, num_steps: int) -> list[int]:
    """The steps that learn from the teacher's targets of the text: all steps but the on-policy ones."""
    on_policy = recipe.distill.on_policy if recipe.distill else None
    return [step for step in range(num_steps) if on_policy is None or not is_due(recipe.seed, step, on_policy.fraction)]


def member_rows(recipe: Recipe, member: ResolvedMember, num_blocks: int) -> Tensor:
    """int64: the blocks that a member's training reads, each once."""
    return training_rows(recipe, member.first_position, member.num_steps, num_blocks)
