"""What is read from a model's folder is exactly what it holds, by every reader; else a refusal says what differs."""

import json
import logging
import shutil

import pytest
import torch
import transformers
from conftest import make_config, make_model, needs_shared
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertConfig, LlamaForCausalLM

from cascade.models.architecture.dims import dims_of
from cascade.models.architecture.model_class import as_classifier
from cascade.models.checkpoint.load import (
    ModelSource,
    check_weights,
    load_config,
    load_model,
    load_with_new_head,
    resolve_model,
    stored_dtype,
)
from cascade.models.checkpoint.loading_messages import tell_once
from cascade.planning.parent import parent_config
from cascade.pruning.choose import plan_pruning
from cascade.pruning.cut_on_disk import prune_on_disk
from cascade.pruning.importance.offload import offloaded
from cascade.pruning.importance.scores import Scores
from cascade.recipe.schema import Recipe
from cascade.runtime.errors import UserError

LAYERS = 3


@pytest.fixture
def folder(tmp_path):
    make_model("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def tied_folder(tmp_path):
    make_model("llama", tied=True).save_pretrained(tmp_path / "tied")
    return tmp_path / "tied"


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", {"format": "pt"})


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def in_shards(folder, change=lambda value: value):
    """The same weights, or changed ones, in two shards with their index."""
    tensors = {name: change(value).clone() for name, value in load_file(folder / "model.safetensors").items()}
    names, places = sorted(tensors), {}
    for number, part in enumerate((names[:9], names[9:]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def recipe_of(parent, **more):
    members = more.pop("members", [{"name": "half", "target": {"params": 0.5}}])
    values = {"name": "x", "parent": str(parent), "data": {"source": "stdlib", "block_size": 16}, "members": members}
    return Recipe.model_validate(values | {"distill": {"tokens": 64}} | more)


def on_disk(folder):
    source = resolve_model(str(folder))
    config = load_config(source)
    dims = dims_of(config)
    scores = Scores(
        layers=torch.ones(dims.num_hidden_layers),
        heads=torch.ones(dims.num_hidden_layers, dims.num_attention_heads),
        neurons=torch.ones(dims.num_hidden_layers, dims.intermediate_size),
        hidden=torch.ones(dims.hidden_size),
    )
    prune_on_disk(source, plan_pruning(scores, config, dims), folder.parent / "cut")
    return load_model(ModelSource(folder.parent / "cut", "cut"))


def layer_by_layer(folder):
    with offloaded(resolve_model(str(folder)), torch.device("cpu")):
        pass


def under_a_new_head(folder):
    source = resolve_model(str(folder))
    return load_with_new_head(source, as_classifier(load_config(source), "text_classification", ["a", "b"], "x"))


READERS = {
    "memory": lambda folder: load_model(resolve_model(str(folder))),
    "disk": on_disk,
    "offload": layer_by_layer,
    "plan": lambda folder: parent_config(recipe_of(folder)),
    "new head": under_a_new_head,
}


@pytest.fixture(params=READERS)
def read(request):
    return READERS[request.param]


def test_a_whole_checkpoint_is_read_by_every_reader(folder, tied_folder, read):
    read(folder)
    read(tied_folder)


def test_weights_that_the_architecture_does_not_read_are_refused(folder, read):
    change_weights(folder, lambda tensors: tensors | {"model.layers.0.self_attn.gate.weight": torch.ones(3)})
    with pytest.raises(UserError, match=r"does not read model\.layers\.0\.self_attn\.gate\.weight"):
        read(folder)


def test_weights_that_the_file_lacks_are_refused(folder, read):
    change_weights(folder, lambda tensors: {name: value for name, value in tensors.items() if "1.mlp.up" not in name})
    with pytest.raises(UserError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        read(folder)


def test_weights_of_another_shape_are_refused(folder, read):
    change_weights(folder, lambda tensors: tensors | {"model.norm.weight": torch.ones(47)})
    with pytest.raises(UserError, match=r"model\.norm\.weight \(47,\) where config\.json asks for \(48,\)"):
        read(folder)


def test_a_config_of_fewer_layers_than_the_weights_is_refused_with_both_numbers(folder, read):
    change_config(folder, num_hidden_layers=LAYERS - 1)
    with pytest.raises(UserError, match="num_hidden_layers: 2, the weights have 3 layers"):
        read(folder)


def test_a_head_that_is_tied_in_the_config_and_differs_in_the_file_is_refused(tied_folder, read):
    change_weights(tied_folder, lambda t: t | {"lm_head.weight": 2 * t["model.embed_tokens.weight"]})
    with pytest.raises(UserError, match="ties 'lm_head.weight' to 'model.embed_tokens.weight', and the weights hold"):
        if read is under_a_new_head:  # there is no second head to tie: it is one of another task
            load_model(resolve_model(str(tied_folder)))
        read(tied_folder)


def test_a_copy_of_the_embedding_as_the_head_is_told_and_read(tied_folder, caplog):
    change_weights(tied_folder, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    tell_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        model = READERS["memory"](tied_folder)
    assert "equal copies of tied weights: lm_head.weight" in caplog.text
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(on_disk(tied_folder).lm_head.weight, model.lm_head.weight)


def test_a_tied_weight_that_is_stored_under_the_heads_name_alone_is_read_by_every_reader(tied_folder, read):
    before = load_file(tied_folder / "model.safetensors")["model.embed_tokens.weight"]
    change_weights(
        tied_folder, lambda t: {n.replace("model.embed_tokens.weight", "lm_head.weight"): v for n, v in t.items()}
    )
    if read is under_a_new_head:
        with pytest.raises(UserError, match=r"lacks model\.embed_tokens\.weight"):
            read(tied_folder)
        return
    model = read(tied_folder)
    if isinstance(model, LlamaForCausalLM):
        assert torch.equal(model.model.embed_tokens.weight, before)


@pytest.mark.parametrize("left", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_left_in_the_folder_is_refused_with_what_to_do(folder, read, left):
    (folder / left).write_bytes(b"{}" if left.endswith("json") else (folder / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"holds an adapter .*merged.*move these files elsewhere.*merge_and_unload"):
        read(folder)


def test_an_adapter_without_a_model_is_refused_as_one(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds an adapter"):
        resolve_model(str(tmp_path))


def test_one_file_beside_other_shards_is_refused(folder, read):
    in_shards(folder, lambda value: 2 * value)
    with pytest.raises(UserError, match=r"two sets of weights, model\.safetensors and model-00001-of-00002"):
        read(folder)


def test_one_file_beside_equal_shards_is_read(folder, read):
    in_shards(folder)
    read(folder)


def test_one_file_beside_shards_without_an_index_is_refused(folder, read):
    in_shards(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match="two sets of weights"):
        read(folder)


def test_shards_that_the_index_does_not_name_are_refused(folder, read):
    in_shards(folder)
    (folder / "model.safetensors").rename(folder / "model-00003-of-00003.safetensors")
    with pytest.raises(UserError, match=r"model-00003-of-00003\.safetensors: not named by model\.safetensors\.index"):
        read(folder)


def test_shards_without_an_index_and_without_one_file_are_refused(folder, read):
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    with pytest.raises(UserError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        read(folder)


def test_a_distributed_checkpoint_beside_the_weights_is_refused(folder, read):
    shutil.copy(folder / "model.safetensors", folder / "shard-00001-model-00001-of-00001.safetensors")
    with pytest.raises(UserError, match="part of a distributed checkpoint"):
        read(folder)


def test_a_copy_in_another_format_beside_the_weights_is_not_read(folder, read):
    save_file({"tok_embeddings.weight": torch.ones(2)}, folder / "consolidated.safetensors")
    read(folder)


def test_two_names_of_one_weight_are_refused(tmp_path):
    config = make_config("llama")
    AutoModel.from_config(config).save_pretrained(tmp_path)
    change_config(tmp_path, architectures=["LlamaModel"])
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"model.norm.weight": torch.ones(48)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="are both the weights of 'norm.weight'"):
        load_model(resolve_model(str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "shape", "told"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (4,), "computed from config.json"),
        ("mtp.layers.0.mlp.up_proj.weight", (4, 4), "predict more than one token"),
        ("model.mtp_layers.0.norm.weight", (4,), "predict more than one token"),
        ("score.weight", (2, 48), "a head of another task"),
    ],
)
def test_what_a_model_rightly_does_not_read_is_told_by_name(folder, read, name, shape, told, caplog):
    change_weights(folder, lambda tensors: tensors | {name: torch.ones(shape)})
    tell_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        read(folder)
    if not (read is under_a_new_head and name == "score.weight"):  # there it is the head
        assert f"{told}: {name}" in caplog.text


def test_layers_that_predict_further_tokens_are_told_and_others_refused(folder, caplog):
    extra = {f"model.layers.{LAYERS}.mlp.up_proj.weight": torch.ones(4, 4)}
    change_weights(folder, lambda tensors: tensors | extra)
    with pytest.raises(UserError, match="the weights have 4 layers"):
        load_model(resolve_model(str(folder)))
    change_config(folder, num_nextn_predict_layers=1)
    with caplog.at_level(logging.WARNING):
        load_model(resolve_model(str(folder)))
    assert "predict more than one token" in caplog.text


def test_causal_masks_that_old_gpt2_files_hold_are_told_and_read_over(tmp_path, caplog):
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    masks = {f"transformer.h.{n}.attn.bias": torch.ones(1, 1, 32, 32) for n in range(2)}
    masks |= {f"transformer.h.{n}.attn.masked_bias": torch.tensor(-1e4) for n in range(2)}
    change_weights(tmp_path, lambda tensors: tensors | masks)
    tell_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        load_model(resolve_model(str(tmp_path)))
    assert "transformer.h.0.attn.bias" in caplog.text


def bert(folder, kind="BertForMaskedLM", **changes):
    config = BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        **changes,
    )
    getattr(transformers, kind)(config).save_pretrained(folder)
    return folder


def test_the_head_of_a_masked_language_model_is_told_where_the_body_alone_is_read(tmp_path, caplog):
    bert(tmp_path)
    change_config(tmp_path, architectures=["BertModel"])
    tell_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        model = load_model(resolve_model(str(tmp_path)))
    assert "a head of another task: cls.predictions" in caplog.text
    assert "an absent pooler, whose weights are random: pooler.dense" in caplog.text
    stored = load_file(tmp_path / "model.safetensors")["bert.embeddings.word_embeddings.weight"]
    assert torch.equal(model.embeddings.word_embeddings.weight, stored)


def test_a_classifier_without_its_pooler_or_its_head_is_refused(tmp_path):
    bert(tmp_path)
    change_config(tmp_path, architectures=["BertForSequenceClassification"])
    with pytest.raises(UserError, match=r"lacks bert\.pooler\.dense\.bias, .*classifier\.weight"):
        load_model(resolve_model(str(tmp_path)))


def test_a_body_of_another_width_is_refused_under_a_new_head(folder):
    change_config(folder, intermediate_size=44)
    with pytest.raises(UserError, match=r"mlp\.\w+\.weight .* where config\.json asks for"):
        under_a_new_head(folder)


def test_a_given_student_is_looked_through_by_the_plan(folder, tmp_path):
    from cascade.planning.family import resolve_family

    make_model("llama").save_pretrained(tmp_path / "student")
    change_config(tmp_path / "student", num_hidden_layers=2)
    recipe = recipe_of(folder, members=[{"name": "small", "student": str(tmp_path / "student")}])
    with pytest.raises(UserError, match=r"student: .*the weights have 3 layers"):
        resolve_family(recipe, parent_config(recipe))


def test_a_warning_of_the_library_is_told_however_quiet_it_is_set(folder, caplog):
    from transformers.utils import logging as library

    before = library.get_verbosity()
    library.set_verbosity_error()
    change_config(folder, num_nextn_predict_layers=1)
    tell_once.cache_clear()
    try:
        from cascade.models.checkpoint.loading_messages import relay_warnings

        with caplog.at_level(logging.WARNING), relay_warnings("here"):
            library.get_logger("transformers.modeling_utils").warning("weights are not what they seem")
        assert "here: transformers: weights are not what they seem" in caplog.text
        assert library.get_verbosity() == logging.ERROR
    finally:
        library.set_verbosity(before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_dtype_is_that_of_the_weights_whatever_the_config_says(folder, dtype):
    change_weights(folder, lambda tensors: {name: value.to(dtype) for name, value in tensors.items()})
    for said in (None, "float32", "bfloat16"):
        change_config(folder, dtype=said)
        assert stored_dtype(resolve_model(str(folder))) == dtype
        assert parent_config(recipe_of(folder)).dtype == dtype


def test_the_dtype_is_that_of_most_bytes(folder):
    change_weights(folder, lambda t: {n: v if "norm" in n else v.to(torch.bfloat16) for n, v in t.items()})
    assert stored_dtype(resolve_model(str(folder))) == torch.bfloat16


@needs_shared
def test_a_real_checkpoint_has_nothing_to_be_told():
    from conftest import SHARED

    source = resolve_model(str(SHARED / "models" / "stories260K"))
    match = check_weights(source, load_config(source))
    assert match.notes == () and len(match.stored) == 47


def test_buffers_with_values_of_their_own_are_read_in_memory_and_refused_from_disk(tmp_path):
    config = transformers.ApertusConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    transformers.ApertusForCausalLM(config).save_pretrained(tmp_path / "model")
    name = "model.layers.1.mlp.act_fn.beta"
    change_weights(tmp_path / "model", lambda tensors: tensors | {name: torch.full_like(tensors[name], 0.25)})
    assert float(load_model(resolve_model(str(tmp_path / "model"))).state_dict()[name]) == 0.25
    for reader in (on_disk, layer_by_layer):
        with pytest.raises(UserError, match="is no parameter of ApertusForCausalLM that can be read from disk"):
            reader(tmp_path / "model")


def test_names_of_older_versions_are_read_as_the_library_renames_them(tmp_path):
    from cascade.models.architecture.axes import probe_axes
    from cascade.models.checkpoint.stored_names import stored_parameters

    bert(tmp_path)
    before = load_file(tmp_path / "model.safetensors")
    change_weights(
        tmp_path,
        lambda t: {
            n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v + 1
            for n, v in t.items()
        },
    )
    source = resolve_model(str(tmp_path))
    config = load_config(source)
    in_memory = load_model(source).state_dict()
    from_disk = stored_parameters(config, probe_axes(config), source)
    norm = "bert.encoder.layer.1.output.LayerNorm.weight"
    assert from_disk[norm][0] == norm.replace("weight", "gamma")
    assert all(torch.equal(entry.read(), in_memory[name]) for name, (_, entry) in from_disk.items())
    assert torch.equal(in_memory[norm], before[norm] + 1)
