"""A GGUF file is read whole, or refused with what it lacks."""

import pytest
import torch
from conftest import make_model

from cascade.models.checkpoint.load import load_config, load_model, resolve_model
from cascade.runtime.errors import UserError

gguf = pytest.importorskip("gguf", reason="reading GGUF needs the gguf package")

NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def permuted(weight, heads):
    """Rows of queries and keys in the order of the GGUF format: halves of a head interleaved."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def tensors_of(model):
    tensors = {
        "token_embd.weight": model.model.embed_tokens.weight,
        "output_norm.weight": model.model.norm.weight,
        "output.weight": model.lm_head.weight,
    }
    for number, layer in enumerate(model.model.layers):
        for name, place in NAMES.items():
            weight = layer.get_submodule(place).weight
            heads = {"attn_q": 8, "attn_k": 2}.get(name)
            tensors[f"blk.{number}.{name}.weight"] = permuted(weight, heads) if heads else weight
    return tensors


def write(path, model, change=lambda tensors: tensors, *, parts=None):
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if parts:
        writer.add_uint16("split.count", parts)
    for name, value in change(tensors_of(model)).items():
        writer.add_tensor(name, value.detach().float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return resolve_model(str(path))


def test_every_value_of_a_whole_file_is_read(tmp_path):
    model = make_model("llama", hidden_size=64)
    loaded = load_model(write(tmp_path / "a.gguf", model))
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lost", ["blk.1.ffn_up.weight", "token_embd.weight", "output_norm.weight"])
def test_a_file_that_lacks_a_tensor_is_refused(tmp_path, lost):
    source = write(
        tmp_path / "a.gguf",
        make_model("llama", hidden_size=64),
        lambda tensors: {name: value for name, value in tensors.items() if name != lost},
    )
    with pytest.raises(UserError, match=f"the file lacks {lost}"):
        load_model(source)


@pytest.mark.parametrize("extra", ["blk.3.ffn_up.weight", "blk.0.attn_q.bias", "rope_freqs.weight"])
def test_a_file_with_a_tensor_that_the_model_does_not_read_is_refused(tmp_path, extra):
    model = make_model("llama", hidden_size=64)
    source = write(tmp_path / "a.gguf", model, lambda tensors: tensors | {extra: torch.full((4,), 2.0)})
    with pytest.raises(UserError, match=f"the model does not read {extra}"):
        load_model(source)


def test_rotary_scales_that_are_all_one_are_read_over(tmp_path):
    model = make_model("llama", hidden_size=64)
    load_model(write(tmp_path / "a.gguf", model, lambda tensors: tensors | {"rope_freqs.weight": torch.ones(4)}))


def test_one_part_of_several_is_refused_by_its_name_and_by_its_own_count(tmp_path):
    model = make_model("llama", hidden_size=64)
    named = write(tmp_path / "a-00001-of-00003.gguf", model)
    counted = write(tmp_path / "b.gguf", model, parts=2)
    for source, count in ((named, 3), (counted, 2)):
        with pytest.raises(UserError, match=f"one part of a model in {count} GGUF files; join them first"):
            load_model(source)


def test_the_plan_refuses_an_incomplete_file_from_its_header(tmp_path):
    from test_contents import recipe_of

    from cascade.planning.parent import parent_config

    model = make_model("llama", hidden_size=64)
    whole = write(tmp_path / "whole.gguf", model)
    assert parent_config(recipe_of(tmp_path / "whole.gguf")).num_hidden_layers == load_config(whole).num_hidden_layers
    write(tmp_path / "a.gguf", model, lambda t: {n: v for n, v in t.items() if not n.startswith("blk.2.ffn")})
    with pytest.raises(UserError, match=r"lacks blk\.2\.ffn_down"):
        parent_config(recipe_of(tmp_path / "a.gguf"))
