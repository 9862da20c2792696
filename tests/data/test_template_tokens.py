"""Tokens without a row are found by the plan, also those that a chat template writes, and in streamed text."""

import pytest
from test_bad_rows import GOOD, STABLE, tokenizer_with, write

from cascade.data.look import look_at
from cascade.data.sources import TextData
from cascade.runtime.errors import UserError

MARKED = STABLE.replace("<end>", "<mark>")


def marked(template):
    tokenizer = tokenizer_with(template)
    rows = len(tokenizer)
    tokenizer.add_tokens(["<mark>"], special_tokens=True)
    return tokenizer, rows


def test_a_token_that_a_chat_template_writes_and_the_model_lacks_is_refused(tmp_path):
    assert MARKED != STABLE
    path = write(tmp_path / "a.jsonl", GOOD[:30])
    data = TextData("files", {"train": (path,)}, messages_field="messages")
    tokenizer, rows = marked(MARKED)
    with pytest.raises(
        UserError, match=rf"a.jsonl:1: it has the token '<mark>' \(id {rows}\), and only ids below {rows}"
    ):
        look_at(data, "train", data.files["train"], tokenizer, rows)
    assert look_at(data, "train", data.files["train"], tokenizer, rows + 1)["skipped"] == 0
    assert look_at(data, "train", data.files["train"], marked(STABLE)[0], rows)["skipped"] == 0


def test_a_token_of_streamed_text_that_the_model_lacks_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "plain words"}, {"text": "and a <mark> there"}])
    tokenizer, rows = marked(None)
    data = TextData("files", {"train": (path,)}, streaming=True)
    with pytest.raises(UserError, match="a.jsonl:2: it has the token '<mark>'"):
        look_at(data, "train", data.files["train"], tokenizer, rows)
    assert look_at(data, "train", data.files["train"], tokenizer, rows + 1)["rows"] == 2
