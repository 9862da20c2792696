"""A parent from nothing: a byte-level BPE tokenizer and a model trained by cross-entropy alone."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from cascade.data.blocks import TokenBlocks
from cascade.distillation.options import Execution, Hooks, Optimization, Safekeeping
from cascade.distillation.supervision import Selection
from cascade.distillation.trainer import TrainingMetrics, distill
from cascade.models.architecture import config_from_values, model_from_config

END_TOKEN, MASK_TOKEN = "<|endoftext|>", "<|mask|>"

# A line break keeps its indentation with it, so that depth in code is one token; names split at underscores.
_PIECES = r"\n[ ]*| ?_?[^\W\d_]+|\d| ?[^\s\w]+|\s+|_+"


def train_tokenizer(
    texts: list[str], *, vocab_size: int, model_max_length: int, masks: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of exactly the bytes, the end token (a mask, too) and the commonest merges."""
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


def pretrained_config(values: dict[str, Any], *, vocab_size: int, end_token_id: int = 0) -> Any:
    """The transformers config of a recipe's `pretrain.config`.

    Raises:
        UserError: no or an unknown model_type, or values that its config class refuses.
    """
    special = {"bos_token_id": end_token_id, "eos_token_id": end_token_id, "pad_token_id": None}
    return config_from_values(special | values | {"vocab_size": vocab_size}, "parent.pretrain.config")


def pretrain(
    config: Any,
    blocks: TokenBlocks,
    *,
    num_tokens: int,
    optimization: Optimization,
    execution: Execution,
    selection: Selection,
    safekeeping: Safekeeping,
    hooks: Hooks,
) -> tuple[nn.Module, TrainingMetrics]:
    """A model of `config` with random weights, trained on `num_tokens` tokens by cross-entropy, as `distill` does."""
    torch.manual_seed(optimization.seed)
    model: nn.Module = model_from_config(config)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    metrics = distill(
        model,
        None,
        blocks,
        num_tokens=num_tokens,
        optimization=optimization,
        execution=execution,
        selection=selection,
        safekeeping=safekeeping,
        hooks=hooks,
    )
    return model, metrics
