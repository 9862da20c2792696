"""One stage on its own, from the command line's plain arguments: models by reference, text by name."""

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cascade.data.blocks import TokenBlocks, pack_documents
from cascade.data.framing import Framing, framing_of
from cascade.data.sources import TextData, read_documents
from cascade.distillation.options import Hooks, Objective, Optimization
from cascade.distillation.range_test import find_learning_rate
from cascade.distillation.supervision import Selection, Supervision
from cascade.distillation.trainer import TrainingMetrics, distill
from cascade.evaluation.evaluate import default_device, evaluate
from cascade.evaluation.framing_test import choose_framing
from cascade.evaluation.heldout import heldout_blocks
from cascade.evaluation.tasks_lm_eval.harness import find_tasks, require_datasets
from cascade.evaluation.tasks_lm_eval.task_code import require_allowed
from cascade.evaluation.tasks_lm_eval.task_options import TaskOptions
from cascade.evaluation.tokenizer_files import require_same_ids
from cascade.models.architecture.axes import probe_axes
from cascade.models.architecture.dims import dims_of
from cascade.models.architecture.head import require_head
from cascade.models.architecture.model_class import model_class_of, require_language
from cascade.models.architecture.positions import require_context
from cascade.models.architecture.vocabulary import common_vocabulary, require_ids
from cascade.models.checkpoint.load import (
    ModelSource,
    check_weights,
    load_config,
    load_model,
    load_tokenizer,
    resolve_model,
    save_checkpoint,
    stored_dtype,
)
from cascade.planning.family import score_for_dims
from cascade.pruning.choose import plan_pruning
from cascade.pruning.cut import prune
from cascade.pruning.cut_on_disk import prune_on_disk
from cascade.pruning.importance.offload import blocks_at_once, offloaded
from cascade.pruning.importance.scores import score_importance
from cascade.pruning.importance.statistics import collect_statistics
from cascade.pruning.plan import config_of, load_plan, save_plan
from cascade.pruning.proof import prove_cuts
from cascade.pruning.repair.refit import repair
from cascade.pruning.rotation import require_rotatable, untied
from cascade.pruning.size.shape import CUT_DIMS, solve_shape
from cascade.pruning.size.target import Target
from cascade.runtime.errors import RunError, UserError
from cascade.store.commits import require_empty, staged

PICO, STDLIB = "builtin:pico-python", "stdlib"
"""The model that comes with the package, and the text that it was trained on."""


def prune_model(
    reference: str,
    params: float | None,
    dims: dict[str, int],
    output: Path,
    num_blocks: int,
    data: str | None,
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
    data = named_text(data, reference)
    config = load_config(source)
    check_weights(source, config)
    require_context(config, block_size, "--block-size", "model")
    axes, before = probe_axes(config), dims_of(config)
    target = Target(params=params, dims=dims)
    hidden = score_for_dims(hidden, target, config, config)
    if hidden == "pca":
        require_rotatable(config, axes)
    shaped = untied(config) if hidden == "pca" else config
    wanted = solve_shape(shaped, target, parent=config)
    cut = [name for name in CUT_DIMS if wanted.as_dict()[name] < before.as_dict()[name]]
    prove_cuts(config, along=cut, rotated=hidden == "pca")
    framing = _framing(source, data, block_size, ask=not offload)
    blocks = _blocks(data, "calibration", source, block_size, framing).take(num_blocks)
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
        "text": told_text(data),
        **framing.record(),
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
    student: str,
    teacher: str,
    output: Path,
    data: str | None,
    block_size: int,
    *,
    num_tokens: int,
    objective: Objective,
    optimization: Optimization,
    search_rate: bool,
) -> dict[str, Any]:
    """Recovery of an existing checkpoint; writes the checkpoint and log.jsonl.

    With `search_rate` the learning rate is found by short trainings first, instead of that of `optimization`.
    """
    output = require_empty(output)
    source, teacher_source = resolve_model(student), resolve_model(teacher)
    data = named_text(data, teacher)
    _require_language_models(source, teacher_source)
    common = _common_ids(source, teacher_source, block_size)
    supervision = Supervision(objective=replace(objective, vocab_size=common))
    framing = _framing(teacher_source, data, block_size)
    train = _blocks(data, "train", teacher_source, block_size, framing, common)
    selection = _blocks(data, "selection", teacher_source, block_size, framing, common).take(16)
    learner, expert = load_model(source), load_model(teacher_source)
    provenance = {"stage": "distill", "student": source.reference, "teacher": teacher_source.reference}
    with staged(output, provenance) as folder:
        learner, expert = learner.to(default_device()), expert.to(default_device()).requires_grad_(False)
        if search_rate:
            search = find_learning_rate(
                learner,
                expert,
                train,
                num_tokens=num_tokens,
                selection=selection,
                supervision=supervision,
                optimization=optimization,
            )
            optimization = replace(optimization, learning_rate=search.learning_rate)
        metrics = distill(
            learner,
            expert,
            train,
            num_tokens=num_tokens,
            supervision=supervision,
            optimization=optimization,
            selection=Selection(blocks=selection),
            hooks=Hooks(log_path=folder / "log.jsonl"),
        )
        _save(learner, folder, source)
    return {
        "output": str(output),
        "text": told_text(data),
        **framing.record(),
        "learning_rate": optimization.learning_rate,
        **_training_figures(metrics),
    }


def _training_figures(metrics: TrainingMetrics) -> dict[str, Any]:
    return {
        "num_steps": metrics.num_steps,
        "num_tokens": metrics.num_tokens,
        "seconds": round(metrics.seconds, 1),
        "selection_loss": metrics.selection_loss,
        "selection_kl": metrics.selection_kl,
    }


def evaluate_model(
    checkpoint: str,
    tasks: TaskOptions,
    teacher: str | None,
    num_blocks: int,
    data: str | None,
    block_size: int,
) -> dict[str, Any]:
    """Every number about one checkpoint."""
    source, expert = resolve_model(checkpoint), None
    teacher_source = None if teacher is None else resolve_model(teacher)
    data = named_text(data, checkpoint)
    _require_language_models(source, teacher_source)
    common = _common_ids(source, teacher_source, block_size)
    found = find_tasks(tasks.names, tasks.folders)
    require_allowed(found, tasks.allow_code)
    require_datasets(found)
    tokenizer = load_tokenizer(source)
    framing = _framing(teacher_source or source, data, block_size)
    text = replace(_text(data), begin_blocks=framing.begin_blocks, end_token=bool(framing.suffix))
    heldout = heldout_blocks(text, tokenizer, block_size=block_size, max_blocks=num_blocks, name="--data (heldout)")
    require_ids(heldout.input_ids, common, tokenizer, "--data (heldout)")
    if teacher_source is not None:
        expert = load_model(teacher_source).to(default_device())
    result = evaluate(
        source,
        tasks=tasks,
        teacher=expert,
        heldout=heldout,
        vocab_size=common,
    )
    metrics = [asdict(metric) for metric in result.metrics]
    if result.failed:
        failures = "; ".join(f"{name} could not be measured: {why}" for name, why in result.failed.items())
        raise RunError(f"{failures}. The others: {json.dumps(metrics)}")
    return {
        "checkpoint": source.reference,
        "text": told_text(data),
        **framing.record(),
        "metrics": metrics,
        "speed": result.speed,
    }


def named_text(data: str | None, reference: str) -> str:
    """What --data names; not given, the text of the model that comes with the package, and of no other.

    Raises:
        UserError: nothing says which text the model is meant for.
    """
    data = (data or "").strip()
    if not data and reference != PICO:
        raise UserError(
            f"--data is missing: give text like that which {reference} was trained on (a JSONL(.gz), Parquet or text "
            f"file), as all figures depend on it; --data {STDLIB} takes the source code of Python's standard library"
        )
    return data or STDLIB


def told_text(data: str) -> str:
    """The text as results name it."""
    return f"{STDLIB} (source code of Python's standard library)" if data == STDLIB else data


def _require_language_models(*sources: ModelSource | None) -> None:
    """Refuse checkpoints whose weights are not those of their config, or that are no language models.

    Raises:
        UserError: with the first of them.
    """
    for source in sources:
        if source is not None:
            config = load_config(source)
            check_weights(source, config)
            require_language(config, source.reference)


def _common_ids(source: ModelSource, teacher: ModelSource | None, block_size: int) -> int:
    """Ids, from 0 on, that a model has in common with its teacher, before any weight is read; its own without one.

    Raises:
        UserError: blocks are longer than what one of them can read, or their tokenizers differ.
    """
    config = load_config(source)
    require_context(config, block_size, "--block-size", "model")
    require_head(config)
    rows = int(config.get_text_config().vocab_size)
    tokenizer = load_tokenizer(source, vocab_size=rows)
    if teacher is None:
        return rows
    expert = load_config(teacher)
    require_context(expert, block_size, "--block-size", "teacher")
    require_head(expert)
    expert_rows = int(expert.get_text_config().vocab_size)
    own = load_tokenizer(teacher, vocab_size=expert_rows)
    common = common_vocabulary(own, tokenizer, expert_rows, rows, source.reference)
    require_same_ids(own, tokenizer, source.reference)
    return common


def _framing(source: ModelSource, data: str, block_size: int, *, ask: bool = True) -> Framing:
    """How text is framed for a model; a language model whose tokenizer begins texts is asked, on selection text.

    Where it is not asked, the prefix stands at the start of every block.
    """
    config = load_config(source)
    tokenizer = load_tokenizer(source, vocab_size=int(config.get_text_config().vocab_size))
    framing = framing_of(tokenizer, "--data", begin_blocks=True, end_token=True)
    if not ask or not framing.prefix or not model_class_of(config).can_generate():
        return framing
    model = load_model(source).to(default_device())
    return choose_framing(model, framing, partial(_blocks, data, "selection", source, block_size)).framing


def _blocks(
    data: str, split: str, source: ModelSource, block_size: int, framing: Framing, vocab_size: int | None = None
) -> TokenBlocks:
    name = f"--data ({split})"
    texts = read_documents(_text(data), split, key=name)
    rows = int(load_config(source).get_text_config().vocab_size)
    tokenizer = load_tokenizer(source, vocab_size=rows)
    blocks = pack_documents(texts, tokenizer, block_size=block_size, max_blocks=50_000, framing=framing, name=name)
    require_ids(blocks.input_ids, vocab_size or rows, tokenizer, name)
    return blocks


def _text(data: str) -> TextData:
    return TextData("stdlib", {}) if data == STDLIB else TextData("files", {"train": (data,)}, recipe=False)


def _save(model: Any, folder: Path, source: ModelSource) -> None:
    dtype: torch.dtype = stored_dtype(source)
    save_checkpoint(model, folder, companions=None if source.gguf_file else source.folder, dtype=dtype)
    if source.gguf_file:
        load_tokenizer(source).save_pretrained(folder)
