"""Teachers behind an endpoint: nothing paid for is lost, nothing is asked twice, no key gets out."""

import json
import time

import pytest
from endpoint_server import chat_answer, serving

from cascade.recipe.generate import Endpoint
from cascade.runtime.errors import UserError
from cascade.runtime.permissions import Permissions
from cascade.teacher.writing.address import check_endpoint
from cascade.teacher.writing.answers import AnswerLog, damaged_lines, requests_of
from cascade.teacher.writing.endpoint import EndpointError, ask
from cascade.teacher.writing.prompts import prompts_of
from cascade.teacher.writing.spending import BudgetSpent, Spending

KEY = "sk-secret-0123456789"
QUICK = {"max_backoff_seconds": 0.01, "timeout_seconds": 5.0, "concurrency": 3, "key_env": "TEST_ENDPOINT_KEY"}


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("TEST_ENDPOINT_KEY", KEY)


def asked(url, folder, count=6, **settings):
    """Ask for answers to so many prompts; the log."""
    endpoint = Endpoint(url=url, model="teacher", **(QUICK | settings))
    wanted = requests_of(prompts_of([f"question {number}" for number in range(count)]), 1, {})
    log = AnswerLog(folder / "answers.jsonl")
    ask(endpoint, wanted, log, Spending(folder / "spending.json", endpoint), sampling={"temperature": 0.5})
    return wanted, AnswerLog(folder / "answers.jsonl").answers


def echo(body, number=0):
    return 200, {}, chat_answer(f"answer to {body['messages'][-1]['content']}")


def test_every_prompt_gets_its_own_answer_and_the_key_travels_in_one_header_only(tmp_path):
    with serving(echo) as (url, received):
        wanted, answers = asked(url, tmp_path)
    for request in wanted:
        assert answers[request.key].text == f"answer to {request.prompt.text}"
        assert (answers[request.key].prompt_tokens, answers[request.key].answer_tokens) == (5, 7)
    assert len(received) == 6 and {path for path, _, _ in received} == {"/v1/chat/completions"}
    for _, headers, body in received:
        assert headers["Authorization"] == f"Bearer {KEY}" and KEY not in json.dumps(body)
        assert body["model"] == "teacher" and body["temperature"] == 0.5
    assert all(KEY not in path.read_text() for path in tmp_path.iterdir())


FAULTS = {
    "429": (429, {}, b"slow down"),
    "429 with Retry-After": (429, {"Retry-After": "0.01"}, b"slow down"),
    "500": (500, {}, b"oops"),
    "502": (502, {}, b"bad gateway"),
    "504": (504, {}, b"late"),
    "503": (503, {}, b"<html>busy</html>"),
    "reset in the body": "reset",
    "not JSON": (200, {}, b"<html>hello</html>"),
    "an error with status 200": (200, {}, {"error": {"message": "overloaded"}}),
    "no choices": (200, {}, {"choices": []}),
    "a list": (200, {}, [1]),
    "content is a number": (200, {}, {"choices": [{"message": {"content": 3}}]}),
    "a message that is a text": (200, {}, {"choices": [{"message": "hi"}]}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_F22_a_fault_that_passes_is_tried_again(tmp_path, fault):
    with serving(lambda body, number: FAULTS[fault] if number % 2 == 0 else echo(body)) as (url, received):
        wanted, answers = asked(url, tmp_path, concurrency=1)
    assert all(answers[request.key].text == f"answer to {request.prompt.text}" for request in wanted)
    assert len(received) == 12
    assert json.loads((tmp_path / "spending.json").read_text())["requests"] == 12


def test_F24_a_server_that_never_answers_is_given_up_within_its_timeout(tmp_path):
    with serving(lambda body, number: ("hang", 3.0)) as (url, _):
        started = time.monotonic()
        with pytest.raises(EndpointError, match="no answer after 2 tries; the last: (ReadTimeout|no whole answer)"):
            asked(url, tmp_path, count=1, timeout_seconds=0.2, max_retries=1)
        assert time.monotonic() - started < 2.5


@pytest.mark.parametrize(
    "beginning",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: ",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", b"HTTP/1.0 200 OK\r\n\r\n",
    ],
)  # fmt: skip
def test_F24_a_server_that_drips_its_answer_is_given_up_within_the_timeout_and_the_next_is_heard(tmp_path, beginning):
    def respond(body, number):
        return ("drip", beginning) if number < 2 else echo(body)

    with serving(respond) as (url, received):
        started = time.monotonic()
        with pytest.raises(EndpointError, match="no answer after 2 tries; the last: no whole answer within 0.3 sec"):
            asked(url, tmp_path, count=1, timeout_seconds=0.3, max_retries=1)
        assert time.monotonic() - started < 2.0
        wanted, answers = asked(url, tmp_path, count=1)
    assert len(received) == 3 and set(answers) == {wanted[0].key}


def test_F22_what_was_answered_before_a_failure_is_kept_and_only_the_rest_is_asked_for(tmp_path):
    with serving(lambda body, number: echo(body) if number < 4 else (500, {}, b"down")) as (url, _):
        with pytest.raises(EndpointError, match="no answer after 2 tries; the last: 500 down"):
            asked(url, tmp_path, count=10, max_retries=1, concurrency=1)
    kept = AnswerLog(tmp_path / "answers.jsonl").answers
    assert len(kept) == 4
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write('{"key": "half of a li')  # as a death leaves it
    with serving(echo) as (url, received):
        wanted, answers = asked(url, tmp_path, count=10)
    assert len(received) == 6 and len(answers) == 10
    assert {body["messages"][-1]["content"] for _, _, body in received} == {
        request.prompt.text for request in wanted if request.key not in kept
    }


def test_F15_an_answer_that_was_changed_on_the_disk_is_told_and_asked_for_again(tmp_path, caplog):
    with serving(echo) as (url, received):
        asked(url, tmp_path, count=4)
        path = tmp_path / "answers.jsonl"
        assert damaged_lines(path) == []
        path.write_text(path.read_text().replace("answer to question 2", "answer to question 9"))
        assert damaged_lines(path) == [next(n for n, line in enumerate(path.open(), 1) if "question 9" in line)]
        _, answers = asked(url, tmp_path, count=4)
    assert len(received) == 5 and received[-1][2]["messages"][-1]["content"] == "question 2"
    assert sorted(answer.text for answer in answers.values()) == [f"answer to question {n}" for n in range(4)]
    assert "a line is not as it was written" in caplog.text


@pytest.mark.parametrize(
    ("budget", "sent"),
    [
        ({"requests": 3}, 3),
        ({"tokens": 30}, 3),
        ({"money": 0.03, "price_per_million_prompt": 1000.0, "price_per_million_answer": 1000.0}, 3),
    ],
)
def test_a_budget_is_kept_over_all_starts(tmp_path, budget, sent):
    with serving(echo) as (url, received):
        for _ in range(2):
            with pytest.raises(BudgetSpent, match=r"generate.endpoint.budget.\w+: [\d.]+ is spent; raise it"):
                asked(url, tmp_path, concurrency=1, budget=budget)
        assert len(received) == sent
        assert len(AnswerLog(tmp_path / "answers.jsonl").answers) == sent


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, r"the key is not accepted \(401 wrong key \[key\]\); look at \$TEST_ENDPOINT_KEY"),
        (404, r"404 wrong key \[key\]; look at generate.endpoint.url and model 'teacher'"),
        (302, "answers with a redirect .* which is not followed"),
    ],
)
def test_F22_what_will_not_pass_stops_at_once_without_showing_the_key(tmp_path, status, message):
    content = f"wrong key {KEY}".encode()
    with serving(lambda body, number: (status, {"Location": "http://127.0.0.2/"}, content)) as (url, received):
        with pytest.raises(UserError, match=message) as raised:
            asked(url, tmp_path, concurrency=1)
    assert len(received) == 1 and KEY not in str(raised.value)


def test_a_prompt_that_is_refused_does_not_stop_the_others(tmp_path):
    def respond(body, number):
        return (400, {}, b"too long") if body["messages"][-1]["content"] == "question 2" else echo(body)

    with serving(respond) as (url, _):
        wanted, answers = asked(url, tmp_path)
    assert [request.key in answers for request in wanted] == [True, True, False, True, True, True]
    with serving(echo) as (url, received):
        asked(url, tmp_path)
    assert len(received) == 1  # the refused one is asked for again


@pytest.mark.parametrize("first", [0, 3])
def test_refusals_in_a_row_are_no_matter_of_the_prompts(tmp_path, first):
    def respond(body, number):
        return echo(body) if number < first else (400, {}, b"your credit balance is too low")

    with serving(respond) as (url, received):
        with pytest.raises(EndpointError, match="refused 5 prompts in a row: 400 your credit balance is too low"):
            asked(url, tmp_path, count=20, concurrency=1)
    assert len(received) == first + 5
    assert len(AnswerLog(tmp_path / "answers.jsonl").answers) == first  # no refusal is kept


def test_the_first_reason_to_stop_is_told_though_other_threads_wait(tmp_path):
    def respond(body, number):
        if body["messages"][-1]["content"] == "question 0":
            return 429, {}, b"busy"  # its thread waits in a pause while another one spends the budget
        return echo(body)

    with serving(respond) as (url, _):
        started = time.monotonic()
        with pytest.raises(BudgetSpent, match="budget.requests: 5 is spent"):
            asked(url, tmp_path, count=20, max_backoff_seconds=60.0, budget={"requests": 5})
        assert time.monotonic() - started < 20


def test_what_is_paid_for_is_counted_even_if_it_cannot_be_used(tmp_path):
    useless = {"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": 4}}
    with serving(lambda body, number: (200, {}, useless) if number == 0 else echo(body)) as (url, _):
        asked(url, tmp_path, count=1)
    spent = json.loads((tmp_path / "spending.json").read_text())
    assert spent == {"requests": 2, "prompt_tokens": 16, "answer_tokens": 11}


def test_half_of_a_character_is_no_reason_to_lose_an_answer(tmp_path):
    body = b'{"choices": [{"message": {"content": "good \\ud83d"}}]}'
    with serving(lambda asked, number: (200, {}, body)) as (url, _):
        wanted, answers = asked(url, tmp_path, count=1)
    assert answers[wanted[0].key].text == "good ?"


def test_F22_a_pause_that_is_too_long_ends_the_run_instead(tmp_path):
    with serving(lambda body, number: (429, {"Retry-After": "3600"}, b"")) as (url, _):
        with pytest.raises(EndpointError, match="asks to come back in 3600 seconds"):
            asked(url, tmp_path, count=1)


def test_an_endpoint_that_is_down_is_named(tmp_path):
    with serving(echo) as (url, _):
        pass
    with pytest.raises(EndpointError, match=rf"{url}/chat/completions: no answer after 2 tries; .*refused"):
        asked(url, tmp_path, max_retries=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "ftp://host/v1"}, "expected https://HOST/v1"),
        ({"url": "http://example.com/v1"}, "plain http would show key and text"),
        ({"url": "http://169.254.169.254/v1"}, "link-local"),
        ({"url": "https://169.254.169.254/v1"}, "link-local"),
        ({"url": "https://[::ffff:169.254.169.254]/v1"}, "link-local"),
        ({"url": "https://0xa9fea9fe/v1"}, "link-local"),
        ({"url": "http://2852039166/v1", "allow_http": True}, "link-local"),
        ({"url": "http://169.254.169.254./v1", "allow_http": True}, "link-local"),
        ({"url": "http://0.0.0.0/v1", "allow_http": True}, "link-local, unspecified"),
        ({"url": "https://[fe80::1]/v1"}, "link-local"),
        ({"url": "https://[64:ff9b::a9fe:a9fe]/v1"}, "169.254.169.254 is a link-local"),
        ({"url": "https://[fec0::1]/v1"}, "on a private network"),
        ({"url": "https://[::ffff:127.0.0.1]/v1"}, "127.0.0.1 is this machine; write localhost"),
        ({"url": "https://evil.com\\.openai.com/v1", "key_env": "OPENAI_API_KEY"}, "no odd signs"),
        ({"url": "http://169.254.169.254\\.x/v1", "allow_http": True}, "no odd signs"),
        ({"url": "https://h.example/v 1"}, "no odd signs"),
        ({"url": "https://10.0.0.5/v1"}, "10.0.0.5 is on a private network; .*--allow-private"),
        ({"url": "https://[::ffff:192.168.1.1]/v1"}, "192.168.1.1 is on a private network"),
        ({"url": "https://host:99999999/v1"}, "ort out of range"),
        ({"url": "https://evil.example/v1", "key_env": "HF_TOKEN"}, "is the key to router.huggingface.co and is not"),
        ({"url": "https://openai.com.evil.example/v1", "key_env": "OPENAI_API_KEY"}, "is the key to openai.com and is"),
        ({"url": "https://evil.example/v1", "key_env": "DATABASE_URL"}, "not sent to evil.example; .* CASCADE_KEY"),
        ({"url": "https://user:pw@host/v1"}, "no user, password or query"),
        ({"key_env": "CASCADE_NOT_SET"}, "the environment variable CASCADE_NOT_SET is not set"),
        ({"key_env": "CASCADE_BROKEN_KEY"}, "CASCADE_BROKEN_KEY holds spaces, line breaks or"),
    ],
)
def test_addresses_and_keys_that_cannot_be_right_are_refused_before_anything_is_sent(settings, message, monkeypatch):
    monkeypatch.setenv("CASCADE_BROKEN_KEY", "sk-abc\nsecond-secret")
    with pytest.raises(UserError, match=message) as raised:
        check_endpoint(Endpoint(**({"url": "https://host/v1", "model": "m"} | settings)))
    assert "secret" not in str(raised.value)


def test_keys_go_to_their_own_service_or_where_they_are_meant_for_and_private_networks_only_if_allowed(monkeypatch):
    def key_for(url, name, **permissions):
        return check_endpoint(Endpoint(url=url, model="m", key_env=name), Permissions(**permissions))

    for name in ("OPENAI_API_KEY", "CASCADE_KEY", "ANY_KEY"):
        monkeypatch.setenv(name, f"key-of-{name}")
    assert key_for("https://api.openai.com/v1", "OPENAI_API_KEY") == "key-of-OPENAI_API_KEY"
    assert key_for("https://teacher.example/v1", "CASCADE_KEY") == "key-of-CASCADE_KEY"
    assert (
        key_for("http://127.0.0.1:1/v1", "ANY_KEY") == key_for("http://localhost:1/v1", "ANY_KEY") == "key-of-ANY_KEY"
    )
    assert key_for("https://10.0.0.5/v1", "CASCADE_KEY", private_networks=True) == "key-of-CASCADE_KEY"
    with pytest.raises(UserError, match="on a private network"):
        key_for("https://10.0.0.5/v1", "CASCADE_KEY", task_code=True)
    with pytest.raises(UserError, match="link-local"):
        key_for("https://169.254.169.254/v1", "CASCADE_KEY", private_networks=True)


@pytest.mark.parametrize("at_first", ["93.184.216.34", None])
def test_F29_a_name_that_leads_elsewhere_once_it_was_looked_at_is_sent_nothing(tmp_path, monkeypatch, at_first):
    import socket

    own, asked_for = socket.getaddrinfo, []

    def rebinding(host, port, *rest, **named):
        if host not in ("rebind.example", b"rebind.example"):
            return own(host, port, *rest, **named)
        asked_for.append(host)
        if len(asked_for) > 1:
            return own("127.0.0.1", port, *rest, **named)
        if at_first is None:
            raise OSError("no such name")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (at_first, port))]

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    monkeypatch.setenv("CASCADE_KEY", KEY)
    with serving(echo) as (url, received):
        there = url.replace("127.0.0.1", "rebind.example")
        with pytest.raises(UserError, match="127.0.0.1 is this machine; write localhost for it"):
            asked(there, tmp_path, count=1, key_env="CASCADE_KEY", allow_http=True)
    assert received == [] and len(asked_for) == 2


def test_keys_of_the_body_can_be_left_out_and_ours_cannot_be_taken(tmp_path):
    with serving(echo) as (url, received):
        asked(url, tmp_path, count=1, extra_body={"seed": None, "max_completion_tokens": 9})
    assert "seed" not in received[0][2] and received[0][2]["max_completion_tokens"] == 9
    with pytest.raises(ValueError, match="`n` cannot be set here"):
        Endpoint(url=url, model="m", extra_body={"n": 3})


def test_a_completion_endpoint_gets_text_and_its_text_is_taken(tmp_path):
    def respond(body, number):
        return 200, {}, {"choices": [{"text": body["prompt"].upper(), "finish_reason": "length"}]}

    with serving(respond) as (url, received):
        wanted, answers = asked(url, tmp_path, api="completions", extra_body={"echo": False})
    assert {path for path, _, _ in received} == {"/v1/completions"} and received[0][2]["echo"] is False
    assert [answers[one.key].text for one in wanted] == [one.prompt.text.upper() for one in wanted]
    assert all(answers[one.key].answer_tokens == 3 for one in wanted)  # ten letters, uncounted by the server
