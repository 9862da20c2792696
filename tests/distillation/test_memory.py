"""A remembered teacher: the same bits, read once, within its limit."""

import copy

import pytest
import torch
from conftest import make_blocks, make_model

from cascade.data.blocks import TokenBlocks
from cascade.distillation.losses.batch import batch_losses
from cascade.distillation.losses.features import FeatureLoss
from cascade.distillation.options import Features, Objective
from cascade.distillation.range_test import find_learning_rate
from cascade.distillation.supervision import Lesson
from cascade.distillation.teacher_memory import remember
from cascade.models.architecture.origin import Origin


def counted(teacher):
    calls = []
    teacher.model.register_forward_pre_hook(lambda *args: calls.append(1))
    return calls


@pytest.mark.parametrize("with_features", [False, True])
def test_a_batch_is_read_once_and_its_losses_are_the_same_bits(with_features):
    student, plain = make_model(seed=2), make_model(seed=1)
    teacher = remember(copy.deepcopy(plain))
    calls, blocks = counted(teacher), make_blocks(count=4)
    asked = Features(hidden="mse", relations=("qq",))
    losses = []
    for one in (plain, teacher, teacher):
        features = FeatureLoss(asked, Origin((0, 1, 2, 3)), student, one) if with_features else None
        found = batch_losses(student, one, blocks, Objective(), features)
        losses.append([found.fused.loss.item(), *(value.item() for value in found.features.values())])
    assert losses[0] == losses[1] == losses[2]
    assert len(calls) == 1
    features = FeatureLoss(Features(hidden="cosine"), Origin((0, 1, 2, 3)), student, teacher)
    batch_losses(student, teacher, blocks, Objective(), features)  # another look at the same batch
    batch_losses(student, teacher, make_blocks(count=4, seed=9), Objective(), features)
    assert len(calls) == 3


def test_documents_kept_apart_are_not_taken_for_the_same_text_without_masks():
    student, teacher = make_model(seed=2), remember(make_model(seed=1))
    ids = make_blocks(count=1).input_ids
    places = torch.cat([torch.arange(6), torch.arange(10)])[None]
    found = [batch_losses(student, teacher, TokenBlocks(ids, ids, 3.0, p), Objective()) for p in (None, places)]
    assert found[0].fused.divergence[8] != found[1].fused.divergence[8]


def test_what_is_read_once_does_not_push_out_what_comes_back_and_the_limit_holds():
    student, teacher = make_model(seed=2), make_model(seed=1)
    remember(teacher, limit_bytes=2 * 4 * 16 * 48 * 4)  # hidden states of two batches
    calls = counted(teacher)
    batches = make_blocks(count=16).split(4)

    def read(number, **options):
        batch_losses(student, teacher, batches[number], Objective(), **options)

    read(0), read(1)
    read(2, keep=False), read(3, keep=False)
    read(0), read(1)
    assert len(calls) == 4
    read(2)  # pushes out the one that was read longest ago
    read(1), read(2)
    assert len(calls) == 5
    read(0)
    assert len(calls) == 6


def test_tries_of_a_learning_rate_read_the_teacher_once():
    student, teacher = make_model(seed=2), remember(make_model(seed=1))
    calls = counted(teacher)
    selection = make_blocks(count=8, seed=5)
    lesson = Lesson(student=student, teacher=teacher, blocks=make_blocks(count=64), selection=selection)
    assert len(find_learning_rate(lesson, num_tokens=8 * 16 * 8).tried) >= 2
    assert len(calls) == 8 + 1  # steps of one try, and the selection text
