"""`cascade cache`: the size, use and integrity of cached teacher targets, and their removal."""

import json
import sys
from pathlib import Path

import click

from cascade.cli.options import ABOVE_ZERO, JSON, POSITIVE, CommandGroup, finish, quiet_libraries
from cascade.runtime.errors import UserError

FOLDER = click.option(
    "--folder", type=click.Path(file_okay=False), help="The cache's folder (default: ~/.cache/cascade/teacher)."
)
ROOT = click.option(
    "--root", "roots", multiple=True, metavar="PREFIX", help="Only roots whose names begin with PREFIX; repeatable."
)


@click.group(cls=CommandGroup)
def cache() -> None:
    """Kept teacher targets: their size and use, damage, and removing them."""


@cache.command()
@FOLDER
@ROOT
@JSON
def info(folder: str | None, roots: tuple[str, ...], as_json: bool) -> None:
    """Print a line for each teacher and form of targets: windows, bytes, and how often a training found its windows."""
    from cascade.report.tables import plain_table
    from cascade.teacher.targets.inspect import describe, roots_in

    place = _folder(folder)
    records = [describe(root) for root in roots_in(place, roots)]
    if as_json:
        return click.echo(json.dumps({"folder": str(place), "roots": records}))
    head = ["root", "teacher", "targets", "windows", "shards", "MB", "asked", "found", "unreadable"]
    table = [head]
    for record in records:
        rate = "" if record["hit_rate"] is None else f"{record['hit_rate']:.0%}"
        cells = [record["root"], f"{record['model_type']} {record['weights'][:8]}", _targets(record["targets"] or {})]
        cells += [
            f"{record['windows']:,}",
            str(record["shards"]),
            f"{record['bytes'] / 1e6:,.1f}",
            f"{record['windows_asked']:,}",
        ]
        table.append([*cells, rate, str(record["unreadable_shards"])])
    click.echo(f"{place}\n")
    click.echo(plain_table(table) if records else "empty")


@cache.command()
@FOLDER
@ROOT
@click.option(
    "--run", "run_folder", type=click.Path(file_okay=False), help="Also compare with the teacher of this run directory."
)
@click.option("--windows", default=8, type=POSITIVE, show_default=True, help="With --run: windows to label again.")
@JSON
def verify(folder: str | None, roots: tuple[str, ...], run_folder: str | None, windows: int, as_json: bool) -> None:
    """Read all kept targets and compare them with their checksums; with --run, some of them with the live teacher.

    Exit code 1 where something is damaged. Damaged windows are never used: the next run labels them again.
    """
    from cascade.teacher.targets.inspect import damage, roots_in

    live, place = None, _folder(folder)
    if run_folder is not None:
        quiet_libraries()
        from cascade.pipeline.cache_check import check_against_teacher, folder_of_run

        place = place if folder else folder_of_run(Path(run_folder))
        live = check_against_teacher(Path(run_folder), windows, place)
        roots = roots or tuple(live["root"].split(", "))
    damages = {root.name: damage(root) for root in roots_in(place, roots)}
    bad = any(any(faults.values()) for faults in damages.values()) or bool(live and live["differing"])
    if as_json:
        click.echo(json.dumps({"folder": str(place), "roots": damages, "teacher": live, "ok": not bad}))
        sys.exit(int(bad))
    for name, faults in damages.items():
        counts = [f"{len(faults[kind])} damaged {kind}" for kind in ("shards", "windows") if faults[kind]]
        click.echo(f"{name}: {', '.join([*faults['record'], *counts]) or 'whole'}")
        for shard in faults["shards"]:
            click.echo(f"  {shard}")
    if live:
        click.echo(
            f"teacher: {live['compared']} of {live['windows_there']:,} windows labelled again, "
            f"{len(live['differing'])} differ"
        )
    if bad:
        click.echo("`cascade cache prune --damaged` removes damaged shards; the next run labels their windows again.")
    sys.exit(int(bad))


@cache.command()
@FOLDER
@ROOT
@click.option("--damaged", is_flag=True, help="Remove damaged shards and leftovers of killed runs.")
@click.option(
    "--unused-days", type=click.FloatRange(min=0), help="Remove roots that no training has read for this many days."
)
@click.option("--max-gb", type=ABOVE_ZERO, help="Remove the longest unused roots until the rest take at most this.")
@click.option("--all", "everything", is_flag=True, help="Remove all roots (of those named with --root).")
@JSON
def prune(
    folder: str | None,
    roots: tuple[str, ...],
    damaged: bool,
    unused_days: float | None,
    max_gb: float | None,
    everything: bool,
    as_json: bool,
) -> None:
    """Remove kept targets; a run that needs them labels them again."""
    from cascade.teacher.targets.inspect import remove_damaged, remove_roots, roots_in, to_fit, unused_since

    if not (damaged or everything or unused_days is not None or max_gb is not None):
        raise UserError("cache prune: say what to remove: --damaged, --unused-days N, --max-gb N or --all")
    place = _folder(folder)
    matching, freed, removed = roots_in(place, roots), 0, []
    if damaged:
        freed += sum(remove_damaged(root) for root in matching)
    if unused_days is not None:
        removed += unused_since(matching, unused_days)
    if max_gb is not None:
        removed += to_fit([root for root in matching if root not in removed], max_gb * 1e9)
    if everything:
        removed = matching
    freed += remove_roots(removed)
    result = {"folder": str(place), "removed_roots": [root.name for root in removed], "freed_bytes": freed}
    finish(result, as_json)


def _folder(folder: str | None) -> Path:
    from cascade.teacher.targets.keys import default_folder

    return Path(folder).expanduser() if folder else default_folder()


def _targets(layout: dict[str, object]) -> str:
    """The form of targets in words, such as 'sampled, 38 draws'."""
    kind = str(layout.get("kind", "?"))
    if kind == "sampled":
        exact = layout.get("exact_ids")
        return f"sampled, {layout.get('draws')} draws" + (
            f", {len(exact)} exact" if isinstance(exact, tuple | list) else ""
        )
    if kind == "hidden":
        points = layout.get("points")
        states = len(points) if isinstance(points, tuple | list) else 0
        return f"hidden, {layout.get('dtype')}" + (f", {states} layers" if states else "")
    return f"{kind}, {layout.get('top_k')} ids"
