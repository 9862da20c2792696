"""The loss and the loop: exact where it can be, the same however a step is split."""

import copy
import dataclasses
import json
import math
import shutil

import pytest
import torch
from conftest import distill_with, make_blocks, make_model
from hypothesis import given
from hypothesis import strategies as st
from test_architectures import DECODERS, config_of

import cascade.models.architecture.head as head_module
from cascade.data.blocks import IGNORE_INDEX, TokenBlocks
from cascade.data.order import blocks_at
from cascade.distillation.losses.batch import selection_losses
from cascade.distillation.schedule import Schedule
from cascade.models.architecture.head import head_of, last_hidden, logits_of
from cascade.models.architecture.twin import twin_of
from cascade.runtime.errors import TrainingError, UserError


@pytest.mark.parametrize("architecture", DECODERS)
def test_logits_are_the_heads_of_what_it_would_have_read(architecture):
    model = twin_of(config_of(architecture))
    ids = torch.arange(3, 19).view(2, 8)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        hidden = last_hidden(model, input_ids=ids)
        torch.testing.assert_close(logits_of(hidden, head_of(model)), logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(model(input_ids=ids).logits, logits)  # the head is back


def test_a_model_whose_logits_are_made_otherwise_is_refused(monkeypatch):
    model = twin_of(config_of("gemma2"))
    read = head_module._read
    head_module._difference_on_twin.cache_clear()
    # As if nobody knew of the soft-cap: no public name leaves it out.
    monkeypatch.setattr(head_module, "_read", lambda one: dataclasses.replace(read(one), softcap=None))
    with pytest.raises(UserError, match=r"Gemma2ForCausalLM: its logits are not its head's"):
        head_of(model)
    head_module._difference_on_twin.cache_clear()
    with pytest.raises(UserError, match="BertModel has no language-model head"):
        head_of(twin_of(config_of("BertModel")))


def train(student, teacher, blocks, **options):
    settings = {"num_tokens": 8 * 16 * 3, "batch_size": 8, "microbatch_size": 8, "learning_rate": 1e-2}
    return distill_with(student, teacher, blocks, **(settings | options))


@pytest.mark.parametrize("microbatch_size", [1, 2, 4])
def test_F36_accumulated_microbatches_train_as_one_batch(microbatch_size):
    blocks = make_blocks(count=24)
    # Uneven numbers of counted tokens per block, where a mean of means would differ.
    labels = blocks.labels.clone()
    for row in range(24):
        labels[row, : row % 11] = IGNORE_INDEX
    blocks = TokenBlocks(blocks.input_ids, labels, 3.0)
    teacher, start = make_model(seed=1), make_model(seed=2)
    whole, split = copy.deepcopy(start), copy.deepcopy(start)
    first = train(whole, teacher, blocks, microbatch_size=8)
    second = train(split, teacher, blocks, microbatch_size=microbatch_size)
    assert [entry["loss"] for entry in first.curve] == pytest.approx(
        [entry["loss"] for entry in second.curve], rel=1e-5
    )
    assert [e["grad_norm"] for e in first.curve] == pytest.approx([e["grad_norm"] for e in second.curve], rel=1e-4)


def test_padding_changes_nothing():
    blocks = make_blocks(count=8, size=16)
    ids = torch.cat([blocks.input_ids, torch.zeros(8, 5, dtype=torch.int64)], dim=1)
    labels = torch.cat([blocks.labels, torch.full((8, 5), IGNORE_INDEX)], dim=1)
    padded = TokenBlocks(ids, labels, 3.0)
    teacher, start = make_model(seed=1), make_model(seed=2)
    plain_student, padded_student = copy.deepcopy(start), copy.deepcopy(start)
    plain = train(plain_student, teacher, blocks, num_tokens=8 * 16 * 2)
    after = train(padded_student, teacher, padded, num_tokens=8 * 21 * 2)
    assert [e["loss"] for e in plain.curve] == pytest.approx([e["loss"] for e in after.curve], rel=1e-5)
    assert selection_losses(start, teacher, padded, 3) == pytest.approx(
        selection_losses(start, teacher, blocks, 8), rel=1e-5
    )


def test_training_towards_the_teacher_lowers_the_divergence():
    blocks, teacher, student = make_blocks(count=16), make_model(seed=1), make_model(seed=2)
    before = selection_losses(student, teacher, blocks, 8)["selection_kl"]
    metrics = train(student, teacher, blocks, num_tokens=8 * 16 * 40, selection=blocks, selection_every=10)
    assert metrics.selection_kl < 0.5 * before
    assert metrics.num_steps == 40 and metrics.num_tokens == 8 * 16 * 40


def test_the_same_training_twice_gives_the_same_bits():
    blocks, teacher = make_blocks(count=16), make_model(seed=1)
    students = [make_model(seed=2), make_model(seed=2)]
    for student in students:
        train(student, teacher, blocks)
    first, second = (student.state_dict() for student in students)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_teacher_is_not_changed_and_gets_no_gradient():
    teacher = make_model(seed=1)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    train(make_model(seed=2), teacher, make_blocks())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_non_finite_loss_stops_before_the_optimizer_step_and_names_the_blocks():
    teacher, student = make_model(seed=1), make_model(seed=2)
    with torch.no_grad():
        teacher.model.norm.weight[0] = float("nan")
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with pytest.raises(TrainingError, match=r"step 0.*Blocks of this batch: \["):
        train(student, teacher, make_blocks())
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())


def test_a_batch_without_a_counted_token_is_refused():
    blocks = make_blocks()
    nothing = TokenBlocks(blocks.input_ids, torch.full_like(blocks.labels, IGNORE_INDEX), 3.0)
    with pytest.raises(TrainingError, match="no token"):
        train(make_model(seed=2), make_model(seed=1), nothing)


def test_the_log_has_one_line_per_step(tmp_path):
    blocks = make_blocks()
    train(
        make_model(seed=2),
        make_model(seed=1),
        blocks,
        selection=blocks,
        selection_every=2,
        log_path=tmp_path / "log.jsonl",
    )
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert ["selection_kl" in line for line in lines] == [False, True, True]


def test_the_schedule_warms_up_from_zero_and_ends_at_its_final_fraction():
    for kind in ("cosine", "wsd"):
        schedule = Schedule(kind, warmup_fraction=0.1, final_fraction=0.1, decay_fraction=0.3)
        rates = [schedule.factor(step, 100) for step in range(101)]
        assert rates[:10] == sorted(rates[:10]) and 0 < rates[0] < 0.1
        assert rates[10] == 1.0 and rates[100] == pytest.approx(0.1)
        assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[10:71] == [1.0] * 61 and rates[85] == pytest.approx(0.55)  # stable, then a straight line
    with pytest.raises(ValueError, match="unknown schedule 'linear'"):
        Schedule("linear").factor(50, 100)


def test_layers_that_are_computed_again_give_the_same_training():
    blocks, teacher = make_blocks(count=24), make_model(seed=1)
    plain, thrifty = make_model(seed=2), make_model(seed=2)
    first = train(plain, teacher, blocks)
    second = train(thrifty, teacher, blocks, gradient_checkpointing=True)
    assert [entry["loss"] for entry in first.curve] == pytest.approx([e["loss"] for e in second.curve], rel=1e-5)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(thrifty.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    assert not thrifty.is_gradient_checkpointing


@pytest.mark.nightly
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_layers_train_as_they_are_and_are_left_as_they_were():
    blocks, teacher = make_blocks(count=24), make_model(seed=1)
    plain, compiled = make_model(seed=2), make_model(seed=2)
    torch._dynamo.utils.counters.clear()
    first = train(plain, teacher, blocks)
    assert not torch._dynamo.utils.counters["frames"]
    second = train(compiled, teacher, blocks, compiled=True)
    assert torch._dynamo.utils.counters["frames"]["ok"] >= 1
    assert [entry["loss"] for entry in first.curve] == pytest.approx([e["loss"] for e in second.curve], rel=1e-5)
    for name, value in plain.state_dict().items():
        # By norm: AdamW makes a whole step of a gradient that is all rounding.
        assert (compiled.state_dict()[name] - value).norm() <= 1e-4 * value.norm(), name
    assert all(layer._compiled_call_impl is None for layer in compiled.model.layers)


@given(start=st.integers(0, 200), count=st.integers(1, 30), num_blocks=st.integers(1, 40), seed=st.integers(0, 9))
def test_F07_any_position_of_the_order_can_be_reached_directly(start, count, num_blocks, seed):
    from_zero = blocks_at(0, start + count, num_blocks=num_blocks, seed=seed)
    assert torch.equal(blocks_at(start, count, num_blocks=num_blocks, seed=seed), from_zero[start:])


@given(num_blocks=st.integers(1, 40), seed=st.integers(0, 9), epoch=st.integers(0, 3))
def test_F07_every_epoch_reads_every_block_once_in_an_order_of_its_own(num_blocks, seed, epoch):
    order = blocks_at(epoch * num_blocks, num_blocks, num_blocks=num_blocks, seed=seed)
    assert order.sort().values.tolist() == list(range(num_blocks))
    if num_blocks > 20:
        assert not torch.equal(order, blocks_at((epoch + 1) * num_blocks, num_blocks, num_blocks=num_blocks, seed=seed))


def test_perplexity_of_a_uniform_model_is_the_vocabulary():
    model, blocks = make_model(), make_blocks()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert selection_losses(model, None, blocks, 8)["selection_loss"] == pytest.approx(math.log(64), rel=1e-6)
