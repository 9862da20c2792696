"""What a member costs in memory and time, before any weight is read: counted FLOPs at a rate measured here."""

import math
import time
from functools import lru_cache
from typing import Any

import torch

from cascade.distillation.losses.fused import CPU_CHUNK_BYTES
from cascade.distillation.optimizer import orthogonalisation_flops
from cascade.distillation.range_test import FEWEST_STEPS, MOST_STEPS, SHARE
from cascade.distillation.teacher_memory import LIMIT_BYTES
from cascade.models.architecture.dims import ModelDims
from cascade.models.architecture.model_class import attends_causally
from cascade.models.architecture.sized import Sized
from cascade.planning.example_length import tokens_per_example
from cascade.recipe.distill import Distill
from cascade.recipe.schema import Recipe
from cascade.runtime import ranks

BASE_PROCESS_BYTES = 600_000_000
"""Memory of a process that has imported torch, transformers and lm-eval."""

_USUAL_TRIES = 4
"""Short trainings that a search for a learning rate usually takes."""

MUON_SHARE = 0.5
"""`distill.optimizer: auto` is Muon where its orthogonalisation costs at most this share of a step's other FLOPs."""

_HOLES_SHARE = 0.5
"""Of what the backward pass keeps: what freed tensors of one microbatch leave in the heap that the next does not fill.
Measured on a CPU with glibc: a training of 23M parameters in two microbatches takes 1,080 MB, and 809 MB where each
freed tensor goes back to the system."""

MOMENT_BYTES = {"adamw": 8.0, "adamw_8bit": 2.1, "muon": 8.0}
"""Bytes of an optimizer's state for one weight."""


def optimizer_of(recipe: Recipe, config: Any, parent_config: Any) -> str:
    """The optimizer that `distill.optimizer` comes to for a student of `config`.

    Measured on the stories and quickstart families, of the same shapes, each member at its own searched rate: Muon's
    held-out KL is 0.97, 0.87, 0.91 and 0.99, 0.93, 0.94 times AdamW's at 60, 35 and 20%. Encoders and classifiers were
    not measured.
    """
    settings = recipe.distill
    if settings is None:
        raise ValueError("a recipe with members has a distill section")
    if settings.optimizer != "auto":
        return settings.optimizer
    if recipe.task != "language" or settings.learning_rate != "auto" or ranks.world_size() > 1:
        return "adamw"
    tokens = settings.batch_size * recipe.data.block_size
    step = tokens * (3 * flops_of(recipe, config) + flops_of(recipe, parent_config))
    return "muon" if orthogonalisation_flops(config) <= MUON_SHARE * step else "adamw"


def peak_memory(recipe: Recipe, distill: Distill, student: Sized, teacher: Sized, *, optimizer: str) -> float:
    """Estimated peak memory of a training, in bytes.

    Weights, gradients, the optimizer's moments and the average of the student (or its start, which a search for a rate
    goes back to), the teacher's weights, what the backward pass keeps of each layer (and the feature losses of its
    hidden states), the head's gradient, a chunk of both models' logits, and what is remembered of the teacher.
    """
    length = recipe.data.max_length if recipe.counts_examples else recipe.data.block_size
    tokens, dims = distill.microbatch_size * length, student.dims
    layer_values = 12 * dims.hidden_size + 4 * dims.intermediate_size + 6 * dims.num_attention_heads * dims.head_dim
    if distill.features.hidden != "none":
        layer_values += 3 * dims.hidden_size
    values: float = dims.num_hidden_layers * layer_values
    if distill.gradient_checkpointing:  # what enters each layer, and all of one of them with its gradients
        values = dims.num_hidden_layers * dims.hidden_size + 2 * layer_values
    moments = MOMENT_BYTES[optimizer] * student.num_parameters
    if optimizer == "muon":  # one moment of each matrix inside the layers
        moments -= 4.0 * student.num_parameters_non_embedding
    copies = 8.0 + 4.0 * (distill.ema_decay is not None or distill.learning_rate == "auto")
    weights = copies * student.num_parameters + moments + 4.0 * teacher.num_parameters
    if distill.microbatch_size < distill.batch_size:
        values *= 1 + _HOLES_SHARE
    head = 4.0 * dims.vocab_size * dims.hidden_size + 2 * min(4.0 * tokens * dims.vocab_size, CPU_CHUNK_BYTES)
    teacher_states = min(LIMIT_BYTES, _remembered_bytes(recipe, distill, dims, teacher.dims))
    return float(BASE_PROCESS_BYTES + weights + 4.0 * tokens * values + head + teacher_states)


def _remembered_bytes(recipe: Recipe, distill: Distill, dims: ModelDims, parent: ModelDims) -> float:
    """Bytes of the teacher's hidden states of text that is read again: to select, to measure, to search for a rate."""
    size = 1 if recipe.counts_examples else recipe.data.block_size
    num_tokens = distill.selection_examples if recipe.counts_examples else distill.selection_blocks * size
    num_tokens += recipe.evaluate.heldout_blocks * size
    if distill.learning_rate == "auto":
        budget = distill.tokens or distill.examples or 0
        fewest, most = (steps * distill.batch_size * size for steps in (FEWEST_STEPS, MOST_STEPS))
        points = 0 if distill.features.hidden == "none" else dims.num_hidden_layers
        num_tokens += round(min(most, max(fewest, SHARE * budget))) * (1 + points)
    return 4.0 * parent.hidden_size * num_tokens


def member_bytes(count: int, stored_bytes: int, *, start: str, repaired: bool, ce: bool) -> int:
    """Bytes of a member's checkpoints for `count` parameters.

    What it starts from, cut and then repaired, is in float32; what is recovered, published and trained as a baseline
    is as it is saved.
    """
    float32_copies = {"checkpoint": 0, "prune": 1 + repaired}.get(start, 1)
    return count * (4 * float32_copies + stored_bytes * (2 + ce))


def training_state_bytes(count: int, *, optimizer: str, averaged: bool, keep_states: int) -> int:
    """Bytes of the training states that are kept, and of the one that is being written, for `count` parameters."""
    return math.ceil(count * (4 + MOMENT_BYTES[optimizer] + 4 * averaged) * (keep_states + 1))


def flops_of(recipe: Recipe, config: Any) -> float:
    """Forward FLOPs of what the recipe counts: a token in a block of its size, or a whole example (text or image).

    A text has the mean length of those that are trained on. Models that look both ways attend to all of it, others to
    half of it on average.
    """
    sized = Sized(config)
    if recipe.task == "image_classification":
        return sized.flops_per_token(0)
    length = tokens_per_example(recipe) if recipe.counts_examples else recipe.data.block_size
    per_token = sized.flops_per_token(length if attends_causally(config) else 2 * length)
    if not recipe.counts_examples:
        return per_token
    return per_token * length - float(sized.axes.flops_once(sized.dims)) * (length - 1)


def units_in(recipe: Recipe, num_blocks: int) -> float:
    """The tokens, or examples, that `num_blocks` blocks of packed text amount to."""
    if not recipe.counts_examples:
        return float(num_blocks * recipe.data.block_size)
    if recipe.task == "image_classification":
        return float(num_blocks)
    return num_blocks * recipe.data.max_length / tokens_per_example(recipe)


SHORT_SHARE = 0.05
"""Share of a member's tokens on which each of the two shapes that `prune.hidden: auto` tries is recovered."""


def short_recovery(recipe: Recipe, num_tokens: int) -> int:
    """Tokens (or examples) of the recovery by which each shape that is tried for a member is first judged.

    With `prune.search` a quarter of what its finalists have, else a share of the member's own.
    """
    search = recipe.prune.search
    return math.ceil(search.tokens / 4) if search else math.ceil(SHORT_SHARE * num_tokens)


def stage_seconds(
    recipe: Recipe, flops: float, parent_flops: float, tokens: int, *, cut: bool, choices: int = 1
) -> dict[str, float]:
    """Estimated seconds of each stage of one member: counted FLOPs at this machine's measured rate, plus start-up."""
    rate = flops_per_second()
    heldout = recipe.evaluate.heldout_blocks * (1 if recipe.counts_examples else recipe.data.block_size)
    # Items of the usual multiple-choice kind: about 400 tokens, all choices together.
    items = 400 * (recipe.evaluate.limit or 1000) * len(recipe.evaluate.tasks)
    calibration = units_in(recipe, recipe.calibration.num_blocks)
    evaluation = 12 + (items * flops + heldout * (flops + parent_flops)) / rate
    seconds = {}
    if cut:
        seconds["statistics"] = 0.5 + calibration * parent_flops / rate
        seconds["prune"] = 1.0
        # Two ways of repair, each about six passes of the calibration text.
        if recipe.prune.repair.method != "none":
            repaired = units_in(recipe, recipe.prune.repair.num_blocks)
            seconds["repair"] = 1 + 10 * repaired * (flops + parent_flops) / rate
        search = recipe.prune.search
        num_shapes = search.candidates if search else choices if choices > 1 else 0
        if num_shapes:  # each is cut, repaired one way and recovered shortly
            short = short_recovery(recipe, tokens) * (3 * flops + parent_flops) / rate
            seconds["candidate"] = num_shapes * (1 + seconds.get("repair", 0.0) / 2 + short)
        if search:
            seconds["finalist"] = search.finalists * (1 + search.tokens * (3 * flops + parent_flops) / rate)
    searched = 0.0
    if recipe.distill is not None and tokens:
        steps = FEWEST_STEPS * recipe.distill.batch_size * (1 if recipe.counts_examples else recipe.data.block_size)
        searched = _USUAL_TRIES * max(SHARE * tokens, steps)
    if recipe.distill is not None and recipe.distill.learning_rate == "auto" and tokens:
        seconds["rate"] = 1 + searched * (3 * flops + parent_flops) / rate
    seconds["distill"] = tokens * (3 * flops + parent_flops) / rate
    for kind in ("cut", "repaired"):
        if kind in recipe.baseline_kinds:
            seconds[f"heldout-{kind}"] = 1 + heldout * (flops + parent_flops) / rate
    if "ce" in recipe.baseline_kinds:
        if recipe.ce_learning_rate == "auto" and tokens:
            seconds["ce-rate"] = 1 + searched * 3 * flops / rate
        seconds["baseline-ce"] = tokens * 3 * flops / rate
        seconds["heldout-ce"] = 1 + heldout * (flops + parent_flops) / rate
    return seconds | {"evaluate": evaluation, "report": 0.2}


def parent_seconds(recipe: Recipe, parent_config: Any) -> dict[str, float]:
    """Estimated seconds of the stages that all members share."""
    flops = flops_of(recipe, parent_config)
    seconds = {"data": 5.0, "evaluate": stage_seconds(recipe, flops, 0.0, 0, cut=False)["evaluate"]}
    if recipe.parent.model.endswith(".gguf"):
        seconds["convert"] = 10 + Sized(parent_config).num_parameters / 1e7
    if recipe.parent.fit is not None:
        seconds["fit"] = 3 * flops * recipe.parent.fit.examples / flops_per_second()
    if recipe.parent.pretrain is not None:
        seconds["pretrain"] = 3 * flops * recipe.parent.pretrain.tokens / flops_per_second()
    return seconds


@lru_cache(maxsize=1)
def flops_per_second() -> float:
    """A third of the float32 matrix product rate measured here: what whole models reach of it, roughly."""
    size = 512
    left, right = torch.ones(size, size), torch.ones(size, size)
    left @ right
    started, rounds = time.perf_counter(), 10
    for _ in range(rounds):
        left @ right
    return rounds * 2 * size**3 / (time.perf_counter() - started) / 3


def stored_weight_bytes(recipe: Recipe, parent_config: Any) -> int:
    """Bytes of one weight of a published member: of `save.dtype`, or of the parent's own dtype."""
    dtype = getattr(parent_config, "dtype", None) if recipe.save.dtype == "parent" else recipe.save.dtype
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."))
    return dtype.itemsize if isinstance(dtype, torch.dtype) else 4
