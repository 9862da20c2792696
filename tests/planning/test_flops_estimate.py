"""The FLOPs that a plan counts are those that torch counts, of every kind of model, forward and in a training step.

torch counts causal attention whole; a plan counts the half that is used. Products of two batches of matrices
(`aten.bmm`, attention without a fused kernel) are therefore halved where a model looks back only.
"""

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from cascade.data.blocks import TokenBlocks
from cascade.data.examples import Examples
from cascade.distillation.losses.batch import batch_losses
from cascade.distillation.options import Objective
from cascade.models.architecture.model_class import attends_causally, model_from_config
from cascade.planning import estimates
from cascade.recipe.schema import Recipe

LENGTH = 128

SMALL = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
GATED = {**SMALL, "intermediate_size": 176, "num_key_value_heads": 2}
WIDE_HEADS = {**GATED, "head_dim": 32}
ENCODER = {**SMALL, "intermediate_size": 256}
DISTIL = {"vocab_size": 512, "dim": 64, "hidden_dim": 256, "n_layers": 3, "n_heads": 4}
TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
IMAGES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
          "image_size": 32, "patch_size": 8, "num_labels": 10}  # fmt: skip

DECODERS = {
    "llama": ("LlamaConfig", GATED),
    "qwen2": ("Qwen2Config", GATED),
    "qwen3": ("Qwen3Config", WIDE_HEADS),
    "gemma2": ("Gemma2Config", WIDE_HEADS),
    "gemma3": ("Gemma3TextConfig", WIDE_HEADS),
    "phi3": ("Phi3Config", GATED),
    "gpt2": ("GPT2Config", {"vocab_size": 512, "n_embd": 64, "n_layer": 3, "n_head": 4}),
    "gpt_neox": ("GPTNeoXConfig", ENCODER),
    "opt": ("OPTConfig", {**SMALL, "ffn_dim": 256, "word_embed_proj_dim": 64}),
}
CLASSIFIERS = {
    "BertForSequenceClassification": ("BertConfig", ENCODER),
    "DistilBertForSequenceClassification": ("DistilBertConfig", DISTIL),
    "RobertaForSequenceClassification": ("RobertaConfig", ENCODER),
    "LlamaForSequenceClassification": ("LlamaConfig", GATED),
}
BODIES = {"BertModel": ("BertConfig", ENCODER), "DistilBertModel": ("DistilBertConfig", DISTIL)}
MASKED = {"BertForMaskedLM": ("BertConfig", ENCODER), "DistilBertForMaskedLM": ("DistilBertConfig", DISTIL)}
PICTURES = {"ViTForImageClassification": ("ViTConfig", IMAGES), "DeiTForImageClassification": ("DeiTConfig", IMAGES)}


def config_of(architecture, **changes):
    tables = DECODERS | CLASSIFIERS | BODIES | MASKED | PICTURES
    name, values = tables[architecture]
    tokens = {} if architecture in PICTURES else TOKENS
    config = getattr(transformers, name)(**{**values, **tokens, **changes})
    if architecture not in DECODERS:
        config.architectures = [architecture]
    return config


def model_of(config):
    """A random model whose attention is plain products of matrices, which torch counts under one name."""
    model = model_from_config(config)
    model.set_attn_implementation("eager")
    return model.train()


def recipe_of(task, **distill):
    counts = "tokens" if task in ("language", "masked_language") else "examples"
    return Recipe.model_validate({
        "name": "f", "task": task, "parent": "none", "distill": {counts: 64, "learning_rate": 1e-3, **distill},
        "data": {"source": "files", "train": "none.jsonl", "block_size": LENGTH, "max_length": LENGTH},
    })  # fmt: skip


@pytest.fixture(autouse=True)
def examples_of_full_length(monkeypatch):
    """All texts are as long as the longest that is read: the length that is counted here."""
    monkeypatch.setattr(estimates, "tokens_per_example", lambda recipe: LENGTH)


def counted(causal, run):
    """FLOPs of what `run` does: torch's, with half of the products of attention where it looks back only."""
    formulas = {torch.ops.aten.addmm_: lambda _, left, right, out_shape=None, **__: 2 * left[0] * left[1] * right[1]}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        run()
    products = counter.get_flop_counts()["Global"]
    attention = products.get(torch.ops.aten.bmm, 0)
    assert attention > 0, "attention is not counted under the name that is halved"
    return counter.get_total_flops() - (attention / 2 if causal else 0)


@torch.no_grad()
def forward(model, **inputs):
    model(**inputs)


def ids(count=1):
    return torch.randint(5, 500, (count, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("architecture", DECODERS)
def test_a_language_models_block_costs_what_torch_counts(architecture):
    config = config_of(architecture)
    torch_flops = counted(True, lambda: forward(model_of(config), input_ids=ids()))
    assert attends_causally(config)
    assert LENGTH * estimates.flops_of(recipe_of("language"), config) == pytest.approx(torch_flops, rel=0.01)


@pytest.mark.parametrize("architecture", MASKED)
def test_a_masked_language_models_block_costs_what_torch_counts(architecture):
    config = config_of(architecture)
    torch_flops = counted(False, lambda: forward(model_of(config), input_ids=ids()))
    assert LENGTH * estimates.flops_of(recipe_of("masked_language"), config) == pytest.approx(torch_flops, rel=0.01)


@pytest.mark.parametrize(("task", "architecture"), [
    *(("text_classification", name) for name in CLASSIFIERS), *(("embedding", name) for name in BODIES),
])  # fmt: skip
def test_a_texts_pooler_and_its_classes_are_counted_once_not_at_each_token(task, architecture):
    config = config_of(architecture)
    torch_flops = counted(attends_causally(config), lambda: forward(model_of(config), input_ids=ids()))
    assert estimates.flops_of(recipe_of(task), config) == pytest.approx(torch_flops, rel=0.01)


@pytest.mark.parametrize("patch_size", [4, 8])
@pytest.mark.parametrize("architecture", PICTURES)
def test_an_image_costs_its_patches_attention_and_classes(architecture, patch_size):
    config = config_of(architecture, patch_size=patch_size)
    image = torch.zeros(1, 3, 32, 32)
    torch_flops = counted(False, lambda: forward(model_of(config), pixel_values=image))
    assert estimates.flops_of(recipe_of("image_classification"), config) == pytest.approx(torch_flops, rel=0.01)


def planned(monkeypatch, recipe, student, teacher, units):
    """FLOPs of the stage distill by the plan: its seconds on a machine of one FLOP a second."""
    monkeypatch.setattr(estimates, "flops_per_second", lambda: 1.0)
    costs = [0.0 if config is None else estimates.flops_of(recipe, config) for config in (student, teacher)]
    return estimates.stage_seconds(recipe, *costs, units, cut=False)["distill"]


def training_step(student, teacher, batch):
    """Forward and backward pass of a student, forward pass of its teacher."""
    batch_losses(student, teacher, batch, Objective()).fused.loss.backward()


@pytest.mark.parametrize("architecture", DECODERS)
def test_a_training_step_costs_three_students_and_one_teacher(architecture, monkeypatch):
    small = {"gpt2": {"n_layer": 2}}.get(architecture, {"num_hidden_layers": 2})
    student, teacher = config_of(architecture, **small), config_of(architecture)
    blocks = TokenBlocks(ids(4), ids(4), 3.0)
    expert = model_of(teacher).requires_grad_(False)
    step_flops = counted(True, lambda: training_step(model_of(student), expert, blocks))
    assert planned(monkeypatch, recipe_of("language"), student, teacher, 4 * LENGTH) == pytest.approx(
        step_flops, rel=0.01
    )


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_a_training_step_on_the_text_alone_costs_three_students(architecture, monkeypatch):
    student = config_of(architecture)
    blocks = TokenBlocks(ids(4), ids(4), 3.0)
    step_flops = counted(True, lambda: training_step(model_of(student), None, blocks))
    assert planned(monkeypatch, recipe_of("language"), student, None, 4 * LENGTH) == pytest.approx(step_flops, rel=0.01)


def test_a_step_of_hidden_tokens_that_all_count_costs_three_students_and_one_teacher(monkeypatch):
    student, teacher = config_of("BertForMaskedLM", num_hidden_layers=2), config_of("BertForMaskedLM")
    blocks = TokenBlocks(ids(4), ids(4), 0.0, masked=True)
    expert = model_of(teacher).requires_grad_(False)
    step_flops = counted(False, lambda: training_step(model_of(student), expert, blocks))
    recipe = recipe_of("masked_language")
    assert planned(monkeypatch, recipe, student, teacher, 4 * LENGTH) == pytest.approx(step_flops, rel=0.01)


def test_where_few_tokens_count_a_step_costs_less_than_the_plan_by_their_heads(monkeypatch):
    """The plan counts the head at every token; how many count is known once the text is packed."""
    config = config_of("llama")
    labels = ids(4)
    labels[:, : LENGTH // 2] = -100
    step_flops = counted(True, lambda: training_step(model_of(config), None, TokenBlocks(ids(4), labels, 0.0)))
    head = 3 * 2 * config.hidden_size * config.vocab_size * 4 * (LENGTH // 2)
    plan = planned(monkeypatch, recipe_of("language"), config, None, 4 * LENGTH)
    assert plan - head == pytest.approx(step_flops, rel=0.01)


@pytest.mark.parametrize("architecture", [*CLASSIFIERS, *PICTURES])
def test_an_examples_training_step_costs_three_students_and_one_teacher(architecture, monkeypatch):
    layers = "n_layers" if architecture.startswith("Distil") else "num_hidden_layers"
    pictures = architecture in PICTURES
    # The gradient towards an image's pixels, which nothing needs, is counted: the smaller the patches, the less it is.
    patches = {"patch_size": 4} if pictures else {}
    student, teacher = config_of(architecture, **patches, **{layers: 2}), config_of(architecture, **patches)
    inputs = {"pixel_values": torch.zeros(4, 3, 32, 32)} if pictures else {"input_ids": ids(4)}
    if not pictures:
        inputs["attention_mask"] = torch.ones(4, LENGTH, dtype=torch.int64)
    batch = Examples(inputs, torch.tensor([0, 1, 1, 0]))
    expert = model_of(teacher).requires_grad_(False)
    step_flops = counted(attends_causally(student), lambda: training_step(model_of(student), expert, batch))
    recipe = recipe_of("image_classification" if pictures else "text_classification")
    assert planned(monkeypatch, recipe, student, teacher, 4) == pytest.approx(step_flops, rel=0.01)
