"""What a dtype cannot hold is refused before anything is written in it."""

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file
from test_contents import change_weights, recipe_of

from cascade.models.architecture.dims import dims_of
from cascade.models.checkpoint.load import load_config, load_model, resolve_model, save_checkpoint
from cascade.models.checkpoint.value_range import require_computable
from cascade.planning.checks import check_family
from cascade.planning.family import resolve_family
from cascade.planning.parent import parent_config
from cascade.pruning.choose import plan_pruning
from cascade.pruning.cut_on_disk import prune_on_disk
from cascade.runtime.errors import UserError

UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"


def scaled(model, factor):
    """The same function: what one weight gains, the next one loses."""
    with torch.no_grad():
        model.get_parameter(UP).mul_(factor)
        model.get_parameter(DOWN).div_(factor)
    return model


def test_weights_that_float16_cannot_hold_are_refused_before_a_file_is_written(tmp_path):
    model = scaled(make_model("llama"), 2.0**20)
    with pytest.raises(UserError, match=rf"float16 cannot hold the weights {UP}: they reach .*65,504. Use bfloat16"):
        save_checkpoint(model, tmp_path / "out", companions=None, dtype=torch.float16)
    assert not (tmp_path / "out").exists()
    save_checkpoint(model, tmp_path / "out", companions=None, dtype=torch.bfloat16)
    assert load_file(tmp_path / "out" / "model.safetensors")[UP].isfinite().all()


def test_the_largest_number_of_float16_is_saved_as_it_is(tmp_path):
    model = make_model("llama")
    with torch.no_grad():
        model.get_parameter(UP)[0, 0] = 65_504.0
    save_checkpoint(model, tmp_path, companions=None, dtype=torch.float16)
    assert float(load_file(tmp_path / "model.safetensors")[UP][0, 0]) == 65_504.0


def test_the_plan_refuses_a_dtype_that_cannot_hold_the_parent(tmp_path):
    scaled(make_model("llama"), 2.0**20).save_pretrained(tmp_path)
    for dtype in ("float32", "bfloat16"):
        recipe = recipe_of(tmp_path, save={"dtype": dtype})
        config = parent_config(recipe)
        check_family(recipe, config, resolve_family(recipe, config))
    recipe = recipe_of(tmp_path, save={"dtype": "float16"})
    with pytest.raises(UserError, match=r"save\.dtype: .*float16 cannot hold the weights"):
        check_family(recipe, config, resolve_family(recipe, config))


def test_a_cut_on_disk_that_outgrows_its_dtype_is_refused(tmp_path):
    from cascade.pruning.importance.scores import Scores

    (tmp_path / "model").mkdir()
    make_model("llama").to(torch.float16).save_pretrained(tmp_path / "model")
    source = resolve_model(str(tmp_path / "model"))
    config = load_config(source)
    dims = dims_of(config)
    count = dims.num_hidden_layers
    scores = Scores(
        layers=torch.ones(count),
        heads=torch.ones(count, dims.num_attention_heads),
        neurons=torch.ones(count, dims.intermediate_size),
        hidden=torch.ones(dims.hidden_size),
    )
    plan = plan_pruning(scores, config, dims)
    plan.scales[DOWN] = 1e6
    with pytest.raises(UserError, match=f"cannot hold {DOWN} once it is cut"):
        prune_on_disk(source, plan, tmp_path / "cut")


def test_weights_that_fit_and_activations_that_do_not_are_refused_with_their_place(tmp_path):
    ids = {"input_ids": torch.arange(3, 15)[None]}
    usual, model = make_model("llama"), scaled(make_model("llama"), 2.0**14)
    assert all(parameter.abs().max() <= 65_504 for parameter in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(model(**ids).logits, usual(**ids).logits)
        assert not model.to(torch.float16)(**ids).logits.isfinite().all()
    assert require_computable(usual, ids, torch.float16, "x") == ""
    assert require_computable(model.float(), ids, torch.bfloat16, "x") == ""
    with pytest.raises(UserError, match=r"x: computes values of up to .* \(in model\.layers\.0\.mlp"):
        require_computable(model.float(), ids, torch.float16, "x")
    assert "float16 ends at 65,504" in require_computable(model.float(), ids, torch.float16, "x", refuse=False)


def test_a_rounded_copy_that_float16_cannot_hold_is_refused(tmp_path):
    pytest.importorskip("torchao")
    from cascade.pipeline.context import Run
    from cascade.pipeline.stage_output import Checkpoint, Made
    from cascade.pipeline.stages.quantise import make_rounded
    from cascade.recipe.schema import Finish

    scaled(make_model("llama"), 2.0**20).save_pretrained(tmp_path / "model")
    recipe = recipe_of(tmp_path / "model", save={"dtype": "float16"})
    entry = Finish.model_validate({"quantise": "int8"})
    source = resolve_model(str(tmp_path / "model"))
    with pytest.raises(UserError, match="finish: .*float16 cannot hold the weights"):
        texts = {"source": "", "tasks": "", "production": "", "data": Made(tmp_path, "")}
        run = Run(recipe=recipe, runner=None, parent=Checkpoint(source, ""), **texts)
        make_rounded(run, source, entry, tmp_path / "out", lambda *_: None)
    assert not (tmp_path / "out" / "checkpoint").exists()


def test_a_rounded_copy_of_a_parent_with_weights_that_are_rightly_not_read_is_made(tmp_path):
    pytest.importorskip("torchao")
    from cascade.models.checkpoint.quantised import load_rounded

    make_model("llama").save_pretrained(tmp_path)
    unread = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "mtp.norm.weight": torch.ones(4)}
    change_weights(tmp_path, lambda tensors: tensors | unread)
    plain = load_model(resolve_model(str(tmp_path)))
    load_rounded(tmp_path, plain, "int8", torch.float32)
    change_weights(tmp_path, lambda tensors: tensors | {"model.gate.weight": torch.ones(4)})
    with pytest.raises(UserError, match="does not read model.gate.weight"):
        load_rounded(tmp_path, plain, "int8", torch.float32)
