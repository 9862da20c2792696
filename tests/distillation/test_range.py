"""The learning rate is found by short trainings that leave no trace."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import distill_with, make_blocks, make_model

from cascade.distillation import range_test
from cascade.distillation.options import Optimization
from cascade.distillation.range_test import FIRST_RATE, GROWTH, find_learning_rate
from cascade.distillation.supervision import Lesson
from cascade.distillation.trainer import TrainingMetrics
from cascade.runtime.errors import DivergedError, NotFiniteError, TrainingError


def pretending(best, curvature=1.0, runs_off_above=math.inf):
    """A training whose loss is a parabola over the logarithm of the rate, lowest at `best`."""

    def train(student, teacher, blocks, *, optimization, **options):
        learning_rate = optimization.learning_rate
        if learning_rate > runs_off_above:
            raise NotFiniteError("loss nan")
        loss = 1 + curvature * math.log2(learning_rate / best) ** 2
        return TrainingMetrics(8, 8, 0.0, loss, loss, [])

    return train


def search(num_tokens=8 * 16 * 8):
    model = torch.nn.Linear(1, 1)
    lesson = Lesson(student=model, teacher=model, blocks=make_blocks(), selection=make_blocks())
    return find_learning_rate(lesson, num_tokens=num_tokens)


@pytest.mark.parametrize("best", [1.3e-4, 6e-4, 1e-3, 2.6e-3, 1.5e-2])
def test_the_best_rate_of_a_smooth_loss_is_found_in_few_tries(best, monkeypatch):
    monkeypatch.setattr(range_test, "distill", pretending(best))
    found = search()
    assert found.learning_rate == pytest.approx(best, rel=0.02)
    assert len(found.tried) <= 6


def test_a_longer_training_takes_a_higher_rate(monkeypatch):
    monkeypatch.setattr(range_test, "distill", pretending(1e-3))
    found = search(num_tokens=8 * 16 * 1000)
    assert found.learning_rate == pytest.approx(1e-3 * (1000 / 60) ** GROWTH["adamw"], rel=0.02)
    assert found.num_tokens == len(found.tried) * 60 * 8 * 16


def test_rates_at_which_the_loss_runs_off_are_passed_over(monkeypatch):
    monkeypatch.setattr(range_test, "distill", pretending(2e-4, runs_off_above=5e-4))
    assert 1e-4 < search().learning_rate < 4e-4
    monkeypatch.setattr(range_test, "distill", pretending(1e-3, runs_off_above=0))
    with pytest.raises(TrainingError, match=r"ran off at every rate tried \(.*0\.001, 0\.002\)"):
        search()


def test_a_try_that_diverges_is_a_bad_rate_whatever_a_whole_training_would_do(monkeypatch):
    given = []

    def train(student, teacher, blocks, **options):
        given.append(options)
        if options["optimization"].learning_rate > 5e-4:
            raise DivergedError("the loss has climbed")
        return pretending(2e-4)(student, teacher, blocks, **options)

    monkeypatch.setattr(range_test, "distill", train)
    model = torch.nn.Linear(1, 1)
    whole = Optimization(learning_rate=0.0, ema_decay=0.9, weight_decay=0.1)
    lesson = Lesson(student=model, teacher=model, blocks=make_blocks(), selection=make_blocks(), optimization=whole)
    found = find_learning_rate(lesson, num_tokens=8 * 16 * 8)
    assert 1e-4 < found.learning_rate < 4e-4
    assert not any({"safekeeping", "hooks"} & options.keys() for options in given)
    for trial in (options["optimization"] for options in given):
        assert trial == replace(whole, learning_rate=trial.learning_rate, ema_decay=None)


def test_what_stops_a_training_otherwise_stops_the_search(monkeypatch):
    def out_of_memory(*args, **options):
        raise TrainingError("out of memory with microbatch_size 1")

    monkeypatch.setattr(range_test, "distill", out_of_memory)
    with pytest.raises(TrainingError, match="out of memory"):
        search()


def test_the_tries_leave_the_student_as_it_is_and_the_found_rate_beats_far_ones():
    teacher, student, blocks = make_model(seed=1), make_model(seed=2), make_blocks(count=32)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    options = {"num_tokens": 8 * 16 * 40, "selection": blocks}
    lesson = Lesson(student=student, teacher=teacher, blocks=blocks, selection=blocks)
    found = find_learning_rate(lesson, num_tokens=options["num_tokens"])
    assert all(torch.equal(student.state_dict()[name], value) for name, value in before.items())
    assert found.tried[0]["learning_rate"] == FIRST_RATE

    def after(rate):
        model = make_model(seed=2)
        return distill_with(model, teacher, blocks, learning_rate=rate, **options).selection_kl

    best = after(found.learning_rate)
    assert best < after(found.learning_rate / 16) and best < after(found.learning_rate * 16)


def test_a_shape_whose_short_recovery_ran_off_is_the_last_of_those_tried(recipe_folder, tmp_path, monkeypatch):
    from cascade.models.checkpoint.load import ModelSource
    from cascade.pipeline.context import Run
    from cascade.pipeline.stage_output import Checkpoint, Made
    from cascade.pipeline.stages import shape_search
    from cascade.pipeline.stages.cut import Base
    from cascade.pipeline.stages.shape_search import Candidate
    from cascade.recipe.load import load_recipe

    recipe = load_recipe(recipe_folder / "tiny.yaml", ["prune.repair.method=none", "distill.on_divergence=stop"])

    def runs_off(*args, **options):
        raise DivergedError("the loss has climbed")

    model = torch.nn.Linear(1, 1)
    for name, value in (("plan_shape", None), ("prune", model), ("load_model", model),
                        ("load_training", SimpleNamespace(block_size=16)), ("feature_loss", None), ("losses_on_selection", {"kl_to_teacher": 0.5})):  # fmt: skip
        monkeypatch.setattr(shape_search, name, lambda *args, value=value, **options: value)
    monkeypatch.setattr(shape_search, "distill", runs_off)
    parent = Checkpoint(ModelSource(tmp_path, "parent"), "")
    texts = {"source": "", "tasks": "", "production": "", "data": Made(tmp_path, "")}
    run = Run(recipe=recipe, runner=None, parent=parent, teachers=[model], **texts)
    base, member = Base(model=parent, lineage=None), SimpleNamespace(optimizer="adamw")
    (tmp_path / "ran-off").mkdir()
    shape_search.make_candidate(run, member, base, None, 64, tmp_path / "ran-off", None)
    (tmp_path / "poor").mkdir()
    (tmp_path / "poor" / "losses.json").write_text('{"repaired": {"kl_to_teacher": 9.0}, "recovered": null}')
    tried = [Candidate(None, None, [Made(tmp_path / name, "")]) for name in ("ran-off", "poor")]
    assert [shape.stages[0].folder.name for shape in sorted(tried, key=Candidate.score)] == ["poor", "ran-off"]
