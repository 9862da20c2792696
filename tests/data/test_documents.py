"""Packed documents that do not see each other, chat messages, weighted mixtures."""

import dataclasses
import json

import pytest
import torch
from conftest import make_blocks, make_model, pack_tokens
from hypothesis import given
from hypothesis import strategies as st
from test_architectures import DECODERS, config_of

from cascade.data import streaming
from cascade.data.blocks import IGNORE_INDEX, TokenBlocks, load_blocks, save_blocks
from cascade.data.framing import framing_of
from cascade.data.messages import chat_documents, conversation_tokens
from cascade.data.packing import BlockFormat
from cascade.data.prepare import mixed, prepare_blocks
from cascade.data.sources import TextData
from cascade.distillation.losses.batch import batch_losses
from cascade.distillation.options import Objective
from cascade.models.architecture.document_isolation import require_document_masks
from cascade.models.checkpoint.load import load_tokenizer, resolve_model
from cascade.runtime.errors import UserError

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    found = load_tokenizer(resolve_model("builtin:pico-python"))
    found.chat_template = TEMPLATE
    return found


@given(st.lists(st.integers(1, 30), min_size=3, max_size=12), st.integers(4, 16))
def test_places_start_at_0_with_each_document_and_each_block(lengths, block_size):
    documents = [([number + 1] * length, None, 1) for number, length in enumerate(lengths)]
    if sum(lengths) < block_size:
        return
    blocks = pack_tokens(documents, block_size=block_size, document_masks=True)
    for ids, places in zip(blocks.input_ids.tolist(), blocks.position_ids.tolist(), strict=True):
        seen = {}
        for token, place in zip(ids, places, strict=True):
            assert place == seen.get(token, 0)
            seen[token] = place + 1


@pytest.mark.parametrize("architecture", [name for name in DECODERS if name != "opt"])
def test_documents_of_a_block_do_not_see_each_other(architecture):
    require_document_masks(config_of(architecture))


def test_an_architecture_that_cannot_keep_documents_apart_is_refused():
    with pytest.raises(UserError, match="data.document_masks: model type 'opt' does not keep"):
        require_document_masks(config_of("opt"))


def test_losses_of_a_masked_block_are_those_of_its_documents_alone():
    student, teacher, ids = make_model(seed=2), make_model(seed=1), make_blocks(count=1, size=16).input_ids
    places = torch.cat([torch.arange(6), torch.arange(10)])[None]
    labels = ids.clone()
    labels[0, 6] = IGNORE_INDEX  # a document's first token has nothing before it
    packed = batch_losses(student, teacher, TokenBlocks(ids, labels, 3.0, places), Objective()).fused
    alone = [
        batch_losses(student, teacher, TokenBlocks(part, part, 3.0), Objective()).fused
        for part in ids.split([6, 10], 1)
    ]
    torch.testing.assert_close(packed.divergence, torch.cat([one.divergence for one in alone]), rtol=1e-4, atol=1e-6)


def test_blocks_come_back_from_disk_with_labels_and_places(tmp_path):
    documents = [([1, 2, 3], [IGNORE_INDEX, 2, 3], 3), ([4, 5, 6, 7, 8], None, 5)]
    blocks = pack_tokens(documents, block_size=4, document_masks=True)
    save_blocks(blocks, tmp_path / "blocks.safetensors")
    again = load_blocks(tmp_path / "blocks.safetensors")
    assert torch.equal(again.labels, blocks.labels)
    assert again.position_ids.tolist() == [[0, 1, 2, 0], [0, 1, 2, 3]]
    assert again.rows(torch.tensor([1])).inputs()["position_ids"].tolist() == [[0, 1, 2, 3]]


def test_only_what_the_assistant_says_counts(tokenizer):
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "open a file"},
        {"role": "assistant", "content": "open(name)"},
        {"role": "user", "content": "close it"},
        {"role": "assistant", "content": "file.close()"},
    ]
    ids, labels = conversation_tokens(messages, tokenizer)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    counted = tokenizer.decode([label for label in labels if label != IGNORE_INDEX])
    assert counted == f"open(name){tokenizer.eos_token}file.close(){tokenizer.eos_token}"
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(ids, labels, strict=True))


def test_an_answer_whose_first_token_begins_before_it_counts_from_there(tokenizer):
    messages = [{"role": "user", "content": "indent"}, {"role": "assistant", "content": "    return x"}]
    tokenizer.chat_template = TEMPLATE.replace("<assistant>", "<assistant>\n").replace(
        "<{{ m.role }}>", "<{{ m.role }}>{{ '\n' if m.role == 'assistant' else '' }}"
    )
    try:
        ids, labels = conversation_tokens(messages, tokenizer)
    finally:
        tokenizer.chat_template = TEMPLATE
    counted = tokenizer.decode([label for label in labels if label != IGNORE_INDEX])
    assert counted.strip() == f"return x{tokenizer.eos_token}"
    assert tokenizer.decode(ids).endswith(f"<assistant>\n    return x{tokenizer.eos_token}")


def test_blocks_in_which_nothing_counts_are_dropped_and_no_answers_at_all_refused():
    silent, spoken = ([1] * 8, [IGNORE_INDEX] * 8, 8), ([2] * 8, None, 8)
    blocks = pack_tokens([silent, spoken, silent, spoken], block_size=8)
    assert blocks.input_ids[:, 0].tolist() == [2, 2]
    with pytest.raises(UserError, match="data.train: no token of [0-9]+ blocks counts for the loss"):
        pack_tokens([silent, silent], block_size=8, name="data.train")


def test_with_masks_nobody_has_to_guess_a_documents_first_token():
    blocks = pack_tokens([([1, 2, 3], None, 3), ([4, 5, 6, 7, 8], None, 5)], block_size=4, document_masks=True)
    assert blocks.labels.tolist() == [[IGNORE_INDEX, 2, 3, IGNORE_INDEX], [5, 6, 7, 8]]


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    tokenizer.chat_template = "{{ messages | length }}" + TEMPLATE
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        with pytest.raises(UserError, match="writes earlier turns differently"):
            conversation_tokens(messages, tokenizer)
        tokenizer.chat_template = None
        with pytest.raises(UserError, match="has no chat template"):
            conversation_tokens(messages, tokenizer)
        tokenizer.chat_template = "{{ raise_exception('no system role') }}"
        with pytest.raises(UserError, match="the parent's chat template refuses it: no system role"):
            conversation_tokens(messages, tokenizer)
    finally:
        tokenizer.chat_template = TEMPLATE


@pytest.mark.parametrize("row", ["text", [], [{"role": "user"}], [{"role": "user", "content": 3}], None])
def test_a_row_that_is_no_conversation_is_named(tokenizer, row):
    with pytest.raises(UserError, match=r"data.train: expected a list of \{role, content\} messages"):
        list(chat_documents([row], tokenizer, "data.train"))


def chats(path, count):
    """A file of two-turn conversations, as data."""
    turns = (
        [{"role": "user", "content": f"say {number}"}, {"role": "assistant", "content": f"it is {number}"}]
        for number in range(count)
    )
    path.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    return TextData("files", {"train": (str(path),)}, messages_field="messages")


def test_chat_files_become_blocks_whose_conversations_are_kept_apart(tokenizer, tmp_path):
    data = chats(tmp_path / "chat.jsonl", 60)
    blocks = prepare_blocks(data, "train", tokenizer, BlockFormat(block_size=32, document_masks=True))
    assert 0.1 < (blocks.labels != IGNORE_INDEX).float().mean() < 0.9
    assert (blocks.position_ids[:, 0] == 0).all()
    assert (blocks.position_ids == 0).sum() > len(blocks)


@given(st.lists(st.integers(1, 40), min_size=2, max_size=4), st.data(), st.one_of(st.none(), st.integers(20, 200)))
def test_a_mixture_holds_its_shares(sizes, data, max_blocks):
    weights = [data.draw(st.integers(1, 5)) for _ in sizes]
    shares = [weight / sum(weights) for weight in weights]
    sources = [
        TokenBlocks(torch.full((size, 4), number), torch.full((size, 4), number), 3.0)
        for number, size in enumerate(sizes)
    ]
    found = mixed(sources, shares, max_blocks)
    for number, (size, share) in enumerate(zip(sizes, shares, strict=True)):
        count = int((found.input_ids[:, 0] == number).sum())
        assert abs(count - share * len(found)) <= len(sizes)
        if max_blocks is None:
            assert count >= size
    if max_blocks is not None:
        assert len(found) <= max_blocks + len(sizes)


def test_weights_of_files_are_shares_of_the_training_blocks(tokenizer, tmp_path):
    for name, word in (("a", "alpha"), ("b", "beta")):
        with (tmp_path / f"{name}.jsonl").open("w") as file:
            for number in range(80):
                file.write(json.dumps({"text": f"{word} {number} " * 20}) + "\n")
    files = tuple(str(tmp_path / f"{name}.jsonl") for name in "ab")
    data = TextData("files", {"train": files}, weights=(3.0, 1.0))
    blocks = prepare_blocks(data, "train", tokenizer, BlockFormat(block_size=32, max_blocks=80))
    assert len(blocks) == 80
    texts = [tokenizer.decode(row) for row in blocks.input_ids]
    assert sum("alpha" in text for text in texts) == 60


class Killed(BaseException):
    """Stands for a death that no handler sees."""


@pytest.mark.parametrize("document_masks", [False, True])
def test_streamed_text_gives_the_blocks_of_text_read_at_once_and_goes_on_where_it_was_stopped(
    tokenizer, tmp_path, monkeypatch, document_masks
):
    for name in "ab":
        with (tmp_path / f"{name}.jsonl").open("w") as file:
            for number in range(900):
                file.write(json.dumps({"text": f"{name} document {number} has these words"}) + "\n")
    files = tuple(str(tmp_path / f"{name}.jsonl") for name in "ab")
    data = TextData("files", {"train": files})
    options = {"block_size": 32, "max_blocks": 300, "document_masks": document_masks}
    whole = prepare_blocks(data, "train", tokenizer, BlockFormat(**options))
    streamed = dataclasses.replace(data, streaming=True)
    assert_same(prepare_blocks(streamed, "train", tokenizer, BlockFormat(**options)), whole)

    read = []
    tokens = streaming.encoded

    def dies(documents, *args):
        read.append(documents[0])
        if len(read) == 4:
            raise Killed
        return tokens(documents, *args)

    monkeypatch.setattr(streaming, "encoded", dies)
    block_format = BlockFormat(**options, framing=framing_of(tokenizer, "data"))
    own = {"folder": tmp_path / "cursor", "shard_tokens": 3000}
    with pytest.raises(Killed):
        streaming.stream_blocks(streamed, "train", tokenizer, block_format, **own)
    resumed = streaming.stream_blocks(streamed, "train", tokenizer, block_format, **own)
    assert_same(resumed, whole)
    assert read[4] in read[1:4]  # after the last whole shard, not from the start


@pytest.mark.parametrize("damage", ["bit", "gone", "cursor"])
def test_F17_a_damaged_shard_of_streamed_text_is_read_again(tokenizer, tmp_path, monkeypatch, caplog, damage):
    with (tmp_path / "a.jsonl").open("w") as file:
        for number in range(900):
            file.write(json.dumps({"text": f"document {number} has these words"}) + "\n")
    data = TextData("files", {"train": (str(tmp_path / "a.jsonl"),)}, streaming=True)
    block_format = BlockFormat(block_size=32, max_blocks=200, framing=framing_of(tokenizer, "data"))
    own = {"folder": tmp_path / "cursor", "shard_tokens": 2000}
    whole = streaming.stream_blocks(data, "train", tokenizer, block_format, **own)
    shard = sorted((tmp_path / "cursor").glob("*.safetensors"))[0]
    if damage == "bit":
        content = bytearray(shard.read_bytes())
        content[-3] ^= 1
        shard.write_bytes(content)
    elif damage == "gone":
        shard.unlink()
    else:
        (tmp_path / "cursor" / "train-cursor.json").write_text('{"shards": 1')
    assert_same(streaming.stream_blocks(data, "train", tokenizer, block_format, **own), whole)
    assert "what an earlier try left cannot be used" in caplog.text


def test_streamed_chat_and_its_splits_are_those_of_chat_read_at_once(tokenizer, tmp_path):
    data = chats(tmp_path / "chat.jsonl", 400)
    for split in ("train", "selection"):
        options = {"block_format": BlockFormat(block_size=32, max_blocks=50, document_masks=True)}
        streamed = prepare_blocks(dataclasses.replace(data, streaming=True), split, tokenizer, **options)
        assert_same(streamed, prepare_blocks(data, split, tokenizer, **options))


def assert_same(one, other):
    assert torch.equal(one.input_ids, other.input_ids)
    assert torch.equal(one.labels, other.labels)
    assert (one.position_ids is None) == (other.position_ids is None)
    assert one.position_ids is None or torch.equal(one.position_ids, other.position_ids)
    assert one.bytes_per_token == pytest.approx(other.bytes_per_token, rel=0.05)
