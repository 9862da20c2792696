"""A recipe -> the members in the order they are made, each with its seed, shape and cost. Loads no weights."""

import math
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from cascade.errors import UserError
from cascade.models.axes import probe_axes
from cascade.models.checkpoint import load_config, resolve_model
from cascade.models.dims import ModelDims, config_with_dims, dims_of
from cascade.pruning.proof import prove_cuts
from cascade.pruning.rotation import require_rotatable, untied
from cascade.pruning.shape import CUT_DIMS, Target, solve_shape
from cascade.recipe.schema import Distill, Member, Recipe

BASE_PROCESS_BYTES = 600_000_000
"""torch, transformers and lm-eval themselves."""


@dataclass(frozen=True)
class ResolvedMember:
    """One member, with everything that can be known before any weight is read."""

    member: Member
    seed: str
    """'parent', a member's name, or '' for a student that already exists"""
    config: Any
    """The member's config, of the shape solved for (per-layer lists are settled by the plan)."""
    parent_config: Any
    hidden: str
    """The score of hidden channels: activation_norm or pca."""
    dims: ModelDims
    num_parameters: int
    num_parameters_non_embedding: int
    flops_per_token: float
    """Forward, at the recipe's block size."""
    num_steps: int
    num_tokens: int
    """Training tokens, in whole steps."""
    first_position: int
    """Blocks that the chain of seeds has read before."""
    peak_memory_bytes: float
    disk_bytes: float
    seconds: dict[str, float]
    """Estimated time of each stage on this machine."""

    @property
    def name(self) -> str:
        """The member's name."""
        return self.member.name


def resolve_family(
    recipe: Recipe,
    parent_config: Any,
    *,
    pinned_seeds: dict[str, str] | None = None,
    found_shapes: dict[str, ModelDims] | None = None,
) -> list[ResolvedMember]:
    """Members, largest first, a seed always before what is cut from it.

    `pinned_seeds` (member -> seed) holds for members that already exist: adding a size between two others must not
    give the smaller one another seed. `found_shapes` are those that a search has chosen by now.

    Raises:
        UserError: a target that cannot be met, or a student with another vocabulary.
    """
    axes, parent = probe_axes(parent_config), dims_of(parent_config)
    total = int(axes.num_parameters(parent))
    if recipe.distill is None:
        return []
    resolved: dict[str, ResolvedMember] = {}
    for member in sorted(recipe.members, key=lambda member: -_wanted(member, parent_config, total)):
        seed, seed_config = _seed(member, resolved, parent_config, pinned_seeds or {})
        config = _shape(recipe, member, seed_config, parent_config, (found_shapes or {}).get(member.name))
        before = 0
        if seed in resolved:
            before = resolved[seed].first_position + resolved[seed].num_steps * recipe.distill.batch_size
        resolved[member.name] = _resolve(recipe, recipe.distill, member, seed, config, parent_config, before)
    return list(resolved.values())


def check_family(recipe: Recipe, parent_config: Any, members: list[ResolvedMember]) -> dict[str, float]:
    """The proof of the cut, along every axis that some member is cut along, on a tiny twin; empty if none is cut.

    Raises:
        UserError: the cut is not exact for this architecture, or the blocks are longer than the parent's context.
    """
    context = getattr(parent_config, "max_position_embeddings", None)
    if context and recipe.data.block_size > context:
        raise UserError(
            f"data.block_size: {recipe.data.block_size} is longer than the parent's context of {context} tokens"
        )
    if recipe.prune.hidden == "pca":
        require_rotatable(parent_config, probe_axes(parent_config))
    before = dims_of(parent_config).as_dict()
    cut = [name for name in CUT_DIMS if any(one.seed and one.dims.as_dict()[name] < before[name] for one in members)]
    return prove_cuts(parent_config, along=cut) if cut else {}


def _wanted(member: Member, parent_config: Any, total: int) -> float:
    """Parameters that a member will have, to sort by."""
    if member.target is not None and member.target.params is not None:
        return member.target.params * (total if member.target.params <= 1 else 1)
    if member.target is not None:
        dims = _solved(member, parent_config, parent_config)
        return float(probe_axes(parent_config).num_parameters(dims))
    config = load_config(resolve_model(member.student))
    return float(probe_axes(config).num_parameters(dims_of(config)))


def _seed(
    member: Member, resolved: dict[str, ResolvedMember], parent_config: Any, pinned: dict[str, str]
) -> tuple[str, Any]:
    if member.student:
        return "", load_config(resolve_model(member.student))
    seed = member.seed
    if seed == "previous":
        cut = [name for name, other in resolved.items() if other.seed]
        seed = pinned.get(member.name) or (cut[-1] if cut else "parent")
    if seed == "parent":
        return seed, parent_config
    if seed not in resolved:
        raise UserError(f"members: {member.name}: its seed '{seed}' is smaller; a seed has to be larger")
    return seed, resolved[seed].config


def _shape(recipe: Recipe, member: Member, seed_config: Any, parent_config: Any, found: ModelDims | None) -> Any:
    if member.target is None:
        return seed_config
    config = shape_config(seed_config, hidden_score(recipe.prune.hidden, parent_config))
    return config_with_dims(config, found or _solved(member, config, parent_config))


def hidden_score(wanted: str, parent_config: Any) -> str:
    """The score of hidden channels that `prune.hidden` asks for; `auto` is decided by the parent's config alone.

    A rotation gave the better cut wherever it was legal and tried, but it unties the embeddings, and those of a small
    model with a large vocabulary would cost it more than the rotation gives back.
    """
    if wanted != "auto":
        return wanted
    axes, dims = probe_axes(parent_config), dims_of(parent_config)
    try:
        require_rotatable(parent_config, axes)
    except UserError:
        return "activation_norm"
    total = axes.num_parameters(dims)
    embeddings = total - axes.num_parameters_non_embedding(dims)
    return "pca" if not axes.tied or embeddings <= LARGEST_UNTIED_SHARE * total else "activation_norm"


LARGEST_UNTIED_SHARE = 0.15
"""Of the parent's parameters: tied embeddings up to this share are untied by `prune.hidden: auto`."""


def shape_config(seed_config: Any, hidden: str) -> Any:
    """The seed's config as its members will have it: with a head of its own where the stream is rotated."""
    return untied(seed_config) if hidden == "pca" else seed_config


def _solved(member: Member, seed_config: Any, parent_config: Any) -> ModelDims:
    try:
        return solve_shape(seed_config, target_of(member), parent=parent_config)
    except UserError as error:
        raise UserError(f"members: {member.name}: {error}") from error


def target_of(member: Member) -> Target:
    """A member's target as the solver takes it.

    Raises:
        ValueError: the member is not cut.
    """
    if member.target is None:
        raise ValueError(f"{member.name} is not cut")
    return Target(**member.target.model_dump())


def _resolve(
    recipe: Recipe, distill: Distill, member: Member, seed: str, config: Any, parent_config: Any, before: int
) -> ResolvedMember:
    axes, dims = probe_axes(config), dims_of(config)
    parent_axes, parent = probe_axes(parent_config), dims_of(parent_config)
    if dims.vocab_size != parent.vocab_size:
        raise UserError(
            f"members: {member.name}: the student has {dims.vocab_size} tokens in its vocabulary, the teacher "
            f"{parent.vocab_size}; logits can only be compared over the same vocabulary"
        )
    step_tokens = distill.batch_size * recipe.data.block_size
    num_steps = math.ceil((member.tokens or distill.tokens) / step_tokens)
    count = int(axes.num_parameters(dims))
    flops = float(axes.flops_per_token(dims, recipe.data.block_size))
    parent_flops = float(parent_axes.flops_per_token(parent, recipe.data.block_size))
    stored_bytes = {"float32": 4, "bfloat16": 2, "float16": 2}.get(recipe.save.dtype) or dtype_bytes(parent_config)
    return ResolvedMember(
        member=member,
        seed=seed,
        config=config,
        parent_config=parent_config,
        hidden=hidden_score(recipe.prune.hidden, parent_config),
        dims=dims,
        num_parameters=count,
        num_parameters_non_embedding=int(axes.num_parameters_non_embedding(dims)),
        flops_per_token=flops,
        num_steps=num_steps,
        num_tokens=num_steps * step_tokens,
        first_position=before,
        peak_memory_bytes=_peak_memory(recipe, distill, dims, count, int(parent_axes.num_parameters(parent))),
        disk_bytes=count * (4 + stored_bytes * (1 + len(recipe.baselines))),
        seconds=stage_seconds(recipe, flops, parent_flops, num_steps * step_tokens, cut=bool(seed)),
    )


def _peak_memory(recipe: Recipe, distill: Distill, dims: ModelDims, count: int, parent_count: int) -> float:
    """Estimated bytes while training.

    Weights, gradients and AdamW's two moments of the student, the teacher's weights, what the backward pass keeps of
    each layer, and four copies of the logits of a microbatch.
    """
    tokens = distill.microbatch_size * recipe.data.block_size
    kept_per_token = dims.num_hidden_layers * (
        12 * dims.hidden_size + 4 * dims.intermediate_size + 6 * dims.num_attention_heads * dims.head_dim
    )
    return (
        BASE_PROCESS_BYTES + 16.0 * count + 4.0 * parent_count + 4.0 * tokens * (kept_per_token + 4 * dims.vocab_size)
    )


def stage_seconds(recipe: Recipe, flops: float, parent_flops: float, tokens: int, *, cut: bool) -> dict[str, float]:
    """Estimated seconds of each stage of one member: counted FLOPs at this machine's measured rate, plus start-up."""
    rate = _flops_per_second()
    heldout = recipe.evaluate.heldout_blocks * recipe.data.block_size
    # Items of the usual multiple-choice kind: about 400 tokens, all choices together.
    items = 400 * (recipe.evaluate.limit or 1000) * len(recipe.evaluate.tasks)
    calibration = recipe.calibration.num_blocks * recipe.data.block_size
    evaluation = 12 + (items * flops + heldout * (flops + parent_flops)) / rate
    seconds = {}
    if cut:
        seconds["statistics"] = 0.5 + calibration * parent_flops / rate
        seconds["prune"] = 1.0
        # Two ways of repair, each about six passes of the calibration text.
        if recipe.prune.repair.method != "none":
            repaired = recipe.prune.repair.num_blocks * recipe.data.block_size
            seconds["repair"] = 1 + 10 * repaired * (flops + parent_flops) / rate
    seconds["distill"] = tokens * (3 * flops + parent_flops) / rate
    for kind in ("cut", "repaired"):
        if kind in recipe.baselines:
            seconds[f"heldout-{kind}"] = 1 + heldout * (flops + parent_flops) / rate
    if "ce" in recipe.baselines:
        seconds["baseline-ce"] = tokens * 3 * flops / rate
        seconds["heldout-ce"] = 1 + heldout * (flops + parent_flops) / rate
    return seconds | {"evaluate": evaluation, "report": 0.2}


def parent_seconds(recipe: Recipe, parent_config: Any) -> dict[str, float]:
    """Estimated seconds of the stages that all members share."""
    flops = float(probe_axes(parent_config).flops_per_token(dims_of(parent_config), recipe.data.block_size))
    seconds = {"data": 5.0, "evaluate": stage_seconds(recipe, flops, 0.0, 0, cut=False)["evaluate"]}
    if recipe.parent.model.endswith(".gguf"):
        parameters = int(probe_axes(parent_config).num_parameters(dims_of(parent_config)))
        seconds["convert"] = 10 + parameters / 1e7
    if recipe.parent.pretrain is not None:
        seconds["pretrain"] = 3 * flops * recipe.parent.pretrain.tokens / _flops_per_second()
    return seconds


@lru_cache(maxsize=1)
def _flops_per_second() -> float:
    """A third of the float32 matrix product rate measured here: what whole models reach of it, roughly."""
    size = 512
    left, right = torch.ones(size, size), torch.ones(size, size)
    left @ right
    started, rounds = time.perf_counter(), 10
    for _ in range(rounds):
        left @ right
    return rounds * 2 * size**3 / (time.perf_counter() - started) / 3


def dtype_bytes(config: Any) -> int:
    """Bytes of one stored weight."""
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."))
    return dtype.itemsize if isinstance(dtype, torch.dtype) else 4


def run_folder_of(recipe: Recipe, output: str | Path | None) -> Path:
    """Where the run goes: --output, else the recipe's `output`, else runs/NAME."""
    return Path(output or recipe.output or Path("runs") / recipe.name)
