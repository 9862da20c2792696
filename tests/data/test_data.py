"""Documents, splits and blocks."""

import gzip
import json

import pytest
import torch
from conftest import ROOT, needs_shared, write_texts
from hypothesis import given
from hypothesis import strategies as st

from cascade.data import stdlib
from cascade.data.blocks import load_blocks, save_blocks
from cascade.data.packing import pack_documents
from cascade.data.sources import TextData, read_documents
from cascade.data.splits import SPLITS, drop_near_copies, split_of_text
from cascade.evaluation.heldout import HELDOUT
from cascade.models.checkpoint.load import load_tokenizer, resolve_model
from cascade.runtime.errors import UserError


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve_model("builtin:pico-python"))


@given(st.lists(st.text(min_size=1, max_size=50), min_size=1, max_size=5))
def test_the_built_in_tokenizer_gives_every_text_back(texts):
    tokenizer = load_tokenizer(resolve_model("builtin:pico-python"))
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_packing_keeps_the_text_in_order_with_an_end_token_between_documents(tokenizer):
    texts = ["import os\n", "def f(x):\n    return x\n", "class A:\n    pass\n"] * 20
    blocks = pack_documents(texts, tokenizer, block_size=16)
    text = tokenizer.decode(blocks.input_ids.flatten())
    assert "<|endoftext|>".join(texts).startswith(text.rstrip("�"))
    assert blocks.block_size == 16 and torch.equal(blocks.labels, blocks.input_ids)


def test_bytes_per_token_count_the_text_and_the_end_tokens(tokenizer):
    texts = ["x = 1\n" * 30, "é = 2\n" * 30]
    blocks = pack_documents(texts, tokenizer, block_size=8)
    tokens = sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts)
    assert blocks.bytes_per_token == pytest.approx(sum(len(text.encode()) for text in texts) / tokens)


def test_blocks_read_back_as_they_were_written(tokenizer, tmp_path):
    blocks = pack_documents(["import os\n" * 50], tokenizer, block_size=16)
    save_blocks(blocks, tmp_path / "blocks.safetensors")
    loaded = load_blocks(tmp_path / "blocks.safetensors")
    assert torch.equal(loaded.input_ids, blocks.input_ids) and loaded.bytes_per_token == blocks.bytes_per_token


def test_too_little_text_is_refused_with_the_numbers(tokenizer):
    with pytest.raises(UserError, match=r"data.train: \d+ tokens do not fill one block of 512"):
        pack_documents(["import os\n"], tokenizer, block_size=512, name="data.train")


def test_taken_blocks_are_spread_over_all(tokenizer):
    blocks = pack_documents(["import os\n" * 500], tokenizer, block_size=8)
    assert torch.equal(blocks.take(4).input_ids, blocks.input_ids[[len(blocks) * i // 4 for i in range(4)]])


@given(st.text(max_size=40))
def test_a_text_has_one_split_whatever_stands_beside_it(text):
    shares = {"calibration": 0.2, "selection": 0.2, "heldout": 0.2}
    assert split_of_text(text, shares=shares) == split_of_text(text, shares=shares)


def test_splits_cut_from_one_file_are_disjoint_and_complete(tmp_path):
    write_texts(tmp_path / "all.jsonl.gz", 400)
    data = TextData("files", {"train": (str(tmp_path / "all.jsonl.gz"),)})
    parts = {split: read_documents(data, split) for split in (*SPLITS[:3], HELDOUT)}
    sets = [set(texts) for texts in parts.values()]
    assert sum(len(part) for part in sets) == len(set.union(*sets)) == 400
    assert all(len(part) >= 3 for part in sets)


def test_a_training_document_that_is_also_held_out_is_dropped(tmp_path):
    rows = [{"text": f"document {number}"} for number in range(20)]
    for name, part in {"train": rows, "held": rows[:5]}.items():
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in part)
    files = {"train": (str(tmp_path / "train.jsonl.gz"),), "heldout": (str(tmp_path / "held.jsonl.gz"),)}
    files |= {"selection": files["train"]}
    data = TextData("files", files)
    assert set(read_documents(data, HELDOUT)) == {row["text"] for row in rows[:5]}
    assert set(read_documents(data, "selection")) == {row["text"] for row in rows[5:]}
    with pytest.raises(UserError, match="no documents for the train split"):
        read_documents(data, "train")


def test_near_copies_are_dropped_and_other_documents_kept():
    original = "\n".join(f"line {number} of the original" for number in range(40))
    copy = original.replace("line 7 ", "line seven ")
    other = "\n".join(f"something else, number {number}" for number in range(40))
    assert drop_near_copies([copy, other], [original]) == [1]


def test_the_standard_librarys_splits_share_no_module():
    modules = {}
    for path, _ in stdlib.stdlib_documents():
        modules.setdefault(path.split("/")[0].removesuffix(".py").lstrip("_"), set()).add(stdlib.split_of_module(path))
    assert all(len(splits) == 1 for splits in modules.values())
    assert {split for splits in modules.values() for split in splits} == set(SPLITS)


def test_no_training_text_of_the_standard_library_is_in_the_frozen_held_out_text():
    data = TextData("stdlib", {})
    train = read_documents(data, "train")
    held_out = read_documents(data, HELDOUT)
    assert len(held_out) >= 15
    assert drop_near_copies(train, held_out) == list(range(len(train)))
    assert not set(train) & set(read_documents(data, "selection")) & set(read_documents(data, "calibration"))


def test_a_python_without_library_sources_gets_a_clear_error(tmp_path):
    (tmp_path / "os.py").write_text("x = 1\n")
    with pytest.raises(UserError, match="no standard library sources"):
        stdlib.stdlib_documents(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "no such file"),
        ("strange.xyz", "x", "unknown kind of file"),
        ("broken.jsonl", '{"text": "a"}\n{"text": \n', "cannot be read"),
        ("field.jsonl", '{"body": "a"}\n', "no field 'text'; it has: body"),
        ("empty.jsonl", '{"text": " "}\n', "no documents for the train split"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_documents(TextData("files", {"train": (str(tmp_path / name),)}), "train")


def test_text_and_parquet_files_are_read(tmp_path):
    import datasets

    (tmp_path / "a.txt").write_text("first line\nsecond line\n")
    datasets.Dataset.from_dict({"text": ["from parquet"]}).to_parquet(tmp_path / "b.parquet")
    (tmp_path / "c.jsonl").write_text('{"text": "other"}\n')
    files = {"train": (str(tmp_path / "a.txt"), str(tmp_path / "b.parquet"))}
    files |= {split: (str(tmp_path / "c.jsonl"),) for split in SPLITS[1:]}
    texts = read_documents(TextData("files", files), "train")
    assert [text.strip() for text in texts] == ["first line\nsecond line", "from parquet"]


@needs_shared
def test_the_shared_stories_are_read_with_their_own_splits():
    folder = ROOT.parent / "shared" / "data" / "text" / "tinystories"
    files = {"train": (str(folder / "train.jsonl.gz"),), "heldout": (str(folder / "valid.jsonl.gz"),)}
    data = TextData("files", files)
    assert len(read_documents(data, HELDOUT)) == 400
    assert len(read_documents(data, "train")) > 3300


def test_an_encoders_texts_end_with_its_separator():
    class Encoder:
        eos_token_id, sep_token_id = None, 7

        def __call__(self, texts, **options):
            return {"input_ids": [[1, 2, 3] for _ in texts]}

    assert pack_documents(["a", "b"], Encoder(), block_size=8).input_ids.tolist() == [[1, 2, 3, 7, 1, 2, 3, 7]]
