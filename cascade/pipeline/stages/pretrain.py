"""The stage pretrain: a parent from nothing, as a byte-level BPE tokenizer and a model trained by cross-entropy.

Depends on: `parent.pretrain`, the text and the recipe's seed. Leaves: `checkpoint/` with the tokenizer, `log.jsonl`.
"""

from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from cascade.data.packing import BlockFormat
from cascade.data.prepare import prepare_blocks
from cascade.data.sources import read_documents
from cascade.distillation.options import Execution, Hooks, Optimization, Safekeeping
from cascade.distillation.supervision import Selection
from cascade.distillation.trainer import distill
from cascade.models.architecture.model_class import model_from_config
from cascade.models.architecture.positions import usable_context
from cascade.models.checkpoint.load import (
    CHECKPOINT,
    ModelSource,
    save_checkpoint,
)
from cascade.pipeline.runner import StageRunner
from cascade.pipeline.training_options import cosine_schedule
from cascade.planning.classifier import made_dtype
from cascade.planning.inputs import as_guessed, data_fingerprint, text_data
from cascade.planning.parent import parent_config
from cascade.recipe.schema import Pretrain, Recipe
from cascade.runtime.progress import OnStep
from cascade.store.commits import partial_of

END_TOKEN, MASK_TOKEN = "<|endoftext|>", "<|mask|>"

# A line break keeps its indentation with it, so that depth in code is one token; names split at underscores.
_PIECES = r"\n[ ]*| ?_?[^\W\d_]+|\d| ?[^\s\w]+|\s+|_+"


def pretrained_parent(runner: StageRunner, recipe: Recipe, settings: Pretrain) -> ModelSource:
    """The parent, which this run trains from random weights."""
    key_settings = settings.model_dump(exclude={"microbatch_size"}) | {
        "seed": recipe.seed,
        "dtype": recipe.save.dtype,
        "text_field": recipe.data.text_field,
        "weights": recipe.data.weights,
        "document_masks": recipe.data.masks_documents,
    }
    if key_settings["optimizer"] == "adamw":  # runs from before there was a choice stay finished
        del key_settings["optimizer"]
    if recipe.task == "masked_language":
        key_settings |= {"task": recipe.task, "mask_copies": recipe.data.mask_copies}
    pretrained = runner.make(
        "pretrain",
        "parent",
        settings=key_settings,
        inputs={"source": data_fingerprint(recipe.data)},
        write=partial(make_pretrained, recipe),
    )
    return pretrained.model(recipe.name).source


def make_pretrained(recipe: Recipe, folder: Path, on_step: OnStep) -> None:
    """Train tokenizer and model on the recipe's training text; write the checkpoint and the log."""
    settings = recipe.parent.pretrain
    if settings is None:
        raise ValueError("the recipe has no parent.pretrain")
    data = text_data(recipe.data)
    texts = read_documents(data, "train")
    config = parent_config(recipe)
    tokenizer = train_tokenizer(
        texts,
        vocab_size=settings.tokenizer.vocab_size,
        model_max_length=usable_context(config) or config.max_position_embeddings,
        masks=recipe.task == "masked_language",
    )
    block_format = BlockFormat(block_size=settings.block_size, document_masks=recipe.data.masks_documents)
    selection = prepare_blocks(data, "selection", tokenizer, block_format).take(48)
    train = as_guessed(recipe, prepare_blocks(data, "train", tokenizer, block_format), "train", tokenizer)
    selection = as_guessed(recipe, selection, "selection", tokenizer)
    torch.manual_seed(recipe.seed)
    model: nn.Module = model_from_config(config)
    distill(
        model.to("cuda" if torch.cuda.is_available() else "cpu"),
        None,
        train,
        num_tokens=settings.tokens,
        optimization=_optimization(settings, recipe.seed),
        execution=Execution(microbatch_size=settings.microbatch_size),
        selection=Selection(blocks=selection, every=settings.selection_every),
        safekeeping=Safekeeping(state_folder=partial_of(folder)),
        hooks=Hooks(log_path=folder / "log.jsonl", on_step=on_step),
    )
    save_checkpoint(model, folder / CHECKPOINT, companions=None, dtype=made_dtype(recipe))
    tokenizer.save_pretrained(folder / CHECKPOINT)


def _optimization(settings: Pretrain, seed: int) -> Optimization:
    return Optimization(
        batch_size=settings.batch_size,
        seed=seed,
        optimizer=settings.optimizer,
        learning_rate=settings.learning_rate,
        schedule=cosine_schedule(settings),
        weight_decay=settings.weight_decay,
    )


def train_tokenizer(
    texts: list[str], *, vocab_size: int, model_max_length: int, masks: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: the 256 bytes, the end token, with `masks` a mask token, and the commonest merges."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_TOKEN, MASK_TOKEN] if masks else [END_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_TOKEN,
        eos_token=END_TOKEN,
        model_max_length=model_max_length,
        **({"mask_token": MASK_TOKEN} if masks else {}),
    )
