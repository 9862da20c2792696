"""What `cascade plan` prints: the record of `preview` as a table and sentences."""

from collections.abc import Sequence
from math import ceil
from typing import Any

from cascade.planning.cache_choice import options_table
from cascade.planning.preview_data import data_lines
from cascade.report.plots import minutes, short_number
from cascade.report.tables import plain_table

_LEAST_SHARE, _LEAST_HOP = 0.1, 2 / 3
"""Of a teacher's parameters, and of a seed's: below them `hops_too_large` says so."""


def preview_text(plan: dict[str, Any]) -> str:
    """The record of `preview` as lines for a terminal."""
    lines = [
        plain_table(_table(plan)),
        "",
        *plan["cautions"],
        *hops_too_large(plan["members"]),
        *data_lines(plan["data"]),
        *(_generation_lines(plan["generate"]) if plan["generate"] else ()),
        *_cost_lines(plan),
        *_optimizer_lines(plan["members"]),
        *_fading_lines(plan["features_fade"], plan["members"]),
        *_targets_lines(plan["targets"]),
        *_shape_lines(plan),
    ]
    return "\n".join(lines)


def _table(plan: dict[str, Any]) -> list[list[str]]:
    """Shapes and costs, the parent's first."""
    shapes = ["layers", "hidden", "MLP", "heads", "parameters", "of parent"]
    costs = [f"FLOPs/{plan['counts'][:-1]}", plan["counts"], "memory", "disk", "time"]
    parent = plan["parent"]
    flops = short_number(parent["flops_per_token"])
    table = [
        ["", "seed", *shapes, *costs],
        ["parent", "", *_shape_cells(parent["dims"]), f"{parent['num_parameters']:,}", "100%", flops, "", "", "", ""],
    ]
    for member in plan["members"]:
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
    return table


def _cost_lines(plan: dict[str, Any]) -> list[str]:
    needed, free = _bytes(plan["disk_needed_bytes"]), _bytes(plan["disk_free_bytes"])
    return [
        f"Run directory {plan['run']}: needs {needed} more on the disk, {free} are free.",
        f"Time, all stages that are left: about {minutes(plan['seconds'])} on this machine (operations counted, rate "
        "measured).",
    ]


def _shape_lines(plan: dict[str, Any]) -> list[str]:
    """Which shapes there are, how they are chosen, and that the cut to them is exact."""
    lines = []
    if plan["copies"]:
        lines.append(f"Copies in fewer bits, their time and space not counted above: {', '.join(plan['copies'])}.")
    if plan["legal_values"]:
        values = "; ".join(f"{name}: {lengths}" for name, lengths in plan["legal_values"].items())
        lines.append(f"Each axis can be cut to: {values}.")
    if plan["hidden_tried"]:
        lines.append(
            f"prune.hidden: auto cuts, repairs and recovers {', '.join(plan['hidden_tried'])} both ways, with the "
            "stream rotated and not, on a twentieth of the tokens, and keeps what is then nearer the parent on "
            "selection text."
        )
    if plan["finished"]:
        lines.append(f"Made already, of the shapes above: {', '.join(plan['finished'])}.")
    if plan["search"] and len(plan["finished"]) < len(plan["members"]):
        lines.append(
            "Shapes are searched: those of members that are not made yet are where the search starts; smaller members "
            "follow what it finds."
        )
    for name, milliseconds in plan["decode_ms"].items():
        lines.append(f"{name} decodes in about {milliseconds:.2f} ms a step, as measured and fitted here.")
    if plan["proof"]:
        worst = max(plan["proof"].values())
        lines.append(
            f"Cut proven on a tiny twin: pruned equals silenced to {worst:.0e} along {', '.join(plan['proof'])}."
        )
    return lines


def _optimizer_lines(members: list[dict[str, Any]]) -> list[str]:
    """The optimizers that members are trained with, and the steps of each training."""
    steps: dict[str, list[str]] = {}
    for member in members:
        steps.setdefault(member["optimizer"], []).append(f"{member['name']} in {member['num_steps']:,} steps")
    return [f"Trained with {optimizer}: {', '.join(names)}." for optimizer, names in steps.items()]


def _fading_lines(fading: dict[str, Any], members: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence about when the weight of the feature losses has faded, for each member whose losses fade."""
    steps = {member["name"]: member["num_steps"] for member in members}
    ends = []
    for name, fraction in fading["members"].items():
        if fraction <= 1:
            ends.append(f"of {name}'s nothing is left after {ceil(fraction * steps[name]):,} of {steps[name]:,} steps")
        else:
            ends.append(f"of {name}'s {1 - 1 / fraction:.0%} is left at the end")
    if not ends:
        return []
    setting = f"distill.features.fade_fraction: {fading['setting']}"
    return [f"The weight of the feature losses falls evenly from the first step on ({setting}): {', '.join(ends)}."]


def _targets_lines(targets: dict[str, Any]) -> list[str]:
    """The form in which the teacher's targets are kept, and a table of the alternatives."""
    lines = [f"Teacher's targets: {targets['kind']} ({targets['why']})."]
    if not targets["options"]:
        return lines
    if targets["kind"] != "none":
        lines[0] += (
            f" It labels {targets['tokens_labelled']:,} tokens for {targets['tokens_read']:,} that are read; kept in "
            f"{targets['folder']}, {_bytes(targets['disk_free_bytes'])} free."
        )
    refused: dict[str, list[str]] = {}
    for option in targets["options"]:
        if option["refused"]:
            refused.setdefault(option["refused"], []).append(option["kind"])
    lines.append(plain_table(options_table(targets["options"], _bytes, minutes)))
    return [*lines, *(f"Not {' or '.join(kinds)}: {why}." for why, kinds in refused.items())]


def hops_too_large(members: Sequence[dict[str, Any]]) -> list[str]:
    """Warnings about a student below a tenth of its teacher or above it, or cut by more than a third at once."""
    sizes = {"parent": 1.0} | {member["name"]: member["fraction_of_parent"] for member in members}
    warnings = []
    for member in members:
        name, share, seed = member["name"], member["fraction_of_parent"], member["seed"]
        if seed and share > 1:
            warnings.append(
                f"{name} has {share:.0%} of its teacher's parameters though it is cut: prune.hidden: pca "
                "rotates the stream, which needs a head of its own beside the embeddings; activation_norm does not."
            )
        if share < _LEAST_SHARE:
            warnings.append(
                f"{name} has {share:.1%} of its teacher: so small a student cannot follow all of it; members "
                "between them, each the seed of the next, usually close part of the gap."
            )
        if seed and share / sizes[seed] < _LEAST_HOP:
            between = (share * sizes[seed]) ** 0.5
            warnings.append(
                f"{name} cuts {1 - share / sizes[seed]:.0%} of {seed} at once, more than a third: think of a "
                f"member between them, of {between:.0%} of the parent."
            )
    return warnings


def _generation_lines(planned: dict[str, Any]) -> list[str]:
    """What the teacher will be asked for."""
    line = (
        f"Text: {planned['prompts']:,} prompts, {planned['answers']:,} answers of at most {planned['max_new_tokens']} "
        f"tokens from {planned['teacher']}"
    )
    if not planned["missing"]:
        return [f"{line}, which are there already: nothing is asked."]
    if planned["missing"] < planned["answers"]:
        line += f"; {planned['missing']:,} are not there yet"
    return [line + (f", for at most {planned['money']:,.2f} and the prompts." if planned["money"] else ".")]


def _shape_cells(dims: dict[str, int]) -> list[str]:
    heads = f"{dims['num_attention_heads']}/{dims['num_key_value_heads']}"
    return [str(dims["num_hidden_layers"]), str(dims["hidden_size"]), str(dims["intermediate_size"]), heads]


def _bytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
