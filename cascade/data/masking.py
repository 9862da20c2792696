"""Blocks with hidden tokens to guess, as BERT learns (Devlin et al. 2018, https://arxiv.org/abs/1810.04805).

Shapes: N = blocks, S = block size.
"""

from dataclasses import replace
from typing import Any

import torch

from cascade.data.blocks import IGNORE_INDEX, TokenBlocks
from cascade.runtime.errors import UserError

SHARE, _AS_MASK, _AS_ANY = 0.15, 0.8, 0.1
"""Share of tokens to guess; shares of these that become the mask token, or any other token. The rest stays."""


def mask_token(tokenizer: Any) -> int:
    """Id of the mask token, which stands where a token is hidden.

    Raises:
        UserError: the tokenizer has no such token.
    """
    if tokenizer.mask_token_id is None:
        raise UserError("task: masked_language: the parent's tokenizer has no mask token")
    return int(tokenizer.mask_token_id)


def masked_blocks(
    blocks: TokenBlocks, tokenizer: Any, *, seed: int, copies: int = 1, vocab_size: int | None = None
) -> TokenBlocks:
    """Each block `copies` times, each time with other tokens to guess; labels count at those alone.

    Where a token is replaced by any other, its id is below `vocab_size`.

    Special tokens are never hidden; every block has at least one token to guess.

    Raises:
        UserError: the tokenizer has no mask token.
    """
    mask = mask_token(tokenizer)
    whole = blocks.rows(torch.arange(len(blocks)).repeat(copies))
    generator = torch.Generator().manual_seed(seed)
    ids = whole.input_ids.clone()
    special = torch.isin(ids, torch.tensor(sorted(tokenizer.all_special_ids)))
    draws = torch.rand(ids.shape, generator=generator).masked_fill(special, 2.0)
    chosen = (draws < SHARE) | (draws == draws.min(1, keepdim=True).values)
    chosen &= ~special
    how = torch.rand(ids.shape, generator=generator)
    # Of tokens that were added later some models may have no row: the same draws for all that read the text.
    count = min(tokenizer.vocab_size, vocab_size or tokenizer.vocab_size)
    replacements = torch.randint(0, count, ids.shape, generator=generator).to(ids.dtype)
    labels = torch.where(chosen, ids, IGNORE_INDEX)
    ids = torch.where(chosen & (how < _AS_MASK), mask, ids)
    ids = torch.where(chosen & (how >= 1 - _AS_ANY), replacements, ids)
    return replace(whole, input_ids=ids, labels=labels, bytes_per_token=0.0, masked=True)
