"""Text that a teacher writes: prompts, filters, resuming, and a student that learns from it."""

import gzip
import json

import pytest
import torch
from conftest import ROOT, make_model
from endpoint_server import chat_answer, serving
from hypothesis import given
from hypothesis import strategies as st

from cascade.data.blocks import IGNORE_INDEX
from cascade.data.messages import conversation_tokens
from cascade.data.sources import TextData, read_documents
from cascade.data.splits import SPLITS
from cascade.evaluation.heldout import HELDOUT
from cascade.models.checkpoint.load import load_tokenizer, resolve_model
from cascade.pipeline.run import run_generate, run_recipe
from cascade.recipe.generate import Filters, Generate
from cascade.recipe.load import load_recipe
from cascade.runtime.errors import RunError, UserError
from cascade.teacher.writing.answers import Answer, requests_of
from cascade.teacher.writing.filters import Filter, perplexity, repetition
from cascade.teacher.writing.generate import select_answers, write_answers
from cascade.teacher.writing.local import Teacher
from cascade.teacher.writing.prompts import beginnings, filled, prompts_of, read_prompts


@pytest.fixture(scope="module")
def teacher():
    """A random model that reads the built-in tokenizer's ids."""
    source = resolve_model("builtin:pico-python")
    return Teacher(make_model(vocab_size=2048, max_position_embeddings=64), load_tokenizer(source), "random")


def generate(settings, prompts, folder, *, teacher):
    """The dataset that a teacher here writes."""
    return select_answers(settings, write_answers(settings, prompts, folder, teacher=teacher))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "bad.jsonl:2: not JSON"),
        ('{"question": "x"}', r"bad.jsonl:2: .* expected \{\"prompt\""),
        ('{"prompt": "  "}', "bad.jsonl:2: "),
        ('{"messages": [{"role": "user"}]}', "bad.jsonl:2: "),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "bad.jsonl:2: its last message is the assistant's"),
        ("[1]", "bad.jsonl:2: "),
    ],
)
def test_a_malformed_line_of_prompts_is_named(tmp_path, line, message):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        list(read_prompts(tmp_path / "bad.jsonl"))


def test_prompt_files_may_be_compressed_and_a_broken_one_is_named(tmp_path):
    with gzip.open(tmp_path / "p.jsonl.gz", "wt") as file:
        file.write('{"prompt": "a"}\n\n{"messages": [{"role": "user", "content": "b"}]}\n')
    assert [prompt.text for prompt in prompts_of(list(read_prompts(tmp_path / "p.jsonl.gz")))] == ["a", "b"]
    (tmp_path / "p.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match=r"p.jsonl.gz: cannot be read"):
        list(read_prompts(tmp_path / "p.jsonl.gz"))
    with pytest.raises(UserError, match="no such file"):
        list(read_prompts(tmp_path / "q.jsonl"))


def test_templates_are_filled_with_every_combination_and_values_are_never_read_as_templates():
    texts = list(
        filled(["A {kind} about {topic} {{x}}.", "Hi"], {"kind": ["poem", "{topic}"], "topic": ["sea", "sky"]})
    )
    assert texts == ["A poem about sea {x}.", "A poem about sky {x}.", "A {topic} about sea {x}.",
                     "A {topic} about sky {x}.", "Hi"]  # fmt: skip
    with pytest.raises(UserError, match=r"names \{place\}, which has no values"):
        list(filled(["{place}"], {}))
    with pytest.raises(UserError, match=r"no template names \{place\}"):
        list(filled(["x"], {"place": ["here"]}))
    with pytest.raises(UserError, match="write {{ and }} for braces"):
        list(filled(["{"], {}))


def test_prompts_are_unique_and_drawn_evenly():
    prompts = prompts_of(["a", "b", "a", "c", "d"], system="Be brief.", count=2)
    assert [one.messages[-1]["content"] for one in prompts] == ["a", "c"]
    assert all(one.messages[0] == {"role": "system", "content": "Be brief."} for one in prompts)
    with pytest.raises(UserError, match="not one prompt"):
        prompts_of([])


def test_beginnings_are_the_first_words_as_they_stood(tmp_path):
    (tmp_path / "t.jsonl").write_text(
        "".join(json.dumps({"text": f"one  two\nthree {n} five"}) + "\n" for n in range(40))
    )
    found = beginnings([str(tmp_path / "t.jsonl")], "text", 3)
    assert set(found) == {"one  two\nthree"}


def test_an_answer_does_not_depend_on_where_its_writing_was_stopped(teacher, tmp_path):
    settings = Generate(prompts=["x"], max_new_tokens=12, batch_size=4, answers=2)
    prompts = prompts_of([f"def f{number}(" for number in range(7)])
    whole = generate(settings, prompts, tmp_path / "whole", teacher=teacher)
    assert len(whole.rows) + sum(whole.dropped.values()) == 14
    lines = (tmp_path / "whole" / "answers.jsonl").read_text().splitlines()
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "answers.jsonl").write_text("\n".join(lines[2:7]) + "\n" + lines[8][:20])
    assert generate(settings, prompts, tmp_path / "part", teacher=teacher) == whole
    assert generate(settings, prompts, tmp_path / "whole", teacher=teacher) == whole
    assert (tmp_path / "whole" / "answers.jsonl").read_text().splitlines() == lines  # nothing was asked again


def test_greedy_answers_are_the_teachers_likeliest_tokens(teacher, tmp_path):
    settings = Generate(prompts=["x"], max_new_tokens=5, temperature=0.0, filters=Filters(max_repetition=1.0))
    prompts = prompts_of(["def f(x):", "import os"])
    rows = generate(settings, prompts, tmp_path, teacher=teacher).rows
    for prompt, row in zip(prompts, rows, strict=True):
        ids = teacher.tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
        start = len(ids)
        for _ in range(5):
            with torch.no_grad():
                ids.append(int(teacher.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert row["messages"][-1]["content"] == teacher.tokenizer.decode(ids)[len(prompt.text) :], start


def test_a_prompt_that_leaves_no_room_is_refused(teacher, tmp_path):
    with pytest.raises(UserError, match="do not fit into the teacher's context of 64"):
        generate(Generate(prompts=["x"], max_new_tokens=60), prompts_of(["a b c d e f g"]), tmp_path, teacher=teacher)
    with pytest.raises(UserError, match="the teacher's tokenizer has no chat template"):
        generate(Generate(prompts=["x"], chat=True), prompts_of(["a"]), tmp_path, teacher=teacher)


def reasons(settings, texts, **options):
    judged = Filter(settings, **options)
    requests = requests_of(prompts_of([f"q{n}" for n in range(len(texts))]), 1, {})
    return [
        judged.reason_against(one, Answer("k", text, "stop", 1, 1)) for one, text in zip(requests, texts, strict=True)
    ]


def test_every_filter_drops_what_it_is_for_and_nothing_else():
    good = "the quick brown fox jumps over the lazy dog again"
    assert reasons(Filters(), [good, "", good, "a b c d " * 9]) == ["", "empty", "", "repetitive"]  # of other prompts
    judged, (one, two) = Filter(Filters()), requests_of(prompts_of(["q"]), 2, {})
    assert judged.reason_against(one, Answer("k", good, "stop", 1, 1)) == ""
    assert judged.reason_against(two, Answer("k", good.upper() + "\n", "stop", 1, 1)) == "duplicate"
    assert reasons(Filters(min_words=3, max_words=5), ["one two", "a b c", "a b c d e f"]) == [
        "too short",
        "",
        "too long",
    ]
    near = good.replace("again", "once")
    assert reasons(Filters(duplicates="near"), [good, near, "quite another thing it is"]) == ["", "near duplicate", ""]
    assert reasons(Filters(duplicates="keep"), [good, good]) == ["", ""]
    own = reasons(Filters(), [good, near], keep=lambda messages, answer: messages[-1]["content"] == "q1")
    assert own == ["own filter", ""]
    judged = reasons(
        Filters(max_perplexity=5.0), [good, near], perplexity_of=lambda prompt, text: 9.0 if text == good else 2.0
    )
    assert judged == ["perplexity", ""]


@given(st.lists(st.sampled_from("abcd"), min_size=4, max_size=30))
def test_repetition_is_the_share_of_runs_seen_before(words):
    runs = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    again = sum(run in runs[:place] for place, run in enumerate(runs))
    assert repetition(" ".join(words)) == pytest.approx(again / len(runs))


def test_perplexity_is_that_of_the_answer_alone(teacher):
    prompt = prompts_of(["def f("])[0]
    found = perplexity(teacher.model, teacher.tokenizer, prompt, "x): return x", chat=False)
    before, own = (teacher.tokenizer(text)["input_ids"] for text in ("def f(", "x): return x"))
    logits = teacher.model(input_ids=torch.tensor([before + own])).logits[0, len(before) - 1 : -1]
    assert found == pytest.approx(torch.nn.functional.cross_entropy(logits, torch.tensor(own)).exp().item(), rel=1e-4)


def test_only_the_answers_count_and_a_truncated_one_does_not_teach_to_stop():
    tokenizer = load_tokenizer(resolve_model("builtin:pico-python"))
    messages = [{"role": "user", "content": "def f(x):"}, {"role": "assistant", "content": "\n    return x"}]
    ids, labels = conversation_tokens(messages, tokenizer, template=False)
    assert tokenizer.decode(ids[:-1]) == "def f(x):\n    return x" and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode([one for one in labels if one != IGNORE_INDEX][:-1]) == "\n    return x"
    assert labels[-1] == ids[-1]
    messages[1]["truncated"] = True
    assert conversation_tokens(messages, tokenizer, template=False)[1][-1] == IGNORE_INDEX
    trimming = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}<end>{% endfor %}"
    tokenizer.chat_template = trimming + "{% if add_generation_prompt %}[assistant]{% endif %}"
    _, labels = conversation_tokens(messages, tokenizer)
    assert tokenizer.decode([one for one in labels if one != IGNORE_INDEX]) == "return x"
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<end>{% endfor %}" + (
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    for truncated, counted in ((False, "\n    return x<end>"), (True, "\n    return x")):
        messages[1]["truncated"] = truncated
        _, labels = conversation_tokens(messages, tokenizer)
        assert tokenizer.decode([one for one in labels if one != IGNORE_INDEX]) == counted


def test_answers_to_one_prompt_are_in_one_split(tmp_path):
    with (tmp_path / "d.jsonl").open("w") as file:
        for number in range(300):
            for answer in "ab":
                turns = [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": answer * 3}]
                file.write(json.dumps({"messages": turns}) + "\n")
    data = TextData("files", {"train": (str(tmp_path / "d.jsonl"),)}, messages_field="messages")
    asked = [{one[0]["content"] for one in read_documents(data, split)} for split in (*SPLITS[:3], HELDOUT)]
    assert sum(map(len, asked)) == len(set().union(*asked)) == 300


WRITTEN = """\
name: written
parent: {parent}
generate:
  templates: "{{word}} {{number}}"
  values: {{word: [the, def, class, return, self, value, index, import], number: [{numbers}]}}
  answers: 2
  max_new_tokens: 24
  filters: {{max_repetition: 1.0}}
data: {{source: generated, block_size: 16}}
members:
  - name: small
    target: {{dims: {{num_hidden_layers: 1}}}}
    init: layers
distill: {{teacher: text, tokens: 128, learning_rate: 3e-3, batch_size: 4, microbatch_size: 4, selection_blocks: 2}}
evaluate: {{heldout_blocks: 2}}
"""


NUMBERS = ", ".join(f'"{number}"' for number in range(40))


def test_a_family_learns_from_what_its_parent_has_written(tiny_parent, tmp_path):
    (tmp_path / "w.yaml").write_text(WRITTEN.format(parent=tiny_parent, numbers=NUMBERS))
    recipe = load_recipe(tmp_path / "w.yaml")
    found = run_generate(recipe, output=tmp_path / "run")
    assert found["prompts"] == 320 and found["answers"] == 640 and found["money"] == 0.0
    folder = run_recipe(recipe, output=tmp_path / "run")
    assert len(list((folder / "stages").glob("parent.generate-*"))) == 1  # found again, not written again
    with pytest.raises(UserError, match="belongs to another recipe.*\n.*generate.filters.min_words: 1 there, 2 now"):
        run_recipe(load_recipe(tmp_path / "w.yaml", ["generate.filters.min_words=2"]), output=tmp_path / "run")
    rows = {row["name"]: row for row in json.loads((folder / "family.json").read_text())["rows"]}
    assert rows["small"]["status"] == "done" and rows["small"]["tokens"]["teacher_labelled"] == 0


def test_a_filter_of_ones_own_is_a_function_in_a_file(tiny_parent, tmp_path):
    (tmp_path / "w.yaml").write_text(WRITTEN.format(parent=tiny_parent, numbers=NUMBERS))
    (tmp_path / "mine.py").write_text("def odd(messages, answer):\n    return messages[-1]['content'][-1] in '1357'\n")
    recipe = load_recipe(tmp_path / "w.yaml")
    found = run_generate(recipe, output=tmp_path / "run", filter_path=f"{tmp_path / 'mine.py'}:odd")
    assert found["rows"] <= 320 and found["dropped (own filter)"] > 0
    rows = [json.loads(line) for line in open(found["dataset"])]
    assert all(row["messages"][0]["content"][-1] in "1357" for row in rows)
    answers = (tmp_path / "run" / "answers" / "answers.jsonl").read_bytes()
    longer = run_generate(load_recipe(tmp_path / "w.yaml", ["generate.filters.min_words=3"]), output=tmp_path / "run")
    assert longer["dropped (too short)"] > 0  # another filter, the same answers
    assert (tmp_path / "run" / "answers" / "answers.jsonl").read_bytes() == answers
    with pytest.raises(UserError, match="there is no function 'even' in it"):
        run_generate(recipe, output=tmp_path / "run", filter_path=f"{tmp_path / 'mine.py'}:even")


def test_a_student_learns_from_an_endpoints_answers_through_its_own_chat_template(tiny_parent, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-mine")
    from shutil import copytree

    parent = copytree(tiny_parent, tmp_path / "parent")
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|endoftext|>{% endfor %}"
    (parent / "chat_template.jinja").write_text(template + "{% if add_generation_prompt %}<|assistant|>{% endif %}")

    def respond(body, number):
        return 200, {}, chat_answer("it is " + body["messages"][-1]["content"] + " " + "so " * (body["seed"] % 3))

    with serving(respond) as (url, received):
        prompts = [f"{word} {number}" for word in ("the", "def", "class", "return") for number in range(40)]
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": one}) + "\n" for one in prompts))
        smaller = [
            f"parent={parent}",
            f"generate.endpoint.url={url}",
            "generate.endpoint.model=big",
            f"generate.prompts={tmp_path / 'prompts.jsonl'}",
            "generate.filters={duplicates: exact}",
            "data.block_size=16",
            "members=[{name: small, target: {dims: {num_hidden_layers: 1}}, init: layers}]",
            "distill={teacher: text, tokens: 128, learning_rate: 3e-3, batch_size: 4, microbatch_size: 4}",
            "evaluate.heldout_blocks=2",
        ]
        recipe = load_recipe(ROOT / "recipes" / "black_box.yaml", smaller)
        folder = run_recipe(recipe, output=tmp_path / "run")
        count = len(received)
        run_recipe(recipe, output=tmp_path / "run")
    assert count == len(received) == 320
    provenance = json.loads(next((folder / "stages").glob("parent.generate-*/provenance.json")).read_text())
    assert provenance["teacher"] == f"big at {url}" and provenance["chat"] is True
    assert (folder / "members" / "small" / "model.safetensors").exists()


def test_a_dataset_is_read_back_however_late_its_first_truncated_answer_stands(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"q{n}", "truncated": False},
                          {"role": "assistant", "content": "word " * 700, "truncated": n == 3999}]} for n in range(4000)]  # fmt: skip
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = TextData("files", {"train": (str(tmp_path / "d.jsonl"),)}, messages_field="messages")
    assert sum(len(read_documents(data, split)) for split in (*SPLITS[:3], HELDOUT)) == 4000


def test_every_message_of_a_dataset_has_the_same_keys(teacher, tmp_path):
    settings = Generate(prompts=["x"], max_new_tokens=4, filters=Filters(max_repetition=1.0))
    for row in generate(settings, prompts_of(["a", "b", "c"]), tmp_path, teacher=teacher).rows:
        assert all(set(one) == {"role", "content", "truncated"} for one in row["messages"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("generate.max_new_tokens=511", "do not fit into the teacher's context of 512"),
        ("generate.num_prompts=9", "9 prompts are too few: none of them falls to the"),
        (
            "generate.endpoint={url: 'http://127.0.0.1:1/v1', model: m}",
            "the parent's tokenizer has no chat template for it",
        ),
        ("generate.chat=true", "the teacher's tokenizer has no chat template"),
    ],
)
def test_the_plan_finds_what_would_make_the_text_useless(tiny_parent, tmp_path, change, message):
    from cascade.planning.preview import preview

    (tmp_path / "w.yaml").write_text(WRITTEN.format(parent=tiny_parent, numbers=NUMBERS))
    with pytest.raises(UserError, match=message):
        preview(load_recipe(tmp_path / "w.yaml", [change]), tmp_path / "run")


def test_a_run_goes_on_from_a_generated_text_with_members_of_a_seed_of_their_own(tiny_parent, tmp_path):
    from cascade.planning.ownership import check_ownership

    (tmp_path / "w.yaml").write_text(WRITTEN.format(parent=tiny_parent, numbers=NUMBERS))
    recipe = load_recipe(tmp_path / "w.yaml", ["members.0.seed=parent"])
    run_generate(recipe, output=tmp_path / "run")
    check_ownership(tmp_path / "run", recipe)


def test_no_answer_left_is_said_with_the_reasons(teacher, tmp_path):
    settings = Generate(prompts=["x"], max_new_tokens=4, filters=Filters(min_words=50))
    with pytest.raises(RunError, match=r"none of 2 answers is left \(too short: 2\); look at generate.filters"):
        generate(settings, prompts_of(["a", "b"]), tmp_path, teacher=teacher)
