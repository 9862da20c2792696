"""The student's own batches: what it writes, what counts, what is kept."""

import dataclasses

import pytest
import torch
from conftest import distill_with, make_blocks, make_model

from cascade.data.blocks import IGNORE_INDEX
from cascade.distillation.on_policy import Rollouts, generate
from cascade.distillation.options import Objective, OnPolicy
from cascade.runtime.errors import UserError

SETTINGS = OnPolicy(0.5, prompt_tokens=5, max_new_tokens=7)


def test_continuations_follow_their_prompts_and_only_they_count():
    student, blocks = make_model(seed=2), make_blocks(count=3)
    student.train()
    written = generate(student, blocks, SETTINGS)
    assert written.input_ids.shape == (3, 12)
    assert torch.equal(written.input_ids[:, :5], blocks.input_ids[:, :5])
    assert (written.labels[:, :5] == IGNORE_INDEX).all()
    assert torch.equal(written.labels[:, 5:], written.input_ids[:, 5:])
    assert student.training


def test_a_block_with_a_prompt_of_its_own_is_continued_after_that():
    student, blocks = make_model(seed=2), make_blocks(count=2)
    labels = blocks.labels.clone()
    labels[0, :9] = IGNORE_INDEX
    written = generate(student, dataclasses.replace(blocks, labels=labels), SETTINGS)
    assert torch.equal(written.input_ids[0, :9], blocks.input_ids[0, :9])
    assert (written.labels != IGNORE_INDEX).sum(1).tolist() == [7, 7]
    assert (written.labels[0] != IGNORE_INDEX).nonzero()[0] == 9
    assert (written.labels[1] != IGNORE_INDEX).nonzero()[0] == 5
    assert (written.labels[1, 12:] == IGNORE_INDEX).all()  # padding


def test_nothing_counts_after_the_end_token_and_the_end_token_does():
    student, blocks = make_model(seed=2), make_blocks(count=4)
    torch.manual_seed(0)
    free = generate(student, blocks, dataclasses.replace(SETTINGS, temperature=1e-4))
    end = int(free.input_ids[0, 7])
    ended = generate(student, blocks, dataclasses.replace(SETTINGS, temperature=1e-4), [end])
    counted = ended.labels[0] != IGNORE_INDEX
    first = (free.input_ids[0, 5:] == end).nonzero()[0] + 5
    assert counted.nonzero()[-1] == first
    assert ended.labels[0, first] == end


def test_a_prompt_that_leaves_no_room_loses_its_start_and_a_masked_one_starts_with_its_document():
    student, blocks = make_model(seed=2, max_position_embeddings=16), make_blocks(count=1)
    labels = blocks.labels.clone()
    labels[0, :12] = IGNORE_INDEX
    long = dataclasses.replace(blocks, labels=labels)
    written = generate(student, long, dataclasses.replace(SETTINGS, max_new_tokens=6))
    assert torch.equal(written.input_ids[0, :10], blocks.input_ids[0, 2:12])
    places = torch.cat([torch.arange(7), torch.arange(9)])[None]
    written = generate(student, dataclasses.replace(long, position_ids=places), SETTINGS)
    assert torch.equal(written.input_ids[0, :5], blocks.input_ids[0, 7:12])


def test_a_students_own_generation_settings_do_not_bend_its_samples():
    student, blocks = make_model(seed=2), make_blocks(count=2)
    texts = []
    for penalty in (1.0, 9.0):
        student.generation_config.repetition_penalty = penalty
        torch.manual_seed(3)
        texts.append(generate(student, blocks, SETTINGS).input_ids)
        assert student.generation_config.repetition_penalty == penalty
    assert torch.equal(*texts)


def test_the_share_of_own_batches_is_what_was_asked_for():
    rollouts = Rollouts(OnPolicy(0.3), 0, {})
    assert sum(map(rollouts.due, range(2000))) == pytest.approx(600, abs=60)
    assert not any(map(Rollouts(OnPolicy(0.0), 0, {}).due, range(100)))
    assert all(map(Rollouts(OnPolicy(1.0), 0, {}).due, range(100)))


def test_a_full_buffer_gives_kept_batches_and_drops_the_oldest():
    student, blocks = make_model(seed=2), make_blocks(count=2)
    settings = dataclasses.replace(SETTINGS, buffer_size=3, replay_fraction=0.5)
    rollouts, seen = Rollouts(settings, 1, {}), []
    again = 0
    for step in range(30):
        batch = rollouts.batch(student, blocks, step)
        again += any(torch.equal(batch.input_ids, other) for other in seen)
        seen.append(batch.input_ids)
        assert len(rollouts.buffer) <= 6
    assert 5 <= again <= 22


def test_the_students_own_text_is_judged_by_the_teacher_alone():
    usual = Objective("forward_kl", cross_entropy_weight=0.5)
    objective = Rollouts(SETTINGS, 0, {}).objective(usual)
    assert objective == Objective("reverse_kl", cross_entropy_weight=0.0)


def test_training_on_its_own_text_brings_the_student_to_its_teacher():
    teacher, student = make_model(seed=1), make_model(seed=2)
    blocks = make_blocks(count=24)
    options = {"num_tokens": 8 * 16 * 50, "learning_rate": 1e-2, "selection": make_blocks(count=8, seed=9)}
    metrics = distill_with(student, teacher, blocks, on_policy=OnPolicy(1.0, 4, 12), selection_every=1, **options)
    assert metrics.selection_kl < 0.5 * metrics.curve[0]["selection_kl"]


def test_without_a_teacher_there_is_no_one_to_judge():
    with pytest.raises(UserError, match="need a teacher"):
        distill_with(make_model(), None, make_blocks(), num_tokens=100, on_policy=SETTINGS)
