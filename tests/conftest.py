"""Shared fixtures: tiny random models with the built-in tokenizer, small texts, the shared folder where it is."""

import dataclasses
import gzip
import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
if "PYTEST_XDIST_WORKER" in os.environ:  # Two workers of two threads each starve each other.
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from cascade.data.blocks import TokenBlocks
from cascade.models.architecture.twin import twin_of
from cascade.models.checkpoint.load import BUILTIN_FOLDER, copy_companions

# What runs keep of their teachers by default must neither meet nor litter the user's own.
_CACHES = tempfile.TemporaryDirectory(prefix="cascade-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHES.name

settings.register_profile("cascade", deadline=None, max_examples=15, derandomize=True)
settings.load_profile("cascade")

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"

ARCHITECTURES = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is not beside this checkout")


MAKERS = {"run_recipe", "run_experiment", "tiny_family", "zygote"}
"""Functions and fixtures that make families."""

FAMILY_FILES = {
    "data/test_labels.py",
    "evaluation/test_framing.py",
    "evaluation/test_tail.py",
    "models/test_padding.py",
    "teacher/test_cache_run.py",
    "teacher/test_generate.py",
    "teacher/test_logprobs.py",
}
"""Files outside `pipeline` and `docs` whose fixtures and helpers make families."""

SLOW_FILES = {
    "data/test_named_text.py",
    "data/test_packing.py",
    "distillation/test_distillation.py",
    "distillation/test_embeddings.py",
    "distillation/test_parallel.py",
    "evaluation/test_evaluation.py",
    "evaluation/test_task_files.py",
    "models/test_architectures.py",
    "models/test_older_readers.py",
    "planning/test_flops_estimate.py",
    "planning/test_memory_estimate.py",
    "planning/test_vocabularies.py",
    "pruning/test_offload.py",
    "pruning/test_repair.py",
    "pruning/test_stream.py",
    "recipe/test_recipes.py",
    "teacher/test_asked_again.py",
    "teacher/test_cache.py",
}
"""Files that make no family, and are too slow for the group `unit` all the same."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Give each test the markers `unit`, `run` and `faults`, by its file, its fixtures and the functions that it calls."""
    for test in items:
        file = test.path.relative_to(ROOT / "tests").as_posix()
        words = {*test.fixturenames, *test.function.__code__.co_names}
        if file.startswith("faults/"):
            test.add_marker("faults")
        if file.startswith(("pipeline/", "docs/")) or file in FAMILY_FILES or words & MAKERS:
            test.add_marker("run")
        elif not file.startswith("faults/") and file not in SLOW_FILES and test.get_closest_marker("nightly") is None:
            test.add_marker("unit")


def pack_tokens(documents, *, framing=None, name="text", **options):
    """Blocks of documents given as (ids, labels, bytes, ...), one after another; `options` are those of BlockFormat."""
    from cascade.data.packing import BlockFormat, Tokenized, pack_blocks

    if framing is not None:
        options["framing"] = framing
    return pack_blocks((Tokenized(*document) for document in documents), BlockFormat(**options), name=name)


def make_config(architecture, *, tied=False, **changes):
    dims = {
        "vocab_size": 64,
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
    }
    return ARCHITECTURES[architecture](**(dims | changes), tie_word_embeddings=tied)


def make_model(architecture="llama", *, tied=False, seed=0, **changes):
    config = make_config(architecture, tied=tied, **changes)
    from cascade.models.architecture.dims import dims_of

    return twin_of(config, seed=seed, dims=dims_of(config))


def make_blocks(count=8, size=16, vocabulary=64, seed=0):
    ids = torch.randint(0, vocabulary, (count, size), generator=torch.Generator().manual_seed(seed))
    return TokenBlocks(ids, ids, 3.0)


def training_options(*, selection=None, selection_every=25, **options):
    """Options of `distill` by their own names, each in the record that declares it."""
    from cascade.distillation.options import Execution, Hooks, Optimization, Safekeeping
    from cascade.distillation.supervision import Selection, Supervision

    records = {"supervision": Supervision, "optimization": Optimization, "execution": Execution,
               "safekeeping": Safekeeping, "hooks": Hooks}  # fmt: skip
    arguments = {}
    for name, record in records.items():
        names = [field.name for field in dataclasses.fields(record) if field.name in options]
        arguments[name] = record(**{name: options.pop(name) for name in names})
    assert not options, f"no options of a training: {options}"
    return arguments | {"selection": selection and Selection(blocks=selection, every=selection_every)}


def distill_with(student, teacher, blocks, *, num_tokens, **options):
    """`distill` with options by their own names."""
    from cascade.distillation.trainer import distill

    return distill(student, teacher, blocks, num_tokens=num_tokens, **training_options(**options))


def write_texts(path, count, *, seed=0):
    """Sentences of a small made-up language, different in every document."""
    import random

    draw = random.Random(seed)
    words = "the def class return self value index of in for import list name open file data print is not and".split()
    with gzip.open(path, "wt") as file:
        for _ in range(count):
            text = " ".join(draw.choice(words) + str(draw.randrange(9)) for _ in range(120))
            file.write(json.dumps({"text": text}) + "\n")


@pytest.fixture(scope="session")
def tiny_parent(tmp_path_factory):
    """A random Llama of 2 layers in bfloat16 with the built-in model's tokenizer, saved as users save models."""
    folder = tmp_path_factory.mktemp("tiny-parent")
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    from transformers import LlamaForCausalLM

    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    copy_companions(BUILTIN_FOLDER / "pico-python", folder)
    return folder


@pytest.fixture(scope="session")
def recipe_folder(tmp_path_factory, tiny_parent):
    """A recipe for a family of two that takes seconds, its text beside it."""
    folder = tmp_path_factory.mktemp("recipe")
    write_texts(folder / "train.jsonl.gz", 60, seed=1)
    for seed, split in enumerate(("calibration", "selection", "heldout"), start=2):
        write_texts(folder / f"{split}.jsonl.gz", 12, seed=seed)
    (folder / "tiny.yaml").write_text(
        f"""\
name: tiny
parent: {tiny_parent}
data:
  source: files
  train: train.jsonl.gz
  calibration: calibration.jsonl.gz
  selection: selection.jsonl.gz
  heldout: heldout.jsonl.gz
  block_size: 32
members:
  - name: big
    target: {{params: 0.8}}
  - name: small
    target: {{params: 0.5}}
calibration: {{num_blocks: 8}}
distill: {{tokens: 512, learning_rate: 3e-3, batch_size: 4, microbatch_size: 4, selection_blocks: 4}}
evaluate: {{tasks: [python_minimal_pairs], limit: 6, heldout_blocks: 8}}
baselines: [cut, repaired, {{ce: {{learning_rate: 3e-3}}}}]
"""
    )
    return folder


@pytest.fixture(scope="session")
def zygote(tmp_path_factory):
    """Starts commands in processes that can be killed."""
    from fault_process import Zygote

    started = Zygote(tmp_path_factory.mktemp("zygote"))
    yield started
    started.close()


@pytest.fixture(scope="session")
def tiny_recipe(recipe_folder):
    from cascade.recipe.load import load_recipe

    return load_recipe(recipe_folder / "tiny.yaml")


@pytest.fixture(scope="session")
def tiny_family(tiny_recipe, tmp_path_factory):
    """A finished run of the tiny recipe."""
    from cascade.pipeline.run import run_recipe

    return run_recipe(tiny_recipe, output=tmp_path_factory.mktemp("runs") / "tiny")
