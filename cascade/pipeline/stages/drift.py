"""The stage drift: production text beside the held-out text."""

from functools import partial
from pathlib import Path

from cascade.data.blocks import TokenBlocks
from cascade.data.examples import load_training
from cascade.data.sources import read_documents
from cascade.evaluation.drift import lengths, uncertainty, unlikeness
from cascade.evaluation.heldout import (
    production_documents,
)
from cascade.models.checkpoint.load import (
    load_config,
)
from cascade.pipeline.context import Run
from cascade.pipeline.stages.evaluate import block_ids, write_beside
from cascade.pipeline.stages.heldout import heldout_text, production_text
from cascade.planning.inputs import (
    evaluation_settings,
    text_data,
)
from cascade.report.production import DRIFT
from cascade.runtime import ranks
from cascade.runtime.progress import OnStep
from cascade.store.strict_json import write_json

_TRAINING_BLOCKS = 2048
"""Blocks of training text that held-out and production text are compared with."""


def make_drift(run: Run, folder: Path, on_step: OnStep) -> None:
    """drift.json: production text beside the recipe's held-out text, against the training text and for the teacher."""
    recipe, parent, teacher = run.recipe, run.parent.source, run.teacher()
    heldout, train = heldout_text(run, parent), load_training(run.data.folder / "train.safetensors")
    if not isinstance(heldout, TokenBlocks) or not isinstance(train, TokenBlocks):
        raise ValueError("production text is compared with blocks of tokens")
    texts = {"heldout": heldout, "production": production_text(run, parent)}
    # Of both texts as many tokens, or the longer would have more that is new; of the training text many more.
    count = min(len(blocks) for blocks in texts.values())
    samples = [block_ids(blocks.take(count)) for blocks in texts.values()]
    known = block_ids(train.take(max(count, _TRAINING_BLOCKS)))
    vocab_size = int(load_config(parent).get_text_config().vocab_size)
    source = text_data(recipe.data)
    documents = {
        "heldout": read_documents(source, "selection"),
        "production": production_documents(source, recipe.data.production),
    }
    record = {
        "text": {kind: unlikeness(known, ids, vocab_size) for kind, ids in zip(texts, samples, strict=True)},
        "teacher": {kind: uncertainty(teacher, blocks) for kind, blocks in texts.items()},
        "letters": {kind: lengths(texts_of_kind) for kind, texts_of_kind in documents.items()},
    }
    write_json(folder / DRIFT, record)


def compare_with_production(run: Run) -> None:
    """drift.json in the run directory; none without production text."""
    text = ""
    if run.production:
        drift = run.runner.make(
            "drift",
            "parent",
            settings=evaluation_settings(run.recipe, heldout_only=True),
            inputs={"source": run.source, "parent": run.parent, "data": run.data, "production": run.production},
            write=partial(make_drift, run),
        )
        text = (drift.folder / DRIFT).read_text(encoding="utf-8")
    if ranks.rank() == 0:
        write_beside(run.folder, DRIFT, text)
