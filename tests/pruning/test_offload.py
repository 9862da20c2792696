"""Statistics of a model that stays on disk: bitwise what memory gives, with one layer's weights in memory at a time."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import make_blocks
from test_architectures import ALL, config_of
from test_stream import llama, saved
from torch import nn

from cascade.models.architecture.axes import probe_axes
from cascade.models.architecture.dims import dims_of
from cascade.models.architecture.twin import twin_of
from cascade.models.checkpoint.load import load_model
from cascade.pruning.importance.offload import offloaded
from cascade.pruning.importance.statistics import collect_statistics, save_statistics
from cascade.runtime.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize("architecture", ALL)
def test_statistics_of_a_model_on_disk_are_bitwise_those_in_memory(architecture, tmp_path):
    source = saved(twin_of(config_of(architecture)), tmp_path / "parent", max_shard_size="20KB")
    options = {"batch_size": 3, "covariance_blocks": 4, "head_contributions": True, "device": CPU}
    blocks = make_blocks(count=5, size=12)
    save_statistics(collect_statistics(load_model(source), blocks, **options), tmp_path / "memory")
    with offloaded(source, CPU) as model:
        save_statistics(collect_statistics(model, blocks, **options), tmp_path / "disk")
    assert (tmp_path / "memory").read_bytes() == (tmp_path / "disk").read_bytes()


def test_one_layer_at_a_time_has_weights(tmp_path):
    source = saved(twin_of(config_of("llama")), tmp_path / "parent")
    with offloaded(source, CPU) as model:
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        seen = []

        def note(module: nn.Module, args: tuple) -> None:
            present = {name for name, parameter in model.named_parameters() if parameter.device.type == "cpu"}
            seen.append({probe_axes(model.config).layer_of(name) for name in present})

        for layer in model.model.layers:
            layer.mlp.register_forward_pre_hook(note)
        collect_statistics(model, make_blocks(count=2, size=12), device=CPU)
        assert seen == [{number} for number in range(dims_of(model.config).num_hidden_layers)]
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_a_checkpoint_that_lacks_a_weight_is_refused_with_its_name(tmp_path):
    from safetensors.torch import load_file, save_file

    source = saved(twin_of(transformers.LlamaConfig()), tmp_path / "parent")
    path = tmp_path / "parent" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"), offloaded(source, CPU):
        pass


MEASURE = """
import sys, json, threading, time
from pathlib import Path
import torch
from cascade.data.blocks import TokenBlocks
from cascade.pruning.importance.offload import offloaded
from cascade.pruning.importance.statistics import collect_statistics
from cascade.models.checkpoint.load import ModelSource
def anonymous():
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024
from cascade.models.architecture.axes import probe_axes
from cascade.models.checkpoint.load import load_config
source = ModelSource(Path(sys.argv[1]), "parent")
probe_axes(load_config(source))  # imports what the architecture needs
ids = torch.arange(64).view(2, 32)
torch.ones(64, 64) @ torch.ones(64, 64)
start = peak = anonymous()
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
with offloaded(source, torch.device("cpu")) as model:
    collect_statistics(model, TokenBlocks(ids, ids, 3.0), device=torch.device("cpu"))
print(json.dumps(peak - start))
"""


def test_a_model_on_disk_is_scored_in_the_memory_of_one_layer(tmp_path):
    config = llama(
        vocab_size=2000, hidden_size=768, intermediate_size=2048, num_hidden_layers=16, num_attention_heads=16
    )
    with torch.random.fork_rng():
        model = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "parent")
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters()) * 4
    whole = sum(parameter.numel() for parameter in model.parameters()) * 4
    output = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "parent")], capture_output=True, text=True, check=True
    )
    peak = json.loads(output.stdout.splitlines()[-1])
    print(f"layer {layer / 1e6:.0f} MB, model {whole / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB")
    assert peak < 3 * layer + 60e6 < whole / 2
