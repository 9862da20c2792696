"""Data that says less, or other things, than it seems to: keys of other rows, roles, labels, encodings."""

import pyarrow
import pyarrow.parquet
import pytest
from test_bad_rows import chat, tokenizer_with, write
from test_labels import labelled

from cascade.data.examples import class_names
from cascade.data.labels import label_of
from cascade.data.messages import conversation_tokens
from cascade.data.rows import read_rows
from cascade.data.sources import TextData, read_documents
from cascade.evaluation.heldout import HELDOUT
from cascade.runtime.errors import UserError

TOOLS = (
    "{%- for m in messages -%}<{{ m.role }}>{{ m.content }}{%- if m.tool_calls is defined -%}"
    "{{ m.tool_calls | tojson }}{%- endif -%}<end>{%- endfor -%}{%- if add_generation_prompt -%}<assistant>{%- endif -%}"
)


def calls(name, **arguments):
    return {"role": "assistant", "content": None, "tool_calls": [{"name": name, "arguments": arguments}]}


def chats(path, **options):
    """(documents, bad rows) of a file of chats."""
    data = TextData("files", {"train": (str(path),), "heldout": (str(path),)}, messages_field="messages", **options)
    bad = data.bad_row_counter()
    return read_documents(data, HELDOUT, bad=bad), bad.named()


def test_chats_have_the_same_ids_from_jsonl_and_from_parquet(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "weather"}, calls("weather", place="Rome")]},
        {"messages": [{"role": "user", "content": "add"}, calls("add", a=1, b={"c": 2})]},
        {"messages": chat("one", "first")},
    ]
    write(tmp_path / "a.jsonl", rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    tokenizer = tokenizer_with(TOOLS)
    ids = [
        [conversation_tokens(one, tokenizer) for one in chats(tmp_path / name)[0]] for name in ("a.jsonl", "a.parquet")
    ]
    assert ids[0] == ids[1] and len(ids[0]) == 3


def test_a_null_field_of_a_parquet_row_is_still_a_bad_row(tmp_path):
    rows = [{"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "a"}]}] + [
        {"messages": chat(f"question {n}", "answer")} for n in range(2)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    documents, bad = chats(tmp_path / "a.parquet", max_bad_rows=0.5)
    assert len(documents) == 2
    assert bad[0]["reason"] == (
        "field 'messages' has a message 1 (user) whose content is null; write \"\" for an empty text"
    )


def test_a_message_that_only_calls_tools_has_an_empty_content(tmp_path):
    without = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}
    path = write(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "a"}, calls("f"), without]}])
    (document,), bad = chats(path)
    assert [message["content"] for message in document] == ["a", "", ""] and not bad


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        (["user", "Assistant"], "has no answer of the assistant (its roles: user, Assistant)"),
        (["user", "gpt"], "has no answer of the assistant (its roles: user, gpt)"),
        (["system", "user"], "has no answer of the assistant (its roles: system, user)"),
        (
            ["user", "Assistant", "user", "assistant"],
            "has the roles 'assistant' and 'Assistant', which would not count; write them alike",
        ),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_conversation_without_an_answer_that_counts_is_a_bad_row(tmp_path, roles, reason, streaming):
    rows = [{"messages": chat(f"question {n}", "answer")} for n in range(2)]
    rows.append({"messages": [{"role": role, "content": "x"} for role in roles]})
    path = write(tmp_path / "a.jsonl", rows)
    documents, bad = chats(path, max_bad_rows=0.4, streaming=streaming)
    assert len(documents) == 2
    assert bad == [{"place": f"{path}:3", "reason": f"field 'messages' {reason}"}]
    with pytest.raises(UserError, match=r"1 of 3 rows cannot be used, the first: .*a.jsonl:3: field 'messages' has"):
        chats(path)


@pytest.mark.parametrize(
    "labels", [[0, True], ["true", 1], [True, "true"], ["Positive", "positive"], ["1e1", 10], ["+1", 1], ["False", 0]]
)
def test_labels_that_mean_one_class_are_refused_with_both_places(tmp_path, labels):
    other = [label for label in [0, 1] if labels == [0, True]]
    with pytest.raises(UserError, match=r"a.jsonl:\d+\) and .*a.jsonl:\d+\) look like one class and would be two"):
        class_names(labelled(tmp_path / "a.jsonl", [*labels, *other]))


def test_numbers_with_underscores_are_names_and_large_numbers_are_exact(tmp_path):
    assert class_names(labelled(tmp_path / "a.jsonl", ["1_0", "10"])) == ["10", "1_0"]
    large = [10**16, 10**16 + 1]
    assert class_names(labelled(tmp_path / "b.jsonl", large)) == [str(one) for one in large]


@pytest.mark.parametrize("blank", [" ", "\t\n"])
def test_a_blank_label_is_none(blank):
    with pytest.raises(UserError, match="a.jsonl:1: has no label"):
        label_of(blank, "a.jsonl:1")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "b.jsonl"])
def test_text_of_two_byte_letters_without_a_mark_is_refused(tmp_path, name, encoding):
    content = {"a.txt": "some text", "a.jsonl": '{"text": "a"}\n', "b.jsonl": '[{"text": "a"}]'}[name]
    (tmp_path / name).write_bytes(content.encode(encoding))
    with pytest.raises(UserError, match=rf"{name}.*NUL bytes, as in UTF-16 or a damaged file; save it as UTF-8"):
        list(read_rows(str(tmp_path / name), ["text"]))
