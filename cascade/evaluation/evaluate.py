"""Everything that is measured about one finished checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cascade.data.blocks import TokenBlocks
from cascade.data.examples import Examples
from cascade.evaluation.heldout import HeldoutReport, heldout_report
from cascade.evaluation.reload import check_reload, start_fresh_process
from cascade.evaluation.tasks_lm_eval.harness import run_tasks
from cascade.evaluation.tasks_lm_eval.task_options import TaskOptions
from cascade.models.architecture.positions import usable_context
from cascade.models.checkpoint.load import ModelSource, load_model, load_tokenizer, resolve_model
from cascade.report.records import Metric
from cascade.runtime.retry_smaller import in_parts_that_fit

PROMPT_TOKENS, NEW_TOKENS = 256, 32
"""Tokens of the prompt, and of the text written after it, that speed is measured on."""
_NO_TASKS = TaskOptions()


@dataclass(frozen=True)
class Evaluation:
    """Numbers about one checkpoint."""

    metrics: list[Metric]
    """Metrics of task 'heldout', then those of lm-eval's tasks."""
    items: dict[str, list[float]]
    """'task/metric/filter' -> score of each item"""
    raw: dict[str, Any]
    """lm-eval's own result"""
    tail: dict[str, Any] | None
    """Losses by decile of the teacher's entropy and by slice (`long_tail`); None without a teacher"""
    failed: dict[str, str]
    """Task -> why it could not be measured"""
    speed: dict[str, float]
    """prefill_tokens_per_s, decode_tokens_per_s, peak_memory_bytes; empty if not measured"""
    blocks: dict[str, Any] | None = None
    """Sums over the tokens of each held-out block (`block_sums`); None without such blocks"""


def evaluate(
    checkpoint: Path | str | ModelSource,
    *,
    tasks: TaskOptions = _NO_TASKS,
    teacher: nn.Module | None = None,
    heldout: TokenBlocks | Examples | None = None,
    vocab_size: int | None = None,
    measure_speed: bool = True,
    reference: Path | None = None,
    trained_tokenizer: Any | None = None,
) -> Evaluation:
    """Evaluate a saved checkpoint as its users will load it: from disk, rounded as saved, computed in float32.

    `vocab_size` are the ids, from 0 on, that the teacher is compared over, where those are not all rows that both
    models have. `reference` is what `write_reference` wrote when the checkpoint was saved; with it the reload gate
    compares, while speed is measured. With `trained_tokenizer` the checkpoint's own must write text as that does.

    Raises:
        UserError: no such checkpoint, or an unknown task.
        ReloadError: the checkpoint gives other logits in a fresh process.
    """
    source = checkpoint if isinstance(checkpoint, ModelSource) else resolve_model(str(checkpoint))
    reloads = measure_speed and source.gguf_file is None
    if reloads:
        start_fresh_process()
    model = load_model(source).to(default_device())
    report = HeldoutReport(metrics=[], items={}, tail=None)
    if heldout is not None:
        report = in_parts_that_fit(
            lambda size: heldout_report(model, teacher, heldout, batch_size=size, vocab_size=vocab_size), 8, "heldout"
        )
    tokenizer = load_tokenizer(source) if tasks.names else None
    results = run_tasks(model, tokenizer, tasks, source=source)
    speed: dict[str, float] = {}
    if reloads:
        speed = check_reload(
            source.folder,
            reference,
            tokenizer=trained_tokenizer,
            prompt_tokens=_prompt_tokens(model),
            new_tokens=NEW_TOKENS,
        )
    return Evaluation(
        metrics=report.metrics + results.metrics,
        items=report.items | results.items,
        raw=results.raw,
        tail=report.tail,
        failed=results.failed,
        speed=speed,
        blocks=report.blocks,
    )


def _prompt_tokens(model: Any) -> int:
    """Tokens of the prompt that speed is measured on: as many as leave room for what is written."""
    context = usable_context(model.config)
    if context is None:
        return PROMPT_TOKENS
    return max(1, min(PROMPT_TOKENS, context - NEW_TOKENS if model.can_generate() else context))


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
