"""Packed text: a few bytes a token, the same files as ever, and blocks that are what the rules of framing say."""

import importlib.util

import pytest
import torch
from conftest import ROOT, make_blocks, pack_tokens
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cascade.data.blocks import IGNORE_INDEX, load_blocks, save_blocks
from cascade.data.framing import Framing
from cascade.data.packing import BlockBuilder, BlockFormat, Tokenized, token_rows
from cascade.runtime.errors import UserError


def packed_by_hand(documents, block_size, framing, document_masks):
    """[(ids, labels, places)] of each block, token by token."""
    blocks, block = [], ([], [], [])
    for ids, labels in documents:
        for place, (token, label) in enumerate(zip(ids, labels, strict=True)):
            behind = False
            if not block[0] and framing.begin_blocks:
                for before, prefix_token in enumerate(framing.prefix[: min(place, len(framing.prefix))]):
                    for row, value in zip(block, (prefix_token, IGNORE_INDEX, before), strict=True):
                        row.append(value)
                behind = len(block[0]) == len(framing.prefix) > 0
            start = block[2][-1] + 1 if block[2] and place else 0
            hidden = behind or (document_masks and place == 0)
            for row, value in zip(block, (token, IGNORE_INDEX if hidden else label, start), strict=True):
                row.append(value)
            if len(block[0]) == block_size:
                blocks.append(block)
                block = ([], [], [])
    return [block for block in blocks if any(label != IGNORE_INDEX for label in block[1][1:])]


@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=9),
    block_size=st.integers(4, 12),
    prefix=st.integers(0, 3),
    begin_blocks=st.booleans(),
    document_masks=st.booleans(),
    seed=st.integers(0, 99),
)
def test_blocks_are_those_that_are_packed_token_by_token(
    lengths, block_size, prefix, begin_blocks, document_masks, seed
):
    draw = torch.Generator().manual_seed(seed)
    framing = Framing(tuple(range(90, 90 + prefix)), (99,), begin_blocks=begin_blocks and prefix > 0)
    documents = []
    for length in lengths:
        ids = framing.around(torch.randint(0, 80, (length,), generator=draw).tolist())
        counts = torch.rand(len(ids), generator=draw) < 0.7
        documents.append((ids, [token if count else IGNORE_INDEX for token, count in zip(ids, counts, strict=True)]))
    expected = packed_by_hand(documents, block_size, framing, document_masks)
    options = {"block_size": block_size, "framing": framing, "document_masks": document_masks}
    if not expected:
        with pytest.raises(UserError, match=r"do not fill one block|counts for the loss"):
            pack_tokens([(ids, labels, 1) for ids, labels in documents], **options)
        return
    blocks = pack_tokens([(ids, labels, 1) for ids, labels in documents], **options)
    ids, labels, places = ([block[row] for block in expected] for row in range(3))
    assert blocks.input_ids.tolist() == ids and blocks.labels.tolist() == labels
    assert (blocks.position_ids.tolist() if document_masks else None) == (places if document_masks else None)


def test_packing_storing_and_reading_take_at_most_12_bytes_a_token():
    script = ROOT / "tests" / "benchmarks" / "packing.py"
    specification = importlib.util.spec_from_file_location("packing_benchmark", script)
    benchmark = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(benchmark)
    peaks = benchmark.in_a_process(ROOT, "the same, a prefix in each block", 2_000_000)  # it was 184
    assert peaks["packing"] < 12 and peaks["storing"] < 12
    assert peaks["reading"] < 0.5  # the file is mapped


def test_a_label_that_is_not_its_token_is_refused():
    with pytest.raises(ValueError, match="a token's label is the token itself or IGNORE_INDEX"):
        BlockBuilder(BlockFormat(block_size=4)).append(token_rows(Tokenized([1, 2], [1, 3], 2)))


def test_where_all_tokens_count_labels_are_the_ids_and_take_no_memory(tmp_path):
    blocks = pack_tokens([(list(range(40)), None, 40)], block_size=8)
    save_blocks(blocks, tmp_path / "b.safetensors")
    for same in (blocks, load_blocks(tmp_path / "b.safetensors"), blocks.rows(torch.tensor([2, 0]))):
        assert same.labels is same.input_ids and same.input_ids.dtype == torch.int32
    assert set(load_file(tmp_path / "b.safetensors")) == {"input_ids"}


def test_a_file_in_int64_is_read_and_models_are_given_int64_of_either(tmp_path):
    blocks = make_blocks(4, 8)
    places = torch.arange(8).expand(4, 8).contiguous()
    tensors = {"input_ids": blocks.input_ids, "labels": blocks.labels + 1, "position_ids": places}
    save_file(tensors, tmp_path / "old.safetensors", metadata={"bytes_per_token": "3.0", "masked": "False"})
    old = load_blocks(tmp_path / "old.safetensors")
    save_blocks(old, tmp_path / "new.safetensors")
    new = load_blocks(tmp_path / "new.safetensors")
    assert (old.input_ids.dtype, new.input_ids.dtype) == (torch.int64, torch.int32)
    for read in (old, new):
        assert torch.equal(read.targets(), tensors["labels"][:, 1:])
        inputs = read.rows(torch.tensor([3, 1])).inputs()
        assert torch.equal(inputs["input_ids"], tensors["input_ids"][[3, 1]])
        assert torch.equal(inputs["position_ids"], places[[3, 1]])


def test_a_file_that_is_mapped_is_not_written_to(tmp_path):
    save_blocks(make_blocks(4, 8), tmp_path / "b.safetensors")
    stored = (tmp_path / "b.safetensors").read_bytes()
    load_blocks(tmp_path / "b.safetensors").input_ids.zero_()
    assert (tmp_path / "b.safetensors").read_bytes() == stored
