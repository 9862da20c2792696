"""The token that fills short rows up, and checks that no row's result depends on it.

Decoders that classify read the last token that is not `config.pad_token_id`, wherever the mask ends: config, tokenizer
and padding have to say the same.
"""

import copy
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade.models.architecture.model_class import is_classifier
from cascade.models.architecture.twin import twin_of
from cascade.runtime.errors import UserError
from cascade.runtime.files import read_json

_PADDING_NAMES = re.compile(r"(?i)pad"), re.compile(r"(?i)reserved|unused|extra_id")
"""Names of special tokens that no text holds, the best first."""

_NONE_POSSIBLE = "add one (tokenizer.add_special_tokens, then model.resize_token_embeddings), and save both"

_PAD, _OTHER_PAD, _LENGTHS, _TOLERANCE = 3, 4, (3, 9), 1e-4


def set_padding(config: Any, tokenizer: Any, place: str) -> bool:
    """Let a new classifier's config and its tokenizer pad alike; returns whether either was changed.

    The tokenizer's own token is taken, else the config's where it is a special one, else one that no text ends with.

    Raises:
        UserError: there is no such token.
    """
    before = getattr(config, "pad_token_id", None), tokenizer.pad_token_id, tokenizer.padding_side
    number = _first_possible(config, tokenizer)
    if number is None:
        raise UserError(
            f"{place}: its tokenizer has no padding token, and no other that texts never end with; {_NONE_POSSIBLE}"
        )
    config.pad_token_id = number
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.convert_ids_to_tokens(number), "right"
    return before != (number, number, "right")


def write_padding(folder: Path, tokenizer: Any) -> None:
    """Write a tokenizer's padding into the files of a folder where it is saved; their other settings stay."""
    name = "tokenizer_config.json"
    _change(folder / name, {"pad_token": tokenizer.pad_token, "padding_side": tokenizer.padding_side})
    for name, values in {
        "special_tokens_map.json": {"pad_token": tokenizer.pad_token},
        "generation_config.json": {"pad_token_id": tokenizer.pad_token_id},
    }.items():
        if (folder / name).is_file():
            _change(folder / name, values)


def require_rows_apart(config: Any, tokenizer: Any, place: str) -> None:
    """Refuse a model that reads a text otherwise beside longer ones than alone: measured on a tiny twin.

    Raises:
        UserError: the model does, or there is no token to pad a classifier's texts with.
    """
    by_config, by_tokenizer = getattr(config, "pad_token_id", None), tokenizer.pad_token_id
    if by_tokenizer is None and is_classifier(config):
        raise UserError(
            f"{place}: its tokenizer has no padding token, so texts cannot stand beside each other; "
            f"{_advice(config, tokenizer)}"
        )
    if _ignores_padding(config, by_tokenizer, "right") and _ignores_padding(
        config, by_tokenizer, tokenizer.padding_side
    ):
        return
    if by_config != by_tokenizer:
        why = (
            f"pads with {by_tokenizer} ({tokenizer.pad_token!r}) by its tokenizer and with {by_config} by its config, "
            "so it"
        )
        remedy = f'write "pad_token_id": {by_tokenizer} into its config.json'
    elif _ignores_padding(config, by_tokenizer, "right"):
        why = f"its tokenizer pads at the left, and model type '{config.model_type}' then"
        remedy = 'write "padding_side": "right" into its tokenizer_config.json'
    else:
        why, remedy = f"model type '{config.model_type}'", "texts are padded at the end here, which it is not made for"
    raise UserError(f"{place}: {why} reads a text otherwise beside longer ones than alone; {remedy}")


def _advice(config: Any, tokenizer: Any) -> str:
    """What to write where, for a classifier whose tokenizer has no padding token."""
    number = _first_possible(config, tokenizer)
    if number is None:
        return _NONE_POSSIBLE
    token = json.dumps(tokenizer.convert_ids_to_tokens(number), ensure_ascii=False)
    return (
        f'write "pad_token": {token} into its tokenizer_config.json and "pad_token_id": {number} into its config.json'
    )


def _first_possible(config: Any, tokenizer: Any) -> int | None:
    """The best candidate that the model has a row for; None where there is none."""
    candidates = (number for number in _candidates(config, tokenizer) if number is not None)
    return next((number for number in candidates if 0 <= number < config.vocab_size), None)


def _candidates(config: Any, tokenizer: Any) -> list[int | None]:
    """Ids that may pad, the best first."""
    special = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = [number for form in _PADDING_NAMES for number, token in special.items() if form.search(token)]
    last = tokenizer("a", verbose=False)["input_ids"][-1:]
    by_config = getattr(config, "pad_token_id", None)
    further = [by_config if by_config in special else None, *named, tokenizer.eos_token_id, tokenizer.unk_token_id]
    return [tokenizer.pad_token_id, *(number for number in further if number not in last)]


def _change(path: Path, values: dict[str, Any]) -> None:
    settings = read_json(path) if path.is_file() else {}
    path.write_text(json.dumps(settings | values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@torch.no_grad()
def _ignores_padding(config: Any, fill: int | None, side: str) -> bool:
    """Whether a short row gives the same alone and beside a longer one, padded with `fill` at that side."""
    small = copy.deepcopy(config)
    by_config = getattr(config, "pad_token_id", None)
    small.pad_token_id = None if by_config is None else _PAD
    filled = _PAD if fill is not None and fill == by_config else _OTHER_PAD
    model: Any = twin_of(small)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(_OTHER_PAD + 1, model.config.vocab_size, (n,), generator=generator) for n in _LENGTHS]
    longest = max(_LENGTHS)
    ids, mask = torch.full((len(rows), longest), filled), torch.zeros(len(rows), longest, dtype=torch.int64)
    for number, row in enumerate(rows):
        places = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[number, places], mask[number, places] = row, 1
    try:
        together = _output(model, ids, mask)
    except ValueError:  # transformers' own: no batches without a padding token
        return False
    alone = torch.cat([_output(model, row[None], torch.ones(1, len(row), dtype=torch.int64)) for row in rows])
    return bool((together - alone).abs().max() <= _TOLERANCE * alone.abs().max())


def _output(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits [rows, classes], or of a body its hidden states' mean over each row's tokens [rows, D]."""
    output = model(input_ids=ids, attention_mask=mask)
    if hasattr(output, "logits"):
        return torch.as_tensor(output.logits)
    weights = mask[:, :, None].float()
    return torch.as_tensor((output.last_hidden_state * weights).sum(1) / weights.sum(1))
