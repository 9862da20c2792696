"""The plan says when the losses of distill.features have faded: the number that the training goes by."""

import pytest

from cascade.models.architecture.model_class import model_from_config
from cascade.pipeline.stages.training import feature_loss
from cascade.planning.fading import fade_fraction_of
from cascade.planning.family import resolve_family
from cascade.planning.parent import parent_config
from cascade.planning.preview import preview
from cascade.planning.preview_text import preview_text
from cascade.pruning.choose import plan_pruning
from cascade.pruning.proof import random_scores
from cascade.recipe.load import load_recipe


@pytest.fixture
def recipe(recipe_folder):
    return lambda *changes: load_recipe(recipe_folder / "tiny.yaml", ["baselines=[]", *changes])


def test_the_plans_fade_fraction_is_the_one_that_the_training_computes(recipe):
    tiny = recipe("distill.tokens=100_000")
    parent = model_from_config(parent_config(tiny))
    members = resolve_family(tiny, parent.config)
    by_name = {member.name: member for member in members}
    for member in members:
        student = model_from_config(member.sized.config)
        plans = [plan_pruning(random_scores(parent), parent.config, member.sized.dims)]
        trained = feature_loss(tiny, plans, student, parent, member.num_tokens).features.fade_fraction
        assert fade_fraction_of(tiny, member, by_name) == pytest.approx(trained, rel=1e-12)
    sooner = [fade_fraction_of(tiny, member, by_name) for member in members]
    assert sooner[0] > sooner[1]  # the smaller one's fade first


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ([], ["big", "small"]),
        (["distill.features.fade_fraction=none"], []),
        (["distill.features.hidden=none"], []),
        (["members.1={name: small, init: random, config: {model_type: llama, hidden_size: 48, intermediate_size: 32,"
          " num_hidden_layers: 3, num_attention_heads: 4, num_key_value_heads: 2}}"], ["big"]),
    ],
)  # fmt: skip
def test_only_losses_of_members_that_are_cut_fade_by_themselves(recipe, changes, names):
    tiny = recipe(*changes)
    members = resolve_family(tiny, parent_config(tiny))
    by_name = {member.name: member for member in members}
    assert [name for name in by_name if fade_fraction_of(tiny, by_name[name], by_name) is not None] == names


def test_the_plan_says_after_how_many_steps_nothing_is_left_or_how_much_at_the_end(recipe, tmp_path):
    plan = preview(recipe("distill.features.fade_fraction=0.3"), tmp_path / "run")
    assert plan["features_fade"] == {"setting": 0.3, "members": {"big": 0.3, "small": 0.3}}
    line = (
        "The weight of the feature losses falls evenly from the first step on (distill.features.fade_fraction: 0.3): "
        "of big's nothing is left after 2 of 4 steps, of small's nothing is left after 2 of 4 steps."
    )
    assert line in preview_text(plan).split("\n")
    plan["features_fade"] = {"setting": "auto", "members": {"big": 4.0}}
    assert "fade_fraction: auto): of big's 75% is left at the end." in preview_text(plan)
    plan["features_fade"] = {"setting": "none", "members": {}}
    assert "feature losses" not in preview_text(plan)
