"""The part of a plan that looks at the data: every split can be filled, and which rows will be left out."""

from typing import Any

from cascade.data.examples import read_examples
from cascade.data.look import example_text, look_at, look_at_passages, look_text, skipped_lines
from cascade.data.packing import BlockFormat
from cascade.data.prepare import prepare_blocks
from cascade.data.sources import TextData, read_documents
from cascade.evaluation.heldout import production_data
from cascade.planning.classifier import check_labels, labels_read
from cascade.planning.inputs import classes_of, labelled_data, text_data
from cascade.recipe.schema import Recipe

_BLOCKS = 256


def preview_data(recipe: Recipe, config: Any, tokenizer: Any | None, vocab_size: int | None = None) -> dict[str, Any]:
    """{'files': {key of the recipe: what it holds}, 'passages', 'classes', 'labels_read', 'prompts'}.

    `tokenizer` is None where the parent is not made yet, or reads images; `vocab_size` are the ids that all models
    have.

    Raises:
        UserError: a split cannot be filled, a row or a label cannot be used, or too many.
    """
    data = text_data(recipe.data)
    record: dict[str, Any] = {"files": {}, "passages": None, "classes": None, "labels_read": "", "prompts": None}
    if recipe.counts_examples:
        bad = data.bad_row_counter()
        for split in ("train", "selection"):
            read_examples(labelled_data(recipe.data, recipe.task), split, bad)
        record["files"]["train"] = bad.record() | {"rows_of": "train and selection"}
        if recipe.classifies:
            check_labels(recipe, config)
            record |= {"classes": list(classes_of(recipe)), "labels_read": labels_read(recipe, config)}
        return record
    if recipe.generate is not None:
        return record
    if data.source != "stdlib":
        record["files"] = {
            name: look_at(data, name, names, tokenizer, vocab_size) for name, names in data.own_splits.items()
        }
        record["passages"] = look_at_passages(data)
    if recipe.data.production:
        sample = production_data(data, recipe.data.production)
        record["files"]["production"] = look_at(sample, "production", recipe.data.production, tokenizer, vocab_size)
    _require_splits(data, recipe.data.block_size, tokenizer)
    return record


def _require_splits(data: TextData, block_size: int, tokenizer: Any | None) -> None:
    bad = data.bad_row_counter()
    count = _BLOCKS if data.messages_field else 1  # a chat's first blocks may hold questions alone
    block_format = BlockFormat(block_size=block_size, max_blocks=count)
    for split in ("train", "calibration", "selection"):
        if tokenizer is None:
            read_documents(data, split, bad=bad)
        else:
            prepare_blocks(data, split, tokenizer, block_format, bad=bad)


def data_lines(record: dict[str, Any]) -> list[str]:
    """The record of `preview_data` as lines for a terminal."""
    lines: list[str] = []
    for name, rows in record["files"].items():
        lines += skipped_lines(name, rows) if "files" not in rows else look_text(name, rows)
    if record["passages"]:
        shares = ", ".join(f"{split} {letters:,} letters" for split, letters in record["passages"].items())
        lines.append(
            "Too few documents to give each split one: they are dealt out in stretches of neighbours, long ones cut at "
            f"paragraphs: {shares}."
        )
    example = next((rows["example"] for rows in record["files"].values() if rows.get("example")), None)
    if example:
        lines.append(
            f"The first conversation; what counts for the loss stands between [[ and ]]:\n{example_text(example)}"
        )
    if record["classes"]:
        lines.append(f"{len(record['classes'])} classes: {', '.join(record['classes'])[:200]}.")
    if record["labels_read"]:
        lines.append(f"Labels that are numbers are read as places among the parent's classes: {record['labels_read']}.")
    if record["prompts"]:
        lines += skipped_lines("prompts", record["prompts"])
    return lines
