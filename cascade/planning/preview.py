"""`cascade plan`: everything that can be known and checked before any weight is loaded."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cascade.evaluation.tasks_lm_eval.harness import find_tasks
from cascade.evaluation.tasks_lm_eval.task_code import require_allowed
from cascade.models.architecture.sized import Sized
from cascade.models.checkpoint.load import ModelSource, load_tokenizer
from cascade.models.checkpoint.sentence_files import unlearned_settings
from cascade.planning.cache_choice import Choice, cache_folder, choose_cache, with_cache
from cascade.planning.cautions import cautions
from cascade.planning.checks import check_family
from cascade.planning.disk_room import bytes_still_needed
from cascade.planning.estimates import flops_of, parent_seconds
from cascade.planning.fading import fading_record
from cascade.planning.family import ResolvedMember, resolve_family, run_folder_of
from cascade.planning.foreseen import require_foreseen, rows_of_all
from cascade.planning.generation import check_generation, missing_answers
from cascade.planning.inputs import text_data
from cascade.planning.latencies import find_latencies
from cascade.planning.origins import check_licences
from cascade.planning.ownership import check_ownership, pinned_seeds
from cascade.planning.parent import existing_parent, parent_config
from cascade.planning.preview_data import preview_data
from cascade.planning.remaining import remaining_members, remaining_seconds, shapes_on_disk
from cascade.pruning.size.shape import legal_values, listed
from cascade.pruning.size.target import Latency
from cascade.recipe.generate import Generate
from cascade.recipe.schema import Recipe
from cascade.runtime.permissions import NO_PERMISSIONS, Permissions
from cascade.store.lock import existing
from cascade.teacher.writing.generate import collect_prompts, planned


def preview(
    recipe: Recipe, output: str | Path | None = None, permissions: Permissions = NO_PERMISSIONS
) -> dict[str, Any]:
    """The record of a plan: members with their shapes and costs, after every check that needs no weights.

    Raises:
        UserError: whatever would stop the run.
    """
    folder = run_folder_of(recipe, output)
    check_ownership(folder, recipe)
    config = parent_config(recipe)
    parent, source = Sized(config), existing_parent(recipe)
    reads_text = bool(parent.dims.vocab_size)
    tokenizer = load_tokenizer(source, vocab_size=parent.dims.vocab_size) if source is not None and reads_text else None
    tasks = find_tasks(recipe.evaluate.tasks, [Path(path) for path in recipe.evaluate.task_folders])
    require_allowed(tasks, permissions.task_code)
    latencies = find_latencies(recipe, config, folder)
    members = resolve_family(
        recipe,
        config,
        pinned_seeds=pinned_seeds(folder),
        found_shapes=shapes_on_disk(folder, [member.name for member in recipe.members]),
        latencies=latencies,
    )
    data = preview_data(recipe, config, tokenizer, rows_of_all(config, members) if reads_text else None)
    generate = None
    if recipe.generate is not None:
        data["prompts"], generate = _preview_generation(recipe, recipe.generate, source, folder, permissions)
    proof = check_family(recipe, config, members)
    require_foreseen(recipe, config, members, permissions)
    choice = choose_cache(recipe, config, members, run_folder=folder)
    members = remaining_members(folder, recipe, with_cache(recipe, config, members, choice))
    check_licences(recipe)
    sentences = unlearned_settings(source.folder, "parent") if source is not None and recipe.task == "embedding" else ()
    return {
        **_run_record(recipe, members, parent, folder),
        "generate": generate,
        "data": data,
        "proof": proof,
        "legal_values": {name: listed(values) for name, values in legal_values(parent).items()} if reads_text else {},
        **_members_record(recipe, members, parent),
        "targets": _targets_record(recipe, choice, len(members)),
        "cautions": [*cautions(recipe, members, config, folder, choice), *sentences],
        "copies": _copies(recipe, members),
        "decode_ms": _decode_ms(members, latencies),
        "features_fade": fading_record(recipe, members),
    }


def _preview_generation(
    recipe: Recipe, settings: Generate, source: ModelSource | None, folder: Path, permissions: Permissions
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(rows of prompts that are left out, what the teacher will be asked for)."""
    bad = text_data(recipe.data).bad_row_counter()
    prompts = collect_prompts(settings, recipe.data.text_field, bad)
    skipped = bad.record()
    if source is None:
        raise ValueError("a parent that writes is not trained in the same recipe")
    check_generation(recipe, settings, prompts, source)
    missing = missing_answers(recipe, settings, prompts, source, folder)
    return skipped, planned(settings, len(prompts), missing, permissions)


def _run_record(recipe: Recipe, members: Sequence[ResolvedMember], parent: Sized, folder: Path) -> dict[str, Any]:
    shared = sum(remaining_seconds(folder, recipe, "parent", parent_seconds(recipe, parent.config)).values())
    return {
        "name": recipe.name,
        "run": str(folder),
        "disk_needed_bytes": bytes_still_needed(folder, members),
        "disk_free_bytes": shutil.disk_usage(existing(folder)).free,
        "seconds": shared + sum(sum(member.seconds.values()) for member in members),
        "counts": "examples" if recipe.counts_examples else "tokens",
        "parent": {
            "dims": parent.dims.as_dict(),
            "num_parameters": parent.num_parameters,
            "flops_per_token": flops_of(recipe, parent.config),
        },
    }


def _members_record(recipe: Recipe, members: Sequence[ResolvedMember], parent: Sized) -> dict[str, Any]:
    return {
        "search": recipe.prune.search is not None,
        "finished": [member.name for member in members if not member.seconds],
        "hidden_tried": [member.name for member in members if len(member.hidden_choices) > 1 and member.seconds],
        "members": [_member_record(member, parent) for member in members],
    }


def _member_record(member: ResolvedMember, parent: Sized) -> dict[str, Any]:
    return {
        "name": member.name,
        "seed": member.seed or None,
        "init": member.member.start,
        "dims": member.sized.dims.as_dict(),
        "num_parameters": member.sized.num_parameters,
        "num_parameters_non_embedding": member.sized.num_parameters_non_embedding,
        "fraction_of_parent": member.sized.num_parameters / parent.num_parameters,
        "flops_per_token": member.flops_per_token,
        "num_tokens": member.num_tokens,
        "num_steps": member.num_steps,
        "optimizer": member.optimizer,
        "peak_memory_bytes": round(member.peak_memory_bytes),
        "disk_bytes": round(member.disk_bytes),
        "state_bytes": round(member.state_bytes),
        "seconds": member.seconds,
    }


def _targets_record(recipe: Recipe, choice: Choice, num_members: int) -> dict[str, Any]:
    return {
        "kind": choice.kind,
        "why": choice.why,
        "folder": str(cache_folder(recipe)),
        "disk_free_bytes": shutil.disk_usage(existing(cache_folder(recipe))).free,
        "tokens_labelled": choice.num_labelled,
        "tokens_read": choice.num_read,
        "options": choice.records(max(1, num_members)),
    }


def _copies(recipe: Recipe, members: Sequence[ResolvedMember]) -> list[str]:
    """Names of the copies in fewer bits."""
    everything = ["parent", *(member.name for member in members)]
    return [f"{name}-{entry.suffix}" for entry in recipe.finish for name in entry.members or everything]


def _decode_ms(members: Sequence[ResolvedMember], latencies: Mapping[str, Latency]) -> dict[str, float]:
    """Milliseconds of a decoding step, of the members with a target in them."""
    return {
        member.name: float(latencies[member.name].milliseconds(member.sized.axes, member.sized.dims))
        for member in members
        if member.name in latencies
    }
