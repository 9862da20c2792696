"""Held-out text opens for the key that evaluation alone has, and for no other room."""

import ast
import json
from typing import get_args, get_type_hints

import pytest
from conftest import ROOT

from cascade.data.examples import LabelledData, read_examples
from cascade.data.framing import framing_of
from cascade.data.packing import BlockFormat
from cascade.data.prepare import prepare_blocks
from cascade.data.sources import TextData, read_documents, read_placed
from cascade.data.splits import SPLITS, Heldout, Split
from cascade.data.streaming import stream_blocks
from cascade.evaluation.heldout import HELDOUT
from cascade.models.checkpoint.load import load_tokenizer, resolve_model

PACKAGE = ROOT / "cascade"
READERS = (read_documents, read_placed, read_examples, prepare_blocks, stream_blocks)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("splits")
    files = {}
    for split in SPLITS:
        path = folder / f"{split}.jsonl"
        lines = [{"text": f"{split} says {number} " * 20, "label": str(number % 2)} for number in range(6)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        files[split] = (str(path),)
    return TextData("files", files)


def first_text(reader, data, split, folder):
    """What a reader of the data package gives of a split, as text."""
    tokenizer = load_tokenizer(resolve_model("builtin:pico-python"))
    if reader is read_documents:
        return read_documents(data, split)[0]
    if reader is read_placed:
        return read_placed(data, split)[0][1]
    if reader is read_examples:
        return read_examples(LabelledData(data, images=False), split)[0].content
    if reader is prepare_blocks:
        return tokenizer.decode(prepare_blocks(data, split, tokenizer, BlockFormat(block_size=16)).input_ids[0])
    block_format = BlockFormat(
        block_size=16, max_blocks=4, document_masks=False, framing=framing_of(tokenizer, "data", begin_blocks=True)
    )
    return tokenizer.decode(stream_blocks(data, split, tokenizer, block_format, folder=folder).input_ids[0])


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_a_reader_opens_the_held_out_split_for_its_key_alone(reader, data, tmp_path):
    assert "heldout says" in first_text(reader, data, HELDOUT, tmp_path)
    for name in ("heldout", str(HELDOUT)):
        with pytest.raises(ValueError, match="read by cascade.evaluation alone"):
            first_text(reader, data, name, tmp_path)
    for split in get_args(Split):
        assert f"{split} says" in first_text(reader, data, split, tmp_path)


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_a_reader_of_splits_refuses_the_held_outs_name_by_its_type(reader):
    assert get_type_hints(reader)["split"] == Split | Heldout
    assert get_args(Split) == tuple(split for split in SPLITS if split != "heldout")


def keys_in(path):
    """Lines of a file on which the key to the held-out split is made, imported or reached for."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        imported = isinstance(node, ast.ImportFrom) and any(alias.name in ("HELDOUT", "*") for alias in node.names)
        reached = isinstance(node, ast.Attribute) and node.attr == "HELDOUT"
        called = getattr(node.func, "attr", getattr(node.func, "id", "")) if isinstance(node, ast.Call) else ""
        if imported or reached or called == "Heldout":
            yield node.lineno


def test_no_other_room_makes_or_takes_the_key():
    holders = {path: list(keys_in(path)) for path in PACKAGE.rglob("*.py")}
    rooms = {path.relative_to(PACKAGE).parts[0] for path, lines in holders.items() if lines}
    assert rooms == {"evaluation"}, {str(path): lines for path, lines in holders.items() if lines}


@pytest.mark.parametrize("text", [
    "from cascade.evaluation.heldout import HELDOUT",
    "from cascade.evaluation import heldout\nread_documents(data, heldout.HELDOUT)",
    "from cascade.data.splits import Heldout\nread_documents(data, Heldout('heldout'))",
])  # fmt: skip
def test_the_look_for_the_key_finds_it(text, tmp_path):
    (tmp_path / "room.py").write_text(text)
    assert list(keys_in(tmp_path / "room.py"))
