"""How many tokens a model can read: its config's positions, less those that its numbering leaves out."""

import pytest
import torch
from conftest import make_blocks
from transformers import (
    BertConfig,
    CamembertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    MPNetConfig,
    OPTConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

from cascade.distillation.on_policy import generate
from cascade.distillation.options import OnPolicy
from cascade.models.architecture.model_class import model_from_config
from cascade.models.architecture.positions import require_context, usable_context
from cascade.runtime.errors import UserError

SIZE = {"vocab_size": 90, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
GPT2 = {"vocab_size": 90, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
OPT = {"vocab_size": 90, "hidden_size": 16, "word_embed_proj_dim": 16, "num_hidden_layers": 1}
DISTIL = {"vocab_size": 90, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16}


def of(architecture, config_class, positions, **values):
    config = config_class(**values, max_position_embeddings=positions)
    config.architectures = [architecture]
    return config


CASES = {
    "roberta": (of("RobertaForMaskedLM", RobertaConfig, 26, **SIZE, pad_token_id=1), 24),
    "roberta, padding 0": (of("RobertaForMaskedLM", RobertaConfig, 26, **SIZE, pad_token_id=0), 25),
    "roberta, padding 9": (of("RobertaForSequenceClassification", RobertaConfig, 26, **SIZE, pad_token_id=9), 16),
    "roberta, padding 70": (of("RobertaForMaskedLM", RobertaConfig, 90, **SIZE, pad_token_id=70), 19),
    "roberta as decoder": (of("RobertaForCausalLM", RobertaConfig, 26, **SIZE, pad_token_id=1, is_decoder=True), 24),
    "xlm-roberta": (of("XLMRobertaForMaskedLM", XLMRobertaConfig, 26, **SIZE, pad_token_id=1), 24),
    "camembert": (of("CamembertModel", CamembertConfig, 26, **SIZE, pad_token_id=1), 24),
    "mpnet": (of("MPNetForMaskedLM", MPNetConfig, 26, **SIZE, pad_token_id=1), 24),
    "bert": (of("BertForMaskedLM", BertConfig, 26, **SIZE), 26),
    "distilbert": (of("DistilBertForMaskedLM", DistilBertConfig, 26, **DISTIL), 26),
    "opt": (of("OPTForCausalLM", OPTConfig, 26, **OPT, num_attention_heads=2, ffn_dim=16), 26),
    "gpt2": (of("GPT2LMHeadModel", GPT2Config, 26, **GPT2), 26),
    "llama": (of("LlamaForCausalLM", LlamaConfig, 26, **SIZE), 26),
}


@pytest.mark.parametrize("name", CASES)
def test_a_model_reads_its_usable_context_and_where_places_are_looked_up_not_a_token_more(name):
    config, expected = CASES[name]
    assert usable_context(config) == expected
    torch.manual_seed(0)
    model = model_from_config(config).eval()
    with torch.no_grad():
        model(input_ids=torch.full((1, expected), 4))
        if name != "llama":  # rotary positions go on, untrained
            with pytest.raises((IndexError, RuntimeError, ValueError)):
                model(input_ids=torch.full((1, expected + 1), 4))


def test_a_context_is_refused_with_whose_it_is_and_why_it_is_shorter_than_the_config_says():
    config = CASES["roberta"][0]
    require_context(config, 24, "data.block_size")
    with pytest.raises(UserError, match=r"data.block_size: 25 is longer than the member s's context of 24 tokens "
                                        r"\(of its 26 positions the first 2 are never used\)"):  # fmt: skip
        require_context(config, 25, "data.block_size", "member s")
    with pytest.raises(UserError, match=r"27 is longer than the parent's context of 26 tokens$"):
        require_context(CASES["bert"][0], 27, "data.block_size")


def test_a_decoder_that_numbers_places_from_its_padding_writes_no_further_than_it_can_read():
    config = CASES["roberta as decoder"][0]
    torch.manual_seed(0)
    model = model_from_config(config).eval()
    written = generate(model, make_blocks(2, size=24), OnPolicy(1.0, prompt_tokens=24, max_new_tokens=8))
    assert written.input_ids.shape[1] <= 24


def test_the_members_own_context_counts_beside_the_parents(tmp_path, tiny_parent, recipe_folder):
    from cascade.planning.preview import preview
    from cascade.recipe.load import load_recipe

    student = "members=[{name: short, config: {model_type: gpt2, n_embd: 16, n_layer: 1, n_head: 2, n_positions: 24}}]"
    recipe = load_recipe(recipe_folder / "tiny.yaml", [student, "baselines=[]"])
    with pytest.raises(UserError, match="32 is longer than the member short's context of 24 tokens"):
        preview(recipe, tmp_path / "out")
