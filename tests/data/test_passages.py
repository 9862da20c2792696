"""A corpus of few documents fills all splits: cut into passages, neighbours together, nothing in two splits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.data.packing import BlockFormat
from cascade.data.passages import cut_documents, passages
from cascade.data.prepare import prepare_blocks
from cascade.data.sources import TextData, cuts_passages, read_documents
from cascade.data.splits import SPLITS
from cascade.evaluation.heldout import HELDOUT
from cascade.models.checkpoint.load import load_tokenizer, resolve_model
from cascade.runtime.errors import UserError
from cascade.teacher.writing.prompts import beginnings

MISSING = list(SPLITS[1:])


def book(paragraphs=400, seed=0):
    import random

    draw = random.Random(seed)
    words = "the whale sea captain ship sailed and saw a white great old man said to his mate of".split()
    return "\n\n".join(
        " ".join(draw.choice(words) for _ in range(60)).capitalize() + f", {number}." for number in range(paragraphs)
    )


@given(st.text(alphabet="ab .\n", max_size=3000), st.integers(10, 300))
def test_passages_are_the_text_and_none_is_longer_than_asked(text, size):
    found = passages(text, size)
    assert "".join(found) == text
    assert all(len(part.strip()) <= size for part in found)


def test_passages_end_where_paragraphs_do():
    text = book()
    assert all(text[: text.index(part) + len(part)].endswith("\n\n") for part in passages(text)[:-1])


def test_a_book_fills_all_splits_with_stretches_that_share_no_paragraph():
    text = book()
    found = cut_documents([text], MISSING)
    assert all(part in text for parts in found.values() for part in parts)
    paragraphs = {split: {one for part in parts for one in part.split("\n\n") if one} for split, parts in found.items()}
    assert sum(map(len, paragraphs.values())) == len(set().union(*paragraphs.values())) == 400
    assert all(0.015 < sum(map(len, found[split])) / len(text) < 0.06 for split in MISSING)
    assert len(found["train"]) < 20  # long stretches, not one document per passage


def test_a_passage_that_stands_twice_is_in_one_split():
    documents = [f"story {number % 37}: " + "word " * 100 for number in range(100)]
    found = cut_documents(documents, MISSING)
    assert sum(len(set(parts)) for parts in found.values()) == len(set(documents)) == 37


def test_many_short_documents_are_dealt_out_whole():
    documents = [f"story {number}: " + "word " * 100 for number in range(60)]
    found = cut_documents(documents, MISSING)
    assert sorted(one for parts in found.values() for one in parts) == sorted(documents)
    assert [len(found[split]) for split in SPLITS] == [54, 2, 2, 2]


def test_one_text_file_is_a_whole_corpus(tmp_path, caplog):
    (tmp_path / "book.txt").write_text(book())
    data = TextData("files", {"train": (str(tmp_path / "book.txt"),)})
    parts = {split: read_documents(data, split) for split in (*SPLITS[:3], HELDOUT)}
    assert parts == {split: parts[split] for split in SPLITS} == cut_documents([book()], MISSING)
    assert "too few documents to give each split one" in caplog.text
    tokenizer = load_tokenizer(resolve_model("builtin:pico-python"))
    streamed = TextData("files", data.files, streaming=True)
    for split in (*SPLITS[:3], HELDOUT):
        block_format = BlockFormat(block_size=32, max_blocks=5)
        blocks = prepare_blocks(data, split, tokenizer, block_format)
        assert blocks.input_ids.equal(prepare_blocks(streamed, split, tokenizer, block_format).input_ids)


def test_only_documents_too_few_for_the_splits_are_cut(tmp_path):
    for number in range(400):
        (tmp_path / f"{number}.txt").write_text(f"document {number}\n\nof two paragraphs")
    many = TextData("files", {"train": (str(tmp_path),)})
    assert not cuts_passages(many)
    assert all("\n\n" in text for split in (*SPLITS[:3], HELDOUT) for text in read_documents(many, split))
    few = [str(tmp_path / f"{number}.txt") for number in range(3)]
    assert cuts_passages(TextData("files", {"train": tuple(few)}))
    own = {split: (few[0],) for split in MISSING}
    assert not cuts_passages(TextData("files", {"train": tuple(few), **own}))


def test_with_weights_each_source_gives_training_text(tmp_path):
    names = []
    for number in range(2):
        (tmp_path / f"book{number}.txt").write_text(book(seed=number))
        names.append(str(tmp_path / f"book{number}.txt"))
    data = TextData("files", {"train": tuple(names)}, weights=(1.0, 2.0))
    for name in names:
        text = open(name).read()
        assert all(part in text for part in read_documents(data, "train", only=(name,)))


def test_too_little_text_for_four_splits_is_still_refused(tmp_path):
    (tmp_path / "a.txt").write_text("one line")
    with pytest.raises(UserError, match="no documents for the heldout split that are not in another; give more text"):
        read_documents(TextData("files", {"train": (str(tmp_path / "a.txt"),)}), HELDOUT)


def test_the_beginnings_of_few_texts_are_those_of_whole_documents(tmp_path):
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"text {number} begins here\n\nand goes on {number} with more words")
    assert all(text.startswith("text ") for text in beginnings([str(tmp_path)], "text", 4))
