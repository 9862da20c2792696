"""What lm-eval makes of a tokenizer that ends every text itself is said once."""

import pytest
from conftest import make_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from cascade.evaluation.tasks_lm_eval import harness


def tokenizer_writing(template):
    inner = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(autouse=True)
def untold():
    harness._tell_once.cache_clear()


def test_a_causal_models_tokenizer_that_ends_texts_is_told_once(caplog):
    for _ in range(3):
        harness._tell_suffix(tokenizer_writing("<s> $A </s>"), make_model())
    assert caplog.text.count("the tokenizer writes '</s>' behind every text") == 1


def test_lm_eval_scores_a_continuation_as_the_message_says():
    from lm_eval.models.huggingface import HFLM

    tokenizer = tokenizer_writing("<s> $A </s>")
    context, continuation = HFLM(pretrained=make_model(), tokenizer=tokenizer)._encode_pair("a b", " a b")
    assert (context, continuation) == ([0, 3, 4, 1], [4, 1])


@pytest.mark.parametrize("template", ["<s> $A", "$A"])
def test_a_tokenizer_that_ends_no_text_is_not_told(caplog, template):
    harness._tell_suffix(tokenizer_writing(template), make_model())
    assert not caplog.text


def test_encoders_end_their_texts_and_that_is_not_told(caplog):
    config = BertConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    harness._tell_suffix(tokenizer_writing("<s> $A </s>"), BertForMaskedLM(config))
    assert not caplog.text
