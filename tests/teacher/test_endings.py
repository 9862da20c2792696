"""Only an answer that its model has ended teaches where to end."""

import pytest
from endpoint_server import chat_answer, serving

from cascade.recipe.generate import Generate
from cascade.teacher.writing.answers import Answer, AnswerLog
from cascade.teacher.writing.generate import select_answers, write_answers
from cascade.teacher.writing.prompts import prompts_of
from cascade.teacher.writing.reply import reply_of
from cascade.teacher.writing.watch import UselessAnswers


def settings_for(url, *, endpoint=None, **filters):
    quick = {"max_backoff_seconds": 0.01, "timeout_seconds": 5.0, "concurrency": 1, "max_retries": 1}
    return Generate(endpoint={"url": url, "model": "m"} | quick | (endpoint or {}), prompts=["unused.jsonl"],
                    filters=filters, max_new_tokens=64)  # fmt: skip


def written(url, folder, *, count=6, endpoint=None, **filters):
    settings = settings_for(url, endpoint=endpoint, **filters)
    prompts = prompts_of([f"question {number}" for number in range(count)])
    return select_answers(settings, write_answers(settings, prompts, folder))


def ending_in(reason, **message):
    """A server whose every second answer ends otherwise than the others."""

    def respond(body, number):
        answer = chat_answer(f"an answer {number}", finish_reason=reason if number % 2 else "stop")
        if number % 2:
            answer["choices"][0]["message"] |= message
        return 200, {}, answer

    return respond


def cuts_of(dataset):
    return [row["messages"][-1]["truncated"] for row in dataset.rows]


@pytest.mark.parametrize("reason", ["stop", "eos", "eos_token", "end_turn", "stop_sequence", "STOP", None])
def test_an_answer_that_its_model_ended_teaches_where_to_end(tmp_path, reason):
    with serving(ending_in(reason)) as (url, _):
        dataset = written(url, tmp_path, truncated="drop")
    assert cuts_of(dataset) == [False] * 6 and dataset.dropped == {}


@pytest.mark.parametrize(
    "reason", ["length", "abort", "max_tokens", "model_length", "insufficient_system_resource", "new"]
)
def test_any_other_end_does_not_count_and_is_dropped_by_its_name_where_truncated_answers_are(tmp_path, reason, caplog):
    with serving(ending_in(reason)) as (url, _):
        kept, dropped = written(url, tmp_path), written(url, tmp_path, truncated="drop")
    assert sorted(cuts_of(kept)) == [False] * 3 + [True] * 3 and kept.dropped == {}
    assert cuts_of(dropped) == [False] * 3
    assert dropped.dropped == {"truncated" if reason == "length" else f"truncated ({reason})": 3}
    assert (f"finish_reason {reason}: 3" in caplog.text) == (reason != "length")


def test_an_answer_of_all_the_tokens_from_a_server_that_tells_no_end_was_cut(tmp_path):
    cut = chat_answer("word " * 60, finish_reason=None, usage=(5, 64))
    with serving(lambda body, number: (200, {}, cut)) as (url, _):
        assert cuts_of(written(url, tmp_path, max_repetition=1.0)) == [True] * 6


@pytest.mark.parametrize("reason", ["content_filter", "refusal"])
def test_what_a_filter_has_cut_is_a_refusal_whatever_it_says(tmp_path, reason):
    with serving(ending_in(reason)) as (url, _):
        dataset = written(url, tmp_path)
    assert len(dataset.rows) == 3 and dataset.dropped == {"refused": 3}


CALL = {"id": "a", "type": "function", "function": {"name": "search", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("reason", "message"),
    [("tool_calls", {}), ("function_call", {}), ("stop", {"tool_calls": [CALL]}), ("tool_calls", {"content": None}),
     ("stop", {"function_call": CALL["function"]})],
)  # fmt: skip
def test_a_message_that_calls_a_tool_is_dropped_and_counted(tmp_path, reason, message):
    with serving(ending_in(reason, **message)) as (url, _):
        dataset = written(url, tmp_path)
    assert len(dataset.rows) == 3 and dataset.dropped == {"calls a tool": 3}


def test_an_empty_list_of_tools_calls_none():
    body = chat_answer("fine")
    body["choices"][0]["message"]["tool_calls"] = []
    assert reply_of(body, chat=True).finish_reason == "stop"


@pytest.mark.parametrize(("reason", "said"), [("tool_calls", "call a tool"), ("content_filter", "are refusals")])
def test_no_more_answers_are_paid_for_where_all_are_refusals_or_calls_of_tools(tmp_path, reason, said):
    with serving(lambda body, number: (200, {}, chat_answer("some words", finish_reason=reason))) as (url, received):
        with pytest.raises(UselessAnswers, match=said):
            written(url, tmp_path, count=12)
    assert len(received) == 5


def test_answers_that_earlier_versions_kept_are_judged_by_their_ends_too(tmp_path):
    with serving(ending_in("stop")) as (url, received):
        first = written(url, tmp_path)
        log = AnswerLog(tmp_path / "answers.jsonl")
        for answer, reason in zip(list(log.answers.values()), ("content_filter", "abort", "tool_calls"), strict=False):
            log.add([Answer(answer.key, answer.text, reason, 5, 7)])
        dataset = written(url, tmp_path)
    assert len(first.rows) == len(received) == 6
    assert dataset.dropped == {"refused": 1, "calls a tool": 1} and sorted(cuts_of(dataset)) == [False] * 3 + [True]
