"""A member's config.json says to older readers what it says to this transformers; a nightly reads members with one."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import AutoConfig

from cascade.models.architecture.dims import config_with_dims, dims_of
from cascade.models.architecture.model_class import model_from_config
from cascade.models.architecture.twin import twin_of
from cascade.models.checkpoint.load import ModelSource, load_config, save_checkpoint
from cascade.models.checkpoint.loading_messages import tell_once
from cascade.models.checkpoint.older_keys import READ_BY, add_older_keys

OLDEST = READ_BY.split()[1]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 500_000.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e6}
FACTORS = [1.0, 1.5, 2.0, 3.0]
SMALL = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def small(kind, **changes):
    return getattr(transformers, f"{kind}Config")(**(SMALL | changes))


CONFIGS = {
    "plain": (lambda: small("Llama", rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}),
              {"rope_theta": 500_000.0}),
    "llama3": (lambda: small("Llama", rope_parameters=dict(LLAMA3)),
               {"rope_theta": 500_000.0, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}}),
    "linear": (lambda: small("Llama", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
               {"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "yarn": (lambda: small("Qwen3", head_dim=8, rope_parameters=dict(YARN)),
             {"rope_theta": 1e6, "rope_scaling": {k: v for k, v in YARN.items() if k != "rope_theta"}}),
    "gemma3": (lambda: small("Gemma3Text", head_dim=8, sliding_window=8, rope_parameters={
                   "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                   "sliding_attention": {"rope_type": "default", "rope_theta": 2e4}}),
               {"rope_theta": 1e6, "rope_local_base_freq": 2e4, "sliding_window_pattern": 6,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "qwen2 windows": (lambda: small("Qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=2,
                                    rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
                      {"rope_theta": 1e6, "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2}),
    "phi3 longrope": (lambda: small("Phi3", hidden_size=32, num_key_value_heads=4,
                                    original_max_position_embeddings=64, rope_parameters={
                          "rope_type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS[::-1],
                          "rope_theta": 3e4}),
                      {"rope_theta": 3e4, "original_max_position_embeddings": 64,
                       "rope_scaling": {"type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS[::-1]}}),
    "gpt_neox": (lambda: transformers.GPTNeoXConfig(
                     vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                     rope_parameters={"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.5}),
                 {"rotary_emb_base": 2e4, "rotary_pct": 0.5}),
    "gemma2": (lambda: small("Gemma2", head_dim=8, sliding_window=8,
                             rope_parameters={"rope_type": "default", "rope_theta": 5e4}), {"rope_theta": 5e4}),
    "olmo2": (lambda: small("Olmo2", rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
              {"rope_theta": 5e5}),
    "stablelm": (lambda: small("StableLm", rope_parameters={
                     "rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.5}),
                 {"rope_theta": 2e4, "partial_rotary_factor": 0.5}),
    "mistral window": (lambda: small("Mistral", head_dim=8, sliding_window=8), {"sliding_window": 8}),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_the_keys_of_older_readers_stand_beside_the_new_ones_which_read_the_same(name, tmp_path, caplog):
    build, expected = CONFIGS[name]
    config = build()
    config.dtype = torch.bfloat16
    config.save_pretrained(tmp_path)
    before = AutoConfig.from_pretrained(tmp_path).to_dict()
    assert before["rope_parameters"] == json.loads(config.to_json_string())["rope_parameters"]
    add_older_keys(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {key: written.get(key) for key in expected} == expected
    assert written["torch_dtype"] == "bfloat16"
    after = AutoConfig.from_pretrained(tmp_path).to_dict()
    after["rope_parameters"].pop("type", None)  # phi3's older name of rope_type, which its older class asks for
    assert {key: after[key] for key in before} == before
    tell_once.cache_clear()
    load_config(ModelSource(tmp_path, "here"))
    assert not caplog.records  # the older keys bring no warnings of the library's


def test_a_cut_config_says_which_layers_have_windows_by_every_key(tmp_path):
    config = CONFIGS["qwen2 windows"][0]()
    cut = config_with_dims(config, dims_of(config).replace(num_hidden_layers=4), kept_layers=[0, 3, 4, 6])
    assert cut.layer_types == ["full_attention", *["sliding_attention"] * 3]
    assert cut.max_window_layers == 1
    gemma = CONFIGS["gemma3"][0]()
    gemma.sliding_window_pattern = 6  # as Google's own config.json says
    for kept, pattern in (([0, 1, 2, 3, 4, 5], 6), ([3, 4, 5], 3), ([0, 5, 6], 2), ([5, 6], None)):
        cut = config_with_dims(gemma, dims_of(gemma).replace(num_hidden_layers=len(kept)), kept_layers=kept)
        cut.save_pretrained(tmp_path)
        add_older_keys(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text()).get("sliding_window_pattern") == pattern


def test_every_way_to_write_a_checkpoint_writes_the_older_keys(tmp_path):
    from test_contents import on_disk

    model = twin_of(CONFIGS["plain"][0]())
    save_checkpoint(model, tmp_path / "model", companions=None, dtype=torch.float16)
    on_disk(tmp_path / "model")
    for folder in ("model", "cut"):
        written = json.loads((tmp_path / folder / "config.json").read_text())
        assert (written["rope_theta"], written["torch_dtype"], written["dtype"]) == (500_000.0, "float16", "float16")


READ = """
import sys, torch, transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval().float()
    with torch.no_grad():
        logits = model(input_ids=torch.arange(3, 51)[None]).logits
    save_file({"logits": logits.contiguous()}, folder + "/older.safetensors")
print(transformers.__version__)
"""


@pytest.fixture(scope="module")
def older_transformers(tmp_path_factory):
    """A folder with the oldest transformers that cards name, and what it needs of its own time."""
    folder = tmp_path_factory.mktemp("older")
    packages = [f"transformers=={OLDEST}.*", "tokenizers==0.21.*", "huggingface_hub==0.34.*"]
    made = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *packages],
        capture_output=True,
        text=True,
        timeout=600,
    )
    if made.returncode:
        pytest.skip(f"pip cannot install transformers {OLDEST}: {made.stderr.strip().splitlines()[-1:]}")
    return folder


@pytest.mark.nightly
def test_members_read_by_the_oldest_transformers_that_the_card_names_give_the_same_logits(older_transformers, tmp_path):
    models = {}
    for name, (build, _) in CONFIGS.items():
        config = build()
        config._attn_implementation = "eager"
        config.initializer_range = 0.3  # so that positions tell
        torch.manual_seed(0)
        models[name] = model_from_config(config).eval()
        save_checkpoint(models[name], tmp_path / name, companions=None, dtype=torch.float32)
    folders = [str(tmp_path / name) for name in models]
    done = subprocess.run(
        [sys.executable, "-c", READ, *folders],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": str(older_transformers)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().startswith(OLDEST)
    from safetensors.torch import load_file

    differing = {}
    for name, model in models.items():
        with torch.no_grad():
            logits = model(input_ids=torch.arange(3, 51)[None]).logits
        older = load_file(tmp_path / name / "older.safetensors")["logits"]
        difference = float((logits - older).abs().max() / logits.abs().max())
        if not difference <= 1e-5:
            differing[name] = difference
    assert not differing
