"""Feature losses: compared along the pruning's own map, the numbers of a plain reference, gradients to the student."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import distill_with, make_blocks, make_model
from test_architectures import ALL, config_of

from cascade.data.blocks import IGNORE_INDEX, TokenBlocks
from cascade.distillation.losses.batch import batch_losses, visible
from cascade.distillation.losses.features import FeatureLoss
from cascade.distillation.options import Features, Objective
from cascade.models.architecture.dims import dims_of
from cascade.models.architecture.origin import Origin, even_origin
from cascade.models.architecture.twin import twin_of
from cascade.pruning.choose import plan_pruning
from cascade.pruning.cut import prune
from cascade.pruning.importance.scores import score_importance
from cascade.pruning.importance.statistics import collect_statistics
from cascade.pruning.origin import origin_of
from cascade.pruning.proof import random_scores
from cascade.recipe.distill import Distill
from cascade.runtime.errors import UserError

EVERYTHING = Features(hidden="mse", embedding="cosine", relations=("qq", "kk", "vv", "qk"))


def losses_of(student, teacher, features, origin, blocks=None):
    blocks = blocks or make_blocks(count=3)
    return batch_losses(student, teacher, blocks, Objective(), FeatureLoss(features, origin, student, teacher)).features


def cut(model, seed=0, **dims):
    scores = random_scores(model, seed=seed)
    plan = plan_pruning(scores, model.config, dims_of(model.config).replace(**dims))
    return prune(model, plan), plan


WITH_A_HEAD = [name for name in ALL if not name.endswith(("Model", "Classification"))]


@pytest.mark.parametrize("architecture", WITH_A_HEAD)
def test_a_student_that_is_its_teacher_has_no_feature_loss_whatever_the_architecture(architecture):
    teacher = twin_of(config_of(architecture))
    depth = dims_of(teacher.config).num_hidden_layers
    found = losses_of(copy.deepcopy(teacher), teacher, EVERYTHING, Origin(tuple(range(depth + 1))))
    assert set(found) == {"hidden", "embedding", "relations"}
    assert all(abs(value.item()) < 1e-4 for value in found.values())


def test_the_layer_before_a_gap_learns_what_came_after_it():
    model = make_model(num_hidden_layers=6)
    scores = replace(random_scores(model), layers=torch.tensor([9.0, 8.0, 0.0, 0.0, 7.0, 1.0]))
    plan = plan_pruning(scores, model.config, dims_of(model.config).replace(num_hidden_layers=4))
    assert plan.layers == [0, 1, 4, 5]
    assert origin_of([plan]).points == (0, 1, 4, 5, 6)
    smaller = prune(model, plan)
    scores = replace(random_scores(smaller), layers=torch.tensor([9.0, 8.0, 0.0, 0.0]))
    second = plan_pruning(scores, smaller.config, dims_of(smaller.config).replace(num_hidden_layers=2))
    assert origin_of([plan, second]).points == (0, 1, 6)


def test_cuts_of_neurons_and_heads_leave_the_map_of_channels_whole_and_hidden_cuts_select():
    model = make_model()
    _, plan = cut(model, intermediate_size=16)
    assert origin_of([plan]).project(torch.ones(2, 48)).shape == (2, 48)
    smaller, plan = cut(model, hidden_size=32)
    second_plan = cut(smaller, seed=4, hidden_size=16)[1]
    hidden = torch.randn(5, 48)
    assert torch.equal(origin_of([plan]).project(hidden), hidden[:, plan.hidden])
    assert torch.equal(origin_of([plan, second_plan]).project(hidden), hidden[:, plan.hidden][:, second_plan.hidden])


def test_a_rotated_student_of_the_same_size_is_compared_along_its_rotation():
    model, blocks = make_model(seed=3), make_blocks(count=6)
    statistics = collect_statistics(model, blocks, covariance_blocks=6)
    scores = score_importance(statistics, hidden="pca")
    plan = plan_pruning(scores, model.config, dims_of(model.config), statistics=statistics)
    found = losses_of(prune(model, plan), model, Features(hidden="mse", embedding="mse"), origin_of([plan]), blocks)
    assert all(value.item() < 1e-6 * 6 * 15 for value in found.values())


def test_plans_that_do_not_follow_each_other_are_refused():
    model = make_model()
    smaller, plan = cut(model, hidden_size=32)
    with pytest.raises(ValueError, match="does not start from"):
        origin_of([cut(smaller, hidden_size=16)[1], plan])
    with pytest.raises(UserError, match=r"3 layers x 32 channels .* \(3 x 48\)"):
        even_origin(dims_of(smaller.config), dims_of(model.config))
    assert even_origin(dims_of(make_model(num_hidden_layers=3).config), dims_of(model.config)).points == (0, 1, 2, 3)
    assert even_origin(
        dims_of(model.config), dims_of(make_model(num_hidden_layers=6).config)
    ).points == (0, 2, 4, 6)  # fmt: skip


@pytest.mark.parametrize("name", ["qq", "kk", "vv", "qk"])
def test_relations_are_those_of_a_plain_float64_reference(name):
    teacher, student = make_model(seed=1), make_model(seed=2)
    ids = torch.randint(0, 64, (3, 16), generator=torch.Generator().manual_seed(5))
    labels = ids.clone()
    labels[0, :7] = labels[2, 9:] = IGNORE_INDEX
    blocks = TokenBlocks(ids, labels, 3.0)
    features = Features(relations=(name,), relation_heads=4)
    found = losses_of(student, teacher, features, Origin((0, 1, 2, 3)), blocks)["relations"]

    def relation(model):
        taken = {}
        attention = model.model.layers[2].self_attn
        for letter in "qkv":
            module = getattr(attention, f"{letter}_proj")
            module.register_forward_hook(lambda _, __, out, letter=letter: taken.__setitem__(letter, out.double()))
        with torch.no_grad():
            model(input_ids=ids)
        sides = []
        for letter in name:
            side = taken[letter]
            if name == "qk" and letter == "k":  # two key/value heads of 8 channels for eight query heads
                side = torch.cat([side[..., :8]] * 4 + [side[..., 8:]] * 4, -1)
            sides.append(side.view(3, 16, 4, -1).transpose(1, 2))
        scores = sides[0] @ sides[1].mT / sides[0].shape[-1] ** 0.5
        return scores.masked_fill(~torch.ones(16, 16).tril().bool(), -torch.inf).softmax(-1)

    p, q = relation(copy.deepcopy(teacher)), relation(copy.deepcopy(student))
    kl = torch.where(p > 0, p * (p.log() - q.log()), 0.0).sum(-1).mean(1)
    counts = torch.nn.functional.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1))
    torch.testing.assert_close(found.double(), kl[counts].sum(), rtol=1e-5, atol=0)


def test_relation_heads_that_fit_no_width_are_refused_with_those_that_do():
    model = make_model()
    with pytest.raises(UserError, match="relation_heads: 5 does not divide .* possible: 1, 2, 4, 8, 16"):
        FeatureLoss(Features(relations=("qq",), relation_heads=5), Origin((0, 1, 2, 3)), model, model)


def test_tokens_of_other_documents_and_later_ones_are_not_related():
    model = make_model()
    inputs = {"input_ids": torch.zeros(1, 5, dtype=torch.int64), "position_ids": torch.tensor([[0, 1, 0, 1, 2]])}
    expected = torch.block_diag(torch.ones(2, 2).tril(), torch.ones(3, 3).tril()).bool()
    assert torch.equal(visible(model, inputs)[0], expected)


def test_feature_losses_reach_the_student_alone_and_are_learned():
    teacher = make_model(seed=1)
    student, plan = cut(teacher, hidden_size=32, num_hidden_layers=2)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    features = FeatureLoss(EVERYTHING, origin_of([plan]), student, teacher)
    metrics = distill_with(
        student, teacher, make_blocks(count=24), num_tokens=8 * 16 * 60, learning_rate=3e-3, features=features
    )
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    first, last = metrics.curve[0], metrics.curve[-1]
    assert last["hidden_loss"] < 0.9 * first["hidden_loss"]
    assert last["relations_loss"] < first["relations_loss"]
    assert {name.partition(".")[0] for name in student.state_dict()} == {"model", "lm_head"}  # nothing was added


@pytest.mark.parametrize("microbatch_size", [1, 3])
def test_balanced_features_do_not_see_how_a_step_is_split(microbatch_size):
    teacher, blocks = make_model(seed=1), make_blocks(count=24)
    start, plan = cut(teacher, hidden_size=32)
    students = [copy.deepcopy(start), copy.deepcopy(start)]
    curves = []
    for student, size in zip(students, (8, microbatch_size), strict=True):
        features = FeatureLoss(EVERYTHING, origin_of([plan]), student, teacher)
        options = {"num_tokens": 8 * 16 * 3, "microbatch_size": size, "learning_rate": 1e-2, "features": features}
        curves.append(distill_with(student, teacher, blocks, **options).curve)
    for one, other in zip(*curves, strict=True):
        assert one["hidden_loss"] == pytest.approx(other["hidden_loss"], rel=1e-4)
    for one, other in zip(students[0].parameters(), students[1].parameters(), strict=True):
        assert (one - other).norm() / one.norm() < 1e-4


def test_balanced_losses_are_together_as_large_as_the_logit_loss():
    features = FeatureLoss(replace(EVERYTHING, weights={"hidden": 2.0}), Origin((0, 1, 2, 3)), *[make_model()] * 2)
    last = {"loss": 3.0, "hidden_loss": 0.5, "embedding_loss": 0.1, "relations_loss": 0.4}
    assert features.scales(last) == pytest.approx({"hidden": 6.0, "embedding": 3.0, "relations": 3.0})
    plain = FeatureLoss(replace(EVERYTHING, balanced=False), Origin((0, 1, 2, 3)), *[make_model()] * 2)
    assert plain.scales({}) == {"hidden": 1.0, "embedding": 1.0, "relations": 1.0}


@pytest.mark.parametrize(("fade_fraction", "strengths"), [(None, [1, 1, 1, 1]), (1.0, [1, 0.75, 0.5, 0.25]), (0.5, [1, 0.5, 0, 0])])  # fmt: skip
def test_faded_losses_weigh_evenly_less_from_step_to_step_and_then_nothing(fade_fraction, strengths):
    model = make_model()
    loss = FeatureLoss(Features(hidden="cosine", fade_fraction=fade_fraction), Origin((0, 1, 2, 3)), model, model)
    assert [loss.strength(step / 4) for step in range(4)] == strengths
    at_first = loss.scales({"loss": 3.0, "hidden_loss": 0.5})["hidden"]
    faded = [loss.scales({"loss": 3.0, "hidden_loss": 0.5}, strength)["hidden"] for strength in strengths]
    assert faded == [at_first * strength for strength in strengths]


def test_once_they_have_faded_feature_losses_are_neither_weighed_nor_computed():
    blocks, teacher = make_blocks(count=8), make_model(seed=1)
    start = make_model(seed=2)

    def train(fade_fraction, steps):
        student = copy.deepcopy(start)
        features = FeatureLoss(
            Features(hidden="cosine", fade_fraction=fade_fraction, balanced=False),
            Origin((0, 1, 2, 3)),
            student,
            teacher,
        )
        curve = distill_with(student, teacher, blocks, num_tokens=steps * 2 * blocks.block_size, batch_size=2,
                        microbatch_size=2, learning_rate=1e-3, features=features).curve  # fmt: skip
        return curve

    constant, faded = train(None, 4), train(0.5, 4)
    assert constant[0]["loss"] == faded[0]["loss"] and constant[1]["loss"] == faded[1]["loss"]
    assert constant[3]["loss"] != faded[3]["loss"]
    assert ["hidden_loss" in entry for entry in faded] == [True, True, False, False]


@pytest.mark.parametrize(
    ("given", "tokens_per_parameter", "share", "guided", "fade_fraction"),
    [
        ("auto", 17.0, 0.5, True, 0.5),
        ("auto", 1.7, 0.2, True, 2.0),
        ("auto", 17.0, 0.5, False, None),
        ("none", 9.0, 0.1, True, None),
        (0.5, 1.0, 0.5, False, 0.5),
    ],
)
def test_the_smaller_a_cut_student_and_the_longer_its_training_the_sooner_feature_losses_fade(
    given, tokens_per_parameter, share, guided, fade_fraction
):
    settings = Distill(tokens=1000, features={"fade_fraction": given})
    fading = settings.fade_fraction(tokens_per_parameter, share, guided=guided)
    assert fading == (fade_fraction and pytest.approx(fade_fraction))


def test_a_fade_over_no_step_is_refused():
    model = make_model()
    with pytest.raises(UserError, match="fade_fraction 0 is not above 0"):
        FeatureLoss(Features(hidden="cosine", fade_fraction=0.0), Origin((0, 1, 2, 3)), model, model)
