"""Rows that cannot be used: left out, counted and named, or refused; the same in every place that reads rows."""

import dataclasses
import json

import pytest
from click.testing import CliRunner
from test_documents import Killed, assert_same

from cascade.cli.main import main
from cascade.data import streaming
from cascade.data.bad_rows import BadRows
from cascade.data.blocks import IGNORE_INDEX
from cascade.data.framing import framing_of
from cascade.data.look import example_text, look_at
from cascade.data.messages import conversation_examples, conversation_tokens, shown_tokens
from cascade.data.packing import BlockFormat
from cascade.data.prepare import prepare_blocks
from cascade.data.rows import Place
from cascade.data.sources import TextData, read_documents
from cascade.evaluation.heldout import HELDOUT
from cascade.models.checkpoint.load import BUILTIN_FOLDER, copy_companions, load_tokenizer, resolve_model
from cascade.pipeline.run import run_recipe
from cascade.planning.preview_data import data_lines
from cascade.recipe.load import load_recipe
from cascade.report.skipped_rows import merged_skipped
from cascade.runtime.errors import UserError
from cascade.teacher.writing.prompts import read_prompts

STABLE = (
    "{%- for m in messages -%}"
    "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('roles must alternate') }}{%- endif -%}"
    "<{{ m.role }}>{{ m.content }}<end>{%- endfor -%}{%- if add_generation_prompt -%}<assistant>{%- endif -%}"
)
QWEN3 = (  # as Qwen3's: an empty thinking block before the answer after the last question alone
    "{%- set ns = namespace(last=0) -%}"
    "{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
    "{%- for m in messages -%}{%- if m.role == 'assistant' and loop.index0 > ns.last -%}"
    "<assistant>\n<think>\n\n</think>\n\n{{ m.content }}<end>"
    "{%- else -%}<{{ m.role }}>\n{{ m.content }}<end>{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<assistant>\n' }}{%- endif -%}"
)


def tokenizer_with(template):
    found = load_tokenizer(resolve_model("builtin:pico-python"))
    found.chat_template = template
    return found


def chat(*texts):
    roles = ("user", "assistant") * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def counted(labels, tokenizer):
    return tokenizer.decode([label for label in labels if label != IGNORE_INDEX])


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_each_turn_is_an_example_rendered_as_when_it_was_the_last():
    tokenizer, messages = tokenizer_with(QWEN3), chat("one", "first", "two", "second")
    first, second = conversation_examples(messages, tokenizer)
    think = "<think>\n\n</think>\n\n"
    assert tokenizer.decode(first.ids) == f"<user>\none<end><assistant>\n{think}first<end>"
    assert counted(first.labels, tokenizer) == f"{think}first<end>"
    assert tokenizer.decode(second.ids) == (
        f"<user>\none<end><assistant>\nfirst<end><user>\ntwo<end><assistant>\n{think}second<end>"
    )
    assert counted(second.labels, tokenizer) == f"{think}second<end>"
    for example in (first, second):
        assert tokenizer.decode(example.ids) == tokenizer.apply_chat_template(example.messages, tokenize=False)


def test_with_turns_last_only_the_last_answer_counts():
    for template, answer in ((QWEN3, "<think>\n\n</think>\n\nsecond<end>"), (STABLE, "second<end>")):
        tokenizer = tokenizer_with(template)
        (example,) = conversation_examples(chat("one", "first", "two", "second"), tokenizer, turns="last")
        assert counted(example.labels, tokenizer) == answer
    (joined,) = conversation_examples(chat("one", " first", "two", " second"), tokenizer, template=False, turns="last")
    assert counted(joined.labels, tokenizer).startswith(" second")


def test_a_template_that_leaves_earlier_turns_alone_keeps_one_example_with_all_answers():
    tokenizer, messages = tokenizer_with(STABLE), chat("one", "first", "two", "second")
    (example,) = conversation_examples(messages, tokenizer)
    assert (example.ids, example.labels) == conversation_tokens(messages, tokenizer)
    assert tokenizer.decode(example.ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert counted(example.labels, tokenizer) == "first<end>second<end>"


def test_a_truncated_last_answer_of_a_rewriting_template_does_not_teach_to_stop():
    tokenizer, messages = tokenizer_with(QWEN3), chat("one", "first", "two", "second")
    messages[-1]["truncated"] = True
    assert [counted(one.labels, tokenizer).endswith("<end>") for one in conversation_examples(messages, tokenizer)] == [
        True,
        False,
    ]


def test_what_counts_can_be_shown():
    tokenizer = tokenizer_with(STABLE)
    (example,) = conversation_examples(chat("open a file", "open(name)"), tokenizer)
    shown = example_text(shown_tokens(example, tokenizer))
    assert shown.replace("[[", "").replace("]]", "") == tokenizer.decode(example.ids)
    assert "[[" in shown and shown.index("[[") >= shown.index("<assistant>") and shown.endswith("open(name)<end>]]")


GOOD = [{"messages": chat(f"question {number}", f"answer {number}")} for number in range(400)]
BAD_CHATS = {
    "two questions": {"messages": [{"role": "user", "content": "again"}, *chat("question", "answer")]},
    "content null": {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}]},
    "messages null": {"messages": None},
    "no messages": {"messages": []},
    "no field": {"chat": []},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
    "starts with the assistant": {"messages": [{"role": "assistant", "content": "x"}]},
}
BAD_TEXTS = {
    "null": {"text": None},
    "number": {"text": 7},
    "list": {"text": ["a"]},
    "no field": {"body": "x"},
    "half a letter": {"text": "\ud83d"},
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", [*BAD_CHATS, *(f"text: {name}" for name in BAD_TEXTS)])
def test_one_bad_row_of_hundreds_is_left_out_counted_and_named(tmp_path, kind, streaming):
    text = kind.startswith("text: ")
    good = [{"text": f"the text number {number}"} for number in range(400)] if text else GOOD
    row = BAD_TEXTS[kind.removeprefix("text: ")] if text else BAD_CHATS[kind]
    data = TextData("files", {}, messages_field="" if text else "messages", streaming=streaming)
    whole, found = (
        dataclasses.replace(data, files=dict.fromkeys(("train", "heldout"), (write(tmp_path / name, rows),)))
        for name, rows in {"good.jsonl": good, "bad.jsonl": [*good[:40], row, *good[40:]]}.items()
    )
    tokenizer, bad = tokenizer_with(STABLE), found.bad_row_counter()
    options = {"block_format": BlockFormat(block_size=32, document_masks=not text)}
    blocks = prepare_blocks(found, HELDOUT, tokenizer, bad=bad, **options)
    assert_same(blocks, prepare_blocks(whole, HELDOUT, tokenizer, **options))
    record = bad.record()
    assert (record["rows"], record["skipped"]) == (401, 1)
    assert record["named"][0]["place"] == f"{tmp_path}/bad.jsonl:41" and record["named"][0]["reason"]
    with pytest.raises(UserError, match=r"bad.jsonl:41: .*data.bad_rows: skip"):
        prepare_blocks(dataclasses.replace(found, bad_rows="stop"), HELDOUT, tokenizer, **options)


@pytest.mark.parametrize("streaming", [False, True])
def test_more_bad_rows_than_the_recipe_allows_are_refused(tmp_path, streaming):
    rows = [{"text": number if number % 50 == 7 else f"text {number}"} for number in range(400)]
    path = write(tmp_path / "a.jsonl", rows)
    data = TextData("files", {"train": (path,), "heldout": (path,)}, streaming=streaming)
    said = (
        r"8 of 400 rows cannot be used, the first: .*a.jsonl:8: field 'text' is no text: 7. That is 2.0%, and data.max"
    )
    tokenizer = tokenizer_with(STABLE)
    with pytest.raises(UserError, match=said):
        prepare_blocks(data, HELDOUT, tokenizer, BlockFormat(block_size=32))
    bad = BadRows("skip", 0.02)
    prepare_blocks(data, HELDOUT, tokenizer, BlockFormat(block_size=32), bad=bad)
    assert bad.record()["skipped"] == 8


def test_texts_without_a_letter_are_counted_and_are_no_reason_to_stop(tmp_path):
    rows = [{"text": " \n" if number % 3 else f"text {number}"} for number in range(30)]
    path, bad = write(tmp_path / "a.jsonl", rows), BadRows()
    data = TextData("files", {"train": (path,), "heldout": (path,)})
    assert len(read_documents(data, HELDOUT, bad=bad)) == 10
    read_documents(data, HELDOUT, bad=bad)  # no row counts twice
    assert bad.record() == {"rows": 30, "skipped": 0, "empty": 20, "named": []}


def test_a_stopped_stream_goes_on_with_its_count_of_bad_rows(tmp_path, monkeypatch):
    rows = [{"text": 7 if number in (5, 1500) else f"document {number} has these words"} for number in range(1800)]
    path = write(tmp_path / "a.jsonl", rows)
    data = TextData("files", {"train": (path,), "heldout": (path,)}, streaming=True)
    tokenizer, tokens, calls = tokenizer_with(STABLE), streaming.encoded, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        return tokens(*args)

    block_format = BlockFormat(block_size=32, max_blocks=10_000, framing=framing_of(tokenizer, "data"))
    arguments, folder = (data, HELDOUT, tokenizer, block_format), tmp_path / "cursor"
    whole = streaming.stream_blocks(*arguments, folder=tmp_path / "other")
    monkeypatch.setattr(streaming, "encoded", dies)
    with pytest.raises(Killed):
        streaming.stream_blocks(*arguments, folder=folder, shard_tokens=3000)
    bad = BadRows()
    assert_same(streaming.stream_blocks(*arguments, folder=folder, shard_tokens=3000, bad=bad), whole)
    assert [row["place"] for row in bad.named()] == [f"{path}:6", f"{path}:1501"]


def test_a_plan_tries_all_of_the_first_thousand_chats_and_a_sample_of_the_others(tmp_path):
    rows = [GOOD[number % 400] for number in range(5000)]
    data = TextData("files", {"train": (write(tmp_path / "a.jsonl", rows),)}, messages_field="messages")
    found = look_at(data, "train", data.files["train"], tokenizer_with(STABLE))
    assert found["rows"] == 5000 and 1000 < found["tried_with_template"] < 3500
    assert found["files"] == 1 and found["example"][0][0].startswith("<user>question 0")


def test_a_template_that_refuses_all_is_refused_by_the_plan(tmp_path):
    path = write(tmp_path / "a.jsonl", [BAD_CHATS["two questions"]] * 30)
    data = TextData("files", {"train": (path,)}, messages_field="messages")
    with pytest.raises(
        UserError, match=r"30 of 30 rows cannot be used, the first: .*a.jsonl:1: .*roles must alternate"
    ):
        look_at(data, "train", data.files["train"], tokenizer_with(STABLE))
    with pytest.raises(UserError, match="has no chat template; with data.template: none"):
        look_at(data, "train", data.files["train"], tokenizer_with(None))


def test_an_error_inside_a_template_is_told_as_its_refusal():
    for template in ("{{ messages[0].content + 1 }}", "{{ messages[9]['content'] }}", "{{ 1 // 0 }}"):
        with pytest.raises(UserError, match="the parent's chat template refuses it: "):
            conversation_examples(chat("a", "b"), tokenizer_with(template))


def test_bad_prompts_are_left_out_and_counted_and_byte_order_marks_are_no_part_of_them(tmp_path):
    lines = [json.dumps({"prompt": f"say {number}", "meta": [number]}) for number in range(200)]
    lines[7], lines[9] = json.dumps({"prompt": None}), json.dumps({"messages": chat("a"), "meta": "x"})
    (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    bad = BadRows()
    prompts = list(read_prompts(tmp_path / "p.jsonl", bad))
    assert len(prompts) == 199 and prompts[0] == "say 0" and prompts[8] == chat("a")
    assert [row["place"] for row in bad.named()] == [f"{tmp_path}/p.jsonl:8"]


def test_what_two_stages_left_out_is_merged_without_a_row_twice(tmp_path):
    for name, numbers in {"data": (1, 2), "evaluation": (2, 9)}.items():
        bad = BadRows()
        for number in numbers:
            bad.read(Place("a.jsonl", number, "line"))
            bad.skip(Place("a.jsonl", number, "line"), "it is bad")
        (tmp_path / name).mkdir()
        (tmp_path / name / "skipped.json").write_text(json.dumps(bad.record()))
    merged = merged_skipped({"text": tmp_path / "data", "held-out": tmp_path / "evaluation", "none": tmp_path})
    assert {name: [row["place"] for row in one["named"]] for name, one in merged.items()} == {
        "text": ["a.jsonl:1", "a.jsonl:2"],
        "held-out": ["a.jsonl:9"],
    }
    assert merged["held-out"]["skipped"] == 1


def test_plan_and_report_of_a_run_name_the_rows_that_were_left_out(tiny_parent, tmp_path):
    from shutil import copytree

    parent = copytree(tiny_parent, tmp_path / "parent")
    copy_companions(BUILTIN_FOLDER / "pico-python", parent)
    (parent / "chat_template.jinja").write_text(STABLE)
    write(tmp_path / "chat.jsonl", [*GOOD[:50], BAD_CHATS["two questions"], *GOOD[50:], BAD_CHATS["content null"]])
    (tmp_path / "r.yaml").write_text(
        "name: r\nparent: ./parent\nmembers: []\nevaluate: {heldout_blocks: 2}\n"
        "data: {source: files, train: chat.jsonl, messages_field: messages, block_size: 16}\n"
    )
    result = CliRunner().invoke(main, ["plan", str(tmp_path / "r.yaml"), "--output", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert "data.train: 1 file, 402 rows." in result.output and "chat.jsonl:51: the parent's chat" in result.output
    assert "<user>question 0<end><assistant>" in result.output.replace("[[", "")
    folder = run_recipe(load_recipe(tmp_path / "r.yaml"), output=tmp_path / "run")
    report = (folder / "report.md").read_text()
    assert "## Rows left out" in report and "2 of 402 rows left out" in report
    assert "chat.jsonl:51" in report and "chat.jsonl:402" in report


def test_the_legend_of_a_plan_names_the_signs_that_its_example_has():
    found = {"example": [["question", False], ["answer", True]]}
    lines = data_lines(
        {"files": {"train": found | {"skipped": 0}}, "passages": None, "classes": None}
        | dict.fromkeys(("labels_read", "prompts"))
    )
    assert lines == ["The first conversation; what counts for the loss stands between [[ and ]]:\nquestion[[answer]]"]
