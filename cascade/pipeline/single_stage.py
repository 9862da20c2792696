"""One stage alone, outside a run: `cascade prune`, `distill` and `evaluate` on models and text given by name."""

import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cascade.data.blocks import TokenBlocks
from cascade.data.framing import Framing, framing_of
from cascade.data.packing import pack_documents
from cascade.data.sources import TextData, read_documents
from cascade.data.splits import Split
from cascade.distillation.options import Hooks, Objective, Optimization
from cascade.distillation.range_test import find_learning_rate
from cascade.distillation.supervision import Lesson, Selection, Supervision
from cascade.distillation.trainer import TrainingMetrics, distill
from cascade.evaluation.evaluate import default_device, evaluate
from cascade.evaluation.framing_test import choose_framing
from cascade.evaluation.heldout import heldout_blocks
from cascade.evaluation.tasks_lm_eval.harness import find_tasks, require_datasets
from cascade.evaluation.tasks_lm_eval.task_code import require_allowed
from cascade.evaluation.tasks_lm_eval.task_options import TaskOptions
from cascade.evaluation.tokenizer_files import require_same_ids
from cascade.models.architecture.axes import probe_axes
from cascade.models.architecture.dims import ModelDims, dims_of
from cascade.models.architecture.head import require_head
from cascade.models.architecture.model_class import model_class_of, require_language
from cascade.models.architecture.positions import require_context
from cascade.models.architecture.sized import Sized
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
from cascade.pruning.importance.statistics import Statistics, collect_statistics
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


@dataclass(frozen=True, kw_only=True)
class Text:
    """The text that a stage reads, and the blocks that it is packed into."""

    data: str | None
    """What --data names; None where the command line says nothing."""
    block_size: int
    """Tokens per block."""
    num_blocks: int = 50_000
    """Blocks of calibration or held-out text, at most."""


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """The training of a student by a teacher."""

    num_tokens: int
    objective: Objective
    optimization: Optimization
    search_rate: bool
    """Whether short trainings find the learning rate first, instead of that of `optimization`."""


def prune_model(
    reference: str,
    target: Target,
    output: Path,
    *,
    text: Text,
    hidden: str = "auto",
    repaired: bool = True,
    offload: bool = False,
) -> dict[str, Any]:
    """Statistics -> scores -> plan -> cut -> repair; writes the checkpoint and plan.json.

    With `offload` the model is never in memory as a whole, and nothing is repaired.

    Raises:
        UserError: the target is empty, `output` is not, or the model cannot be cut so.
    """
    output = require_empty(output)
    if target.params is None and not target.dims:
        raise UserError("give --params or at least one --dim")
    source = resolve_model(reference)
    data = named_text(text.data, reference)
    config = load_config(source)
    check_weights(source, config)
    require_context(config, text.block_size, "--block-size", "model")
    hidden, cut_config, dims = _solve_shape(config, target, hidden)
    framing = _framing(source, data, text.block_size, ask=not offload)
    blocks = _blocks(data, "calibration", source, text.block_size, framing).take(text.num_blocks)
    covariance_blocks = -(-text.num_blocks // 4) if hidden == "pca" else 0
    model: nn.Module | None = None
    with staged(output, {"stage": "prune", "source": source.reference}) as folder:
        if offload:
            statistics = _statistics_by_layer(source, blocks, covariance_blocks)
        else:
            model = load_model(source).to(default_device())
            statistics = collect_statistics(model, blocks, covariance_blocks=covariance_blocks)
        plan = plan_pruning(score_importance(statistics, hidden=hidden), config, dims, statistics=statistics)
        save_plan(plan, folder / "plan.json")
        if model is None:
            prune_on_disk(source, plan, folder)
        else:
            student = prune(model, plan)
            if repaired:
                repair(student, model, plan, blocks)
            _save(student, folder, source)
    return {
        "output": str(output),
        "text": text_name(data),
        **framing.record(),
        "num_parameters": int(probe_axes(cut_config).num_parameters(dims)),
        **dims.as_dict(),
    }


def _solve_shape(config: Any, target: Target, hidden: str) -> tuple[str, Any, ModelDims]:
    """(score of hidden channels, config of the model that is cut, dims to cut it to), proved before weights are read.

    Where the stream is rotated, the cut model has a head of its own.
    """
    sized = Sized(config)
    hidden = score_for_dims(hidden, target, config, config)
    if hidden == "pca":
        require_rotatable(sized)
    cut_config = untied(config) if hidden == "pca" else config
    dims = solve_shape(cut_config, target, parent=config)
    cut = [name for name in CUT_DIMS if dims.as_dict()[name] < sized.dims.as_dict()[name]]
    prove_cuts(config, along=cut, rotated=hidden == "pca")
    return hidden, cut_config, dims


def _statistics_by_layer(source: ModelSource, blocks: TokenBlocks, covariance_blocks: int) -> Statistics:
    """Statistics of a model that is read layer by layer, for one larger than memory."""
    device = default_device()
    with offloaded(source, device) as model:
        batch_size = blocks_at_once(load_config(source), blocks.block_size)
        return collect_statistics(
            model, blocks, batch_size=batch_size, covariance_blocks=covariance_blocks, device=device
        )


def prune_model_on_disk(reference: str, plan_path: Path, output: Path) -> dict[str, Any]:
    """Carries out a plan from safetensors to safetensors; writes the checkpoint and plan.json.

    Raises:
        UserError: the plan was made for a model of other dims.
    """
    output = require_empty(output)
    source = resolve_model(reference)
    plan = load_plan(plan_path)
    dims = dims_of(load_config(source))
    if dims != plan.source_dims:
        raise UserError(
            f"{plan_path}: made for a model of {plan.source_dims.as_dict()}, {reference} has {dims.as_dict()}"
        )
    with staged(output, {"stage": "prune", "source": source.reference}) as folder:
        prune_on_disk(source, plan, folder)
        save_plan(plan, folder / "plan.json")
    count = int(probe_axes(config_of(plan)).num_parameters(plan.target_dims))
    return {"output": str(output), "num_parameters": count, **plan.target_dims.as_dict()}


def distill_model(student: str, teacher: str, output: Path, *, text: Text, recovery: Recovery) -> dict[str, Any]:
    """Recovery of an existing checkpoint; writes the checkpoint and log.jsonl.

    Raises:
        UserError: `output` is not empty, or the models cannot be compared on this text.
    """
    output = require_empty(output)
    source, teacher_source = resolve_model(student), resolve_model(teacher)
    data, block_size = named_text(text.data, teacher), text.block_size
    _require_language_models(source, teacher_source)
    common = _common_ids(source, teacher_source, block_size)
    supervision = Supervision(objective=replace(recovery.objective, vocab_size=common))
    framing = _framing(teacher_source, data, block_size)
    train = _blocks(data, "train", teacher_source, block_size, framing, common)
    selection = _blocks(data, "selection", teacher_source, block_size, framing, common).take(16)
    learner, expert = load_model(source), load_model(teacher_source)
    optimization = recovery.optimization
    provenance = {"stage": "distill", "student": source.reference, "teacher": teacher_source.reference}
    with staged(output, provenance) as folder:
        learner, expert = learner.to(default_device()), expert.to(default_device()).requires_grad_(False)
        if recovery.search_rate:
            lesson = Lesson(
                student=learner,
                teacher=expert,
                blocks=train,
                selection=selection,
                supervision=supervision,
                optimization=optimization,
            )
            search = find_learning_rate(lesson, num_tokens=recovery.num_tokens)
            optimization = replace(optimization, learning_rate=search.learning_rate)
        metrics = distill(
            learner,
            expert,
            train,
            num_tokens=recovery.num_tokens,
            supervision=supervision,
            optimization=optimization,
            selection=Selection(blocks=selection),
            hooks=Hooks(log_path=folder / "log.jsonl"),
        )
        _save(learner, folder, source)
    return {
        "output": str(output),
        "text": text_name(data),
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
    checkpoint: str, *, text: Text, tasks: TaskOptions | None = None, teacher: str | None = None
) -> dict[str, Any]:
    """Held-out losses, tasks, speed and memory of a checkpoint; with a teacher also the KL to it.

    Raises:
        UserError: the checkpoint cannot be measured on this text or on these tasks.
        RunError: a task failed; the message has the numbers that could be measured.
    """
    source, expert = resolve_model(checkpoint), None
    teacher_source = None if teacher is None else resolve_model(teacher)
    data, block_size = named_text(text.data, checkpoint), text.block_size
    _require_language_models(source, teacher_source)
    common = _common_ids(source, teacher_source, block_size)
    tasks = tasks or TaskOptions()
    configs = find_tasks(tasks.names, tasks.folders)
    require_allowed(configs, tasks.allow_code)
    require_datasets(configs)
    tokenizer = load_tokenizer(source)
    framing = _framing(teacher_source or source, data, block_size)
    framed_text = replace(_text(data), begin_blocks=framing.begin_blocks, end_token=bool(framing.suffix))
    place = "--data (heldout)"
    heldout = heldout_blocks(framed_text, tokenizer, block_size=block_size, max_blocks=text.num_blocks, name=place)
    require_ids(heldout.input_ids, common, tokenizer, place)
    if teacher_source is not None:
        expert = load_model(teacher_source).to(default_device())
    result = evaluate(source, tasks=tasks, teacher=expert, heldout=heldout, vocab_size=common)
    metrics = [asdict(metric) for metric in result.metrics]
    if result.failed:
        failures = "; ".join(f"{name} could not be measured: {why}" for name, why in result.failed.items())
        raise RunError(f"{failures}. The others: {json.dumps(metrics)}")
    return {
        "checkpoint": source.reference,
        "text": text_name(data),
        **framing.record(),
        "metrics": metrics,
        "speed": result.speed,
    }


def named_text(data: str | None, reference: str) -> str:
    """The text that --data names; without --data the package's own model has its own text, and no other model has one.

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


def text_name(data: str) -> str:
    """The text as results name it."""
    return f"{STDLIB} (source code of Python's standard library)" if data == STDLIB else data


def _require_language_models(*sources: ModelSource | None) -> None:
    """Refuse checkpoints whose weights do not fit their config, and models that are no language models.

    Raises:
        UserError: names the first such model.
    """
    for source in sources:
        if source is not None:
            config = load_config(source)
            check_weights(source, config)
            require_language(config, source.reference)


def _common_ids(source: ModelSource, teacher: ModelSource | None, block_size: int) -> int:
    """How many ids, from 0 on, a model shares with its teacher, before any weight is read; all of its ids without one.

    Raises:
        UserError: blocks are longer than what a model can read, or the two tokenizers differ.
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
    expert_tokenizer = load_tokenizer(teacher, vocab_size=expert_rows)
    common = common_vocabulary(expert_tokenizer, tokenizer, expert_rows, rows, source.reference)
    require_same_ids(expert_tokenizer, tokenizer, source.reference)
    return common


def _framing(source: ModelSource, data: str, block_size: int, *, ask: bool = True) -> Framing:
    """How text is framed for a model; for a language model whose tokenizer begins texts, its selection losses decide.

    Without `ask`, the prefix stands at the start of every block.
    """
    config = load_config(source)
    tokenizer = load_tokenizer(source, vocab_size=int(config.get_text_config().vocab_size))
    framing = framing_of(tokenizer, "--data", begin_blocks=True, end_token=True)
    if not ask or not framing.prefix or not model_class_of(config).can_generate():
        return framing
    model = load_model(source).to(default_device())
    return choose_framing(model, framing, partial(_blocks, data, "selection", source, block_size)).framing


def _blocks(
    data: str, split: Split, source: ModelSource, block_size: int, framing: Framing, vocab_size: int | None = None
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
