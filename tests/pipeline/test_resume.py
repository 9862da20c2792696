"""A training that was killed goes on to the same bits; out of memory it goes on with smaller microbatches."""

import copy
import json

import pytest
import torch
import transformers
from conftest import distill_with, make_blocks, make_model

from cascade.distillation import step
from cascade.distillation.losses.features import FeatureLoss
from cascade.distillation.options import Features, OnPolicy
from cascade.models.architecture.origin import Origin
from cascade.runtime.errors import TrainingError

OPTIONS = {"num_tokens": 8 * 16 * 10, "batch_size": 8, "microbatch_size": 4, "learning_rate": 1e-2}


class Killed(BaseException):
    """Stands for a death that no handler sees."""


def with_dropout():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=32, vocab_size=64, resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def dies_after(step):
    def on_step(done, total):
        if done == step:
            raise Killed

    return on_step


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_F08_killed_and_gone_on_with_it_is_the_same_training_bit_for_bit_dropout_included(tmp_path):
    blocks, start, teacher = make_blocks(count=24), with_dropout(), with_dropout()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    teacher.eval()
    unbroken = copy.deepcopy(start)
    whole = distill_with(unbroken, teacher, blocks, **OPTIONS, log_path=tmp_path / "whole.jsonl")
    for deaths in ((5,), (3, 7)):
        folder = tmp_path / f"state-{len(deaths)}"
        for death in deaths:
            with pytest.raises(Killed):
                torch.manual_seed(death)  # what the process did before makes no difference
                distill_with(
                    copy.deepcopy(start), teacher, blocks, **OPTIONS, state_folder=folder, save_every_minutes=0,
                    on_step=dies_after(death),
                )  # fmt: skip
        student, steps = copy.deepcopy(start), []
        metrics = distill_with(
            student, teacher, blocks, **OPTIONS, state_folder=folder, log_path=tmp_path / f"log-{len(deaths)}.jsonl",
            on_step=lambda done, total, steps=steps: steps.append(done),
        )  # fmt: skip
        assert steps == list(range(deaths[-1] + 1, 11))
        after = weights(student)
        assert all(torch.equal(after[name], value) for name, value in weights(unbroken).items())
        assert [entry["loss"] for entry in metrics.curve] == [entry["loss"] for entry in whole.curve]
        logged = [json.loads(line) for line in (tmp_path / f"log-{len(deaths)}.jsonl").read_text().splitlines()]
        assert [entry["step"] for entry in logged] == list(range(1, 11))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_averages_features_rollouts_and_every_optimizer_go_on_to_the_same_bits_too(tmp_path, optimizer):
    blocks, start, teacher = make_blocks(count=24), make_model(seed=2), make_model(seed=1)
    options = OPTIONS | {
        "ema_decay": 0.8,
        "optimizer": optimizer,
        "features": FeatureLoss(Features(hidden="cosine"), Origin((0, 1, 2, 3)), start, teacher),
        "on_policy": OnPolicy(0.7, prompt_tokens=4, max_new_tokens=6, buffer_size=2),
    }
    unbroken = copy.deepcopy(start)
    whole = distill_with(unbroken, teacher, blocks, **options)
    with pytest.raises(Killed):
        distill_with(
            copy.deepcopy(start), teacher, blocks, **options, state_folder=tmp_path, save_every_minutes=0,
            on_step=dies_after(7),
        )  # fmt: skip
    student = copy.deepcopy(start)
    metrics = distill_with(student, teacher, blocks, **options, state_folder=tmp_path)
    after = weights(student)
    assert all(torch.equal(after[name], value) for name, value in weights(unbroken).items())
    assert [entry["loss"] for entry in metrics.curve] == [entry["loss"] for entry in whole.curve]


def test_dropout_is_on_while_training_and_the_callers_random_numbers_are_left_alone():
    blocks, teacher = make_blocks(count=24), with_dropout().eval()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, second = with_dropout(), with_dropout().requires_grad_(True)
    torch.manual_seed(7)
    losses = [
        distill_with(model, teacher, blocks, **OPTIONS, seed=seed).curve for model, seed in ((first, 1), (second, 2))
    ]
    assert torch.equal(torch.rand(3), expected)
    assert losses[0][0]["loss"] != losses[1][0]["loss"]
    assert losses[0][0]["loss"] > 1e-4  # the student is its teacher, but for dropout


@pytest.mark.parametrize(("asked", "used"), [(2, 2), (4, 4), (8, 4)])
def test_F21_a_smaller_microbatch_that_is_asked_for_when_going_on_is_used(tmp_path, asked, used):
    blocks, start, teacher = make_blocks(count=24), make_model(seed=2), make_model(seed=1)
    options = OPTIONS | {"microbatch_size": 4, "state_folder": tmp_path, "save_every_minutes": 0}
    with pytest.raises(Killed):
        distill_with(copy.deepcopy(start), teacher, blocks, **options, on_step=dies_after(6))
    found = distill_with(copy.deepcopy(start), teacher, blocks, **(options | {"microbatch_size": asked}))
    assert {entry["microbatch_size"] for entry in found.curve[-2:]} == {used}


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "MANIFEST.json"])
def test_F15_a_damaged_state_is_passed_over_for_the_one_before(tmp_path, caplog, name):
    blocks, start, teacher = make_blocks(count=24), make_model(seed=2), make_model(seed=1)
    unbroken = copy.deepcopy(start)
    distill_with(unbroken, teacher, blocks, **OPTIONS)
    with pytest.raises(Killed):
        distill_with(
            copy.deepcopy(start), teacher, blocks, **OPTIONS, state_folder=tmp_path, save_every_minutes=0,
            on_step=dies_after(6),
        )  # fmt: skip
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-000000005", "step-000000006"]
    newest = tmp_path / "step-000000006" / name
    data = bytearray(newest.read_bytes())
    data[-5] ^= 1
    newest.write_bytes(bytes(data))
    student, steps = copy.deepcopy(start), []
    distill_with(
        student, teacher, blocks, **OPTIONS, state_folder=tmp_path, on_step=lambda done, total: steps.append(done)
    )
    assert steps[0] == 6 and f"damaged ({name})" in caplog.text
    assert all(torch.equal(weights(student)[name], value) for name, value in weights(unbroken).items())


def test_F15_states_are_only_dropped_for_one_that_is_there_as_it_was_written(tmp_path, monkeypatch):
    from cascade.distillation import training_state
    from cascade.runtime.errors import DiskError

    blocks, start, teacher = make_blocks(count=24), make_model(seed=2), make_model(seed=1)
    options = OPTIONS | {"state_folder": tmp_path, "save_every_minutes": 0}
    with pytest.raises(Killed):
        distill_with(copy.deepcopy(start), teacher, blocks, **options, on_step=dies_after(4))
    before = sorted(path.name for path in tmp_path.glob("step-*"))
    monkeypatch.setattr(training_state, "is_committed", lambda folder: False)  # a disk that has lost what it took
    with pytest.raises(DiskError, match="was written and is not there as it was; the states before it are kept"):
        distill_with(copy.deepcopy(start), teacher, blocks, **options)
    assert set(before) < {path.name for path in tmp_path.glob("step-*")}


def test_a_state_of_a_training_with_other_settings_is_not_gone_on_with(tmp_path):
    blocks, teacher = make_blocks(count=24), make_model(seed=1)
    with pytest.raises(Killed):
        distill_with(
            make_model(seed=2), teacher, blocks, **OPTIONS, state_folder=tmp_path, save_every_minutes=0,
            on_step=dies_after(4),
        )  # fmt: skip
    steps = []
    options = OPTIONS | {"learning_rate": 1e-3}
    distill_with(
        make_model(seed=2), teacher, blocks, **options, state_folder=tmp_path,
        on_step=lambda done, total: steps.append(done),
    )  # fmt: skip
    assert steps[0] == 1


def test_F21_out_of_memory_halves_the_microbatch_and_the_result_stays(monkeypatch, caplog):
    blocks, teacher = make_blocks(count=24), make_model(seed=1)
    plain, squeezed = make_model(seed=2), make_model(seed=2)
    expected = distill_with(plain, teacher, blocks, **(OPTIONS | {"microbatch_size": 8}))
    original = step.batch_losses

    def short_of_memory(student, teacher, batch, *rest, **options):
        if torch.is_grad_enabled() and len(batch) > 2:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )
        return original(student, teacher, batch, *rest, **options)

    monkeypatch.setattr(step, "batch_losses", short_of_memory)
    found = distill_with(squeezed, teacher, blocks, **(OPTIONS | {"microbatch_size": 8}))
    assert {entry["microbatch_size"] for entry in found.curve} == {2}
    assert caplog.text.count("out of memory: going on with microbatch_size") == 2
    losses = [[entry["loss"] for entry in one.curve] for one in (expected, found)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_block_that_does_not_fit_and_other_runtime_errors_stop_the_training(monkeypatch):
    def fails(message):
        def losses(*args, **options):
            raise RuntimeError(message)

        return losses

    monkeypatch.setattr(step, "batch_losses", fails("DefaultCPUAllocator: can't allocate memory"))
    with pytest.raises(
        TrainingError, match="out of memory with a single block of 16 tokens; what would help: data.block_size 8"
    ):
        distill_with(make_model(seed=2), make_model(seed=1), make_blocks(count=24), **OPTIONS)
    monkeypatch.setattr(step, "batch_losses", fails("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        distill_with(make_model(seed=2), make_model(seed=1), make_blocks(count=24), **OPTIONS)
