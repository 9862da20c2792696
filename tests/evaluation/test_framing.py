"""The tokens that a tokenizer writes around a text: in every place that reads text, and never twice."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import SHARED, distill_with, make_model, needs_shared, pack_tokens
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from cascade.data.blocks import IGNORE_INDEX, TokenBlocks
from cascade.data.framing import Framing, framing_of, written_around
from cascade.data.masking import masked_blocks
from cascade.data.messages import conversation_tokens
from cascade.data.packing import BlockFormat, pack_documents
from cascade.data.prepare import prepare_blocks
from cascade.data.sources import TextData
from cascade.evaluation.framing_test import choose_framing
from cascade.evaluation.heldout import HELDOUT, heldout_blocks
from cascade.models.checkpoint.load import load_model, load_tokenizer, resolve_model
from cascade.pipeline.run import run_recipe
from cascade.planning.preview import preview
from cascade.recipe.load import load_recipe
from cascade.runtime.errors import UserError

BEGIN, END, UNKNOWN, MASK = 0, 1, 2, 3
LETTERS = {letter: number for number, letter in enumerate("abcdefghij", start=4)}


def letters_tokenizer(template="<s> $A", *, eos="</s>", **special):
    """A token a letter, with `template` written around a text."""
    vocabulary = {"<s>": BEGIN, "</s>": END, "<unk>": UNKNOWN, "<mask>": MASK} | LETTERS
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if template:
        inner.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", BEGIN), ("</s>", END)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token=eos, unk_token="<unk>", mask_token="<mask>", **special
    )


def ids_of(text):
    return [LETTERS[letter] for letter in text]


@pytest.mark.parametrize(
    ("template", "around"), [("<s> $A", ([0], [])), ("<s> $A </s>", ([0], [1])), ("$A </s>", ([], [1])), ("", ([], []))]
)
def test_what_a_tokenizer_writes_around_a_text_is_found(template, around):
    assert [list(part) for part in written_around(letters_tokenizer(template))] == [*around]


def test_by_default_documents_have_exactly_the_ids_that_the_tokenizer_gives_them():
    tokenizer = letters_tokenizer()
    blocks = pack_documents(["abc", "de"], tokenizer, block_size=7)
    assert blocks.input_ids.flatten().tolist() == tokenizer("abc")["input_ids"] + tokenizer("de")["input_ids"]
    assert torch.equal(blocks.labels, blocks.input_ids)  # the next one's beginning is what ends a document
    assert blocks.bytes_per_token == 5 / 7


def test_a_tokenizer_that_writes_nothing_has_its_end_token_between_documents():
    blocks = pack_documents(["abc", "de"], letters_tokenizer(""), block_size=7)
    assert blocks.input_ids.flatten().tolist() == [*ids_of("abc"), END, *ids_of("de"), END]


def test_an_end_token_that_the_tokenizer_writes_itself_stands_there_once():
    blocks = pack_documents(["abc", "de"], letters_tokenizer("<s> $A </s>"), block_size=9)
    assert blocks.input_ids.flatten().tolist() == [BEGIN, *ids_of("abc"), END, BEGIN, *ids_of("de"), END]
    assert blocks.labels.flatten().tolist() == [-100, *ids_of("abc"), END, -100, *ids_of("de"), END]
    assert blocks.bytes_per_token == 5 / 7  # as many as count: bits per byte are of the text


def test_without_an_end_token_none_stands_there_whatever_the_tokenizer_writes_itself():
    tokenizer = letters_tokenizer("<s> $A </s>")
    framing = framing_of(tokenizer, "text", end_token=False)
    blocks = pack_documents(["abc", "de"], tokenizer, block_size=7, framing=framing)
    assert blocks.input_ids.flatten().tolist() == [BEGIN, *ids_of("abc"), BEGIN, *ids_of("de")]
    assert framing.record() == {"begin_token": "documents", "end_token": "none"}


def test_one_token_that_begins_and_ends_stands_between_documents_once():
    tokenizer = letters_tokenizer("<s> $A", eos="<s>")  # as OPT's
    framing = framing_of(tokenizer, "text", end_token=True)
    assert framing == Framing((BEGIN,), ())
    blocks = pack_documents(["abc", "de"], tokenizer, block_size=7, framing=framing)
    assert blocks.input_ids.flatten().tolist() == [BEGIN, *ids_of("abc"), BEGIN, *ids_of("de")]


def test_a_block_inside_a_document_begins_with_the_prefix_and_no_block_has_it_twice():
    framing = framing_of(letters_tokenizer(), "text", begin_blocks=True)
    blocks = pack_documents(["abcdefgh", "ij"], letters_tokenizer(), block_size=4, framing=framing)
    assert (
        blocks.input_ids.tolist()
        == [
            [BEGIN, *ids_of("abc")],
            [BEGIN, *ids_of("def")],
            [BEGIN, *ids_of("gh"), BEGIN],  # here the next document begins, and goes on in the next block
            [BEGIN, *ids_of("ij")][:1] + ids_of("ij")[:0] + ids_of("ij") + [0] * 0,
        ][: len(blocks)]
    )
    assert blocks.labels[1].tolist() == [IGNORE_INDEX, IGNORE_INDEX, *ids_of("ef")]


def test_a_block_that_starts_inside_a_prefix_of_several_tokens_gets_the_rest_of_it():
    framing = Framing((7, 8), (9,), begin_blocks=True)
    document = framing.around([20, 21, 22])
    blocks = pack_tokens([(document, None, 3)] * 3, block_size=7, framing=framing)
    # the first block ends with the second document's 7, so the second starts with 7 8
    assert blocks.input_ids.tolist()[:2] == [[7, 8, 20, 21, 22, 9, 7], [7, 8, 20, 21, 22, 9, 7]]


def test_places_of_a_document_that_goes_on_in_the_next_block_count_from_the_prefix():
    framing = framing_of(letters_tokenizer(), "text", begin_blocks=True)
    blocks = pack_documents(
        ["abcde", "fg", "hij"], letters_tokenizer(), block_size=4, framing=framing, document_masks=True
    )
    assert blocks.input_ids[1].tolist() == [BEGIN, *ids_of("de"), BEGIN]
    assert blocks.position_ids[1].tolist() == [0, 1, 2, 0]


def test_what_a_teacher_lists_stays_with_its_token_behind_a_prefix():
    framing = Framing((7,), (), begin_blocks=True)
    ids = framing.around([20, 21, 22, 23, 24])
    listed = [[(token, -0.5)] for token in ids]
    blocks = pack_tokens([(ids, None, 5, listed)] * 2, block_size=4, framing=framing)
    inserted = (blocks.input_ids == 7) & (blocks.known.ids[..., 0] == -1)
    assert int(inserted.sum()) > 0
    assert torch.equal(blocks.known.ids[..., 0][~inserted].long(), blocks.input_ids[~inserted])


def test_messages_without_a_template_begin_and_end_as_a_text_does():
    tokenizer = letters_tokenizer()
    framing = framing_of(tokenizer, "text", end_token=True)
    messages = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    ids, labels = conversation_tokens(messages, tokenizer, template=False, framing=framing)
    assert ids == [BEGIN, *ids_of("abcd"), END]
    assert labels == [-100, -100, -100, *ids_of("cd"), END]


def test_the_tokens_that_begin_a_text_are_never_hidden_from_an_encoder():
    blocks = pack_documents(["abcdefghij"] * 20, letters_tokenizer("<s> $A </s>"), block_size=8)
    masked = masked_blocks(blocks, letters_tokenizer("<s> $A </s>"), seed=0)
    framed = (blocks.input_ids == BEGIN) | (blocks.input_ids == END)
    assert torch.equal(masked.input_ids[framed], blocks.input_ids[framed])


def test_training_calibration_selection_and_held_out_text_begin_alike(tmp_path):
    draw = torch.Generator().manual_seed(0)
    files = {}
    for split in ("train", "calibration", "selection", "heldout"):
        texts = ["".join("abcdefghij"[int(n)] for n in torch.randint(0, 10, (9,), generator=draw)) for _ in range(20)]
        path = tmp_path / f"{split}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        files[split] = (str(path),)
    data, tokenizer = TextData("files", files, begin_blocks=True), letters_tokenizer()
    options = {"block_format": BlockFormat(block_size=8)}
    read = {split: prepare_blocks(data, split, tokenizer, **options) for split in (*list(files)[:3], HELDOUT)}
    read["heldout by evaluation"] = heldout_blocks(data, tokenizer, max_blocks=99, block_size=8)
    read["streamed"] = prepare_blocks(replace(data, streaming=True), "train", tokenizer, **options)
    for blocks in read.values():
        assert set(blocks.input_ids[:, 0].tolist()) == {BEGIN}
    assert torch.equal(read["streamed"].input_ids, read["train"].input_ids)


def test_no_end_token_where_nothing_else_keeps_documents_apart_is_refused(recipe_folder):
    recipe = load_recipe(recipe_folder / "tiny.yaml", ("data.end_token=none",))
    with pytest.raises(UserError, match=r"data.end_token: none: .*begins no text"):
        run_recipe(recipe, output=recipe_folder / "refused")


@needs_shared
def test_a_finished_family_of_a_parent_whose_text_begins_with_a_token_has_nothing_left_to_do(tmp_path):
    text = SHARED / "text" / "tinystories"
    (tmp_path / "r.yaml").write_text(
        f"""\
name: r
parent: {SHARED / "models" / "stories260K"}
data: {{source: files, train: {text / "valid.jsonl.gz"}, block_size: 32, max_tokens: 4_000}}
members: [{{name: half, target: {{params: 0.6}}}}]
calibration: {{num_blocks: 4}}
prune: {{hidden: activation_norm, repair: {{method: none}}}}
distill: {{tokens: 256, batch_size: 4, microbatch_size: 4, learning_rate: 1e-3, selection_blocks: 2}}
evaluate: {{heldout_blocks: 2}}
baselines: [cut]
"""
    )
    recipe = load_recipe(tmp_path / "r.yaml")
    run = run_recipe(recipe, output=tmp_path / "run")
    (member,) = preview(recipe, run)["members"]
    assert member["seconds"] == {}
    card = (run / "members" / "half" / "README.md").read_text()
    assert "begin_token: documents" in card and "end_token: none" in card


def test_texts_that_are_read_one_by_one_are_calibrated_as_they_are_read(tmp_path):
    from types import SimpleNamespace

    from cascade.data.blocks import load_blocks
    from cascade.pipeline.stages.data import make_data

    texts = ["".join("abcdefghij"[int(digit)] for digit in str(n * 7_919 + 10**9)) for n in range(300)]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text(rows)
    (tmp_path / "r.yaml").write_text(
        "name: r\nparent: ./none\ntask: embedding\ndata: {source: files, train: a.jsonl, max_length: 8}\nmembers: []\n"
    )
    folder, tokenizer = tmp_path / "stage", letters_tokenizer("<s> $A </s>", pad_token="<unk>")
    folder.mkdir()
    model = make_model("llama", vocab_size=16)
    model.save_pretrained(tmp_path / "none")
    recipe = load_recipe(tmp_path / "r.yaml")
    parent = SimpleNamespace(folder=tmp_path / "none", gguf_file=None, reference="x")
    make_data(recipe, parent, tokenizer, folder, lambda *_: None)
    assert set(load_blocks(folder / "calibration.safetensors").input_ids[:, 0].tolist()) == {BEGIN}


@needs_shared
def test_the_parent_is_asked_how_its_text_is_framed_and_reads_it_as_it_was_trained():
    source = resolve_model(str(SHARED / "models" / "stories260K"))
    model, tokenizer = load_model(source), load_tokenizer(source)
    texts = stories("valid", 120)

    def pack(framing):
        return pack_documents(texts, tokenizer, block_size=256, framing=framing)

    choice = choose_framing(model, framing_of(tokenizer, "text", end_token=True), pack)
    # llama2.c trains on <s> story <s> story, cut anywhere: no end token, and no <s> in the middle of a story.
    assert choice.framing == Framing((1,), (), begin_blocks=False)
    assert choice.end_token_loss > 3 * choice.guess_loss
    plain = [(tokenizer(text, add_special_tokens=False)["input_ids"] + [2], None, 1) for text in texts]
    without = text_loss(model, pack_tokens(plain, block_size=256))
    assert text_loss(model, pack(choice.framing)) < without - 0.05


@needs_shared
def test_a_model_that_was_trained_with_the_prefix_in_every_block_and_an_end_token_gets_both():
    source = resolve_model(str(SHARED / "models" / "stories260K"))
    model, tokenizer = load_model(source), load_tokenizer(source)
    framing = framing_of(tokenizer, "text", begin_blocks=True, end_token=True)
    train = pack_documents(stories("train", 300), tokenizer, block_size=32, framing=framing)
    distill_with(model, None, train, num_tokens=60_000, learning_rate=2e-3, batch_size=32, microbatch_size=32)

    def pack(wanted):
        return pack_documents(stories("valid", 100), tokenizer, block_size=32, framing=wanted)

    choice = choose_framing(model.eval(), replace(framing, begin_blocks=False), pack)
    assert choice.framing == framing, choice


def test_a_model_that_has_seen_its_end_token_keeps_it():
    model = make_model("llama", vocab_size=16)
    framing = Framing((BEGIN,), (END,))
    choice = choose_framing(model, framing, lambda wanted: blocks_of_letters(wanted), choose_begin=False)
    expected = choice.end_token_loss <= choice.guess_loss
    assert bool(choice.framing.suffix) == expected
    with torch.no_grad():  # a bias towards the end token everywhere
        model.model.norm.weight.mul_(0)
    choice = choose_framing(model, framing, lambda wanted: blocks_of_letters(wanted), choose_begin=False)
    assert choice.end_token_loss == pytest.approx(choice.guess_loss, rel=1e-5)  # no better, no worse than a guess
    assert choice.framing.suffix == (END,) or choice.end_token_loss > choice.guess_loss


@pytest.mark.parametrize("document_masks", [False, True])
def test_with_and_without_the_prefix_the_same_tokens_are_compared(document_masks):
    model = make_model("llama", vocab_size=16)
    for layer in model.model.layers:  # what a token predicts depends on itself alone
        layer.self_attn.o_proj.weight.data.zero_()

    def pack(framing):
        return pack_documents(
            ["abcdefghij" * 3, "jihg"] * 30,
            letters_tokenizer(),
            block_size=16,
            framing=framing,
            document_masks=document_masks,
        )

    losses = choose_framing(model, Framing((BEGIN,), (END,)), pack, choose_end=False).text_loss
    assert losses["blocks"] == pytest.approx(losses["documents"], rel=1e-6)


def blocks_of_letters(framing):
    return pack_documents(["abcdefg", "hij"] * 30, letters_tokenizer(), block_size=8, framing=framing)


def stories(split, count):
    import gzip

    with gzip.open(SHARED / "text" / "tinystories" / f"{split}.jsonl.gz", "rt") as file:
        return [json.loads(line)["text"] for _, line in zip(range(count), file, strict=False)]


def text_loss(model, blocks: TokenBlocks):
    """Nats per token of the text itself."""
    total = count = 0.0
    with torch.no_grad():
        for part in blocks.split(8):
            log_p = model(**part.inputs()).logits[:, :-1].log_softmax(-1)
            wanted = part.input_ids[:, 1:]
            text = wanted > 2
            total -= float(log_p.gather(-1, wanted[..., None])[..., 0][text].sum())
            count += int(text.sum())
    return total / count
