"""A recipe -> the members in the order they are made, each with its seed, shape and cost. Loads no weights."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade.models.architecture.axes import probe_axes
from cascade.models.architecture.dims import ModelDims, config_with_dims, dims_of
from cascade.models.architecture.sized import Sized
from cascade.models.checkpoint.load import check_weights, load_config, resolve_model
from cascade.planning.estimates import (
    flops_of,
    member_bytes,
    optimizer_of,
    peak_memory,
    stage_seconds,
    stored_weight_bytes,
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
    """The shape that a search has chosen for a member."""

    dims: ModelDims
    hidden: str
    """The score of hidden channels: activation_norm or pca."""


@dataclass(frozen=True)
class ResolvedMember:
    """One member, with everything that can be known before any weight is read."""

    member: Member
    target: Target | None
    """The target that the shape is solved for; None where the member has a shape already."""
    seed: str
    """'parent', a member's name, or '' for a member that is not cut."""
    sized: Sized
    """The member's architecture, of the shape solved for (the pruning plan settles the config's per-layer lists)."""
    parent_config: Any
    hidden: str
    """The score of hidden channels: activation_norm or pca."""
    hidden_choices: tuple[str, ...]
    """The scores of hidden channels that are tried; more than one where `prune.hidden: auto` chooses by trying."""
    vocab_size: int | None
    """Ids, from 0 on, over which the member is compared with the parent; None: all rows, as both have equally many."""
    flops_per_token: float
    """Forward FLOPs of a token at the recipe's block size; of a whole example where the recipe counts examples."""
    num_steps: int
    num_tokens: int
    """Training tokens (examples where it classifies), in whole steps."""
    optimizer: str
    """What `distill.optimizer` comes to for this member."""
    first_position: int
    """Blocks that the chain of seeds has read before."""
    peak_memory_bytes: float
    disk_bytes: float
    """Bytes of the checkpoints that stay once the member is finished."""
    state_bytes: float
    """Bytes of training states during training, the state being written included."""
    seconds: dict[str, float]
    """Stage name -> its estimated seconds on this machine."""

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
    """The members with their shapes and costs, largest first, a seed always before the members cut from it.

    `pinned_seeds` (member -> seed) holds for members that already exist: adding a size between two others must not
    give the smaller one another seed. `found_shapes` are those that a search has chosen by now; `latencies` say how
    long the shapes of a member with a target in decode_ms take.

    Raises:
        UserError: a target that cannot be met, or a student with another vocabulary.
    """
    parent = Sized(parent_config)
    if recipe.distill is None:
        return []
    targets = {
        member.name: target_of(member, (latencies or {}).get(member.name)) for member in recipe.members if member.target
    }
    sizes = {member.name: _expected_parameters(member, targets.get(member.name), parent) for member in recipe.members}
    resolved: dict[str, ResolvedMember] = {}
    for member in sorted(recipe.members, key=lambda member: -sizes[member.name]):
        seed = _seed_of(member, resolved, parent_config, pinned_seeds or {})
        shape = (found_shapes or {}).get(member.name)
        outline = _outline(recipe, member, targets.get(member.name), seed, parent, shape)
        resolved[member.name] = _resolve(recipe, recipe.distill, outline, parent)
    return list(resolved.values())


@dataclass(frozen=True, kw_only=True)
class _Seed:
    """The model that a member is cut from."""

    name: str = ""
    """'parent', a member's name, or '' for a member that is not cut."""
    config: Any
    """The config of the seed, or of the member itself where it is not cut."""
    member: ResolvedMember | None = None
    """The seed as a member; None where it is the parent or there is none."""


@dataclass(frozen=True, kw_only=True)
class _Outline:
    """A member before its costs are counted: what it starts from, and the shape that it takes."""

    member: Member
    target: Target | None
    seed: str
    """As in `ResolvedMember`."""
    sized: Sized
    hidden: str
    """activation_norm or pca."""
    vocab_size: int | None
    """As in `ResolvedMember`."""
    first_position: int
    """Blocks that the chain of seeds has read before."""


def _expected_parameters(member: Member, target: Target | None, parent: Sized) -> float:
    """Parameters that a member will have, to sort by."""
    if target is not None and target.params is not None and len(target.bounds()) == 1 and not target.dims:
        return target.params * (parent.num_parameters if target.params <= 1 else 1)
    if target is not None:
        dims = _solved(member, target, parent.config, parent.config)
        return float(parent.axes.num_parameters(dims))
    if member.config:
        config = student_config(member.config, parent.config, member.name)
    else:
        config = load_config(resolve_model(member.student))
    return float(Sized(config).num_parameters)


def _seed_of(member: Member, resolved: dict[str, ResolvedMember], parent_config: Any, pinned: dict[str, str]) -> _Seed:
    if member.student:
        source = resolve_model(member.student)
        config = load_config(source)
        check_weights(source, config)
        return _Seed(config=config)
    if member.start == "random":
        config = student_config(member.config, parent_config, member.name) if member.config else parent_config
        return _Seed(config=config)
    name = member.seed
    if name == "previous":
        chain = [larger.name for larger in resolved.values() if larger.seed and larger.member.chain]
        name = pinned.get(member.name) or (chain[-1] if chain else "parent")
    if name == "parent":
        return _Seed(name=name, config=parent_config)
    if name not in resolved:
        raise UserError(f"members: {member.name}: its seed '{name}' is smaller; a seed has to be larger")
    return _Seed(name=name, config=resolved[name].sized.config, member=resolved[name])


def _outline(
    recipe: Recipe, member: Member, target: Target | None, seed: _Seed, parent: Sized, shape: FoundShape | None
) -> _Outline:
    """What a member starts from and its shape: `shape` where a search has chosen one, else the solved target."""
    hidden = shape.hidden if shape else _hidden_of(recipe, member, seed.config, parent.config)
    config = seed.config
    if target is not None:
        shaped = shape_config(seed.config, hidden)
        config = config_with_dims(shaped, shape.dims if shape else _solved(member, target, shaped, parent.config))
    if member.start == "layers":
        plan_layers(seed.config, dims_of(config), member.name)
    first_position, vocab_size = 0, None
    if seed.member is not None:
        vocab_size = seed.member.vocab_size
        if recipe.distill is not None and not recipe.shares_text:
            first_position = seed.member.first_position + seed.member.num_steps * recipe.distill.batch_size
    elif not seed.name:
        require_same_classes(config, parent.config, member.name)
        vocab_size = common_ids(recipe, member, config, parent.config)
    return _Outline(
        member=member,
        target=target,
        seed=seed.name,
        sized=Sized(config),
        hidden=hidden,
        vocab_size=vocab_size,
        first_position=first_position,
    )


def _hidden_of(recipe: Recipe, member: Member, seed_config: Any, parent_config: Any) -> str:
    """The score of a member's hidden channels; without rotation where no channels are cut, or none by scores."""
    target = member.target
    stays = target is None or (not target.has_bounds() and "hidden_size" not in target.dims)
    if target is None or member.start != "prune" or (recipe.prune.hidden == "auto" and stays):
        return "activation_norm"
    if target.has_bounds():
        return hidden_score(recipe.prune.hidden, parent_config)
    return score_for_dims(recipe.prune.hidden, target_of(member), seed_config, parent_config)


def score_for_dims(setting: str, target: Target, seed_config: Any, parent_config: Any) -> str:
    """As `hidden_score`; for explicit dims, `auto` is never what would make the member larger than the parent."""
    hidden = hidden_score(setting, parent_config)
    if setting != "auto" or hidden != "pca" or target.bounds():
        return hidden
    shaped = shape_config(seed_config, hidden)
    count = probe_axes(shaped).num_parameters(solve_shape(shaped, target, parent=parent_config))
    return hidden if count <= Sized(parent_config).num_parameters else "activation_norm"


def hidden_score(setting: str, parent_config: Any) -> str:
    """The score of hidden channels that `prune.hidden` asks for; `auto` is judged by the parent's config alone.

    A rotation gives the better cut of the same shape, but it unties the embeddings, and those of a small model with a
    large vocabulary cost it more than the rotation gives back. Members with a size to meet have both tried instead
    (`hidden_choices`).
    """
    if setting != "auto":
        return setting
    parent = Sized(parent_config)
    try:
        require_rotatable(parent)
    except UserError:
        return "activation_norm"
    embeddings = parent.num_parameters - parent.num_parameters_non_embedding
    small = embeddings <= LARGEST_UNTIED_SHARE * parent.num_parameters
    return "pca" if small or not parent.axes.tied else "activation_norm"


LARGEST_UNTIED_SHARE = 0.15
"""Share of the parent's parameters up to which `prune.hidden: auto` unties tied embeddings."""


def hidden_choices(setting: str, parent_config: Any) -> tuple[str, ...]:
    """The scores of hidden channels to choose among by trying, where there is a size to meet."""
    if setting != "auto":
        return (hidden_score(setting, parent_config),)
    try:
        require_rotatable(Sized(parent_config))
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


def _resolve(recipe: Recipe, distill: Distill, outline: _Outline, parent: Sized) -> ResolvedMember:
    """The member of an outline, with what it costs."""
    member, sized, target = outline.member, outline.sized, outline.target
    # A classifier's examples count as one token each, whatever their length.
    step_tokens = distill.batch_size * (1 if recipe.counts_examples else recipe.data.block_size)
    budget = member.tokens or member.examples or distill.tokens or distill.examples or 0
    num_steps = math.ceil(budget / step_tokens)
    flops, parent_flops = flops_of(recipe, sized.config), flops_of(recipe, parent.config)
    optimizer = optimizer_of(recipe, sized.config, parent.config)
    several = member.start == "prune" and target is not None and target.bounds()
    choices = hidden_choices(recipe.prune.hidden, parent.config) if several else (outline.hidden,)
    return ResolvedMember(
        member=member,
        target=target,
        seed=outline.seed,
        sized=sized,
        parent_config=parent.config,
        hidden=outline.hidden,
        hidden_choices=choices,
        vocab_size=outline.vocab_size,
        flops_per_token=flops,
        num_steps=num_steps,
        num_tokens=num_steps * step_tokens,
        optimizer=optimizer,
        first_position=outline.first_position,
        peak_memory_bytes=peak_memory(recipe, distill, sized, parent, optimizer=optimizer),
        disk_bytes=member_bytes(
            sized.num_parameters,
            stored_weight_bytes(recipe, parent.config),
            start=member.start,
            repaired=recipe.prune.repair.method != "none",
            ce="ce" in recipe.baseline_kinds,
        ),
        state_bytes=training_state_bytes(
            sized.num_parameters,
            optimizer=optimizer,
            averaged=distill.ema_decay is not None,
            keep_states=distill.keep_states,
        ),
        seconds=stage_seconds(
            recipe,
            flops,
            parent_flops,
            num_steps * step_tokens,
            cut=bool(outline.seed) and member.start == "prune",
            choices=len(choices),
        ),
    )


def is_cut_from_parent(member: ResolvedMember, by_name: Mapping[str, ResolvedMember]) -> bool:
    """Whether the chain of a member's seeds begins with the parent."""
    while member.seed in by_name:
        member = by_name[member.seed]
    return member.seed == "parent"


def run_folder_of(recipe: Recipe, output: str | Path | None) -> Path:
    """Where the run goes: --output, else the recipe's `output`, else runs/NAME."""
    return Path(output or recipe.output or Path("runs") / recipe.name)
