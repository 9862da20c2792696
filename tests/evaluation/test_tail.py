"""The long tail: deciles add up, slices are ordered, and confidence is what a softmax says."""

import json

import pytest
import torch
from conftest import make_blocks, make_model
from hypothesis import given
from hypothesis import strategies as st

from cascade.evaluation.heldout import block_metrics
from cascade.evaluation.long_tail import long_tail
from cascade.evaluation.token_scores import score_tokens
from cascade.models.architecture.head import Head


@given(count=st.integers(1, 200), parts=st.integers(1, 6), seed=st.integers(0, 1000))
def test_deciles_and_slices_add_up_to_the_whole(count, parts, seed):
    draw = torch.Generator().manual_seed(seed)
    entropy, teacher, loss = torch.rand(3, count, generator=draw)
    slices = torch.randint(0, parts, (count,), generator=draw)
    found = long_tail(entropy, teacher, loss, slices, [f"s{number}" for number in range(parts)])
    for kind in ("deciles", "slices"):
        if kind == "slices" and len(slices.unique()) > 5:
            continue
        assert sum(one["count"] for one in found[kind]) == count
        whole = sum(one["loss"] * one["count"] for one in found[kind]) / count
        assert whole == pytest.approx(loss.double().mean().item(), rel=1e-6)
    entropies = [one["entropy"] for one in found["deciles"]]
    assert entropies == sorted(entropies) and len(entropies) == min(10, count)
    assert max(one["count"] for one in found["deciles"]) - min(one["count"] for one in found["deciles"]) <= 1
    lost = [one["loss"] - one["teacher_loss"] for one in found["slices"]]
    assert lost == sorted(lost, reverse=True)


def test_confidence_is_the_softmaxs_largest_and_right_where_it_stands_on_the_target():
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(50, 8, generator=draw), torch.randn(30, 8, generator=draw)
    targets = torch.randint(0, 30, (50,), generator=draw)
    sure, right = score_tokens(hidden, Head(weight, None, 0.5, 4.0), targets).confidence
    p = (4.0 * torch.tanh(hidden @ weight.T * 0.5 / 4.0)).double().softmax(-1)
    assert torch.allclose(sure, p.amax(-1), rtol=1e-5)
    assert torch.equal(right.bool(), p.argmax(-1) == targets)


def test_a_student_that_is_its_teacher_loses_nothing_anywhere():
    model, blocks = make_model(), make_blocks()
    metrics, tail = block_metrics(model, model, blocks)
    assert all(one["loss"] == pytest.approx(one["teacher_loss"], rel=1e-6) for one in tail["deciles"] + tail["slices"])
    assert sum(one["count"] for one in tail["deciles"]) == blocks.num_counted()
    assert block_metrics(model, None, blocks)[1] is None
    error = next(metric for metric in metrics if metric.metric == "calibration_error")
    logits = model(input_ids=blocks.input_ids).logits[:, :-1].double().softmax(-1)
    # With 15 bins no gap is larger than the mean gap taken within finer ones; at least the overall gap.
    overall = (logits.amax(-1) - (logits.argmax(-1) == blocks.labels[:, 1:]).double()).mean().abs().item()
    assert overall - 1e-6 <= error.value <= 1


def test_slices_of_conversations_are_told_with_their_prompts(tiny_parent):
    from cascade.data.blocks import IGNORE_INDEX, TokenBlocks
    from cascade.models.checkpoint.load import ModelSource, load_tokenizer
    from cascade.pipeline.stages.evaluate import _with_beginnings

    source = ModelSource(tiny_parent, "tiny")
    ids = torch.tensor([load_tokenizer(source)("the question is long, the answer short")["input_ids"]])
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < 8, IGNORE_INDEX)
    (block,) = _with_beginnings({"slices": [{"slice": "0"}]}, TokenBlocks(ids, labels, 0.0), source)["slices"]
    assert block["slice"].startswith("the question is long")


def test_texts_from_outside_are_no_links_in_markdown():
    from cascade.report.tables import markdown_table

    table = markdown_table([["", "slice"], ["a", "![x](http://host/p.png) `code` <b> | &amp;"]])
    assert r"!\[x\](http://host/p.png) \`code\` &lt;b> \| &amp;amp;" in table


def test_the_report_shows_the_tail_of_each_member(tiny_family):
    tails = json.loads((tiny_family / "tail.json").read_text())
    assert list(tails) == ["big", "small"] and all(len(one["deciles"]) == 10 for one in tails.values())
    for name in ("report.md", "report.html"):
        text = (tiny_family / name).read_text()
        assert "The long tail" in text and "Where most was lost" in text and "least sure" in text
    assert all(len(one["slice"]) <= 80 and not one["slice"].isdigit() for one in tails["big"]["slices"])
