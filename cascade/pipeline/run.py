"""The loop over members: knows the stages and what each depends on, and no mathematics."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from cascade.evaluation.tasks_lm_eval.task_files import write_task_files
from cascade.models.checkpoint.load import load_config
from cascade.pipeline.kept_targets import open_cache
from cascade.pipeline.member import make_member
from cascade.pipeline.prepare import make_parent, prepare
from cascade.pipeline.publish import publish_copies, publish_member, write_report
from cascade.pipeline.rows import FinishedMember, candidate_rows, teacher_row
from cascade.pipeline.runner import StageRunner
from cascade.pipeline.stages.drift import compare_with_production
from cascade.pipeline.stages.evaluate import evaluate_parent
from cascade.pipeline.stages.framing import framed
from cascade.pipeline.stages.generate import load_filter, reading, run_generation
from cascade.pipeline.stages.labels import make_label_stage
from cascade.pipeline.stages.quantise import make_copies
from cascade.pipeline.start import find_shape
from cascade.planning.cache_choice import choose_cache, settle, with_cache
from cascade.planning.checks import check_family, require_one_process
from cascade.planning.classifier import check_labels
from cascade.planning.disk_room import require_room_for
from cascade.planning.estimates import parent_seconds
from cascade.planning.family import FoundShape, ResolvedMember, resolve_family, run_folder_of
from cascade.planning.foreseen import require_foreseen
from cascade.planning.inputs import framing_settings
from cascade.planning.latencies import find_latencies, keep_latencies
from cascade.planning.origins import check_licences
from cascade.planning.ownership import check_ownership, pinned_seeds, resolved_recipe
from cascade.planning.parent import parent_config
from cascade.pruning.size.latency import DecodeLatency
from cascade.recipe.schema import Recipe
from cascade.report.write import resealed, set_damaged_aside
from cascade.runtime import ranks
from cascade.runtime.errors import RunError, UserError
from cascade.runtime.failpoints import at
from cascade.runtime.files import write_atomically
from cascade.runtime.permissions import NO_PERMISSIONS, Permissions
from cascade.runtime.progress import RunProgress
from cascade.store.commits import MANIFEST
from cascade.store.events import append_event
from cascade.store.lock import locked
from cascade.store.remake import forced_stages
from cascade.store.stage_table import REMAKE_POINTS
from cascade.store.strict_yaml import write_yaml


def run_recipe(
    recipe: Recipe,
    *,
    output: str | Path | None = None,
    only: Sequence[str] = (),
    from_stage: str | None = None,
    known: Sequence[Path] = (),
    permissions: Permissions = NO_PERMISSIONS,
    console: Console | None = None,
) -> Path:
    """Make the family of a recipe, or go on where an earlier run stopped; returns the run directory.

    `only` names members to make (with the seeds that they need); `from_stage` makes their stages again from there on.
    Stages that other run directories (`known`) have finished with the same inputs and settings are taken over.
    `permissions` allow stages what no recipe can allow.

    Raises:
        UserError: the recipe cannot be done, or the directory belongs to another recipe.
        TrainingError: training met a non-finite number.
        ReloadError: a saved member does not reload.
    """
    if from_stage is not None and from_stage not in REMAKE_POINTS:
        raise UserError(f"--from {from_stage}: no such stage; known: {', '.join(REMAKE_POINTS)}")
    ranks.join()
    folder = run_folder_of(recipe, output)
    check_ownership(folder, recipe)
    require_one_process(recipe)
    config = parent_config(recipe)
    if ranks.rank() > 0:
        return _follow_run(recipe, folder, config, only, permissions)
    latencies = find_latencies(recipe, config, folder)
    members = resolve_family(recipe, config, pinned_seeds=pinned_seeds(folder), latencies=latencies)
    _check(recipe, config, members, permissions)
    choice = choose_cache(recipe, config, members, run_folder=folder)
    members = with_cache(recipe, config, members, choice)
    check_licences(recipe)
    scope = _with_seeds(members, only)
    with locked(folder):
        require_room_for(folder, scope)
        _write_recipe(folder, recipe, members)
        keep_latencies(recipe, config, folder, latencies)
        ranks.barrier()
        settle(folder, choice)
        append_event(folder, "started", members=[member.name for member in scope])
        with RunProgress(console or Console(stderr=True), recipe.name, _estimates(recipe, config, scope)) as progress:
            forced = forced_stages(folder, from_stage, only or [member.name for member in members])
            runner = StageRunner(folder, progress, forced, known=known, permissions=permissions)
            _make_family(runner, recipe, members, scope, latencies)
        if forced is not None:
            forced.end()
        if runner.incomplete:
            missing = "\n  ".join(runner.incomplete)
            raise RunError(f"the family is made, but not all of it could be measured:\n  {missing}")
        append_event(folder, "done", members=[member.name for member in scope])
    return folder


def run_generate(
    recipe: Recipe,
    *,
    output: str | Path | None = None,
    filter_path: str = "",
    permissions: Permissions = NO_PERMISSIONS,
    console: Console | None = None,
) -> dict[str, Any]:
    """Only the dataset of a recipe's `generate` section; returns where it is and what is in it.

    Raises:
        UserError: the recipe has no such section, or it cannot be done.
        RunError: the endpoint fails or its budget is spent; what was answered is kept.
    """
    if recipe.generate is None:
        raise UserError("the recipe has no `generate` section")
    if filter_path:
        load_filter(filter_path)
    folder = run_folder_of(recipe, output)
    check_ownership(folder, recipe)
    check_licences(recipe)
    with locked(folder), RunProgress(console or Console(stderr=True), recipe.name, {}) as progress:
        if not (folder / "recipe.yaml").exists():
            write_atomically(folder / "recipe.yaml", write_yaml(resolved_recipe(recipe, [])))
        runner = StageRunner(folder, progress, permissions=permissions)
        generated = run_generation(runner, recipe, make_parent(runner, recipe), filter_path)
    record: dict[str, Any] = generated.json("provenance.json")
    dataset = {
        "dataset": str(generated.folder / "dataset.jsonl"),
        "teacher": record["teacher"],
        "prompts": record["prompts"],
    }
    counts = {name: record[name] for name in ("answers", "rows")}
    dropped = {f"dropped ({reason})": count for reason, count in record["dropped"].items()}
    summary: dict[str, Any] = dataset | counts | dropped | record["spent"]
    return summary


def _check(recipe: Recipe, config: Any, members: list[ResolvedMember], permissions: Permissions) -> None:
    """Refuse what would stop the run later."""
    check_family(recipe, config, members)
    if recipe.classifies:
        check_labels(recipe, config)
    require_foreseen(recipe, config, members, permissions)


def _write_recipe(folder: Path, recipe: Recipe, members: list[ResolvedMember]) -> None:
    """The run directory's own recipe and task files; damaged reports are set aside before."""
    if (folder / MANIFEST).exists():
        set_damaged_aside(folder)
    with resealed(folder):
        write_atomically(folder / "recipe.yaml", write_yaml(resolved_recipe(recipe, members)))
        write_task_files(folder, recipe.evaluate.tasks, [Path(path) for path in recipe.evaluate.task_folders])


def _estimates(recipe: Recipe, config: Any, scope: list[ResolvedMember]) -> dict[tuple[str, str], float]:
    """Seconds of each stage that is to be made, by (owner, stage)."""
    estimates = {("parent", stage): seconds for stage, seconds in parent_seconds(recipe, config).items()}
    for member in scope:
        estimates |= {(member.name, stage): seconds for stage, seconds in member.seconds.items()}
    return estimates


def _follow_run(recipe: Recipe, folder: Path, config: Any, only: Sequence[str], permissions: Permissions) -> Path:
    """The run as another process than the first sees it: it only takes part in what is done together."""
    ranks.barrier()  # until the first has the lock and has kept what it measured
    latencies = find_latencies(recipe, config, folder)
    members = resolve_family(recipe, config, pinned_seeds=pinned_seeds(folder), latencies=latencies)
    with RunProgress(Console(quiet=True), recipe.name, {}) as progress:
        runner = StageRunner(folder, progress, permissions=permissions)
        _make_family(runner, recipe, members, _with_seeds(members, only), latencies)
    return folder


def _make_family(
    runner: StageRunner,
    recipe: Recipe,
    members: list[ResolvedMember],
    scope: list[ResolvedMember],
    latencies: dict[str, DecodeLatency],
) -> None:
    """Make the members of `scope`, each after the one that it is cut from, and publish each as soon as it is made."""
    parent, published = make_parent(runner, recipe), recipe
    if recipe.generate is not None:
        recipe = reading(recipe, run_generation(runner, recipe, parent))
    recipe = framed(runner, recipe, parent)
    published = published.model_copy(update={"data": published.data.model_copy(update=framing_settings(recipe))})
    choice = choose_cache(recipe, load_config(parent), members, run_folder=runner.folder)
    run = prepare(runner, recipe, parent)
    evaluation = evaluate_parent(run)
    run = replace(run, parent_evaluation=evaluation, cache=open_cache(recipe, choice, parent))
    teacher = teacher_row(parent, evaluation)
    compare_with_production(run)
    copies = make_copies(run, "parent", run.parent)
    finished: dict[str, FinishedMember] = {}
    shapes: dict[str, FoundShape] = {}
    writes = ranks.rank() == 0
    if writes:
        publish_copies(runner.folder, published, members, teacher, copies, teacher, parent)
        write_report(runner.folder, published, members, teacher, finished, copies)
    for name in [member.name for member in scope]:
        member = next(member for member in members if member.name == name)
        seed = finished.get(member.seed)
        labels = make_label_stage(run, member)
        candidates = find_shape(run, member, seed)
        if candidates:  # from here on the member, and what is cut from it, has the best shape
            shapes[name] = candidates[0].shape
            members = resolve_family(
                recipe,
                member.parent_config,
                pinned_seeds={member.name: member.seed for member in members},
                found_shapes=shapes,
                latencies=latencies,
            )
            member = next(member for member in members if member.name == name)
        finished[name] = replace(make_member(run, member, seed, labels), candidates=candidate_rows(member, candidates))
        run.require_same_parent()
        if not writes:
            continue
        with at("report"), runner.progress.stage(member.name, "report"):
            publish_member(runner.folder, published, members, member, finished[member.name], teacher, parent)
            write_report(runner.folder, published, members, teacher, finished, copies)


def _with_seeds(members: list[ResolvedMember], only: Sequence[str]) -> list[ResolvedMember]:
    """The members asked for and, before each, those that it is cut from; all of them if none is named."""
    by_name = {member.name: member for member in members}
    unknown = [name for name in only if name not in by_name]
    if unknown:
        raise UserError(f"--only {unknown[0]}: no such member; the recipe has: {', '.join(by_name) or 'none'}")
    needed = set(only or by_name)
    for name in list(needed):
        while name in by_name:
            needed.add(name)
            name = by_name[name].seed
    return [member for member in members if member.name in needed]
