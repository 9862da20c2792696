"""One stage on its own, from the command line's plain arguments: models by reference, text by name."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cascade.checks import require_context
from cascade.data.blocks import TokenBlocks, pack_documents
from cascade.data.sources import TextData, read_documents
from cascade.distillation.range_test import find_learning_rate
from cascade.distillation.trainer import distill
from cascade.errors import RunError, UserError
from cascade.evaluation.evaluate import default_device, evaluate
from cascade.evaluation.heldout import heldout_blocks
from cascade.family import hidden_score
from cascade.importance.offload import blocks_at_once, offloaded
from cascade.importance.scores import score_importance
from cascade.importance.statistics import collect_statistics
from cascade.models.axes import probe_axes
from cascade.models.checkpoint import (
    ModelSource,
    check_weights,
    load_config,
    load_model,
    load_tokenizer,
    require_same_vocabulary,
    resolve_model,
    save_checkpoint,
    stored_dtype,
)
from cascade.models.dims import dims_of
from cascade.pruning.cut import prune
from cascade.pruning.plan import config_of, load_plan, plan_pruning, save_plan
from cascade.pruning.proof import prove_cuts
from cascade.pruning.repair import repair
from cascade.pruning.rotation import require_rotatable, untied
from cascade.pruning.shape import CUT_DIMS, solve_shape
from cascade.pruning.stream import prune_on_disk
from cascade.pruning.target import Target
from cascade.store import require_empty, staged


def prune_model(
    reference: str,
    params: float | None,
    dims: dict[str, int],
    output: Path,
    num_blocks: int,
    data: str,
    block_size: int,
    *,
    hidden: str = "auto",
    repaired: bool = True,
    offload: bool = False,
) -> dict[str, Any]:
    """Statistics -> scores -> plan -> cut -> repair; writes the checkpoint and plan.json.

    With `offload` the model is never in memory as a whole, and nothing is repaired.
    """
    output = require_empty(output)
    if params is None and not dims:
        raise UserError("give --params or at least one --dim")
    source = resolve_model(reference)
    config = load_config(source)
    check_weights(source, config)
    require_context(config, block_size, "--block-size")
    axes, before = probe_axes(config), dims_of(config)
    hidden = hidden_score(hidden, config)
    if hidden == "pca":
        require_rotatable(config, axes)
    shaped = untied(config) if hidden == "pca" else config
    target = Target(params=params, dims=dims)
    wanted = solve_shape(shaped, target, parent=config)
    cut = [name for name in CUT_DIMS if wanted.as_dict()[name] < before.as_dict()[name]]
    prove_cuts(config, along=cut, rotated=hidden == "pca")
    blocks = _blocks(data, "calibration", source, block_size).take(num_blocks)
    options: dict[str, Any] = {"covariance_blocks": -(-num_blocks // 4) if hidden == "pca" else 0}
    with staged(output, {"stage": "prune", "source": source.reference}) as folder:
        if offload:
            with offloaded(source, default_device()) as absent:
                at_once = blocks_at_once(config, block_size)
                statistics = collect_statistics(absent, blocks, batch_size=at_once, device=default_device(), **options)
        else:
            model = load_model(source).to(default_device())
            statistics = collect_statistics(model, blocks, **options)
        plan = plan_pruning(score_importance(statistics, hidden=hidden), config, wanted, statistics=statistics)
        save_plan(plan, folder / "plan.json")
        if offload:
            prune_on_disk(source, plan, folder)
        else:
            student = prune(model, plan)
            if repaired:
                repair(student, model, plan, blocks)
            _save(student, folder, source)
    return {
        "output": str(output),
        "num_parameters": int(probe_axes(shaped).num_parameters(wanted)),
        **wanted.as_dict(),
    }


def prune_model_on_disk(reference: str, plan_path: Path, output: Path) -> dict[str, Any]:
    """Carries out a plan from safetensors to safetensors; writes the checkpoint and plan.json."""
    output = require_empty(output)
    source = resolve_model(reference)
    plan = load_plan(plan_path)
    found = dims_of(load_config(source))
    if found != plan.source_dims:
        raise UserError(
            f"{plan_path}: made for a model of {plan.source_dims.as_dict()}, {reference} has {found.as_dict()}"
        )
    with staged(output, {"stage": "prune", "source": source.reference}) as folder:
        prune_on_disk(source, plan, folder)
        save_plan(plan, folder / "plan.json")
    count = int(probe_axes(config_of(plan)).num_parameters(plan.target_dims))
    return {"output": str(output), "num_parameters": count, **plan.target_dims.as_dict()}


def distill_model(
    student: str, teacher: str, output: Path, data: str, block_size: int, options: dict[str, Any]
) -> dict[str, Any]:
    """Recovery of an existing checkpoint; writes the checkpoint and log.jsonl."""
    output = require_empty(output)
    source, teacher_source = resolve_model(student), resolve_model(teacher)
    require_same_vocabulary(load_tokenizer(teacher_source), load_tokenizer(source), source.reference)
    learner, expert = load_model(source), load_model(teacher_source)
    with staged(
        output, {"stage": "distill", "student": source.reference, "teacher": teacher_source.reference}
    ) as folder:
        learner, expert = learner.to(default_device()), expert.to(default_device()).requires_grad_(False)
        train = _blocks(data, "train", teacher_source, block_size)
        selection = _blocks(data, "selection", teacher_source, block_size).take(16)
        if options["learning_rate"] is None:
            searched = {name: value for name, value in options.items() if name != "learning_rate"}
            found = find_learning_rate(learner, expert, train, selection=selection, **searched)
            options = options | {"learning_rate": found.learning_rate}
        metrics = distill(
            learner,
            expert,
            train,
            selection=selection,
            log_path=folder / "log.jsonl",
            **options,
        )
        _save(learner, folder, source)
    return {
        "output": str(output),
        "learning_rate": options["learning_rate"],
        "num_steps": metrics.num_steps,
        "num_tokens": metrics.num_tokens,
        "seconds": round(metrics.seconds, 1),
        "selection_loss": metrics.selection_loss,
        "selection_kl": metrics.selection_kl,
    }


def evaluate_model(
    checkpoint: str,
    tasks: Sequence[str],
    task_folders: Sequence[Path],
    teacher: str | None,
    limit: int | None,
    num_blocks: int,
    data: str,
    block_size: int,
) -> dict[str, Any]:
    """Every number about one checkpoint."""
    source = resolve_model(checkpoint)
    check_weights(source, load_config(source))
    heldout = heldout_blocks(_text(data), load_tokenizer(source), block_size=block_size, max_blocks=num_blocks)
    tokenizer, expert = load_tokenizer(source), None
    if teacher is not None:
        teacher_source = resolve_model(teacher)
        require_same_vocabulary(load_tokenizer(teacher_source), tokenizer, source.reference)
        expert = load_model(teacher_source).to(default_device())
    result = evaluate(source, tasks=tasks, teacher=expert, heldout=heldout, task_folders=task_folders, limit=limit)
    if result.failed:
        told = "; ".join(f"{name} could not be measured: {why}" for name, why in result.failed.items())
        raise RunError(f"{told}. The others: {json.dumps(result.metrics)}")
    return {"checkpoint": source.reference, "metrics": result.metrics, "speed": result.speed}


def _blocks(data: str, split: str, source: ModelSource, block_size: int) -> TokenBlocks:
    texts = read_documents(_text(data), split)
    return pack_documents(
        texts, load_tokenizer(source), block_size=block_size, max_blocks=50_000, name=f"--data ({split})"
    )


def _text(data: str) -> TextData:
    return TextData("stdlib", {}) if data == "stdlib" else TextData("files", {"train": (data,)})


def _save(model: Any, folder: Path, source: ModelSource) -> None:
    dtype: torch.dtype = stored_dtype(source)
    save_checkpoint(model, folder, companions=None if source.gguf_file else source.folder, dtype=dtype)
    if source.gguf_file:
        load_tokenizer(source).save_pretrained(folder)
