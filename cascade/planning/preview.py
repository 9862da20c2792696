"""`cascade plan`: everything that can be known and checked before any weight is loaded."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cascade.evaluation.tasks_lm_eval.harness import find_tasks
from cascade.evaluation.tasks_lm_eval.task_code import require_allowed
from cascade.models.architecture.axes import probe_axes
from cascade.models.architecture.dims import dims_of
from cascade.models.checkpoint.load import load_tokenizer
from cascade.models.checkpoint.sentence_files import unlearned_settings
from cascade.planning.cache_choice import cache_folder, choose_cache, options_table, with_cache
from cascade.planning.cautions import cautions
from cascade.planning.checks import check_family
from cascade.planning.disk_room import bytes_still_needed
from cascade.planning.estimates import flops_of, parent_seconds
from cascade.planning.family import ResolvedMember, resolve_family, run_folder_of
from cascade.planning.foreseen import require_foreseen, rows_of_all
from cascade.planning.generation import check_generation, missing_answers
from cascade.planning.inputs import text_data
from cascade.planning.latencies import find_latencies
from cascade.planning.origins import check_licences
from cascade.planning.ownership import check_ownership, pinned_seeds
from cascade.planning.parent import existing_parent, parent_config
from cascade.planning.preview_data import data_lines, preview_data
from cascade.planning.remaining import remaining_members, remaining_seconds, shapes_on_disk
from cascade.pruning.size.shape import legal_values, listed
from cascade.recipe.schema import Recipe
from cascade.report.plots import minutes, short_number
from cascade.report.tables import plain_table
from cascade.runtime.permissions import NO_PERMISSIONS, Permissions
from cascade.store.lock import existing
from cascade.teacher.writing.generate import collect_prompts, planned

_LEAST_SHARE, _LEAST_HOP = 0.1, 2 / 3


def preview(
    recipe: Recipe, output: str | Path | None = None, permissions: Permissions = NO_PERMISSIONS
) -> dict[str, Any]:
    """Members with their shapes and costs; checks paths, tasks, tokenizer, text, legality and the cut itself.

    Raises:
        UserError: whatever would stop the run.
    """
    folder = run_folder_of(recipe, output)
    check_ownership(folder, recipe)
    config = parent_config(recipe)
    axes, dims = probe_axes(config), dims_of(config)
    source = existing_parent(recipe)
    if source is not None and dims.vocab_size:
        tokenizer = load_tokenizer(source, vocab_size=dims.vocab_size)
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
    rows = rows_of_all(config, members) if dims.vocab_size else None
    data = preview_data(recipe, config, tokenizer if source is not None and rows else None, rows)
    asked = None
    if recipe.generate is not None:
        bad = text_data(recipe.data).bad_row_counter()
        prompts = collect_prompts(recipe.generate, recipe.data.text_field, bad)
        data["prompts"] = bad.record()
        if source is None:
            raise ValueError("a parent that writes is not trained in the same recipe")
        check_generation(recipe, recipe.generate, prompts, source)
        missing = missing_answers(recipe, recipe.generate, prompts, source, folder)
        asked = planned(recipe.generate, len(prompts), missing, permissions)
    proof = check_family(recipe, config, members)
    require_foreseen(recipe, config, members, permissions)
    choice = choose_cache(recipe, config, members, run_folder=folder)
    members = remaining_members(folder, recipe, with_cache(recipe, config, members, choice))
    check_licences(recipe)
    total = int(axes.num_parameters(dims))
    shared = sum(remaining_seconds(folder, recipe, "parent", parent_seconds(recipe, config)).values())
    return {
        "name": recipe.name,
        "run": str(folder),
        "disk_needed_bytes": bytes_still_needed(folder, members),
        "disk_free_bytes": shutil.disk_usage(existing(folder)).free,
        "seconds": shared + sum(sum(member.seconds.values()) for member in members),
        "counts": "examples" if recipe.counts_examples else "tokens",
        "parent": {
            "dims": dims.as_dict(),
            "num_parameters": total,
            "flops_per_token": flops_of(recipe, config),
        },
        "generate": asked,
        "data": data,
        "proof": proof,
        "legal_values": {name: listed(values) for name, values in legal_values(axes, dims).items()}
        if dims.vocab_size
        else {},
        "search": recipe.prune.search is not None,
        "finished": [member.name for member in members if not member.seconds],
        "hidden_tried": [member.name for member in members if len(member.hidden_choices) > 1 and member.seconds],
        "members": [_member_record(member, total) for member in members],
        "targets": {
            "kind": choice.kind,
            "why": choice.why,
            "folder": str(cache_folder(recipe)),
            "disk_free_bytes": shutil.disk_usage(existing(cache_folder(recipe))).free,
            "tokens_labelled": choice.num_labelled,
            "tokens_read": choice.num_read,
            "options": choice.records(max(1, len(members))),
        },
        "cautions": [
            *cautions(recipe, members, config, folder, choice),
            *(unlearned_settings(source.folder, "parent") if source is not None and recipe.task == "embedding" else ()),
        ],
        "copies": [
            f"{name}-{entry.suffix}"
            for entry in recipe.finish
            for name in entry.members or ["parent", *(member.name for member in members)]
        ],
        "decode_ms": {
            member.name: float(latencies[member.name].milliseconds(probe_axes(member.config), member.dims))
            for member in members
            if member.name in latencies
        },
    }


def preview_text(found: dict[str, Any]) -> str:
    """The preview as a table for a terminal."""
    head = [
        "",
        "seed",
        "layers",
        "hidden",
        "MLP",
        "heads",
        "parameters",
        "of parent",
        f"FLOPs/{found['counts'][:-1]}",
        found["counts"],
        "memory",
        "disk",
        "time",
    ]
    parent = found["parent"]
    table = [
        head,
        [
            "parent",
            "",
            *_shape_cells(parent["dims"]),
            f"{parent['num_parameters']:,}",
            "100%",
            short_number(parent["flops_per_token"]),
            "",
            "",
            "",
            "",
        ],
    ]
    for member in found["members"]:
        table.append(
            [
                member["name"],
                member["seed"] or f"({member['init']})",
                *_shape_cells(member["dims"]),
                f"{member['num_parameters']:,}",
                f"{member['fraction_of_parent']:.0%}",
                short_number(member["flops_per_token"]),
                f"{member['num_tokens']:,}",
                _bytes(member["peak_memory_bytes"]),
                _bytes(member["disk_bytes"]),
                minutes(sum(member["seconds"].values())) if member["seconds"] else "made",
            ]
        )
    lines = [plain_table(table), "", *found["cautions"], *hops_too_large(found["members"]), *data_lines(found["data"])]
    if found["generate"]:
        lines.append(_asked(found["generate"]))
    needed, free = _bytes(found["disk_needed_bytes"]), _bytes(found["disk_free_bytes"])
    lines.append(f"Run directory {found['run']}: needs {needed} more on the disk, {free} are free.")
    lines.append(
        f"Time, all stages that are left: about {minutes(found['seconds'])} on this machine (operations counted, rate "
        "measured)."
    )
    lines += [*_optimizer_lines(found["members"]), *_targets_lines(found["targets"])]
    if found["copies"]:
        lines.append(f"Copies in fewer bits, their time and space not counted above: {', '.join(found['copies'])}.")
    if found["legal_values"]:
        lines.append(
            "Each axis can be cut to: " + "; ".join(f"{k}: {v}" for k, v in found["legal_values"].items()) + "."
        )
    if found["hidden_tried"]:
        lines.append(
            f"prune.hidden: auto cuts, repairs and recovers {', '.join(found['hidden_tried'])} both ways, with the "
            "stream rotated and not, on a twentieth of the tokens, and keeps what is then nearer the parent on "
            "selection text."
        )
    if found["finished"]:
        lines.append(f"Made already, of the shapes above: {', '.join(found['finished'])}.")
    if found["search"] and len(found["finished"]) < len(found["members"]):
        lines.append(
            "Shapes are searched: those of members that are not made yet are where the search starts; smaller members "
            "follow what it finds."
        )
    for name, milliseconds in found["decode_ms"].items():
        lines.append(f"{name} decodes in about {milliseconds:.2f} ms a step, as measured and fitted here.")
    if found["proof"]:
        worst = max(found["proof"].values())
        lines.append(
            f"Cut proven on a tiny twin: pruned equals silenced to {worst:.0e} along {', '.join(found['proof'])}."
        )
    return "\n".join(lines)


def _optimizer_lines(members: list[dict[str, Any]]) -> list[str]:
    """With what, and in how many steps, members are trained."""
    steps: dict[str, list[str]] = {}
    for member in members:
        steps.setdefault(member["optimizer"], []).append(f"{member['name']} in {member['num_steps']:,} steps")
    return [f"Trained with {optimizer}: {', '.join(names)}." for optimizer, names in steps.items()]


def _targets_lines(targets: dict[str, Any]) -> list[str]:
    """What is kept of the teacher, and beside it what might be."""
    lines = [f"Teacher's targets: {targets['kind']} ({targets['why']})."]
    if not targets["options"]:
        return lines
    if targets["kind"] != "none":
        lines[0] += (
            f" It labels {targets['tokens_labelled']:,} tokens for {targets['tokens_read']:,} that are read; kept in "
            f"{targets['folder']}, {_bytes(targets['disk_free_bytes'])} free."
        )
    refused: dict[str, list[str]] = {}
    for one in targets["options"]:
        if one["refused"]:
            refused.setdefault(one["refused"], []).append(one["kind"])
    lines.append(plain_table(options_table(targets["options"], _bytes, minutes)))
    return [*lines, *(f"Not {' or '.join(kinds)}: {why}." for why, kinds in refused.items())]


def hops_too_large(members: Sequence[dict[str, Any]]) -> list[str]:
    """What is worth a thought: a student below a tenth of its teacher or above it, more than a third cut."""
    sizes = {"parent": 1.0} | {one["name"]: one["fraction_of_parent"] for one in members}
    warnings = []
    for one in members:
        share, seed = one["fraction_of_parent"], one["seed"]
        if seed and share > 1:
            warnings.append(
                f"{one['name']} has {share:.0%} of its teacher's parameters though it is cut: prune.hidden: pca "
                "rotates the stream, which needs a head of its own beside the embeddings; activation_norm does not."
            )
        if share < _LEAST_SHARE:
            warnings.append(
                f"{one['name']} has {share:.1%} of its teacher: so small a student cannot follow all of it; members "
                "between them, each the seed of the next, usually close part of the gap."
            )
        if seed and share / sizes[seed] < _LEAST_HOP:
            between = (share * sizes[seed]) ** 0.5
            warnings.append(
                f"{one['name']} cuts {1 - share / sizes[seed]:.0%} of {seed} at once, more than a third: think of a "
                f"member between them, of {between:.0%} of the parent."
            )
    return warnings


def _asked(planned: dict[str, Any]) -> str:
    line = (
        f"Text: {planned['prompts']:,} prompts, {planned['answers']:,} answers of at most {planned['max_new_tokens']} "
        f"tokens from {planned['teacher']}"
    )
    if not planned["missing"]:
        return f"{line}, which are there already: nothing is asked."
    if planned["missing"] < planned["answers"]:
        line += f"; {planned['missing']:,} are not there yet"
    return line + (f", for at most {planned['money']:,.2f} and the prompts." if planned["money"] else ".")


def _member_record(member: ResolvedMember, total: int) -> dict[str, Any]:
    return {
        "name": member.name,
        "seed": member.seed or None,
        "init": member.member.start,
        "dims": member.dims.as_dict(),
        "num_parameters": member.num_parameters,
        "num_parameters_non_embedding": member.num_parameters_non_embedding,
        "fraction_of_parent": member.num_parameters / total,
        "flops_per_token": member.flops_per_token,
        "num_tokens": member.num_tokens,
        "num_steps": member.num_steps,
        "optimizer": member.optimizer,
        "peak_memory_bytes": round(member.peak_memory_bytes),
        "disk_bytes": round(member.disk_bytes),
        "state_bytes": round(member.state_bytes),
        "seconds": member.seconds,
    }


def _shape_cells(dims: dict[str, int]) -> list[str]:
    heads = f"{dims['num_attention_heads']}/{dims['num_key_value_heads']}"
    return [str(dims["num_hidden_layers"]), str(dims["hidden_size"]), str(dims["intermediate_size"]), heads]


def _bytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
