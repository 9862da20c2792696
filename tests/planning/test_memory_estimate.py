"""The memory that a plan names for a training is what the training takes, within 20%, in a process of its own.

What is measured is the largest resident set (VmHWM: `ru_maxrss` begins with that of the process that starts this one)
less what the process held before it made its first model: that is what the machine has to have, with everything that
no counter of tensors sees (what the allocator keeps, what products of matrices need meanwhile). Libraries are not part
of it: a plan adds a fixed figure for them.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

MEDIUM = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}
LARGE = {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 10}
SETTINGS = {
    "long blocks": {"teacher": MEDIUM, "layers": 6, "block_size": 256, "microbatch_size": 8},
    "one block at a time": {"teacher": MEDIUM, "layers": 6, "block_size": 128, "microbatch_size": 1},
    "a large vocabulary": {"teacher": MEDIUM, "layers": 6, "vocab_size": 16384},
    "Muon": {"teacher": MEDIUM, "layers": 6, "microbatch_size": 1, "batch_size": 2, "distill": {"optimizer": "muon"}},
    "AdamW, 60M parameters": {"teacher": LARGE, "layers": 8, "microbatch_size": 1},
    "features": {"teacher": MEDIUM, "layers": 6, "block_size": 256, "distill": {"features": {"hidden": "cosine"}}},
    "an average": {"teacher": MEDIUM, "layers": 6, "distill": {"ema_decay": 0.99}},
    "checkpointing": {"teacher": MEDIUM, "layers": 6, "block_size": 256, "microbatch_size": 8,
                      "distill": {"gradient_checkpointing": True}},
    "kept probabilities": {"teacher": MEDIUM, "layers": 6, "block_size": 256, "cache": "sampled"},
    "kept hidden states": {"teacher": MEDIUM, "layers": 6, "block_size": 256, "cache": "hidden"},
    "a searched rate": {"teacher": MEDIUM, "layers": 4, "block_size": 64, "batch_size": 2, "microbatch_size": 2,
                        "distill": {"learning_rate": "auto"}},
}  # fmt: skip


def measured(tmp_path, **setting):
    """{'plan', 'peak', 'num_parameters'} of a training: bytes, without the process itself."""
    command = [sys.executable, __file__, json.dumps(setting), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(process.stdout.splitlines()[-1])


def test_a_small_training_takes_what_the_plan_says(tmp_path):
    small = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 7}
    figures = measured(tmp_path, teacher=small, layers=6, block_size=64, microbatch_size=4, batch_size=4)
    assert figures["num_parameters"] > 10e6
    assert figures["plan"] == pytest.approx(figures["peak"], rel=0.2)


@pytest.mark.nightly
@pytest.mark.parametrize("name", SETTINGS)
def test_a_training_takes_what_the_plan_says(name, tmp_path):
    figures = measured(tmp_path, **SETTINGS[name])
    assert 10e6 < figures["num_parameters"] < 100e6
    assert figures["plan"] == pytest.approx(figures["peak"], rel=0.2), figures


def recipe_of(setting):
    """The recipe of a training of three steps; of two models that nobody saved."""
    from cascade.recipe.schema import Recipe

    size, block_size = setting.get("batch_size", 8), setting.get("block_size", 128)
    distill = {"tokens": 3 * size * block_size, "learning_rate": 1e-3, "optimizer": "adamw", "batch_size": size,
               "microbatch_size": setting.get("microbatch_size", 4), "features": {"hidden": "none"}}  # fmt: skip
    return Recipe.model_validate({
        "name": "memory", "parent": "none", "data": {"source": "stdlib", "block_size": block_size},
        "evaluate": {"heldout_blocks": 32}, "distill": distill | setting.get("distill", {}),
    })  # fmt: skip


def blocks_of(recipe, count, seed, vocab_size):
    import torch

    from cascade.data.blocks import TokenBlocks

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab_size, (count, recipe.data.block_size), generator=generator)
    return TokenBlocks(ids, ids, 3.0)


def train(recipe, config, parent_config, cache, folder):
    """A member as a run makes it: another has been measured before, the rate is searched for, and it is trained."""
    from cascade.distillation.losses.features import FeatureLoss
    from cascade.distillation.options import Features
    from cascade.distillation.range_test import find_learning_rate
    from cascade.distillation.supervision import Selection
    from cascade.distillation.teacher_memory import remember
    from cascade.distillation.trainer import distill
    from cascade.evaluation.heldout import heldout_report
    from cascade.models.architecture.dims import dims_of
    from cascade.models.architecture.model_class import model_from_config
    from cascade.models.architecture.origin import even_origin
    from cascade.pipeline.training_options import execution_of, optimization_of, supervision_of

    settings, vocab_size = recipe.distill, config.vocab_size
    train_blocks, selection, heldout = (
        blocks_of(recipe, count, seed, vocab_size)
        for seed, count in enumerate((24, settings.selection_blocks, recipe.evaluate.heldout_blocks))
    )
    teacher = remember(model_from_config(parent_config).requires_grad_(False).eval())
    student = model_from_config(config)
    heldout_report(student, teacher, heldout)
    supervision = supervision_of(settings)
    if settings.features.hidden != "none":
        origin = even_origin(dims_of(config), dims_of(parent_config))
        features = FeatureLoss(Features(hidden=settings.features.hidden), origin, student, teacher)
        supervision = replace(supervision, features=features)
    if cache:
        supervision = replace(supervision, targets=kept_targets(teacher, train_blocks, cache, folder))
    optimization = optimization_of(settings, learning_rate=1e-3, optimizer=settings.optimizer, seed=0)
    options = {"supervision": supervision, "execution": execution_of(settings), "num_tokens": settings.tokens}
    if settings.learning_rate == "auto":
        find_learning_rate(student, teacher, train_blocks, selection=selection, optimization=optimization, **options)
    choice = Selection(blocks=selection, every=settings.selection_every)
    distill(student, teacher, train_blocks, selection=choice, optimization=optimization, **options)


def kept_targets(teacher, blocks, kind, folder):
    """What a cache keeps of a teacher, labelled before the training."""
    from cascade.models.architecture.dims import dims_of
    from cascade.models.architecture.head import head_of
    from cascade.teacher.targets.keys import open_windows
    from cascade.teacher.targets.label import label
    from cascade.teacher.targets.reader import CachedTargets
    from cascade.teacher.targets.record import Layout

    dims = dims_of(teacher.config)
    layouts = {
        "sampled": Layout("sampled", dims.vocab_size, draws=38),
        "hidden": Layout("hidden", dims.vocab_size, hidden_size=dims.hidden_size, dtype="bfloat16"),
    }
    windows = open_windows(folder, teacher, None, layouts[kind])
    label(windows, layouts[kind], teacher, blocks)
    return CachedTargets(windows, layouts[kind], blocks, head_of(teacher) if kind == "hidden" else None)


def resident_bytes(entry):
    """`VmRSS` or `VmHWM` of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(entry))


def main(setting, folder):
    from transformers import LlamaConfig

    from cascade.models.architecture.axes import probe_axes
    from cascade.models.architecture.dims import dims_of
    from cascade.models.architecture.sized import Sized
    from cascade.planning import estimates

    def config_of(**sizes):
        heads = sizes["hidden_size"] // 64
        return LlamaConfig(**sizes, num_attention_heads=heads, num_key_value_heads=heads, head_dim=64)

    recipe, vocab_size = recipe_of(setting), setting.get("vocab_size", 2048)
    tiny = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": vocab_size}
    train(recipe, config_of(**tiny), config_of(**tiny), setting.get("cache"), folder / "tiny")  # what libraries load
    before = resident_bytes("VmRSS")
    parent_config = config_of(**setting["teacher"], vocab_size=vocab_size)
    config = config_of(**(setting["teacher"] | {"num_hidden_layers": setting["layers"]}), vocab_size=vocab_size)
    plan = estimates.peak_memory(
        recipe, recipe.distill, Sized(config), Sized(parent_config), optimizer=recipe.distill.optimizer
    )
    train(recipe, config, parent_config, setting.get("cache"), folder / "real")
    peak = resident_bytes("VmHWM") - before
    count = int(probe_axes(config).num_parameters(dims_of(config)))
    figures = {"plan": plan - estimates.BASE_PROCESS_BYTES, "peak": peak, "num_parameters": count}
    print(json.dumps(figures | {"before": before}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
