"""A recipe -> the members in the order they are made, each with its seed, shape and cost. Loads no weights."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade.models.architecture.axes import probe_axes
from cascade.models.architecture.dims import ModelDims, config_with_dims, dims_of
from cascade.models.checkpoint.load import check_weights, load_config, resolve_model
from cascade.planning.estimates import (
    dtype_bytes,
    flops_of,
    member_bytes,
    optimizer_of,
    peak_memory,
    stage_seconds,
    training_state_bytes,
)
from cascade.planning.starts import plan_layers, require_same_classes, student_config
from cascade.planning.vocabularies import common_ids
from cascade.pruning.rotation import require_rotatable, untied
from cascade.pruning.size.shape import solve_shape
from cascade.pruning.size.target import Latency, Target
from cascade.recipe.distill import Distill
from cascade.recipe.schema import Member, Recipe
from cascade.runtime.errors import UserError


@dataclass(frozen=True)
class FoundShape:
    """What was chosen for a member among several that were tried."""

    dims: ModelDims
    hidden: str
    """The score of hidden channels: activation_norm or pca."""


@dataclass(frozen=True)
class ResolvedMember:
    """One member, with everything that can be known before any weight is read."""

    member: Member
    target: Target | None
    """What its shape is solved by; None where that is given."""
    seed: str
    """'parent', a member's name, or '' for one that is not cut"""
    config: Any
    """The member's config, of the shape solved for (per-layer lists are settled by the plan)."""
    parent_config: Any
    hidden: str
    """The score of hidden channels: activation_norm or pca."""
    hidden_choices: tuple[str, ...]
    """More than one where `prune.hidden: auto` is settled by trying."""
    dims: ModelDims
    vocab_size: int | None
    """Ids, from 0 on, that it is compared with the parent over; None: all rows, of which both have as many."""
    num_parameters: int
    num_parameters_non_embedding: int
    flops_per_token: float
    """Forward, at the recipe's block size; of a whole example where it counts those."""
    num_steps: int
    num_tokens: int
    """Training tokens (examples where it classifies), in whole steps."""
    optimizer: str
    """What distill.optimizer comes to for it."""
    first_position: int
    """Blocks that the chain of seeds has read before."""
    peak_memory_bytes: float
    disk_bytes: float
    """Of what stays when it is finished."""
    state_bytes: float
    """Of training states, the one being written included, while it is trained."""
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
    found_shapes: Mapping[str, FoundShape] | None = None,
    latencies: Mapping[str, Latency] | None = None,
) -> list[ResolvedMember]:
    """Members, largest first, a seed always before what is cut from it.

    `pinned_seeds` (member -> seed) holds for members that already exist: adding a size between two others must not
    give the smaller one another seed. `found_shapes` are those that a search has chosen by now; `latencies` say how
    long the shapes of a member with a target in decode_ms take.

    Raises:
        UserError: a target that cannot be met, or a student with another vocabulary.
    """
    axes, parent = probe_axes(parent_config), dims_of(parent_config)
    total = int(axes.num_parameters(parent))
    if recipe.distill is None:
        return []
    targets = {
        member.name: target_of(member, (latencies or {}).get(member.name)) for member in recipe.members if member.target
    }
    resolved: dict[str, ResolvedMember] = {}
    sizes = {member.name: _wanted(member, targets.get(member.name), parent_config, total) for member in recipe.members}
    for member in sorted(recipe.members, key=lambda member: -sizes[member.name]):
        seed, seed_config = _seed(member, resolved, parent_config, pinned_seeds or {})
        target, found = targets.get(member.name), (found_shapes or {}).get(member.name)
        hidden = found.hidden if found else _hidden_of(recipe, member, seed_config, parent_config)
        config = _shape(member, target, seed_config, parent_config, found, hidden)
        if member.start == "layers":
            plan_layers(seed_config, dims_of(config), member.name)
        before = 0
        if seed in resolved and not recipe.shares_text:
            before = resolved[seed].first_position + resolved[seed].num_steps * recipe.distill.batch_size
        if seed:
            vocab_size = resolved[seed].vocab_size if seed in resolved else None
        else:
            require_same_classes(config, parent_config, member.name)
            vocab_size = common_ids(recipe, member, config, parent_config)
        resolved[member.name] = _resolve(
            recipe, recipe.distill, member, target, seed, config, parent_config, before, hidden, vocab_size
        )
    return list(resolved.values())


def _wanted(member: Member, target: Target | None, parent_config: Any, total: int) -> float:
    """Parameters that a member will have, to sort by."""
    if target is not None and target.params is not None and len(target.bounds()) == 1 and not target.dims:
        return target.params * (total if target.params <= 1 else 1)
    if target is not None:
        dims = _solved(member, target, parent_config, parent_config)
        return float(probe_axes(parent_config).num_parameters(dims))
    if member.config:
        config = student_config(member.config, parent_config, member.name)
    else:
        config = load_config(resolve_model(member.student))
    return float(probe_axes(config).num_parameters(dims_of(config)))


def _seed(
    member: Member, resolved: dict[str, ResolvedMember], parent_config: Any, pinned: dict[str, str]
) -> tuple[str, Any]:
    if member.student:
        source = resolve_model(member.student)
        config = load_config(source)
        check_weights(source, config)
        return "", config
    if member.start == "random":
        own = student_config(member.config, parent_config, member.name) if member.config else parent_config
        return "", own
    seed = member.seed
    if seed == "previous":
        chain = [name for name, other in resolved.items() if other.seed and other.member.chain]
        seed = pinned.get(member.name) or (chain[-1] if chain else "parent")
    if seed == "parent":
        return seed, parent_config
    if seed not in resolved:
        raise UserError(f"members: {member.name}: its seed '{seed}' is smaller; a seed has to be larger")
    return seed, resolved[seed].config


def _shape(
    member: Member,
    target: Target | None,
    seed_config: Any,
    parent_config: Any,
    found: FoundShape | None,
    hidden: str,
) -> Any:
    if target is None:
        return seed_config
    config = shape_config(seed_config, hidden)
    return config_with_dims(config, found.dims if found else _solved(member, target, config, parent_config))


def _hidden_of(recipe: Recipe, member: Member, seed_config: Any, parent_config: Any) -> str:
    """Nothing is rotated where no channels are cut, or none by scores."""
    target = member.target
    stays = target is None or (not target.has_bounds() and "hidden_size" not in target.dims)
    if target is None or member.start != "prune" or (recipe.prune.hidden == "auto" and stays):
        return "activation_norm"
    if target.has_bounds():
        return hidden_score(recipe.prune.hidden, parent_config)
    return score_for_dims(recipe.prune.hidden, target_of(member), seed_config, parent_config)


def score_for_dims(wanted: str, target: Target, seed_config: Any, parent_config: Any) -> str:
    """As `hidden_score`; for explicit dims, `auto` is never what would make the member larger than the parent."""
    hidden = hidden_score(wanted, parent_config)
    if wanted != "auto" or hidden != "pca" or target.bounds():
        return hidden
    shaped = shape_config(seed_config, hidden)
    count = probe_axes(shaped).num_parameters(solve_shape(shaped, target, parent=parent_config))
    return hidden if count <= probe_axes(parent_config).num_parameters(dims_of(parent_config)) else "activation_norm"


def hidden_score(wanted: str, parent_config: Any) -> str:
    """The score of hidden channels that `prune.hidden` asks for; `auto` is judged by the parent's config alone.

    A rotation gives the better cut of the same shape, but it unties the embeddings, and those of a small model with a
    large vocabulary cost it more than the rotation gives back. Members with a size to meet have both tried instead
    (`hidden_choices`).
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


def hidden_choices(wanted: str, parent_config: Any) -> tuple[str, ...]:
    """The scores of hidden channels to choose among by trying, where there is a size to meet."""
    if wanted != "auto":
        return (hidden_score(wanted, parent_config),)
    try:
        require_rotatable(parent_config, probe_axes(parent_config))
    except UserError:
        return ("activation_norm",)
    return ("activation_norm", "pca")


def shape_config(seed_config: Any, hidden: str) -> Any:
    """The seed's config as its members will have it: with a head of its own where the stream is rotated."""
    return untied(seed_config) if hidden == "pca" else seed_config


def _solved(member: Member, target: Target, seed_config: Any, parent_config: Any) -> ModelDims:
    try:
        return solve_shape(seed_config, target, parent=parent_config)
    except UserError as error:
        raise UserError(f"members: {member.name}: {error}") from error


def target_of(member: Member, latency: Latency | None = None) -> Target:
    """A member's target as the solver takes it.

    Raises:
        ValueError: the member is not cut.
    """
    if member.target is None:
        raise ValueError(f"{member.name} is not cut")
    return Target(**member.target.model_dump(), latency=latency)


def _resolve(
    recipe: Recipe,
    distill: Distill,
    member: Member,
    target: Target | None,
    seed: str,
    config: Any,
    parent_config: Any,
    before: int,
    hidden: str,
    vocab_size: int | None,
) -> ResolvedMember:
    axes, dims = probe_axes(config), dims_of(config)
    # A classifier's examples count as one token each, whatever their length.
    step_tokens = distill.batch_size * (1 if recipe.counts_examples else recipe.data.block_size)
    budget = member.tokens or member.examples or distill.tokens or distill.examples or 0
    num_steps = math.ceil(budget / step_tokens)
    count = int(axes.num_parameters(dims))
    flops, parent_flops = flops_of(recipe, config), flops_of(recipe, parent_config)
    stored_bytes = {"float32": 4, "bfloat16": 2, "float16": 2}.get(recipe.save.dtype) or dtype_bytes(parent_config)
    optimizer = optimizer_of(recipe, config, parent_config)
    several = member.start == "prune" and target is not None and target.bounds()
    choices = hidden_choices(recipe.prune.hidden, parent_config) if several else (hidden,)
    return ResolvedMember(
        member=member,
        target=target,
        seed=seed,
        config=config,
        parent_config=parent_config,
        hidden=hidden,
        hidden_choices=choices,
        dims=dims,
        vocab_size=vocab_size,
        num_parameters=count,
        num_parameters_non_embedding=int(axes.num_parameters_non_embedding(dims)),
        flops_per_token=flops,
        num_steps=num_steps,
        num_tokens=num_steps * step_tokens,
        optimizer=optimizer,
        first_position=before,
        peak_memory_bytes=peak_memory(recipe, distill, config, parent_config, optimizer=optimizer),
        disk_bytes=member_bytes(
            count,
            stored_bytes,
            start=member.start,
            repaired=recipe.prune.repair.method != "none",
            ce="ce" in recipe.baseline_kinds,
        ),
        state_bytes=training_state_bytes(
            count,
            optimizer=optimizer,
            averaged=distill.ema_decay is not None,
            keep_states=distill.keep_states,
        ),
        seconds=stage_seconds(
            recipe,
            flops,
            parent_flops,
            num_steps * step_tokens,
            cut=bool(seed) and member.start == "prune",
            choices=len(choices),
        ),
    )


def run_folder_of(recipe: Recipe, output: str | Path | None) -> Path:
    """Where the run goes: --output, else the recipe's `output`, else runs/NAME."""
    return Path(output or recipe.output or Path("runs") / recipe.name)
