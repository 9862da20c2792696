"""Held-out scores come from one product with each head, and are those of the losses that models are trained with."""

from dataclasses import replace

import pytest
import torch
from conftest import make_blocks, make_model
from torch.utils._python_dispatch import TorchDispatchMode

from cascade.distillation.losses.fused import fused_loss
from cascade.distillation.options import Objective
from cascade.evaluation.drift import uncertainty
from cascade.evaluation.heldout import heldout_report
from cascade.evaluation.token_scores import score_tokens
from cascade.models.architecture.head import Head
from cascade.runtime.errors import UserError

PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.mm.out, torch.ops.aten.addmm.default, torch.ops.aten.addmm.out}

VOCABULARY = 96
"""Of the models whose products are counted: no other matrix of theirs has as many columns."""


class CountedProducts(TorchDispatchMode):
    """Counts matrix products whose result has a column for each token of the vocabulary."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.count = vocabulary, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        self.count += function in PRODUCTS and result.shape[-1] == self.vocabulary
        return result


def states(seed, *, tokens=50, size=24, rows=40, bias=False):
    draw = torch.Generator().manual_seed(seed)
    head = Head(torch.randn(rows, size, generator=draw), torch.randn(rows, generator=draw) if bias else None)
    return torch.randn(tokens, size, generator=draw), head


def products(model, teacher, blocks):
    with CountedProducts(VOCABULARY) as counted:
        heldout_report(model, teacher, blocks, batch_size=4)
    return counted.count


def test_a_batch_of_held_out_text_is_multiplied_once_with_each_head():
    student, teacher = (make_model(vocab_size=VOCABULARY, seed=seed) for seed in range(2))
    blocks = make_blocks(count=12)
    for model in (student, teacher):  # its twin is looked at once, before
        heldout_report(model, None, blocks)
    assert products(student, None, blocks) == 3  # batches of 4 blocks; it was 6
    assert products(student, teacher, blocks) == 6  # it was 12


def test_a_texts_uncertainty_takes_one_product_a_batch():
    model, blocks = make_model(vocab_size=VOCABULARY), make_blocks(count=12)
    uncertainty(model, blocks)
    with CountedProducts(VOCABULARY) as counted:
        uncertainty(model, blocks, batch_size=4)
    assert counted.count == 3  # it was 6


@pytest.mark.parametrize(("head_rows", "teacher_rows", "vocab_size"), [(40, 40, None), (40, 48, None), (48, 40, 30)])
def test_scores_are_bit_for_bit_those_of_the_losses_of_a_training(head_rows, teacher_rows, vocab_size):
    hidden, head = states(0, rows=head_rows)
    expected, teacher = states(1, size=16, rows=teacher_rows)
    head, teacher = replace(head, scale=0.5), replace(teacher, softcap=2.0)
    targets = torch.randint(0, 30, (50,), generator=torch.Generator().manual_seed(2))
    scores = score_tokens(hidden, head, targets, teacher_hidden=expected, teacher_head=teacher, vocab_size=vocab_size)
    objective = Objective(vocab_size=vocab_size)
    losses = fused_loss(hidden, head, targets, objective, teacher_hidden=expected, teacher_head=teacher)
    comparison = scores.comparison
    assert torch.equal(comparison.kl, losses.divergence) and torch.equal(comparison.agrees, losses.agrees)
    assert torch.equal(comparison.teacher_entropy, losses.teacher_entropy)
    assert torch.equal(comparison.teacher_loss, fused_loss(expected, teacher, targets, Objective()).cross_entropy)
    if head_rows == objective.common_rows(head_rows, teacher_rows):
        assert torch.equal(scores.loss, losses.cross_entropy)
    else:  # the loss is the model's own, over all of its rows
        assert torch.equal(scores.loss, fused_loss(hidden, head, targets, Objective()).cross_entropy)


@pytest.mark.parametrize("bias", [False, True])
def test_confidence_and_loss_are_those_of_a_softmax_in_float64(bias):
    hidden, head = states(0, tokens=300, bias=bias)
    targets = torch.randint(0, 40, (300,), generator=torch.Generator().manual_seed(2))
    scores = score_tokens(hidden, head, targets)
    logits = hidden.double() @ head.weight.double().T + (head.bias.double() if bias else 0.0)
    log_p = logits.log_softmax(-1)
    assert scores.comparison is None
    assert torch.allclose(scores.loss.double(), -log_p.gather(-1, targets[:, None])[:, 0], rtol=1e-5, atol=1e-6)
    assert torch.allclose(scores.confidence[0], log_p.exp().amax(-1), rtol=1e-5)
    assert torch.equal(scores.confidence[1].bool(), log_p.argmax(-1) == targets)


def test_a_target_beyond_the_common_ids_is_refused():
    hidden, head = states(0)
    with pytest.raises(UserError, match="token id 39 is beyond the models' common vocabulary of 30"):
        score_tokens(hidden, head, torch.full((50,), 39), teacher_hidden=hidden, teacher_head=head, vocab_size=30)
