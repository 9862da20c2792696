"""The cut from disk to disk: bitwise what memory gives, in a few tensors' memory, and deaf to damaged files."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import make_blocks
from safetensors.torch import load_file
from test_architectures import ALL, config_of

from cascade.models.architecture.dims import dims_of
from cascade.models.architecture.twin import twin_of
from cascade.models.checkpoint.load import ModelSource, load_model, save_checkpoint
from cascade.models.checkpoint.tensor_file import checkpoint_entries
from cascade.pruning.choose import plan_pruning
from cascade.pruning.cut import prune
from cascade.pruning.cut_on_disk import prune_on_disk
from cascade.pruning.importance.scores import score_importance
from cascade.pruning.importance.statistics import collect_statistics
from cascade.pruning.plan import save_plan
from cascade.pruning.proof import proof_cuts, random_scores
from cascade.runtime.errors import UserError


def weights(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def saved(model, folder, **options):
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model.save_pretrained(folder, **options)
    return ModelSource(folder, "twin")


@pytest.mark.parametrize("architecture", ALL)
def test_the_cut_on_disk_is_bitwise_the_cut_in_memory(architecture, tmp_path):
    source = saved(twin_of(config_of(architecture)), tmp_path / "parent", max_shard_size="20KB")
    model = load_model(source, dtype=torch.bfloat16)
    wanted = {dim: size for change in proof_cuts(model.config).values() for dim, size in change.items()}
    plan = plan_pruning(random_scores(model), model.config, dims_of(model.config).replace(**wanted))
    save_checkpoint(prune(model, plan), tmp_path / "memory", companions=None, dtype=torch.bfloat16)
    prune_on_disk(source, plan, tmp_path / "disk", max_shard_bytes=20_000)
    ours, theirs = weights(tmp_path / "disk"), weights(tmp_path / "memory")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert len(list((tmp_path / "disk").glob("*.safetensors"))) > 1
    ids = torch.arange(3, 15)[None]
    reloaded = load_model(ModelSource(tmp_path / "disk", "disk"))
    with torch.no_grad():
        again = load_model(ModelSource(tmp_path / "memory", "memory"))(input_ids=ids)[0]
        assert torch.equal(reloaded(input_ids=ids)[0], again)


@pytest.mark.parametrize("tied", [False, True])
def test_a_rotation_on_disk_is_bitwise_that_in_memory(tied, tmp_path):
    source = saved(twin_of(transformers.LlamaConfig(tie_word_embeddings=tied)), tmp_path / "parent")
    model = load_model(source)
    statistics = collect_statistics(model, make_blocks(size=12), covariance_blocks=4)
    target = dims_of(model.config).replace(hidden_size=32, num_hidden_layers=2)
    plan = plan_pruning(score_importance(statistics, hidden="pca"), model.config, target, statistics=statistics)
    in_memory = prune(load_model(source, dtype=torch.bfloat16), plan)
    save_checkpoint(in_memory, tmp_path / "memory", companions=None, dtype=torch.bfloat16)
    prune_on_disk(source, plan, tmp_path / "disk")
    ours, theirs = weights(tmp_path / "disk"), weights(tmp_path / "memory")
    assert ours.keys() == theirs.keys() and "lm_head.weight" in ours
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_damaged_files_are_refused_with_their_name(tmp_path):
    source = saved(twin_of(transformers.LlamaConfig()), tmp_path / "parent")
    path = tmp_path / "parent" / "model.safetensors"
    good = path.read_bytes()
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])
    name = "model.norm.weight"
    header[name]["data_offsets"][1] += 2
    bad = json.dumps(header).encode()
    for damaged, message in (
        (good[: len(good) - 10], "its tensors have .* bytes, the file holds .* damaged"),
        ((1 << 60).to_bytes(8, "little") + good[8:], "header claims"),
        (good[:8] + b"{" * length + good[8 + length :], "header cannot be read"),
        (len(bad).to_bytes(8, "little") + bad + good[8 + length :], f"'{name}'.*does not fit"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"model.safetensors.*{message}"):
            checkpoint_entries(source.folder)


def test_a_file_that_was_cut_off_or_replaced_since_is_refused_when_a_tensor_is_read(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(4.0), "b": torch.ones(3)}, path)
    entry = checkpoint_entries(tmp_path)["a"]
    assert entry.read().tolist() == [0, 1, 2, 3]
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(
        UserError, match=r"model\.safetensors: its tensors have 28 bytes, the file holds 23; it is damaged"
    ):
        entry.read()
    save_file({"a": torch.arange(5.0)}, path)
    with pytest.raises(UserError, match=r"model\.safetensors: 'a' has changed while it was in use"):
        entry.read()
    save_file({"b": torch.arange(4.0)}, path)
    with pytest.raises(UserError, match=r"model\.safetensors: .*tensor a"):
        entry.read()


def test_a_tensor_that_nobody_explains_is_refused_with_its_name(tmp_path):
    from safetensors.torch import save_file

    source = saved(twin_of(transformers.LlamaConfig()), tmp_path / "parent")
    path = tmp_path / "parent" / "model.safetensors"
    tensors = load_file(path) | {"model.layers.0.adapter.weight": torch.zeros(3)}
    save_file(tensors, path, metadata={"format": "pt"})
    model = twin_of(transformers.LlamaConfig())
    plan = plan_pruning(random_scores(model), model.config, dims_of(model.config))
    with pytest.raises(UserError, match=r"does not read model\.layers\.0\.adapter\.weight"):
        prune_on_disk(source, plan, tmp_path / "disk")


MEASURE = """
import sys, json, threading, time
from pathlib import Path
from cascade.models.checkpoint.load import ModelSource
from cascade.pruning.plan import load_plan
from cascade.pruning.cut_on_disk import prune_on_disk
def anonymous():
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024
start = peak = anonymous()
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
prune_on_disk(ModelSource(Path(sys.argv[1]), "parent"), load_plan(Path(sys.argv[2])), Path(sys.argv[3]))
print(json.dumps(peak - start))
"""


def cut_in_a_process_of_its_own(config, folder):
    """(largest tensor, peak of anonymous memory above the bare import) in bytes; the checkpoint is random."""
    from cascade.models.architecture.model_class import build_on_meta
    from cascade.models.checkpoint.tensor_file import write_checkpoint

    parent = folder / "parent"
    parent.mkdir()
    config.dtype = torch.bfloat16
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(parent)
    shapes = [(name, tuple(p.shape), torch.bfloat16) for name, p in build_on_meta(config).named_parameters()]
    generator = torch.Generator().manual_seed(0)
    values = ((name, torch.randn(shape, generator=generator).to(dtype)) for name, shape, dtype in shapes)
    write_checkpoint(parent, shapes, values, max_shard_bytes=500_000_000)
    dims = dims_of(config)
    target = dims.replace(
        hidden_size=dims.hidden_size * 3 // 4 // 128 * 128,
        intermediate_size=dims.intermediate_size // 2,
        num_hidden_layers=dims.num_hidden_layers - 2,
    )
    save_plan(plan_pruning(scores_of(dims), config, target), folder / "plan.json")
    arguments = [str(parent), str(folder / "plan.json"), str(folder / "cut")]
    output = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True)
    largest = max(entry.size for entry in checkpoint_entries(parent).values())
    return largest, json.loads(output.stdout.splitlines()[-1])


def scores_of(dims):
    from cascade.pruning.importance.scores import Scores

    draw = torch.Generator().manual_seed(1)
    depth = dims.num_hidden_layers
    return Scores(
        layers=torch.rand(depth, generator=draw),
        heads=torch.rand(depth, dims.num_attention_heads, generator=draw),
        neurons=torch.rand(depth, dims.intermediate_size, generator=draw),
        hidden=torch.rand(dims.hidden_size, generator=draw),
    )


def llama(**changes):
    return transformers.LlamaConfig(tie_word_embeddings=False, num_key_value_heads=8, **changes)


def test_the_cut_on_disk_needs_the_memory_of_a_few_tensors(tmp_path):
    config = llama(
        vocab_size=4000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=18, num_attention_heads=16
    )
    largest, peak = cut_in_a_process_of_its_own(config, tmp_path)
    whole = sum(entry.size for entry in checkpoint_entries(tmp_path / "parent").values())
    assert peak <= 3 * largest + 150e6 < whole


@pytest.mark.nightly
def test_a_checkpoint_of_one_and_a_half_billion_parameters_is_cut_in_the_memory_of_a_few_tensors(tmp_path):
    config = llama(
        vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=22, num_attention_heads=32
    )
    largest, peak = cut_in_a_process_of_its_own(config, tmp_path)
    print(f"largest tensor {largest / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB")
    assert peak <= 3 * largest + 200e6
    plan_folder, source = tmp_path / "plan.json", ModelSource(tmp_path / "parent", "parent")
    from cascade.pruning.plan import load_plan

    theirs = prune(load_model(source, dtype=torch.bfloat16), load_plan(plan_folder)).state_dict()
    ours = weights(tmp_path / "cut")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
