"""Loss, bits per byte, KL to the teacher and agreement with it, on text that nothing else has read.

Shapes: B = batch, S = block size, V = vocabulary.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cascade.data.bad_rows import BadRows
from cascade.data.blocks import IGNORE_INDEX, TokenBlocks, save_blocks
from cascade.data.examples import Examples, LabelledData, Raw, load_training, read_examples, save_examples
from cascade.data.labels import require_known_labels
from cascade.data.packing import BlockFormat
from cascade.data.prepare import prepare_blocks
from cascade.data.sources import TextData, read_documents
from cascade.data.splits import Heldout
from cascade.distillation.teacher_memory import teacher_hidden
from cascade.evaluation.classification import class_metrics
from cascade.evaluation.long_tail import calibration_error, long_tail
from cascade.evaluation.metric import heldout_metric
from cascade.evaluation.sentence_embeddings import embedding_metrics
from cascade.evaluation.token_scores import score_tokens
from cascade.models.architecture.head import head_of, last_hidden
from cascade.models.architecture.model_class import is_body
from cascade.report.records import Metric

HELDOUT = Heldout("heldout")
"""Opens the held-out split. What this package hands on of it is read for a check before the run, or for a figure."""


def heldout_blocks(
    data: TextData,
    tokenizer: Any,
    *,
    block_size: int,
    max_blocks: int,
    document_masks: bool = False,
    name: str = "data.heldout",
    bad: BadRows | None = None,
) -> TokenBlocks:
    """The held-out split as blocks, spread over all its documents; read by this package only.

    Rows that cannot be used are counted in `bad`. Messages name `name`.
    """
    block_format = BlockFormat(block_size=block_size, document_masks=document_masks)
    blocks = prepare_blocks(data, HELDOUT, tokenizer, block_format, name=name, bad=bad)
    return blocks.take(max_blocks)


BLOCK_METRICS = ("loss", "bits_per_byte", "calibration_error", "kl_to_teacher", "top1_agreement")
CLASS_METRICS = ("accuracy", "loss", "calibration_error", "kl_to_teacher", "top1_agreement")
EMBEDDING_METRICS = ("cosine_distance", "similarity_correlation", "same_neighbour")
PRODUCTION_METRICS = ("loss", "kl_to_teacher", "top1_agreement")
"""What is measured of task 'heldout', by kind of task, and of task 'production'; bits only where all tokens count."""


def sample_blocks(
    data: TextData,
    files: Sequence[str],
    tokenizer: Any,
    *,
    block_size: int,
    max_blocks: int,
    document_masks: bool = False,
    bad: BadRows | None = None,
) -> TokenBlocks:
    """Files of production text as blocks, in the form of `data`, spread over all documents."""
    blocks = prepare_blocks(
        production_data(data, files),
        HELDOUT,
        tokenizer,
        BlockFormat(block_size=block_size, document_masks=document_masks),
        name="data.production",
        bad=bad,
    )
    return blocks.take(max_blocks)


def production_documents(data: TextData, files: Sequence[str]) -> list[Any]:
    """All documents of files of production text."""
    return read_documents(production_data(data, files), HELDOUT)


_CHAT_BLOCKS = 256
"""Blocks of chats that are read before a run; one of them has to hold tokens of an answer."""


def require_heldout(data: TextData, production: Sequence[str], tokenizer: Any, *, block_size: int) -> None:
    """Refuse now a held-out split, or production text, that does not fill one block.

    Raises:
        UserError: it does not, or it cannot be read.
    """
    few = BlockFormat(block_size=block_size, max_blocks=_CHAT_BLOCKS if data.messages_field else 1)
    prepare_blocks(data, HELDOUT, tokenizer, few)
    if production:
        text = production_data(data, production)
        prepare_blocks(text, HELDOUT, tokenizer, few, name="data.production")


def heldout_documents(data: TextData) -> list[Any]:
    """All documents of the held-out split, to be looked through before a run."""
    return read_documents(data, HELDOUT)


def production_data(data: TextData, files: Sequence[str]) -> TextData:
    """Where production text is read, whole, as a held-out split of its own."""
    files_of_splits = {"train": tuple(files), "heldout": tuple(files)}
    return replace(
        data, source="files", files=files_of_splits, hub_splits=None, weights=(), streaming=False, listed=False
    )


def heldout_rows(data: LabelledData) -> list[Raw]:
    """The held-out split's examples as they stand in their files, to be looked through before a run."""
    return read_examples(data, HELDOUT)


def heldout_examples(read: Callable[[Heldout], Examples]) -> Examples:
    """The held-out split as labelled examples; `read` gives that of a split; read by this package only."""
    return read(HELDOUT)


HELDOUT_FILE = "heldout.safetensors"
"""File of packed text in the folder of the stages heldout and production."""


def save_heldout(text: TokenBlocks | Examples, folder: Path) -> None:
    """Keep packed held-out or production text in a file that opens for evaluations alone (`open_heldout`)."""
    path = folder / HELDOUT_FILE
    if isinstance(text, Examples):
        save_examples(text, path, split="heldout")
    else:
        save_blocks(text, path, split="heldout")


def open_heldout(folder: Path) -> TokenBlocks | Examples:
    """What `save_heldout` wrote; read by this package, and by the stage that hands it to this package."""
    return load_training(folder / HELDOUT_FILE, split="heldout")


def require_known_heldout_labels(data: LabelledData, classes: Sequence[str]) -> None:
    """Refuse held-out examples whose label is none of the classes, before anything is trained.

    Raises:
        UserError: there is one; its place is named.
    """
    require_known_labels(read_examples(data, HELDOUT), classes)


class HeldoutReport(NamedTuple):
    """Results of one model on held-out text."""

    metrics: list[Metric]
    """Metrics of task 'heldout', with standard errors."""
    items: dict[str, list[float]]
    """Scores of each item, of labelled examples."""
    tail: dict[str, Any] | None
    """The long tail; None without a teacher."""
    blocks: dict[str, Any] | None = None
    """`block_sums`; None where the text is no blocks of tokens."""


def heldout_report(
    model: nn.Module,
    teacher: nn.Module | None,
    data: TokenBlocks | Examples,
    *,
    batch_size: int = 8,
    vocab_size: int | None = None,
) -> HeldoutReport:
    """Every figure of a model on held-out text.

    `block_metrics`, `class_metrics` of labelled examples, or `embedding_metrics` of an encoder without a head.
    """
    if isinstance(data, Examples) and is_body(getattr(model, "config", None)):
        return HeldoutReport(embedding_metrics(model, teacher, data), {}, None)
    if isinstance(data, Examples):
        return HeldoutReport(*class_metrics(model, teacher, data))
    return _block_report(model, teacher, data, batch_size, vocab_size)


def block_metrics(
    model: nn.Module,
    teacher: nn.Module | None,
    blocks: TokenBlocks,
    *,
    batch_size: int = 8,
    vocab_size: int | None = None,
) -> tuple[list[Metric], dict[str, Any] | None]:
    """Loss and KL in nats per token, bits per byte, expected calibration error; with a teacher also the long tail.

    Every token counts equally; the blocks' own means only give the standard error. Slices of the tail are blocks, by
    their numbers. KL and agreement are over the ids that both models have in common (`Objective.vocab_size`); loss and
    calibration are those of the model itself, over all its rows.
    """
    report = _block_report(model, teacher, blocks, batch_size, vocab_size)
    return report.metrics, report.tail


@torch.no_grad()
def _block_report(
    model: nn.Module, teacher: nn.Module | None, blocks: TokenBlocks, batch_size: int, vocab_size: int | None
) -> HeldoutReport:
    device = next(model.parameters()).device
    columns: dict[str, list[Tensor]] = {"loss": [], "kl_to_teacher": [], "top1_agreement": []}
    counts, confidence, difficulty = [], [], []
    for part in blocks.split(batch_size):
        inputs = part.inputs(device)
        targets = part.targets().to(device)
        valid = targets != IGNORE_INDEX
        hidden = part.predicting(last_hidden(model, **inputs, use_cache=False)).float()[valid]
        expert_hidden, expert = None, None
        if teacher is not None:
            expert_hidden, expert = part.predicting(teacher_hidden(teacher, inputs)).float()[valid], head_of(teacher)
        scores = score_tokens(
            hidden,
            head_of(model),
            targets[valid],
            teacher_hidden=expert_hidden,
            teacher_head=expert,
            vocab_size=vocab_size,
        )
        confidence.append(scores.confidence)
        values, comparison = {"loss": scores.loss}, scores.comparison
        if comparison is not None:
            difficulty.append(torch.stack([comparison.teacher_entropy, comparison.teacher_loss, scores.loss]).cpu())
            values |= {"kl_to_teacher": comparison.kl, "top1_agreement": comparison.agrees}
        for name, value in values.items():
            by_block = torch.zeros(valid.shape, dtype=torch.float64, device=device).masked_scatter_(
                valid, value.double()
            )
            columns[name].append(by_block.sum(1))
        counts.append(valid.double().sum(1))
    tokens, confidence_2N = torch.cat(counts), torch.cat(confidence, 1)
    sums = {name: torch.cat(values) for name, values in columns.items() if values}
    loss, *comparisons = [
        _metric(name, values, tokens, higher=name == "top1_agreement") for name, values in sums.items()
    ]
    error = calibration_error(*confidence_2N)
    calibration = heldout_metric("calibration_error", error, None, confidence_2N.shape[1], higher=False)
    bits = [_bits_per_byte(loss, blocks.bytes_per_token)] if blocks.bytes_per_token else []
    tail = None
    if difficulty:
        numbers = torch.arange(len(blocks)).repeat_interleave(tokens.long().cpu())
        entropy, expert_loss, student_loss = torch.cat(difficulty, 1)
        names = [str(number) for number in range(len(blocks))]
        tail = long_tail(entropy, expert_loss, student_loss, numbers, names)
    return HeldoutReport([loss, *bits, calibration, *comparisons], {}, tail, block_sums(blocks, tokens, sums))


def _bits_per_byte(loss: Metric, bytes_per_token: float) -> Metric:
    """The loss, in nats per token, as bits per byte of text."""
    bits = 1 / (math.log(2) * bytes_per_token)
    value, stderr = (None if nats is None else nats * bits for nats in (loss.value, loss.stderr))
    return replace(loss, metric="bits_per_byte", value=value, stderr=stderr)


def block_sums(blocks: TokenBlocks, tokens: Tensor, sums: dict[str, Tensor]) -> dict[str, Any]:
    """Counted tokens of each block, the sum over them of each metric, and a sha256 of the text and of what counts.

    Two models that were measured on the same text can be compared block by block.
    """
    digest = hashlib.sha256()
    for part in (blocks.input_ids, blocks.labels):
        digest.update(part.long().contiguous().numpy().tobytes())
    values = {name: by_block.cpu().tolist() for name, by_block in sums.items()}
    return {"text": digest.hexdigest(), "tokens": tokens.long().cpu().tolist()} | values


def _metric(name: str, sums: Tensor, tokens: Tensor, *, higher: bool) -> Metric:
    value = float(sums.sum() / tokens.sum())
    # Ratio estimator: blocks with more counted tokens weigh more.
    residuals = (sums - value * tokens) / tokens.mean()
    count = len(sums)
    stderr = float((residuals.square().sum() / (count * (count - 1))).sqrt()) if count > 1 else None
    return heldout_metric(name, value, stderr, int(tokens.sum()), higher=higher)
