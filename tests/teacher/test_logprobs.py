"""Learning from an endpoint's top log-probabilities: the right ids, the right loss, and refusals that say why."""

import json
import math
from shutil import copytree

import pytest
import torch
from conftest import ROOT, SHARED, pack_tokens
from endpoint_server import chat_answer, serving
from hypothesis import given
from hypothesis import strategies as st

from cascade.data.blocks import IGNORE_INDEX, load_blocks, save_blocks
from cascade.data.endpoint_logprobs import ListedReader
from cascade.data.messages import conversation_tokens
from cascade.data.packing import Tokenized
from cascade.data.token_bytes import token_bytes
from cascade.data.token_targets import ListedTargets
from cascade.distillation.losses.divergences import ghost
from cascade.distillation.losses.fused import fused_loss
from cascade.distillation.options import Objective
from cascade.models.architecture.head import Head
from cascade.models.checkpoint.load import load_model, load_tokenizer, resolve_model
from cascade.pipeline.run import run_recipe
from cascade.recipe.generate import Endpoint
from cascade.recipe.load import load_recipe
from cascade.runtime.errors import UserError
from cascade.teacher.writing.answers import AnswerLog, requests_of
from cascade.teacher.writing.endpoint import ask
from cascade.teacher.writing.logprobs import top_logprobs
from cascade.teacher.writing.prompts import prompts_of
from cascade.teacher.writing.spending import Spending

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def pico():
    source = resolve_model("builtin:pico-python")
    return load_model(source), load_tokenizer(source)


def listed_rows(counts, vocabulary, width, draw):
    """So many ids at each place, with probabilities that leave something over (or, with all ids listed, nothing)."""
    ids = torch.full((len(counts), width), -1)
    log_p = torch.full((len(counts), width), -math.inf)
    for place, count in enumerate(counts):
        ids[place, :count] = torch.randperm(vocabulary, generator=draw)[:count]
        p = torch.rand(count + 1, generator=draw) + 0.01
        p = p / (p[:-1].sum() if count == vocabulary or place % 3 == 2 else p.sum())
        log_p[place, :count] = p[:-1].log()
    return ListedTargets(ids, log_p)


def reference(logits, rows, targets, share):
    """By autograd in float64, place by place, straight from the definition."""
    log_q = logits.log_softmax(-1)
    total = 0.0
    for place in range(len(logits)):
        known = rows.ids[place] >= 0
        ids, log_p = rows.ids[place][known], rows.log_p[place][known].double()
        kl = (log_p.exp() * (log_p - log_q[place, ids])).sum()
        rest = 1 - log_p.exp().sum()
        others = torch.tensor([one for one in range(logits.shape[1]) if one not in ids.tolist()], dtype=torch.int64)
        if rest > 1e-6:
            kl = kl + rest * (rest.log() - log_q[place, others].logsumexp(-1))
        total = total + (1 - share) * kl - share * log_q[place, targets[place]]
    return total


@given(
    seed=st.integers(0, 10_000),
    share=st.sampled_from([0.0, 0.3]),
    softcap=st.sampled_from([None, 5.0]),
    bias=st.booleans(),
)
def test_loss_and_gradients_from_listed_ids_equal_the_float64_reference(seed, share, softcap, bias):
    draw = torch.Generator().manual_seed(seed)
    vocabulary, count = 17, 9
    counts = [0, 1, 3, 5, vocabulary, 2, 4, 1, 5]
    rows = listed_rows(counts, vocabulary, vocabulary, draw)
    hidden = torch.randn(count, 6, generator=draw)
    weight, offset = torch.randn(vocabulary, 6, generator=draw), torch.randn(vocabulary, generator=draw)
    targets = torch.randint(0, vocabulary, (count,), generator=draw)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()] + ([offset.requires_grad_()] if bias else [])
    head = Head(weight, offset if bias else None, 1.0, softcap)
    found = fused_loss(hidden, head, targets, Objective(cross_entropy_weight=share), known=rows, chunk_size=4)
    gradients = torch.autograd.grad(found.loss, leaves)

    double = [one.detach().double().requires_grad_() for one in leaves]
    logits = double[0] @ double[1].T + (double[2] if bias else 0)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    wanted = reference(logits, rows, targets, share)
    assert found.loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    for ours, theirs in zip(gradients, torch.autograd.grad(wanted, double), strict=True):
        assert (ours - theirs).norm() <= 2e-5 * theirs.norm()
    agrees = [one for one in range(count) if counts[one]]
    top = rows.ids.gather(1, rows.log_p.argmax(1, keepdim=True))[:, 0]
    assert found.agrees[agrees].tolist() == (logits.argmax(-1) == top)[agrees].float().tolist()


def test_what_a_teachers_own_top_k_lists_costs_what_ghost_top_k_does():
    draw = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(8, 40, generator=draw), 3 * torch.randn(8, 40, generator=draw)
    log_p = teacher.log_softmax(-1)
    top = log_p.topk(6)
    value, gradient = ghost(student.log_softmax(-1), top.indices, top.values)
    student.requires_grad_()
    found = fused_loss(
        student, Head(torch.eye(40), None), torch.zeros(8, dtype=torch.int64), Objective(),
        known=ListedTargets(top.indices, top.values),
    )  # fmt: skip
    assert torch.allclose(found.divergence, value, rtol=1e-4)
    assert torch.allclose(torch.autograd.grad(found.loss, student)[0], gradient, atol=1e-6)


TEXTS = ["def f(x):\n    return 'naïve — 你好 🙂'  # tabs\t\tand  spaces", " leading", "x" * 50, "<|endoftext|>"]


@pytest.mark.parametrize("name", ["pico-python", "stories260K"])
def test_ids_bytes_put_together_are_the_text(name, pico):
    if name == "stories260K":
        if not SHARED.is_dir():
            pytest.skip("the shared data folder is not beside this checkout")
        tokenizer = load_tokenizer(resolve_model(str(SHARED / "models" / name)))
    else:
        tokenizer = pico[1]
    known = token_bytes(tokenizer)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        # SentencePiece's puts a space before every text.
        assert b"".join(known[one] for one in ids).decode() in (text, f" {text}")


@torch.no_grad()
def say(model, tokenizer, context, count, top):
    """A greedy continuation: its text, its tokens' bytes and log-probabilities, each with the likeliest `top`."""
    raw = token_bytes(tokenizer)
    ids, cache, said = tokenizer(context, add_special_tokens=False, return_tensors="pt")["input_ids"], None, []
    for _ in range(count):
        found = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache, log_p = found.past_key_values, found.logits[0, -1].log_softmax(-1)
        best = log_p.topk(top)
        said.append((raw[best.indices[0]], best.values[0].item(),
                     [(raw[one], value.item()) for one, value in zip(best.indices, best.values, strict=True)]))  # fmt: skip
        ids = best.indices[:1][None]
    return b"".join(token for token, _, _ in said), said


def as_chat(text, said, *, with_bytes=True):
    def one(token, value):
        return {"token": token.decode(errors="replace"), "logprob": value, "bytes": list(token) if with_bytes else None}

    body = chat_answer(text.decode(errors="replace"), finish_reason="length")
    content = [one(token, value) | {"top_logprobs": [one(*each) for each in top]} for token, value, top in said]
    body["choices"][0]["logprobs"] = {"content": content}
    return body


def as_completion(text, said):
    tops = [{token.decode(errors="replace"): value for token, value in top} for _, _, top in said]
    return {
        "choices": [{"text": text.decode(errors="replace"), "finish_reason": "length", "logprobs": {
            "tokens": [token.decode(errors="replace") for token, _, _ in said],
            "token_logprobs": [value for _, value, _ in said],
            "top_logprobs": tops,
        }}],
        "usage": {"prompt_tokens": 3, "completion_tokens": len(said)},
    }  # fmt: skip


@pytest.mark.parametrize("shape", ["chat", "chat without bytes", "completions"])
def test_each_token_of_an_answer_gets_the_teachers_own_likeliest_ids(pico, shape):
    model, tokenizer = pico
    reader = ListedReader(tokenizer)
    for prompt in ["def mean(values):\n", "import os\n\nclass Walker", "for key, value in", "# what the é is for\n"]:
        text, said = say(model, tokenizer, prompt, 12, 5)
        body = as_completion(text, said) if shape == "completions" else as_chat(text, said, with_bytes=shape == "chat")
        choice = body["choices"][0]
        answer = {"role": "assistant", "content": text.decode(errors="replace"), "truncated": True}
        answer["top_logprobs"] = json.dumps(top_logprobs([choice["logprobs"]]))
        messages = [{"role": "user", "content": prompt}, answer]
        ids, labels = conversation_tokens(messages, tokenizer, template=False)
        listed = reader.read(answer, ids, labels)
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for place, one in enumerate(listed):
            assert (one == []) == (labels[place] == IGNORE_INDEX)
            if len(one) > 1:
                top = log_p[place - 1].topk(5)
                assert [number for number, _ in sorted(one, key=lambda each: -each[1])] == top.indices.tolist()
                assert max(abs(value - log_p[place - 1, number].item()) for number, value in one) < 1e-3
    reader.require_agreement("here")
    assert reader.num_aligned >= 0.9 * reader.num_tokens > 30


def test_listed_targets_survive_packing_saving_and_choosing_rows(tmp_path):
    documents = [Tokenized([1, 2, 3], None, 3, [[(1, -0.5)], [], [(3, -0.1), (4, -3.0)]]),
                 Tokenized([5, 6, 7, 8, 9], None, 5, [[(one, -1.0)] for one in (5, 6, 7, 8, 9)])]  # fmt: skip
    save_blocks(pack_tokens(documents, block_size=4), tmp_path / "b.safetensors")
    blocks = load_blocks(tmp_path / "b.safetensors").rows(torch.tensor([1, 0]))
    assert blocks.known.ids.tolist() == [
        [[6, -1], [7, -1], [8, -1], [9, -1]], [[1, -1], [-1, -1], [3, 4], [5, -1]]
    ]  # fmt: skip
    assert blocks.known.log_p[1, 2].tolist() == pytest.approx([-0.1, -3.0])
    with pytest.raises(ValueError, match="all documents say"):
        pack_tokens([documents[0], Tokenized([5, 6, 7, 8, 9], None, 5)], block_size=4)


@pytest.fixture
def parent(tiny_parent, tmp_path):
    folder = copytree(tiny_parent, tmp_path / "parent")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def run(url, parent, tmp_path, *changes, api="chat"):
    """recipes/logprobs.yaml, smaller, with a teacher at this address."""
    prompts = [f"{word} {number}" for word in ("the", "def", "class", "return") for number in range(40)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": one}) + "\n" for one in prompts))
    smaller = [
        f"parent={parent}",
        f"generate.endpoint={{url: '{url}', model: big, top_logprobs: 5, api: {api}}}",
        f"generate.prompts={tmp_path / 'prompts.jsonl'}",
        "generate.answers=1",
        "generate.max_new_tokens=8",
        "generate.filters={max_repetition: 1.0, duplicates: keep}",
        "data.block_size=16",
        "members=[{name: small, target: {dims: {num_hidden_layers: 1}}, init: layers}]",
        "distill={teacher: logprobs, tokens: 4096, learning_rate: 3e-3, batch_size: 4, microbatch_size: 4}",
        "evaluate.heldout_blocks=2",
        "baselines=[ce]",
    ]
    return run_recipe(load_recipe(ROOT / "recipes" / "logprobs.yaml", [*smaller, *changes]), output=tmp_path / "run")


def respond_as(pico, api, tops=(5,)):
    """The built-in model behind an endpoint, sometimes with fewer log-probabilities than were asked for."""
    model, tokenizer = pico

    def respond(body, number):
        if api == "chat":
            assert body["logprobs"] is True and body["top_logprobs"] == 5
            context = f"<|user|>{body['messages'][-1]['content']}<|endoftext|><|assistant|>"
        else:
            assert body["logprobs"] == 5
            context = body["prompt"]
        answer = say(model, tokenizer, context, 4, tops[number % len(tops)])
        return 200, {}, as_chat(*answer) if api == "chat" else as_completion(*answer)

    return respond


@pytest.mark.parametrize("api", ["chat", pytest.param("completions", marks=pytest.mark.nightly)])
def test_a_family_learns_from_the_log_probabilities_of_a_real_model_behind_an_endpoint(pico, parent, tmp_path, api):
    with serving(respond_as(pico, api, tops=(5, 3, 1))) as (url, _):
        folder = run(url, parent, tmp_path, api=api)
    data = load_blocks(next((folder / "stages").glob("parent.data-*/train.safetensors")))
    assert data.known is not None and (data.known.ids >= 0).sum(-1).unique().tolist()[-1] == 5
    logs = {path.parent.name.split("-")[0]: [json.loads(line) for line in path.open()]
            for path in (folder / "stages").glob("small.*/log.jsonl")}  # fmt: skip
    taught, text = logs["small.distill"], logs["small.baseline"]
    assert taught[0]["divergence"] > 0 and 0 < taught[0]["teacher_entropy"] < math.log(6)
    assert "divergence" not in text[0] and taught[0]["cross_entropy"] == pytest.approx(
        text[0]["cross_entropy"], rel=1e-5
    )
    assert sum(one["divergence"] for one in taught[-8:]) < 0.8 * sum(one["divergence"] for one in taught[:8])


def test_an_endpoint_without_log_probabilities_is_found_out_with_its_first_answer(parent, tmp_path):
    with serving(lambda body, number: (200, {}, chat_answer("yes"))) as (url, received):
        with pytest.raises(UserError, match="come without log-probabilities; leave generate.endpoint.top_logprobs out"):
            run(url, parent, tmp_path, "generate.endpoint.concurrency=1")
    assert len(received) == 1


def test_log_probabilities_of_another_tokenizer_are_refused_with_the_share_that_agrees(parent, tmp_path):
    def respond(body, number):
        letters = [(letter.encode(), -0.1, [(letter.encode(), -0.1)]) for letter in "return the value"]
        return 200, {}, as_chat(b"return the value", letters)

    with serving(respond) as (url, _):
        with pytest.raises(UserError, match=r"data.train: only \d+% of the answers' tokens are the teacher's, too"):
            run(url, parent, tmp_path)

    # What was paid for is not lost: the same directory goes on with the text alone.
    with serving(respond) as (other, received):
        again = [f"generate.endpoint.url={url}", "distill.teacher=text", "baselines=[]"]
        assert (run(other, parent, tmp_path, *again) / "members" / "small").exists() and not received


def test_one_answer_without_log_probabilities_among_others_is_an_answer(tmp_path):
    def respond(body, number):
        return 200, {}, as_chat(b"yes", [(b"yes", -0.1, [(b"yes", -0.1)])]) if number != 1 else chat_answer("no")

    with serving(respond) as (url, _):
        endpoint = Endpoint(url=url, model="m", top_logprobs=5, concurrency=1)
        wanted = requests_of(prompts_of(["a", "b", "c"]), 1, {})
        log = AnswerLog(tmp_path / "answers.jsonl")
        ask(endpoint, wanted, log, Spending(tmp_path / "s.json", endpoint), sampling={})
    assert [log.answers[one.key].text for one in wanted] == ["yes", "no", "yes"]


def test_an_end_token_that_the_server_lists_is_no_agreement(pico):
    tokenizer = pico[1]
    reader = ListedReader(tokenizer)
    ids = tokenizer(" return", add_special_tokens=False)["input_ids"]
    said = [[" ret", [[" ret", -0.1]]], ["urn", [["urn", -0.1]]], ["<|endoftext|>", [["<|endoftext|>", -0.1]]]]
    message = {"role": "assistant", "content": " return", "top_logprobs": json.dumps(said)}
    whole = [*ids, tokenizer.eos_token_id]
    reader.read(message, whole, whole)
    assert (reader.num_tokens, reader.num_aligned) == (len(ids), 0)


def test_log_probabilities_that_are_no_numbers_are_left_out():
    one = {"token": "a", "logprob": -0.5, "bytes": [97]}
    wrong = [{"token": "b", "logprob": -math.inf}, {"token": "c", "logprob": math.nan}, {"token": "d", "logprob": None}]
    assert top_logprobs([{"content": [one | {"top_logprobs": [one, *wrong]}]}]) == [["a", [["a", -0.5]]]]
    assert top_logprobs(None) == top_logprobs([{}]) == top_logprobs([{"content": None}]) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("distill.features.hidden=mse", "only the parent's inside can be seen; remove distill.features"),
        ("generate.endpoint.top_logprobs=null", "it needs generate.endpoint.top_logprobs"),
        ("distill.temperature=2", "allow forward_kl at temperature 1 only"),
        ("distill.loss=jsd", "allow forward_kl at temperature 1 only"),
        ("generate.endpoint.top_logprobs=21", "less than or equal to 20"),
    ],
)
def test_what_log_probabilities_cannot_do_is_refused_with_the_recipe(parent, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        run("http://127.0.0.1:1/v1", parent, tmp_path, change)


def test_tokens_whose_text_cannot_be_told_are_refused():
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordPiece({"a": 0, "##b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    )
    with pytest.raises(UserError, match="cannot be told"):
        token_bytes(tokenizer)
