"""Whether a cache's targets are still those that the teacher of a run gives."""

from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from cascade.data.blocks import TokenBlocks
from cascade.data.examples import load_training
from cascade.evaluation.evaluate import default_device
from cascade.models.checkpoint.load import CHECKPOINT, ModelSource, load_config, load_model
from cascade.pipeline.kept_targets import TeacherCache, open_cache
from cascade.planning.cache_choice import cache_folder, choose_cache
from cascade.planning.family import resolve_family
from cascade.planning.latencies import find_latencies
from cascade.planning.ownership import pinned_seeds
from cascade.planning.parent import existing_parent
from cascade.recipe.schema import Recipe
from cascade.runtime.errors import UserError
from cascade.store.commits import is_committed
from cascade.store.strict_yaml import read_yaml
from cascade.teacher.targets.keys import weights_digest, window_keys
from cascade.teacher.targets.label import records_of


def check_against_teacher(run_folder: Path, count: int, folder: Path | None = None) -> dict[str, Any]:
    """Label `count` windows of a run again and compare them, byte by byte, with what is kept.

    The teacher's weights are read and hashed again, too. `folder` is the cache's, where it is not the recipe's.

    Raises:
        UserError: the folder holds no run that keeps anything of its teacher, or its weights are no longer the same.
    """
    recipe = _recipe_of(run_folder)
    parent = _parent_of(run_folder, recipe)
    config = load_config(parent)
    latencies = find_latencies(recipe, config, run_folder)
    members = resolve_family(recipe, config, pinned_seeds=pinned_seeds(run_folder), latencies=latencies)
    choice = choose_cache(recipe, config, members, run_folder=run_folder)
    if folder is not None and recipe.distill is not None:
        cache_section = recipe.distill.cache.model_copy(update={"folder": str(folder)})
        recipe = recipe.model_copy(update={"distill": recipe.distill.model_copy(update={"cache": cache_section})})
    folder = cache_folder(recipe)
    if choice.layout is None or not folder.is_dir():
        raise UserError(f"{run_folder}: keeps nothing of its teacher, or not in {folder}; is --folder right?")
    remembered = weights_digest(parent.folder, folder)
    if weights_digest(parent.folder, folder, again=True) != remembered:
        raise UserError(f"{parent.reference}: its weights are no longer those that were labelled with; run again")
    cache = open_cache(recipe, choice, parent)
    data = _newest(run_folder, "parent.data-*")
    if cache is None or data is None:
        raise UserError(f"{run_folder}: this run keeps nothing of its teacher, or has no data yet")
    blocks = load_training(data / "train.safetensors")
    if not isinstance(blocks, TokenBlocks):
        raise UserError(f"{run_folder}: this run keeps nothing of its teacher")
    caches = [cache if member.vocab_size is None else cache.narrowed(member.vocab_size) for member in members]
    teacher = load_model(parent).to(default_device()).requires_grad_(False)
    by_root = {cache.windows.root: cache for cache in caches}
    comparisons = [_compared(cache, teacher, blocks, count) for cache in by_root.values()]
    if not any(comparison["windows_there"] for comparison in comparisons):
        raise UserError(f"{folder}: nothing that this run reads is kept there; give another --folder, or run it again")
    return {
        "root": ", ".join(comparison["root"] for comparison in comparisons),
        "windows_there": sum(comparison["windows_there"] for comparison in comparisons),
        "compared": sum(comparison["compared"] for comparison in comparisons),
        "differing": [key for comparison in comparisons for key in comparison["differing"]],
    }


def _compared(cache: TeacherCache, teacher: nn.Module, blocks: TokenBlocks, count: int) -> dict[str, Any]:
    """How the records of at most `count` of these blocks, in one root, compare with records that are made now."""
    labelled = [row for row, key in enumerate(window_keys(blocks)) if key in cache.windows]
    count = min(count, len(labelled))
    evenly = torch.arange(count) * len(labelled) // max(1, count)
    chosen = blocks.rows(torch.tensor(labelled, dtype=torch.int64)[evenly])
    made_now = records_of(cache.windows, cache.layout, teacher, chosen)
    differing = []
    for key, record in made_now.items():
        from_cache = cache.windows.read(key)
        if from_cache is None or from_cache.tobytes() != record:
            differing.append(key.hex())
    return {
        "root": cache.windows.root[:16],
        "windows_there": len(labelled),
        "compared": len(made_now),
        "differing": differing,
    }


def folder_of_run(run_folder: Path) -> Path:
    """The folder of the cache that a run reads and adds to.

    Raises:
        UserError: the folder holds no run.
    """
    return cache_folder(_recipe_of(run_folder))


def _recipe_of(run_folder: Path) -> Recipe:
    path = run_folder / "recipe.yaml"
    if not path.is_file():
        raise UserError(f"{run_folder}: holds no run; give a run directory")
    try:
        return Recipe.model_validate(read_yaml(path).data)
    except ValidationError as error:
        raise UserError(f"{path}: was written by another version of this program") from error


def _parent_of(run_folder: Path, recipe: Recipe) -> ModelSource:
    for stage in ("pretrain", "convert"):
        folder = _newest(run_folder, f"parent.{stage}-*")
        if folder is not None:
            return ModelSource(folder / CHECKPOINT, recipe.name)
    parent = existing_parent(recipe)
    if parent is None:
        raise UserError(f"{run_folder}: its parent is not trained yet")
    return parent


def _newest(run_folder: Path, pattern: str) -> Path | None:
    """The latest committed stage of this name."""
    folders = [path for path in run_folder.glob(f"stages/{pattern}") if is_committed(path)]
    return max(folders, key=lambda path: path.stat().st_mtime, default=None)
