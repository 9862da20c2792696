"""Whether a run keeps what its teacher says, in which form, and why: what `cascade plan` shows and `cascade run` does.

The choice follows from the recipe and the models' shapes alone, so that a run that goes on makes the same one.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import log2
from pathlib import Path
from typing import Any

from cascade.models.architecture.dims import dims_of
from cascade.planning.estimates import flops_of, flops_per_second, short_recovery
from cascade.planning.family import ResolvedMember
from cascade.recipe.distill import Distill
from cascade.recipe.schema import Recipe
from cascade.runtime.errors import UserError
from cascade.runtime.files import read_json, write_atomically
from cascade.teacher.targets.keys import default_folder
from cascade.teacher.targets.record import Layout

_CHOICE_FILE = "stages/targets.json"

HIDDEN_LIMIT_BYTES = 8e9
"""Hidden states of up to this many bytes are kept where the recipe says `cache: auto`."""
_LABELLING, LEAST_SAVED = 1.1, 0.1
"""Cost of labelling, in forward passes of the teacher; least share of its work that kept targets have to save."""
_IDS_PER_DRAW = 0.45
"""Distinct ids among the draws, as measured on a vocabulary of 49,152."""


@dataclass(frozen=True)
class Option:
    """One form in which the teacher's targets could be kept."""

    kind: str
    refused: str
    """Why this form cannot serve the recipe; empty where it can."""
    num_bytes: float
    label_flops: float
    saved_flops: float
    """FLOPs of the teacher that all trainings together save, less those of labelling."""


@dataclass(frozen=True)
class Choice:
    """The form in which a run keeps the teacher's targets, with the reason and the alternatives."""

    layout: Layout | None
    """None: the teacher runs at each step. Exact ids are added once the tokenizer is loaded."""
    why: str
    num_labelled: int
    """Tokens that the teacher labels, once."""
    num_read: int
    """Tokens that all trainings read."""
    options: list[Option]

    @property
    def kind(self) -> str:
        """The kind of targets that the run keeps: none, sampled, top_k or hidden."""
        return self.layout.kind if self.layout else "none"

    @property
    def num_bytes(self) -> float:
        """Bytes on disk of all kept targets; 0 where none are kept."""
        return 0.0 if self.layout is None else self.num_labelled * bytes_per_token(self.layout)

    def records(self, num_members: int) -> list[dict[str, Any]]:
        """The options for `cascade plan`, in seconds at this machine's measured rate."""
        rate = flops_per_second()
        return [
            {
                "kind": option.kind,
                "refused": option.refused,
                "bytes": round(option.num_bytes),
                "label_seconds": option.label_flops / rate,
                "saved_seconds_per_member": option.saved_flops / rate / num_members,
            }
            for option in self.options
        ]


def options_table(
    options: Sequence[dict[str, Any]], size: Callable[[float], str], time: Callable[[float], str]
) -> list[list[str]]:
    """A table of the forms of targets: disk, labelling time, time saved, and the losses that each allows."""
    gives = {"sampled": "forward KL, temperature 1", "top_k": "the same, a bucket for the rest", "hidden": "all"}
    table = [["targets", "on disk", "labelling", "saves a member", "losses", "here"]]
    for option in options:
        saved = option["saved_seconds_per_member"]
        gained = time(saved) if saved > 0 else f"-{time(-saved)}"
        cells = [option["kind"], size(option["bytes"]), time(option["label_seconds"]), gained, gives[option["kind"]]]
        table.append([*cells, "no" if option["refused"] else "yes"])
    return table


def with_cache(
    recipe: Recipe, parent_config: Any, members: Sequence[ResolvedMember], choice: Choice
) -> list[ResolvedMember]:
    """The members with their training times for a run that keeps the teacher's targets."""
    if choice.layout is None:
        return list(members)
    rate, flops, dims = flops_per_second(), flops_of(recipe, parent_config), dims_of(parent_config)
    head = 2.0 * dims.vocab_size * dims.hidden_size if choice.kind == "hidden" else 0.0
    cached, labelled = [], choice.num_labelled
    for member in members:
        first = min(labelled, member.num_tokens)
        labelled -= first
        spared = member.num_tokens * (flops - head) / rate
        seconds = member.seconds | {"label": 0.5 + _LABELLING * first * flops / rate}
        cached.append(replace(member, seconds=seconds | {"distill": max(0.0, member.seconds["distill"] - spared)}))
    return cached


def choose_cache(
    recipe: Recipe, parent_config: Any, members: Sequence[ResolvedMember], *, run_folder: Path | None = None
) -> Choice:
    """What `distill.cache` comes to for these members; a run directory that has made the choice keeps it.

    Raises:
        UserError: the kind that is asked for cannot give the losses that are.
    """
    distill = recipe.distill
    if distill is None or not members:
        return Choice(None, "there is no training", 0, 0, [])
    setting, outside = distill.cache.kind, _outside(recipe)
    if outside:
        if setting not in ("auto", "none"):
            raise UserError(f"distill.cache: {setting}: {outside}; remove it")
        return Choice(None, outside, 0, 0, [])
    labelled, read = _tokens(recipe, members)
    inside = _inside(distill, members)
    options = [
        _option(recipe, distill, parent_config, kind, inside, labelled, read) for kind in ("sampled", "hidden", "top_k")
    ]
    by_kind = {option.kind: option for option in options}
    if setting == "none":
        return Choice(None, "as the recipe says", labelled, read, options)
    if setting != "auto":
        if by_kind[setting].refused:
            raise UserError(f"distill.cache: {setting}: {by_kind[setting].refused}")
        return Choice(_layout(distill, parent_config, setting, inside), "as the recipe says", labelled, read, options)
    kind, why = _recorded_choice(run_folder) or _auto(recipe, parent_config, by_kind, read)
    if kind != "none" and by_kind[kind].refused:
        raise UserError(f"distill.cache: this run has kept {kind} targets so far, and {by_kind[kind].refused}")
    layout = None if kind == "none" else _layout(distill, parent_config, kind, inside)
    return Choice(layout, why, labelled, read, options)


def settle(run_folder: Path, choice: Choice) -> None:
    """Remember a run's choice: a member that is added later does not change the others' targets."""
    if _recorded_choice(run_folder) is None and choice.options:
        (run_folder / _CHOICE_FILE).parent.mkdir(exist_ok=True)
        write_atomically(run_folder / _CHOICE_FILE, json.dumps({"kind": choice.kind, "why": choice.why}) + "\n")


def _recorded_choice(run_folder: Path | None) -> tuple[str, str] | None:
    path = None if run_folder is None else run_folder / _CHOICE_FILE
    if path is None or not path.exists():
        return None
    try:
        record = read_json(path)
        return str(record["kind"]), str(record["why"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it, and the choice is made again") from error


def _auto(recipe: Recipe, parent_config: Any, by_kind: dict[str, Option], read: int) -> tuple[str, str]:
    """(kind, why): hidden states, which lose nothing, where they fit; else a sample; else the teacher each time."""
    live = max(1, read) * flops_of(recipe, parent_config)
    hidden, sampled = by_kind["hidden"], by_kind["sampled"]
    able = [option for option in (hidden, sampled) if not option.refused]
    if not able:
        return "none", hidden.refused
    best = max(able, key=lambda option: option.saved_flops)
    if best.saved_flops < LEAST_SAVED * live:
        if not recipe.shares_text:
            return "none", "no text is read often enough to pay for labelling it; data.reuse: shared may change that"
        return "none", f"{best.kind} targets would save {max(0.0, best.saved_flops / live):.0%} of the teacher's work"
    if not hidden.refused and hidden.num_bytes <= HIDDEN_LIMIT_BYTES and hidden.saved_flops >= LEAST_SAVED * live:
        return "hidden", "exact, and small enough"
    if not sampled.refused:
        return "sampled", f"hidden states would take {hidden.num_bytes / 1e9:.0f} GB or save little"
    return "none", f"hidden states would take {hidden.num_bytes / 1e9:.0f} GB; {sampled.refused}"


def _outside(recipe: Recipe) -> str:
    """Why nothing of the teacher is kept whatever the kind; empty where it may be."""
    if recipe.counts_examples:
        return f"task: {recipe.task}: what a teacher says of single examples is not kept"
    if recipe.distill is not None and recipe.distill.teacher != "parent":
        return f"distill.teacher: {recipe.distill.teacher}: the parent is not asked"
    return ""


def _tokens(recipe: Recipe, members: Sequence[ResolvedMember]) -> tuple[int, int]:
    """(tokens to label once, tokens that all trainings read)."""
    size = recipe.data.block_size
    read, ends = 0, []
    for member in members:
        read += member.num_tokens
        ends.append(member.first_position * size + member.num_tokens)
        if member.member.start != "prune" or member.target is None or not member.target.bounds():
            continue
        search = recipe.prune.search
        num_shapes = search.candidates if search else len(member.hidden_choices)
        read += num_shapes * short_recovery(recipe, member.num_tokens) if num_shapes > 1 else 0
        read += search.finalists * search.tokens if search else 0
    written = recipe.distill.on_policy.fraction if recipe.distill and recipe.distill.on_policy else 0.0
    starts = sorted((member.first_position * size, end) for member, end in zip(members, ends, strict=True))
    labelled, done = 0, 0
    for start, end in starts:
        labelled += max(0, end - max(start, done))
        done = max(done, end)
    # Steps on the student's own text ask the teacher itself.
    return round((1 - written) * min(labelled, recipe.data.max_tokens)), round((1 - written) * read)


def _inside(distill: Distill, members: Sequence[ResolvedMember]) -> dict[str, str]:
    """The losses that read the teacher's hidden states, and how."""
    cut = any(member.member.start in ("prune", "layers") for member in members)
    forms = {"hidden": distill.hidden_features(cut), "embedding": distill.features.embedding}
    return {name: form for name, form in forms.items() if form != "none"}


def _option(
    recipe: Recipe, distill: Distill, config: Any, kind: str, inside: dict[str, str], labelled: int, read: int
) -> Option:
    layout = _layout(distill, config, kind, inside)
    flops, dims = flops_of(recipe, config), dims_of(config)
    head = 2.0 * dims.vocab_size * dims.hidden_size if kind == "hidden" else 0.0
    label_flops = _LABELLING * labelled * flops
    return Option(
        kind,
        _refused(distill, kind, inside),
        labelled * bytes_per_token(layout),
        label_flops,
        read * (flops - head) - label_flops,
    )


def _refused(distill: Distill, kind: str, inside: dict[str, str]) -> str:
    """Why targets of this kind cannot give the losses that the recipe asks for; empty where they can."""
    if distill.features.relations:
        return "distill.features.relations need the teacher itself; use cache: none"
    if kind == "hidden":
        return ""
    if inside:
        named = ", ".join(f"distill.features.{name}: {form}" for name, form in inside.items())
        off = " and ".join(f"features.{name}: none" for name in inside)
        return f"{named} reads the teacher's hidden states; use cache: hidden or none, or {off}"
    if kind == "top_k" and distill.cache.exact_tokens:
        return "distill.cache.exact_tokens are for sampled targets; remove them"
    losses = ("forward_kl",) if kind == "sampled" else ("forward_kl", "ghost_top_k")
    if distill.loss not in losses or distill.temperature != 1:
        return (
            f"distill.loss: {distill.loss} at temperature {distill.temperature:g} needs all the teacher's "
            f"probabilities; use cache: hidden or none, or loss: {losses[0]} at temperature 1"
        )
    return ""


def _layout(distill: Distill, config: Any, kind: str, inside: dict[str, str]) -> Layout:
    dims, cache = dims_of(config), distill.cache
    if kind == "sampled":
        return Layout(kind, dims.vocab_size, draws=cache.draws)
    if kind == "top_k":
        return Layout(kind, dims.vocab_size, top_k=min(distill.top_k, dims.vocab_size))
    points: tuple[int, ...] = ()
    if "hidden" in inside:
        points = tuple(range(1, dims.num_hidden_layers + 1))
    if "embedding" in inside:
        points = (0, *points)
    return Layout(kind, dims.vocab_size, hidden_size=dims.hidden_size, dtype=cache.dtype, points=points)


def bytes_per_token(layout: Layout) -> float:
    """Estimated bytes on disk of one token's targets."""
    if layout.kind == "hidden":
        width = layout.hidden_size * 2 if layout.dtype == "bfloat16" else layout.hidden_size + 4
        return float(width * (1 + len(layout.points)))
    ids = float(layout.top_k) if layout.kind == "top_k" else min(layout.vocab_size, _IDS_PER_DRAW * layout.draws)
    rising = ids * (2 + max(0.0, log2(layout.vocab_size / ids)))
    if layout.kind == "top_k":
        return rising / 8 + 2 * ids + (4 if layout.version == 1 else 0)
    return (rising + layout.draws) / 8 + (8 if layout.version == 1 else 2) + 4 * len(layout.exact_ids)


def cache_folder(recipe: Recipe) -> Path:
    """The folder of the recipe's kept targets."""
    folder = recipe.distill.cache.folder if recipe.distill else ""
    return Path(folder).expanduser() if folder else default_folder()


def exact_ids(tokens: Sequence[str], tokenizer: Any) -> tuple[int, ...]:
    """Ids of tokens as the vocabulary writes them, in rising order.

    Raises:
        UserError: one is not in it.
    """
    known = tokenizer.get_vocab() if tokens else {}
    for token in tokens:
        if token not in known:
            raise UserError(f"distill.cache.exact_tokens: '{token}' is no token of the parent's vocabulary")
    return tuple(sorted({int(known[token]) for token in tokens}))


def require_exact(ids: Sequence[int], vocab_size: int) -> None:
    """Refuse ids of exact tokens that are not among those that models are compared over.

    Raises:
        UserError: with the first of them.
    """
    beyond = [number for number in ids if number >= vocab_size]
    if beyond:
        raise UserError(
            f"distill.cache.exact_tokens: token id {beyond[0]} is not among the {vocab_size} ids that the teacher and "
            "all members have in common; leave it out"
        )
