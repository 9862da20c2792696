"""A training that meets numbers that are not finite, too little memory, or another world goes on as it was told to."""

import copy
import json
import logging
import math

import pytest
import torch
from conftest import distill_with, make_blocks, make_model

from cascade.data.blocks import TokenBlocks
from cascade.distillation import trainer
from cascade.distillation.schedule import Schedule
from cascade.report.write import report_html
from cascade.runtime import failpoints
from cascade.runtime.errors import DivergedError, NotFiniteError, RunError
from cascade.runtime.retry_smaller import in_parts_that_fit
from cascade.store.health import findings

OPTIONS = {"num_tokens": 8 * 16 * 10, "batch_size": 8, "microbatch_size": 4, "learning_rate": 1e-2}


class Killed(BaseException):
    """Stands for a death that no handler sees."""


@pytest.fixture
def armed(monkeypatch, tmp_path):
    """armed(FAULT) sets it; that it never fires fails the test."""
    log = tmp_path / "fired"

    def arm(fault):
        failpoints.arm({"CASCADE_FAILPOINT": fault, "CASCADE_ALLOW_FAILPOINTS": "1", "CASCADE_FAILPOINT_LOG": str(log)})

    yield arm
    failpoints.arm({})
    assert log.exists(), "the fault never happened"


def trained(start, teacher, blocks, **options):
    student = copy.deepcopy(start)
    metrics = distill_with(student, teacher, blocks, **(OPTIONS | options))
    return {name: value.clone() for name, value in student.state_dict().items()}, metrics


def same(one, other):
    return all(torch.equal(one[name], value) for name, value in other.items())


@pytest.fixture
def models():
    return make_model(seed=2), make_model(seed=1), make_blocks(count=24)


class Watched(TokenBlocks):
    """Blocks that note which of them are asked for."""

    asked: list = []

    def rows(self, index):
        if len(index) == 8:  # a whole step's
            self.asked.append(index.tolist())
        return super().rows(index)


@pytest.mark.parametrize("deaths", [(4,), (1, 2, 9)])
def test_F07_the_blocks_of_a_training_that_died_are_those_of_an_unbroken_one_over_several_epochs(
    models, tmp_path, deaths
):
    start, teacher, plain = models
    blocks = Watched(**vars(plain))

    def dies(at):
        def on_step(done, total):
            if done == at:
                raise Killed

        return on_step

    Watched.asked = []
    trained(start, teacher, blocks)
    unbroken, Watched.asked = Watched.asked, []
    for death in deaths:
        with pytest.raises(Killed):
            trained(start, teacher, blocks, state_folder=tmp_path, save_every_minutes=0, on_step=dies(death))
    trained(start, teacher, blocks, state_folder=tmp_path)
    assert len(unbroken) == 10 and len(blocks) < 8 * 10
    assert Watched.asked == unbroken


@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
@pytest.mark.parametrize("where", ["teacher", "loss", "gradient", "batch"])
def test_F19_what_is_not_finite_never_reaches_the_weights(models, tmp_path, policy, where, armed, monkeypatch):
    start, teacher, blocks = models
    if where == "loss":
        armed("distill.loss:nan@7")  # of two microbatches a step: the fourth step's first
    else:
        armed("distill.microbatch:sleep=0")
        _poison(monkeypatch, where, at=7)
    options = {"state_folder": tmp_path / "state", "save_every_minutes": 0, "on_nan": policy}
    if policy == "stop":
        with pytest.raises(NotFiniteError, match=r"step 3: .*stopped before the optimizer step.*Blocks of this batch"):
            trained(start, teacher, blocks, **options)
        record = json.loads((tmp_path / "state" / "not_finite.json").read_text())
        assert record["step"] == 3 and len(record["blocks"]) == 8 and "text" not in json.dumps(record)
        failpoints.arm({})
        monkeypatch.undo()
        # The cause is gone: it goes on from the last state, to the bits of a training that never had it.
        after, _ = trained(start, teacher, blocks, **options)
        assert same(after, trained(start, teacher, blocks)[0])
        return
    after, metrics = trained(start, teacher, blocks, **options)
    assert all(value.isfinite().all() for value in after.values())
    left_out = [entry["step"] - 1 for entry in metrics.curve if "skipped" in entry]
    assert left_out == [3] and len(metrics.curve) == 10  # the state of before step 3 is the newest one
    assert findings(metrics.curve) == ["1 of 10 steps were left out: losses or gradients were not finite"]


def _poison(monkeypatch, where, at):
    """Put a NaN into the `at`-th microbatch."""
    from cascade.distillation import step

    own, count = step.batch_losses, 0

    def poisoned(student, teacher, part, *rest, **named):
        nonlocal count
        count += 1
        if count != at:
            return own(student, teacher, part, *rest, **named)
        if where == "teacher":
            broken = copy.deepcopy(teacher)
            next(broken.parameters()).data[:] = math.nan
            return own(student, broken, part, *rest, **named)
        if where == "gradient":  # the loss is finite, what comes back through it is not
            found = own(student, teacher, part, *rest, **named)
            weight = next(student.parameters())
            zero = (weight * 0).sum()
            zero.register_hook(lambda gradient: gradient * math.inf)
            return found._replace(fused=found.fused._replace(loss=found.fused.loss + zero))
        # What stands in the batch becomes embeddings: one of them is no number.
        embedding = student.get_input_embeddings()
        hook = embedding.register_forward_hook(lambda module, inputs, output: output * math.nan)
        try:
            return own(student, teacher, part, *rest, **named)
        finally:
            hook.remove()

    monkeypatch.setattr(step, "batch_losses", poisoned)


def test_F19_steps_left_out_are_steps_that_never_were_and_a_death_changes_nothing(models, tmp_path, armed):
    start, teacher, blocks = models
    armed("distill.loss:nan@7")
    options = {"on_nan": "skip", "state_folder": tmp_path / "one", "save_every_minutes": 0}

    def dies(done, total):
        if done == 6:
            raise Killed

    with pytest.raises(Killed):
        trained(start, teacher, blocks, **options, on_step=dies)
    after, metrics = trained(start, teacher, blocks, **options)  # the fault does not come again: it is remembered
    assert [entry["step"] for entry in metrics.curve if "skipped" not in entry] == [1, 2, 3, 5, 6, 7, 8, 9, 10]
    # The same training, told beforehand that its fourth step is none.
    from cascade.distillation import training_state

    save, known = training_state.save_state, tmp_path / "known"

    def first(folder, made, progress, kept=2):
        progress.left_out = [3]
        save(folder, made, progress, kept)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_state, "save_state", first)
        failpoints.arm({})
        expected, _ = trained(start, teacher, blocks, on_nan="rollback", state_folder=known, save_every_minutes=60)
    assert same(after, expected)


def test_F19_a_rollback_leaves_out_all_steps_since_the_state_and_the_log_says_each_step_once(
    models, tmp_path, armed, caplog
):
    start, teacher, blocks = models
    armed("distill.loss:nan@13")  # step 6; the only state is that of the start
    log = tmp_path / "log.jsonl"
    after, metrics = trained(start, teacher, blocks, on_nan="rollback", state_folder=tmp_path / "state", log_path=log)
    assert [entry["step"] for entry in metrics.curve if "skipped" in entry] == [1, 2, 3, 4, 5, 6, 7]
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(1, 11))
    assert "back to step 0" in caplog.text and all(value.isfinite().all() for value in after.values())


def test_F03_a_signal_in_the_last_step_stops_too_and_what_was_learned_is_kept(models, tmp_path, monkeypatch):
    from cascade.runtime.errors import Stopped

    start, teacher, blocks = models
    expected, _ = trained(start, teacher, blocks, ema_decay=0.9)
    options = {"state_folder": tmp_path, "save_every_minutes": 60, "ema_decay": 0.9}
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        steps = iter([None] * 9 + [15] * 9)
        from cascade.distillation import training_state

        patch.setattr(training_state, "stop_requested", lambda: next(steps) is not None)
        trained(start, teacher, blocks, **options)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-000000010"]
    after, metrics = trained(start, teacher, blocks, **options)
    assert same(after, expected) and len(metrics.curve) == 10


def test_states_later_than_the_one_gone_on_with_do_not_push_new_ones_out(models, tmp_path):
    start, teacher, blocks = models
    options = {"state_folder": tmp_path, "save_every_minutes": 0}

    def dies(at):
        def on_step(done, total):
            if done == at:
                raise Killed

        return on_step

    with pytest.raises(Killed):
        trained(start, teacher, blocks, **options, on_step=dies(8))
    with pytest.raises(Killed):  # other settings: those states are of no use
        trained(start, teacher, blocks, learning_rate=1e-3, **options, on_step=dies(3))
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-000000002", "step-000000003"]


def test_F19_after_too_many_it_stops_after_all(models, tmp_path, monkeypatch):
    start, teacher, blocks = models
    broken = copy.deepcopy(teacher)
    next(broken.parameters()).data[:] = math.nan
    with pytest.raises(NotFiniteError, match="step 2: .* after 2 that were left out"):
        trained(start, broken, blocks, on_nan="skip", max_skipped=2)


def test_F20_a_loss_that_climbs_and_gradients_that_are_zero_are_told(models, caplog):
    start, teacher, blocks = models
    good = [{"step": float(n), "loss": 1.0, "grad_norm": 1.0} for n in range(1, 61)]
    assert findings(good) == []
    climbing = [entry | {"loss": 3.0 if entry["step"] > 30 else 1.0} for entry in good]
    assert findings(climbing) == ["the loss has climbed to over 2 times its first 10 steps' from step 31 on"]
    spike = [entry | {"loss": 9.0 if entry["step"] == 30 else 1.0} for entry in good]
    assert findings(spike) == []
    with caplog.at_level(logging.WARNING):
        frozen = copy.deepcopy(start)
        for parameter in frozen.parameters():
            parameter.data.zero_()  # a model that is dead: nothing flows
        distill_with(frozen, teacher, blocks, **OPTIONS)
    assert "steps had gradients that are all zero" in caplog.text or "nothing was learned" in caplog.text


def test_F20_a_training_that_diverges_says_so_in_its_log_and_in_the_report(models, caplog, tmp_path):
    start, teacher, blocks = models
    with caplog.at_level(logging.WARNING):
        metrics = trained(
            start, teacher, blocks, num_tokens=8 * 16 * 60, learning_rate=3.0, max_grad_norm=1e9,
            schedule=Schedule("wsd", warmup_fraction=0.5, decay_fraction=0.05),
        )[1]  # fmt: skip
    assert findings(metrics.curve) and "the loss has climbed" in caplog.text
    shown = report_html(
        "family", [], {}, [("Trainings to look at", [["member", "found"], ["m", *findings(metrics.curve)]])]
    )
    assert "the loss has climbed" in shown


def test_F20_a_training_that_diverges_is_stopped_where_the_recipe_says_so(models):
    start, teacher, blocks = models
    climbing = {
        "num_tokens": 8 * 16 * 200, "learning_rate": 3.0, "max_grad_norm": 1e9,
        "schedule": Schedule("wsd", warmup_fraction=0.15, decay_fraction=0.05),
    }  # fmt: skip
    seen = []
    with pytest.raises(
        DivergedError, match=r"the loss has been over 2 times its first 10 steps' since step \d+"
    ) as raised:
        trained(start, teacher, blocks, **climbing, on_divergence="stop", on_log=seen.append)
    assert len(seen) < 200 and raised.value.exit_code == 65
    calm = trained(start, teacher, blocks, num_tokens=8 * 16 * 40, on_divergence="stop")
    assert len(calm[1].curve) == 40


def test_F20_a_matrix_that_a_cut_has_left_empty_is_told(models, caplog):
    start, teacher, blocks = models
    dead = copy.deepcopy(start)
    dead.model.layers[1].mlp.down_proj.weight.data.zero_()
    with caplog.at_level(logging.WARNING):
        metrics = trained(dead, teacher, blocks)[1]
    assert "all zero before the first step: model.layers.1.mlp.down_proj.weight" in caplog.text
    assert any("1 weight matrices were all zero" in one for one in findings(metrics.curve))
    assert findings(trained(start, teacher, blocks)[1].curve) == []


def test_F19_a_figure_besides_the_loss_that_is_not_finite_is_told_and_the_state_is_saved(models, tmp_path, monkeypatch):
    start, teacher, blocks = models
    monkeypatch.setattr(
        trainer, "selection_losses", lambda *_, **__: {"selection_loss": math.nan, "selection_kl": math.inf}
    )
    options = {"state_folder": tmp_path / "state", "save_every_minutes": 0, "log_path": tmp_path / "log.jsonl"}
    metrics = trained(start, teacher, blocks, selection=blocks, selection_every=4, **options)[1]
    assert metrics.selection_loss is None
    assert findings(metrics.curve) == ["3 entries, the first at step 4, had other figures that were not finite"]
    assert "NaN" not in (tmp_path / "log.jsonl").read_text() and "Infinity" not in (tmp_path / "log.jsonl").read_text()


@pytest.mark.parametrize("what", ["statistics", "heldout", "evaluation"])
def test_F21_out_of_memory_while_measuring_halves_the_batch_and_the_numbers_stay(
    tiny_parent, recipe_folder, what, armed, caplog
):
    from cascade.evaluation.evaluate import evaluate
    from cascade.evaluation.tasks_lm_eval.task_options import HarnessOptions, TaskOptions
    from cascade.models.checkpoint.load import load_model, resolve_model
    from cascade.pruning.importance.statistics import collect_statistics

    blocks = make_blocks(count=8, size=16, vocabulary=2048)
    source = resolve_model(str(tiny_parent))

    def measured():
        if what == "statistics":
            found = in_parts_that_fit(
                lambda size: collect_statistics(load_model(source), blocks, batch_size=size), 8, "statistics"
            )
            return [float(value.double().sum()) for value in found.__dict__.values() if isinstance(value, torch.Tensor)]
        names = ["python_minimal_pairs"] if what == "evaluation" else []
        tasks = TaskOptions(names=names, harness=HarnessOptions(limit=6))
        found = evaluate(source, tasks=tasks, heldout=blocks, measure_speed=False)
        return [metric.value for metric in found.metrics]

    plain = measured()
    armed(f"{'task/' if what == 'evaluation' else ''}{what}.part:oom")
    assert measured() == pytest.approx(plain, rel=1e-5)
    assert f"{what}: out of memory; going on with" in caplog.text


def test_F21_what_does_not_fit_even_alone_ends_with_what_would_help_and_other_errors_stay_what_they_are():
    sizes = []

    def never(size):
        sizes.append(size)
        raise MemoryError

    with pytest.raises(RunError, match="one by one; a larger machine would help"):
        in_parts_that_fit(never, 6, "held-out text")
    assert sizes == [6, 3, 1]
    with pytest.raises(RuntimeError, match="another"):
        in_parts_that_fit(lambda size: (_ for _ in ()).throw(RuntimeError("another")), 6, "x")
