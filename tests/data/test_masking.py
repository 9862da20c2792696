"""Hidden tokens to guess: what is hidden, what counts, and a family that learns it."""

import json

import pytest
import torch
from conftest import make_blocks
from hypothesis import given
from hypothesis import strategies as st
from test_architectures import config_of
from transformers import AutoModelForMaskedLM

from cascade.data.blocks import IGNORE_INDEX, load_blocks, save_blocks
from cascade.data.masking import SHARE, masked_blocks
from cascade.distillation.losses.batch import batch_losses
from cascade.distillation.options import Objective
from cascade.models.architecture.twin import twin_of
from cascade.pipeline.run import run_recipe
from cascade.pipeline.stages.pretrain import train_tokenizer
from cascade.recipe.load import load_recipe
from cascade.runtime.errors import UserError

TOKENIZER = train_tokenizer(["def f(x): return x\n" * 9], vocab_size=300, model_max_length=64, masks=True)


@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 9))
def test_hidden_tokens_are_counted_where_they_stand_and_special_ones_are_never_hidden(count, copies, seed):
    blocks = make_blocks(count, 24, vocabulary=300, seed=seed)
    blocks.input_ids[:, 5] = TOKENIZER.eos_token_id
    found = masked_blocks(blocks, TOKENIZER, seed=seed, copies=copies)
    whole = blocks.input_ids.repeat(copies, 1)
    counted = found.labels != IGNORE_INDEX
    assert len(found) == count * copies and found.masked and found.num_counted() == int(counted.sum())
    assert torch.equal(found.labels[counted], whole[counted])
    assert torch.equal(found.input_ids[~counted], whole[~counted])
    assert counted.any(1).all() and not counted[:, 5].any()
    again = masked_blocks(blocks, TOKENIZER, seed=seed, copies=copies)
    assert torch.equal(again.input_ids, found.input_ids) and torch.equal(again.labels, found.labels)


def test_of_all_tokens_fifteen_in_a_hundred_are_hidden_and_four_fifths_of_them_by_the_mask(tmp_path):
    blocks = make_blocks(400, 64, vocabulary=300)
    found = masked_blocks(blocks, TOKENIZER, seed=0)
    counted = found.labels != IGNORE_INDEX
    assert counted.float().mean() == pytest.approx(SHARE, abs=0.01)
    assert (found.input_ids[counted] == TOKENIZER.mask_token_id).float().mean() == pytest.approx(0.8, abs=0.02)
    assert (found.input_ids == blocks.input_ids)[counted].float().mean() == pytest.approx(0.1, abs=0.02)
    save_blocks(found, tmp_path / "b.safetensors")
    again = load_blocks(tmp_path / "b.safetensors")
    assert again.masked and torch.equal(again.labels, found.labels)


def test_a_tokenizer_without_a_mask_is_refused():
    plain = train_tokenizer(["abc"], vocab_size=300, model_max_length=64)
    with pytest.raises(UserError, match="the parent's tokenizer has no mask token"):
        masked_blocks(make_blocks(), plain, seed=0)


def test_the_loss_of_hidden_tokens_is_that_of_their_own_places():
    student, teacher = (twin_of(config_of("BertForMaskedLM"), seed=seed) for seed in (0, 1))
    blocks = masked_blocks(make_blocks(4, 16, vocabulary=60), TOKENIZER, seed=1)
    blocks.input_ids.clamp_(max=63)
    found = batch_losses(student, teacher, blocks, Objective("forward_kl", 2.0, "tsq", 0.3)).fused
    with torch.no_grad():
        ours, theirs = (model(input_ids=blocks.input_ids).logits.double() for model in (student, teacher))
    counted = blocks.labels != IGNORE_INDEX
    hard = torch.nn.functional.cross_entropy(ours[counted], blocks.labels[counted])
    p, q = ((logits[counted] / 2).log_softmax(-1) for logits in (theirs, ours))
    soft = 4 * (p.exp() * (p - q)).sum(-1).mean()
    assert found.cross_entropy.mean().item() == pytest.approx(hard.item(), rel=1e-5)
    assert found.divergence.mean().item() == pytest.approx(soft.item(), rel=1e-5)
    assert (found.loss / counted.sum()).item() == pytest.approx((0.7 * soft + 0.3 * hard).item(), rel=1e-5)


MASKED = """\
name: masked
task: masked_language
parent:
  pretrain:
    config: {model_type: bert, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 4, num_attention_heads: 4,
             max_position_embeddings: 32}
    tokenizer: {vocab_size: 320}
    tokens: 20_000
    block_size: 32
data: {source: files, train: train.jsonl.gz, block_size: 32, heldout: heldout.jsonl.gz}
members:
  - name: half
    target: {dims: {num_hidden_layers: 2}}
    init: layers
  - name: cut
    target: {params: 0.7}
    seed: parent
  - name: other
    config: {model_type: distilbert, dim: 16, hidden_dim: 32, n_layers: 1, n_heads: 2}
distill: {tokens: 2048, learning_rate: 3e-3, temperature: 2, cross_entropy_weight: 0.3, selection_blocks: 4}
calibration: {num_blocks: 8}
evaluate: {heldout_blocks: 8}
baselines: [cut]
"""


def test_a_family_of_encoders_is_trained_cut_and_recovered_in_distilberts_way(recipe_folder, tmp_path):
    (recipe_folder / "masked.yaml").write_text(MASKED)
    folder = run_recipe(load_recipe(recipe_folder / "masked.yaml"), output=tmp_path / "run")
    rows = {row["name"]: row for row in json.loads((folder / "family.json").read_text())["rows"]}
    kl = {
        name: next(one["value"] for one in row["metrics"] if one["metric"] == "kl_to_teacher")
        for name, row in rows.items()
        if name != "parent"
    }
    assert set(kl) == {"half", "half-cut", "cut", "cut-cut", "other"} and kl["half"] < kl["half-cut"]
    member = AutoModelForMaskedLM.from_pretrained(folder / "members" / "half")
    assert member.config.num_hidden_layers == 2
    log = [json.loads(line) for line in next((folder / "stages").glob("half.distill-*/log.jsonl")).open()]
    assert "hidden_loss" in log[0]  # by default, along the layers that were copied
    assert "fill-mask" in (folder / "members" / "half" / "README.md").read_text()


def test_a_parent_without_a_head_for_hidden_tokens_is_refused(recipe_folder, tiny_parent, tmp_path):
    (recipe_folder / "masked.yaml").write_text(MASKED)
    text = MASKED[: MASKED.index("parent:")] + f"parent: {tiny_parent}\n" + MASKED[MASKED.index("data:") :]
    (recipe_folder / "wrong.yaml").write_text(text)
    with pytest.raises(UserError, match="LlamaForCausalLM has no head for hidden tokens; .* needs a ForMaskedLM model"):
        run_recipe(load_recipe(recipe_folder / "wrong.yaml"), output=tmp_path / "run")
