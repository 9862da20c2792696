"""What a model says of a text does not depend on what stands beside it in the batch, here and in stock transformers."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaModel,
)

from cascade.data.examples import Raw, text_examples
from cascade.evaluation.classification import class_logits
from cascade.models.architecture.model_class import as_classifier
from cascade.models.architecture.padding import require_rows_apart, set_padding
from cascade.models.checkpoint.load import ModelSource, load_model, load_tokenizer
from cascade.pipeline.run import run_recipe
from cascade.pipeline.stages.fit import make_fitted
from cascade.planning.preview import preview
from cascade.recipe.load import load_recipe
from cascade.runtime.errors import UserError

WORDS = "good bad fine poor film plot very not a the is was".split()
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
LLAMA_LIKE = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
BERT_LIKE = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"hidden_size": 32} | LLAMA_LIKE),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"hidden_size": 32} | LLAMA_LIKE),
    "gpt2": (GPT2Config, GPT2LMHeadModel, {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "bert": (BertConfig, BertForMaskedLM, {"hidden_size": 32} | BERT_LIKE),
    "distilbert": (DistilBertConfig, DistilBertForMaskedLM, {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}),
    "roberta": (RobertaConfig, RobertaForMaskedLM, {"hidden_size": 32} | BERT_LIKE),
}
DECODERS = ("llama", "qwen2", "gpt2")
PADDINGS = {
    "nobody": (None, None, "right"),
    "the config alone": (1, None, "right"),
    "a word in the config": (9, None, "right"),
    "the tokenizer alone": (None, "<pad>", "right"),
    "each its own": (2, "<pad>", "right"),
    "both, at the left": (1, "<pad>", "left"),
}
"""Who says what pads -> (config.pad_token_id, the tokenizer's pad_token, its side)."""


def make_letters(pad, side):
    """Of Qwen2's own class, which AutoTokenizer takes for the type: bytes, no merges."""
    letters = ["\u0120", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *letters])}
    return Qwen2Tokenizer(
        vocab=vocabulary, merges=[], unk_token=None, bos_token="<s>", eos_token="</s>", pad_token=pad, padding_side=side
    )


def make_tokenizer(pad, side="right", *, ends=False):
    vocabulary = [*SPECIAL, *WORDS]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if ends:
        backend.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    named = {} if pad is None else {"pad_token": pad}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", padding_side=side, **named
    )


def make_language_model(folder, kind, padding, *, seed=0):
    number, token, side = padding
    config, model, sizes = KINDS[kind]
    torch.manual_seed(seed)
    values = {
        "vocab_size": 32 if kind == "qwen2" else len(SPECIAL) + len(WORDS),
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    model(config(**sizes, **values, pad_token_id=number)).save_pretrained(folder)
    tokenizer = make_letters(token, side) if kind == "qwen2" else make_tokenizer(token, side, ends=kind not in DECODERS)
    tokenizer.save_pretrained(folder)
    return folder


def write_recipe(folder, model, fit="fit: {examples: 64, batch_size: 8, learning_rate: 1e-2}", members=None):
    draw = torch.Generator().manual_seed(0)
    for split, count in {"train": 80, "selection": 20, "heldout": 20}.items():
        with (folder / f"{split}.jsonl").open("w") as file:
            for number in range(count):
                length = 1 + int(torch.randint(9, (), generator=draw))
                words = [WORDS[int(one)] for one in torch.randint(len(WORDS), (length,), generator=draw)]
                file.write(json.dumps({"text": " ".join(words), "label": "ab"[number % 2]}) + "\n")
    (folder / "r.yaml").write_text(f"""\
name: rows
task: text_classification
parent: {{model: {model}, {fit}}}
data: {{source: files, train: train.jsonl, selection: selection.jsonl, heldout: heldout.jsonl, max_length: 16}}
members: {members or "[{name: half, target: {dims: {num_hidden_layers: 1}}}]"}
distill: {{examples: 64, learning_rate: 2e-3, batch_size: 16}}
calibration: {{num_blocks: 8}}
""")
    return load_recipe(folder / "r.yaml")


def texts_of(folder):
    return [json.loads(line)["text"] for line in (folder / "heldout.jsonl").open()]


def require_alike(together, alone):
    assert (together - alone).abs().max() <= 1e-5 * max(1.0, float(alone.abs().max()))


@torch.no_grad()
def require_stock_rows_apart(folder, texts):
    """Stock classes and stock padding: each text gives in the batch what it gives alone."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    model = model.float().eval()
    how = {"return_tensors": "pt", "truncation": True, "max_length": 16}
    alone = torch.cat([model(**tokenizer(text, **how)).logits for text in texts])
    require_alike(model(**tokenizer(texts, **how, padding=True)).logits, alone)
    assert tokenizer.pad_token_id == model.config.pad_token_id
    return alone


@pytest.mark.parametrize(
    ("kind", "said_by"),
    [
        *((kind, said_by) for kind in DECODERS for said_by in PADDINGS),
        # The id that pads is part of an encoder's own config.
        *(
            (kind, said_by)
            for kind in sorted(KINDS.keys() - set(DECODERS))
            for said_by in ("nobody", "both, at the left")
        ),
    ],
)
def test_a_row_gives_alone_what_it_gives_in_a_batch_here_and_in_stock_transformers(tmp_path, kind, said_by):
    number, token, side = PADDINGS[said_by]
    number = 1 if kind not in DECODERS else number
    model = make_language_model(tmp_path / "model", kind, (number, token, side))
    recipe = write_recipe(tmp_path, model)
    make_fitted(recipe, tmp_path / "fit", lambda done, total: None)
    saved, texts = tmp_path / "fit" / "checkpoint", texts_of(tmp_path)
    alone = require_stock_rows_apart(saved, texts)
    source = ModelSource(saved, "fitted")
    examples = text_examples([Raw(text, None) for text in texts], [], load_tokenizer(source), 16)
    for size in (1, 7, len(texts)):
        require_alike(class_logits(load_model(source), examples, batch_size=size), alone)


@pytest.mark.parametrize("said_by", ["nobody", "the config alone"])
def test_a_family_of_decoders_classifies_each_text_by_itself(tmp_path, said_by):
    model = make_language_model(tmp_path / "model", "llama", PADDINGS[said_by])
    other = "{name: other, config: {model_type: gpt2, n_embd: 16, n_layer: 1, n_head: 2}}"
    recipe = write_recipe(
        tmp_path, model, members=f"[{{name: half, target: {{dims: {{num_hidden_layers: 1}}}}}}, {other}]"
    )
    run = run_recipe(recipe, output=tmp_path / "run")
    for name in ("half", "other"):
        settings = run / "members" / name / "generation_config.json"
        config = json.loads((run / "members" / name / "config.json").read_text())
        assert not settings.exists() or json.loads(settings.read_text())["pad_token_id"] == config["pad_token_id"]
        require_stock_rows_apart(run / "members" / name, texts_of(tmp_path))
    rows = {row["name"]: row for row in json.loads((run / "family.json").read_text())["rows"]}
    assert {"parent", "half", "other"} <= set(rows)


def classifier_folder(folder, number, token, side="right", kind="llama"):
    """A finished classifier as somebody else has saved it."""
    make_language_model(folder, kind, (number, token, side))
    config = as_classifier(AutoConfig.from_pretrained(folder), "text_classification", ["a", "b"], "x")
    model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("number", "token", "side", "kind", "message"),
    [
        (None, None, "right", "llama", r'no padding token, .* write "pad_token": "</s>" .*"pad_token_id": 2 into its config'),
        (1, None, "right", "llama", r"no padding token, .* write \"pad_token\": "),
        (None, "<pad>", "right", "llama", r'with 1 \(\'<pad>\'\) by its tokenizer and with None .*"pad_token_id": 1'),
        (2, "<pad>", "right", "gpt2", r'by its config, so it reads a text otherwise .*"pad_token_id": 1 into its config.json'),
        (1, "<pad>", "left", "gpt2", r'pads at the left, .* write "padding_side": "right" into its tokenizer_config.json'),
    ],
)  # fmt: skip
def test_a_classifier_that_reads_by_its_neighbours_is_refused_by_the_plan_with_what_to_write(
    tmp_path, number, token, side, kind, message
):
    recipe = write_recipe(tmp_path, classifier_folder(tmp_path / "model", number, token, side, kind), fit="")
    with pytest.raises(UserError, match=message):
        preview(recipe, tmp_path / "run")
    for name, values in {
        "tokenizer_config.json": {"pad_token": token or "</s>", "padding_side": "right"},
        "config.json": {"pad_token_id": 1 if token else 2},
    }.items():
        path = tmp_path / "model" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    assert preview(recipe, tmp_path / "run")["members"]
    require_stock_rows_apart(tmp_path / "model", texts_of(tmp_path))


def test_a_token_that_texts_end_with_or_that_the_model_lacks_does_not_pad():
    config = LlamaConfig(vocab_size=17, pad_token_id=None)
    ending = make_tokenizer(None, ends=True)
    assert set_padding(config, ending, "x") and config.pad_token_id == 3  # not </s>
    beyond = make_tokenizer(None)
    beyond.add_special_tokens({"pad_token": "<beyond>"})
    config = LlamaConfig(vocab_size=17, pad_token_id=None)
    assert beyond.pad_token_id == 17 and set_padding(config, beyond, "x") and config.pad_token_id == 2
    named = make_tokenizer(None)
    named.add_special_tokens({"additional_special_tokens": ["<|reserved_1|>", "<|right_pad|>"]})
    config = LlamaConfig(vocab_size=30)
    assert set_padding(config, named, "x") and named.pad_token == "<|right_pad|>" and config.pad_token_id == 18


def test_a_tokenizer_without_any_token_to_pad_with_is_refused():
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    with pytest.raises(UserError, match="no other that texts never end with; add one"):
        set_padding(LlamaConfig(vocab_size=2), PreTrainedTokenizerFast(tokenizer_object=backend), "x")


@pytest.mark.parametrize(
    ("config", "kind"),
    [(BertConfig, BertModel), (RobertaConfig, RobertaModel), (LlamaConfig, LlamaModel)],
)
def test_embeddings_are_those_of_a_text_alone_also_where_nothing_pads(config, kind):
    made = config(vocab_size=17, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
    made.architectures = [kind.__name__]
    for token in ("<pad>", None):
        require_rows_apart(made, make_tokenizer(token), "x")


@pytest.mark.parametrize("kind", DECODERS)
def test_a_teachers_likeliest_answer_is_the_same_alone_and_beside_longer_prompts(tmp_path, kind):
    from cascade.teacher.writing.answers import AnswerLog, requests_of
    from cascade.teacher.writing.local import Teacher, write
    from cascade.teacher.writing.prompts import prompts_of

    source = ModelSource(make_language_model(tmp_path / "model", kind, PADDINGS["nobody"], seed=3), "model")
    wanted = requests_of(prompts_of([" ".join(WORDS[:n]) for n in range(1, 10)]), 1, {})
    found = []
    for size in (1, 9):
        log = AnswerLog(tmp_path / f"{size}.jsonl")
        sampling = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 6}
        teacher = Teacher(load_model(source), load_tokenizer(source), "")
        write(teacher, wanted, log, chat=False, sampling=sampling, batch_size=size)
        found.append({key: answer.text for key, answer in log.answers.items()})
    assert found[0] == found[1] and any(found[0].values())


def test_the_fault_is_real():
    """Without the remedy: a padding token that only the tokenizer names moves the place that a decoder reads."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=17, hidden_size=32, **LLAMA_LIKE, pad_token_id=2, num_labels=2)
    model, ids = LlamaForSequenceClassification(config).eval(), torch.tensor([[5, 6, 7]])
    padded = torch.cat([ids, torch.full((1, 4), 1)], 1)
    mask = (padded != 1).long()
    with torch.no_grad():
        assert (model(input_ids=padded, attention_mask=mask).logits - model(input_ids=ids).logits).abs().max() > 1e-3
