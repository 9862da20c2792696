"""No member that is cut has more than its parent has, in any measure and any dim, as the parent is."""

import pytest
from click.testing import CliRunner
from conftest import make_config, make_model

from cascade.cli.main import main
from cascade.models.architecture.axes import probe_axes
from cascade.models.architecture.sized import Sized
from cascade.planning.family import resolve_family, score_for_dims
from cascade.planning.parent import parent_config
from cascade.planning.preview import preview
from cascade.planning.preview_text import preview_text
from cascade.pruning.choose import plan_pruning
from cascade.pruning.importance.scores import score_importance
from cascade.pruning.importance.statistics import collect_statistics
from cascade.pruning.plan import config_of
from cascade.pruning.rotation import untied
from cascade.pruning.size.latency import DecodeLatency
from cascade.pruning.size.shape import diverse_shapes, solve_shape
from cascade.pruning.size.target import MEASURES, Target
from cascade.recipe.load import load_recipe
from cascade.runtime.errors import UserError

TIED = make_config("llama", tied=True, vocab_size=512)
PARENT = Sized(TIED)
WHOLE = PARENT.num_parameters


def test_a_number_between_the_parents_and_the_untied_parents_is_refused():
    assert Sized(untied(TIED)).num_parameters > 1.2 * WHOLE
    for config in (TIED, untied(TIED)):
        with pytest.raises(UserError, match=rf"{WHOLE + 2000:,} parameters is larger than the parent's {WHOLE:,}"):
            solve_shape(config, Target(params=WHOLE + 2000), parent=TIED)


@pytest.mark.parametrize("name", sorted(set(MEASURES) - {"decode_ms"}))
def test_any_bound_above_the_parents_is_refused_also_beside_one_that_binds(name):
    whole = float(MEASURES[name](PARENT.axes, PARENT.dims, Target()))
    for bounds in ({name: 1.01 * whole}, {"params": 0.5} | {name: 1.01 * whole}):
        with pytest.raises(UserError, match="is larger than the parent's"):
            solve_shape(untied(TIED), Target(**bounds), parent=TIED)


def test_a_time_above_the_parents_is_refused():
    latency = DecodeLatency(16, 1, (0.0, 1.0, 0.0, 0.0), ((PARENT.dims.as_dict(), 3.0),), "cpu", 1)
    with pytest.raises(UserError, match="is larger than the parent's 3"):
        solve_shape(TIED, Target(decode_ms=3.2, context=16, latency=latency), parent=TIED)


@pytest.mark.parametrize("dims", [{"num_hidden_layers": 4}, {"hidden_size": 64}, {"num_attention_heads": 16}])
def test_any_dim_above_the_parents_is_refused(dims):
    with pytest.raises(UserError, match="is not between 1 and the seed's"):
        solve_shape(TIED, Target(dims=dims), parent=TIED)


def test_bounds_that_do_not_count_the_head_still_give_no_larger_member():
    small = make_config("llama", tied=True, vocab_size=64)
    axes, whole = probe_axes(untied(small)), Sized(small).num_parameters
    for bounds in ({"flops_per_token": 0.95}, {"params_non_embedding": 0.95}):
        shapes = diverse_shapes(untied(small), Target(**bounds), parent=small, count=20)
        assert shapes and all(axes.num_parameters(one) <= whole for one in shapes)
    free = diverse_shapes(untied(small), Target(params_non_embedding=0.97), count=20)
    assert any(axes.num_parameters(one) > whole for one in free)  # without that they were larger
    with pytest.raises(UserError, match=r"every shape of .* has more parameters than the parent's .*activation_norm"):
        large = make_config("llama", tied=True, vocab_size=4096)
        solve_shape(untied(large), Target(flops_per_token=0.95), parent=large)


def test_explicit_dims_are_rotated_only_where_that_makes_nothing_larger():
    small = make_config("llama", tied=True, vocab_size=16)  # whose embeddings are a small part of it
    assert score_for_dims("auto", Target(dims={"hidden_size": 24}), small, small) == "pca"
    assert score_for_dims("auto", Target(dims={"hidden_size": 48}), small, small) == "activation_norm"


def test_a_share_is_of_the_model_as_it_is_also_where_its_cut_has_a_head_of_its_own():
    from conftest import make_blocks

    model = make_model(tied=True, vocab_size=64)
    statistics = collect_statistics(model, make_blocks(8), covariance_blocks=4)
    plan = plan_pruning(
        score_importance(statistics, hidden="pca"), model.config, Target(params=0.9), statistics=statistics
    )
    whole = Sized(model.config).num_parameters
    assert Sized(config_of(plan)).num_parameters <= 0.9 * whole


def test_the_plan_refuses_what_would_be_larger_and_makes_nothing_larger(recipe_folder):
    parent = parent_config(load_recipe(recipe_folder / "tiny.yaml"))
    whole = Sized(parent).num_parameters
    command = ["plan", str(recipe_folder / "tiny.yaml"), "--set", f"members.0.target.params={whole + 1000}"]
    for more in ([], ["--set", "prune.hidden=pca"], ["--set", "prune.hidden=activation_norm"]):
        result = CliRunner().invoke(main, [*command, *more])
        assert result.exit_code == 2 and "members: big: target of" in result.output
        assert f"is larger than the parent's {whole:,}" in result.output
    for hidden in ("auto", "activation_norm"):
        changes = [f"prune.hidden={hidden}", "members=[{name: m, target: {flops_per_token: 0.9}}]"]
        (member,) = resolve_family(load_recipe(recipe_folder / "tiny.yaml", changes), parent)
        assert member.sized.num_parameters <= whole


def test_dims_that_are_asked_for_rotated_are_made_so_and_the_plan_says_that_they_are_larger(recipe_folder, tmp_path):
    changes = ["members=[{name: m, target: {dims: {hidden_size: 32}}}]", "baselines=[]"]
    told = preview(load_recipe(recipe_folder / "tiny.yaml", [*changes, "prune.hidden=pca"]), tmp_path / "run")
    assert told["members"][0]["fraction_of_parent"] > 1
    assert "m has 119% of its teacher's parameters though it is cut: prune.hidden: pca" in preview_text(told)
    plain = preview(load_recipe(recipe_folder / "tiny.yaml", changes), tmp_path / "run")
    assert plain["members"][0]["fraction_of_parent"] < 1 and "though it is cut" not in preview_text(plain)
