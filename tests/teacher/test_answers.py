"""Answers of a teacher are taken as they are, or not at all; where they are of no use, no more of them are paid for."""

import json
import logging
import re

import pytest
from endpoint_server import chat_answer, serving
from hypothesis import given
from hypothesis import strategies as st

from cascade.recipe.generate import Generate
from cascade.runtime import secrets
from cascade.runtime.errors import UserError
from cascade.teacher.writing.answers import Answer, AnswerLog
from cascade.teacher.writing.endpoint import EndpointError
from cascade.teacher.writing.generate import select_answers, write_answers
from cascade.teacher.writing.prompts import prompts_of
from cascade.teacher.writing.reply import error_of
from cascade.teacher.writing.thoughts import split_thoughts
from cascade.teacher.writing.watch import UselessAnswers, Watch

REAL_KEY = "Zq7-real-key-of-24-signs"
PLACEHOLDERS = ("none", "EMPTY", "dummy", "sk-no-key-required", "lm-studio", "token-abc123", "a1", "return")


def written(url, folder, *, count=12, endpoint=None, filters=None, **more):
    """The dataset that the server at `url` writes to so many prompts."""
    quick = {"max_backoff_seconds": 0.01, "timeout_seconds": 5.0, "concurrency": 1, "max_retries": 1}
    settings = Generate(
        endpoint={"url": url, "model": "m"} | quick | (endpoint or {}),
        prompts=["unused.jsonl"],
        filters=filters or {},
        max_new_tokens=64,
        **more,
    )
    prompts = prompts_of([f"question {number}" for number in range(count)])
    return select_answers(settings, write_answers(settings, prompts, folder))


def texts_of(dataset):
    return [row["messages"][-1]["content"] for row in dataset.rows]


def thinking(content=None, *, field="reasoning_content", reason="length"):
    """The body of an answer with reasoning beside it."""
    body = chat_answer(content, finish_reason=reason)
    body["choices"][0]["message"][field] = "Let me think"
    return 200, {}, body


@pytest.mark.parametrize("key", PLACEHOLDERS)
def test_a_placeholder_or_short_key_changes_no_answer_and_no_message(tmp_path, monkeypatch, key, caplog):
    monkeypatch.setenv("LOCAL_KEY", key)
    code = f"return none_or(x)  # {key}"
    with serving(lambda body, number: (200, {}, chat_answer(f"{code} {number}"))) as (url, received):
        dataset = written(url, tmp_path, endpoint={"key_env": "LOCAL_KEY"})
    assert sorted(texts_of(dataset)) == sorted(f"{code} {number}" for number in range(12))
    assert received[0][1]["Authorization"] == f"Bearer {key}"
    logged = logging.LogRecord("x", logging.WARNING, "f", 1, code, None, None)
    assert secrets.Redacting("%(message)s").format(logged) == secrets.redact_all([code])[0] == code


def test_a_placeholder_in_the_environment_is_no_secret_either(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "lm-studio")
    monkeypatch.setenv("OTHER_API_KEY", "correct-horse-battery")
    assert secrets.redact("~/.cache/lm-studio/model correct-horse-battery") == "~/.cache/lm-studio/model [hidden]"


def test_an_answer_that_holds_a_real_key_is_dropped_and_counted_and_the_key_is_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_KEY", REAL_KEY)

    def respond(body, number):
        return 200, {}, chat_answer(f"the header is {REAL_KEY}" if number == 3 else f"an answer {number}")

    with serving(respond) as (url, _):
        dataset = written(url, tmp_path, endpoint={"key_env": "LOCAL_KEY"})
    assert len(dataset.rows) == 11 and dataset.dropped == {"holds the key": 1}
    assert all(text.startswith("an answer ") for text in texts_of(dataset))
    assert all(REAL_KEY not in path.read_text() for path in tmp_path.iterdir())
    assert secrets.redact(f"x {REAL_KEY} y") == "x [hidden] y"


def test_a_local_teachers_answer_keeps_its_spaces_before_punctuation():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from cascade.teacher.writing.local import _AS_WRITTEN

    backend = Tokenizer(models.WordLevel({"x": 0, "?": 1, "a": 2}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=True)
    assert tokenizer.decode([0, 1, 2]) == "x? a" and tokenizer.decode([0, 1, 2], **_AS_WRITTEN) == "x ? a"


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_without_an_answer_stops_after_five_with_the_cause_and_the_remedy(tmp_path, field):
    with serving(lambda body, number: thinking(field=field)) as (url, received):
        with pytest.raises(UselessAnswers) as raised:
            written(url, tmp_path, count=120)
    assert len(received) == 5
    for part in ("5 answers in a row", "max_new_tokens: 64", "finish_reason: length", "reasoning", "{reasoning_effort: low}",
                 "{chat_template_kwargs: {enable_thinking: false}}", "generate.endpoint.extra_body"):  # fmt: skip
        assert part in str(raised.value)
    assert len(AnswerLog(tmp_path / "answers.jsonl").answers) == 5  # they are paid for


@pytest.mark.parametrize(
    ("body", "cause"),
    [
        (chat_answer(""), r"are empty \(finish_reason: stop\); look at generate.endpoint.api"),
        (chat_answer("", finish_reason="length"), r"ended at generate.max_new_tokens: 64 .* they are empty; raise it"),
        (chat_answer("", finish_reason="length") | {"usage": {"completion_tokens_details": {"reasoning_tokens": 64}}},
         "they are the model's reasoning and no answer"),
        (chat_answer("", finish_reason="content_filter"), "are refusals; look at generate.prompts"),
        (chat_answer([{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}]), "are the model's reasoning"),
    ],
)  # fmt: skip
def test_what_useless_answers_have_in_common_is_told(tmp_path, body, cause):
    with serving(lambda asked, number: (200, {}, body)) as (url, received):
        with pytest.raises(UselessAnswers, match=cause):
            written(url, tmp_path)
    assert len(received) == 5


def test_the_remedies_that_are_named_work(tmp_path):
    def respond(body, number):
        quiet = body.get("reasoning_effort") == "low" or body["max_tokens"] > 1000
        return thinking(f"an answer {number}", reason="stop") if quiet else thinking()

    with serving(respond) as (url, _):
        with pytest.raises(UselessAnswers):
            written(url, tmp_path)
        dataset = written(url, tmp_path, endpoint={"extra_body": {"reasoning_effort": "low"}})
    assert len(dataset.rows) == 12 and not dataset.dropped


def test_some_answers_that_are_only_thoughts_are_counted_and_do_not_stop_the_others(tmp_path):
    def respond(body, number):
        return thinking() if 2 < number < 20 else thinking(f"an answer {number}", reason="stop")

    with serving(respond) as (url, received):
        dataset = written(url, tmp_path, count=40)
    assert len(received) == 40 and len(dataset.rows) == 23 and dataset.dropped == {"only thoughts": 17}


def test_twenty_useless_answers_in_a_row_stop_also_a_teacher_that_has_answered(tmp_path):
    with serving(lambda body, number: thinking("fine", reason="stop") if number == 0 else thinking()) as (
        url,
        received,
    ):
        with pytest.raises(UselessAnswers, match="20 answers in a row"):
            written(url, tmp_path, count=60)
    assert len(received) == 21


THOUGHT = "<think>\nThe user wants a story.\n</think>\n\n"


@pytest.mark.parametrize(
    ("policy", "texts", "dropped"),
    [("keep", [THOUGHT + "He went home", "Fine"], {}), ("strip", ["He went home", "Fine"], {}),
     ("drop", ["Fine"], {"thoughts": 6})],
)  # fmt: skip
def test_thoughts_in_the_text_are_kept_stripped_or_dropped_as_the_recipe_says_and_else_asked_about(
    tmp_path, policy, texts, dropped
):
    def respond(body, number):
        return 200, {}, chat_answer((f"{THOUGHT}He went home" if number % 2 else "Fine") + f" {number}")

    with serving(respond) as (url, received):
        with pytest.raises(UserError, match=r"'<think> The user wants a story. .*thoughts .*: keep .*, strip .*drop"):
            written(url, tmp_path)
        assert len(received) == 2
        dataset = written(url, tmp_path, filters={"thoughts": policy})
        assert len(received) == 12  # the two that were answered are not asked for again
        with pytest.raises(UserError, match="generate.filters.thoughts"):
            written(url, tmp_path)
        assert len(received) == 12
    assert {text.rpartition(" ")[0] for text in texts_of(dataset)} == set(texts) and dataset.dropped == dropped


def test_thoughts_that_take_all_the_tokens_leave_nothing_to_strip_to(tmp_path):
    cut = chat_answer("<think>\nThe user wants", finish_reason="length")
    with serving(lambda body, number: (200, {}, cut)) as (url, received):
        with pytest.raises(UselessAnswers, match="ended at generate.max_new_tokens: 64 .* reasoning and no answer"):
            written(url, tmp_path, filters={"thoughts": "strip"})
    assert len(received) == 5


@pytest.mark.parametrize(
    ("text", "thoughts"),
    [
        ("<think>a</think>\n\nb", "<think>a</think>\n\n"), ("a\n</think>\n\nb", "a\n</think>\n\n"), ("<think>a b", "<think>a b"),
        ("<think>a</think><think>c</think>b", "<think>a</think><think>c</think>"), ("[THINK]a[/THINK]b", "[THINK]a[/THINK]"),
        ("<seed:think>a</seed:think>b", "<seed:think>a</seed:think>"), ("<reasoning>a</reasoning> b", "<reasoning>a</reasoning> "),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b",
         "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>"),
        ("analysisa bassistantfinalb", "analysisa bassistantfinal"), ("analysis of b", ""), ("Write <think> to think.", ""),
        ("def think(): pass", ""), ("", ""), ("Use <think>x</think> tags", ""),
    ],
)  # fmt: skip
def test_thoughts_are_told_from_the_answer_by_their_marks(text, thoughts):
    assert split_thoughts(text) == (thoughts, text.removeprefix(thoughts))


@given(st.text(alphabet="ab <>/think[]THINK\n"))
def test_splitting_loses_no_letter(text):
    assert "".join(split_thoughts(text)) == text


REFUSALS = {
    "openai": {"error": {"message": "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
                         "'max_completion_tokens' instead.", "param": "max_tokens", "code": "unsupported_parameter"}},
    "gateway": {"error": {"message": "'max_tokens' is not supported with this model; use 'max_completion_tokens'."}},
    "pydantic": {"detail": [{"type": "extra_forbidden", "loc": ["body", "max_tokens"], "msg": "Extra inputs are not permitted",
                             "input": 64}]},
    "status 200": {"error": {"message": "`max_tokens` is not supported", "code": 400}},
}  # fmt: skip


@pytest.mark.parametrize("form", REFUSALS)
def test_a_refused_parameter_is_named_at_once_with_the_key_that_mends_it_and_it_does(tmp_path, form):
    def respond(body, number):
        if "max_tokens" in body:
            return 200 if form == "status 200" else 400, {}, REFUSALS[form]
        return 200, {}, chat_answer(f"an answer of {body['max_completion_tokens']} {number}")

    with serving(respond) as (url, received):
        with pytest.raises(UserError, match="does not take `max_tokens`") as raised:
            written(url, tmp_path)
        assert len(received) == 1
        assert "generate.endpoint.extra_body: {max_tokens: null, max_completion_tokens: 64}" in str(raised.value)
        mended = {"extra_body": {"max_tokens": None, "max_completion_tokens": 64}}
        dataset = written(url, tmp_path, endpoint=mended)
    assert len(dataset.rows) == 12 and texts_of(dataset)[0].startswith("an answer of 64 ")


@pytest.mark.parametrize(
    ("error", "endpoint", "remedy"),
    [
        ({"message": "Unsupported value: 'temperature' does not support 1 with this model.", "param": "temperature"}, {},
         r"does not take `temperature`; in the recipe, generate.endpoint.extra_body: \{temperature: null\}"),
        ({"message": "'top_logprobs' is not supported"}, {"top_logprobs": 5}, "leave generate.endpoint.top_logprobs out"),
        ({"message": "Unknown parameter: 'thinking'."}, {"extra_body": {"thinking": 1}}, "leave `thinking` out of generate."),
    ],
)  # fmt: skip
def test_every_parameter_has_its_remedy(tmp_path, error, endpoint, remedy):
    with serving(lambda body, number: (400, {}, {"error": error})) as (url, _):
        with pytest.raises(UserError, match=remedy):
            written(url, tmp_path, endpoint=endpoint)


def test_a_prompt_that_is_too_long_is_no_refused_parameter(tmp_path):
    long = {"message": "'max_tokens' is too large: 64. The maximum context length is 32 tokens.", "param": "max_tokens"}

    def respond(body, number):
        return (400, {}, {"error": long}) if number == 4 else (200, {}, chat_answer(f"an answer {number}"))

    with serving(respond) as (url, _):
        dataset = written(url, tmp_path)
    assert dataset.dropped == {"refused": 1} and len(dataset.rows) == 11


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ({"error": {"message": "Upstream error", "code": 502}}, (502, "Upstream error")),
        ({"error": {"message": "no", "code": "429"}}, (429, "no")),
        ({"error": {"message": "no", "type": "invalid_api_key"}}, (401, "no")),
        ({"error": "model is loading"}, (0, "model is loading")),
        ({"object": "error", "message": "too long", "code": 400}, (400, "too long")),
        ({"choices": [{"message": {"content": ""}, "finish_reason": "error", "error": {"code": 503, "message": "x"}}]}, (503, "x")),
        ({"choices": [{"message": {"content": ""}, "finish_reason": "error"}]}, (0, "finish_reason: error")),
        (chat_answer("fine"), None),
        (chat_answer("fine") | {"error": None}, None),
    ],
)  # fmt: skip
def test_an_error_in_a_body_is_an_error_whatever_its_status(body, found):
    told = error_of(body)
    assert (told and (told[0], told[1])) == found


def test_errors_with_status_200_are_tried_again_or_refused_by_their_code_and_never_empty_answers(tmp_path):
    def respond(body, number):
        if number == 0:
            return 200, {}, {"choices": [{"message": {"content": ""}, "error": {"code": 502, "message": "upstream"}}]}
        if number == 5:
            return 200, {}, {"error": {"code": 400, "message": "flagged"}}
        return 200, {}, chat_answer(f"an answer {number}")

    with serving(respond) as (url, received):
        dataset = written(url, tmp_path)
    assert len(received) == 13 and dataset.dropped == {"refused": 1} and len(dataset.rows) == 11
    with serving(lambda body, number: (200, {}, {"error": {"code": 401, "message": "no"}})) as (url, received):
        with pytest.raises(UserError, match="the key is not accepted"):
            written(url, tmp_path / "other")
        assert len(received) == 1
    with serving(lambda body, number: (200, {}, {"error": {"code": 502, "message": "no"}})) as (url, received):
        with pytest.raises(EndpointError, match="no answer after 2 tries; the last: an error instead of an answer"):
            written(url, tmp_path / "third")
        assert len(received) == 2


def test_stripping_thoughts_does_not_go_with_log_probabilities():
    with pytest.raises(ValueError, match="leaves log-probabilities without their text"):
        Generate(endpoint={"url": "http://localhost/v1", "model": "m", "top_logprobs": 3}, prompts=["p"],
                 filters={"thoughts": "strip"})  # fmt: skip


def test_old_lines_of_answers_are_read(tmp_path):
    line = {"key": "a", "text": "t", "finish_reason": "stop", "prompt_tokens": 1, "answer_tokens": 2, "logprobs": None}
    (tmp_path / "answers.jsonl").write_text(json.dumps(line) + "\n")
    assert AnswerLog(tmp_path / "answers.jsonl").answers["a"].reasoned is False


def test_a_teacher_here_is_asked_about_its_thoughts_too_and_may_say_nothing(tmp_path):
    settings = Generate(prompts=["unused.jsonl"])
    watch = Watch(settings, [])
    for number in range(30):
        watch.look(Answer(str(number), "", "stop", 1, 1))
    log = AnswerLog(tmp_path / "answers.jsonl", watch.look)
    with pytest.raises(UserError, match="generate.filters.thoughts whether the students learn them"):
        log.add([Answer("a", f"{THOUGHT}Fine", "stop", 1, 9)])
    assert list(AnswerLog(tmp_path / "answers.jsonl").answers) == ["a"]


ODD_KEY = 'Zq7"real<key>/of\\24&signs'


@pytest.mark.parametrize("key", ["k3y-7", "ab/9", ODD_KEY, REAL_KEY])
@pytest.mark.parametrize("written_as", ["plain", "json", "slashes", "go", "json in json"])
def test_a_key_that_a_server_repeats_in_an_error_is_shown_in_no_form_however_short(
    tmp_path, monkeypatch, key, written_as
):
    escaped = json.dumps(key)[1:-1]
    go = escaped.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    shown = {"plain": key, "json": escaped, "slashes": escaped.replace("/", "\\/"), "go": go,
             "json in json": json.dumps(escaped)[1:-1]}[written_as]  # fmt: skip
    monkeypatch.setenv("LOCAL_KEY", key)
    for status in (401, 500, 404):
        with serving(lambda body, number, status=status: (status, {}, f"the key {shown} is wrong".encode())) as (
            url,
            _,
        ):
            with pytest.raises((UserError, EndpointError), match="the key .*wrong") as raised:
                written(url, tmp_path / str(status), endpoint={"key_env": "LOCAL_KEY"})
        assert shown not in str(raised.value) and key not in str(raised.value) and "[key] is wrong" in str(raised.value)


def test_a_short_key_is_taken_out_of_an_error_as_a_word_alone_and_a_placeholder_not_at_all(tmp_path, monkeypatch):
    for key, expected in (("tok", "token [key] of tok-2"), ("none", "token tok of tok-2")):
        monkeypatch.setenv("LOCAL_KEY", key)
        with serving(lambda body, number: (404, {}, b"token tok of tok-2")) as (url, _):
            with pytest.raises(UserError, match=re.escape(expected)):
                written(url, tmp_path / key, endpoint={"key_env": "LOCAL_KEY"})
