"""Requests to an endpoint end at their deadline, go where they may, and stop when they are told to."""

import asyncio
import gzip
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from contextlib import contextmanager

import pytest
from endpoint_server import chat_answer, serving

from cascade.recipe.generate import Endpoint
from cascade.runtime.errors import Stopped, UserError
from cascade.runtime.stopping import handled
from cascade.teacher.writing.answers import AnswerLog, requests_of
from cascade.teacher.writing.endpoint import ask
from cascade.teacher.writing.http_client import http_client
from cascade.teacher.writing.prompts import prompts_of
from cascade.teacher.writing.spending import Spending

KEY = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("CASCADE_KEY", KEY)


def post(url, content=b"{}", headers=None, *, seconds=5.0, peers=None):
    """The response to one request; `peers` collects the addresses that were checked."""
    with http_client(url, ([] if peers is None else peers).append, max_connections=1) as client:
        return client.post(content, headers or {}, seconds=seconds)


def answered(url, folder, count, **settings):
    """Ask for answers to so many prompts; the answers that the log then has."""
    endpoint = Endpoint(url=url, model="teacher", key_env="CASCADE_KEY", **settings)
    requests = requests_of(prompts_of([f"question {number}" for number in range(count)]), 1, {})
    log, spending = AnswerLog(folder / "answers.jsonl"), Spending(folder / "spending.json", endpoint)
    ask(endpoint, requests, log, spending, sampling={})
    return log.answers


def echo(body, number=0):
    return 200, {}, chat_answer(f"answer to {body['messages'][-1]['content']}")


@contextmanager
def silent_server():
    """A server that accepts connections and neither reads nor writes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.mark.parametrize(
    ("scheme", "size"), [("http", 2), ("http", 50_000_000), ("https", 2)], ids=["answer", "sending", "TLS handshake"]
)
def test_F24_the_deadline_holds_for_every_part_of_a_request(scheme, size):
    with silent_server() as port:
        started = time.monotonic()
        response = post(f"{scheme}://127.0.0.1:{port}/v1", b"x" * size, seconds=0.3)
        assert response.problem == "no whole answer within 0.3 seconds" or "ConnectTimeout" in response.problem
        assert 0.25 < time.monotonic() - started < 3


def test_F24_a_body_is_bounded_by_its_size_after_decompression():
    bomb = gzip.compress(bytes(70_000_000))
    assert len(bomb) < 100_000
    with serving(lambda body, number: (200, {"Content-Encoding": "gzip"}, bomb)) as (url, _):
        assert "larger than 64,000,000 bytes" in post(url).problem


def test_a_compressed_answer_is_read():
    with serving(lambda body, number: (200, {"Content-Encoding": "gzip"}, gzip.compress(b"an answer"))) as (url, _):
        assert post(url).body == b"an answer"


def test_the_address_of_a_connection_is_checked_before_anything_is_sent():
    def refuse(address):
        raise UserError(f"{address} is not wanted")

    peers = []
    with serving(lambda body, number: (200, {}, b"{}")) as (url, received):
        assert post(url, peers=peers).status == 200 and peers == ["127.0.0.1"] and len(received) == 1
        with (
            pytest.raises(UserError, match="127.0.0.1 is not wanted"),
            http_client(url, refuse, max_connections=1) as client,
        ):
            client.post(b"{}", {"Authorization": f"Bearer {KEY}"}, seconds=5)
    assert len(received) == 1


def test_a_proxy_of_the_environment_is_used_and_its_own_address_is_not_the_endpoints(tmp_path, monkeypatch):
    with serving(echo) as (proxy, received):
        monkeypatch.setenv("HTTP_PROXY", proxy.removesuffix("/v1"))
        answers = answered("http://teacher.invalid/v1", tmp_path, 1, allow_http=True)
        assert [answer.text for answer in answers.values()] == ["answer to question 0"]
        assert received[0][0] == "http://teacher.invalid/v1/chat/completions"
        monkeypatch.setenv("NO_PROXY", "teacher.invalid")
        assert post("http://teacher.invalid/v1").problem.startswith("ConnectError")
    assert len(received) == 1


def test_an_endpoint_on_this_machine_is_asked_directly_whatever_proxy_the_environment_has(monkeypatch):
    with serving(echo) as (proxy, seen), serving(lambda body, number: (200, {}, b"{}")) as (url, received):
        monkeypatch.setenv("HTTP_PROXY", proxy.removesuffix("/v1"))
        assert post(url).status == 200
    assert len(received) == 1 and not seen


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ALL_PROXY", f"socks5://user:{KEY}@127.0.0.1:1", r"names a SOCKS proxy; pip install 'httpx2\[socks\]'"),
        ("HTTPS_PROXY", f"ftp://user:{KEY}@127.0.0.1:1", "is no proxy's url"),
        ("SSL_CERT_FILE", "/no/such/file", "certificates of SSL_CERT_FILE or SSL_CERT_DIR cannot be read: .*No such"),
    ],
)
def test_an_environment_that_cannot_be_used_is_named_without_its_password(monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message) as raised:
        post("https://teacher.invalid/v1")
    assert KEY not in str(raised.value)


def test_F32_the_password_of_a_netrc_is_not_sent(tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password of-another-service\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with serving(lambda body, number: (200, {}, b"{}")) as (url, received):
        post(url)
    assert "Authorization" not in received[0][1]


def test_F32_a_key_that_is_no_header_is_not_shown():
    with serving(lambda body, number: (200, {}, b"{}")) as (url, received):
        with pytest.raises(UserError, match=r"cannot be asked \(LocalProtocolError\); look at url and key") as raised:
            post(url, headers={"Authorization": f"Bearer {KEY}\nX: y"})
    assert received == [] and KEY not in str(raised.value) and raised.value.__suppress_context__


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl, which makes the certificate, is not here")
def test_a_certificate_is_trusted_where_SSL_CERT_FILE_has_it_and_refused_elsewhere(tmp_path, monkeypatch):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    def serve(listener):
        for _ in range(2):
            connection, _ = listener.accept()
            try:
                with context.wrap_socket(connection, server_side=True) as wrapped:
                    wrapped.recv(65536)
                    wrapped.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            except OSError:
                connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        url = f"https://127.0.0.1:{listener.getsockname()[1]}/v1"
        problem = post(url, seconds=30).problem
        assert "CERTIFICATE_VERIFY_FAILED" in problem, problem
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert post(url, seconds=30).body == b"ok"
        thread.join(5)


@contextmanager
def interrupted(*, after, times):
    """The block is stopped by SIGINT, `times` times half a second apart, once `after` requests have arrived.

    Yields (`arrived`, which the server releases for each request, and `sent`, which is set after the first signal).
    """
    arrived, sent, thread_id = threading.Semaphore(0), threading.Event(), threading.main_thread().ident

    def interrupt():
        for _ in range(after):
            arrived.acquire(timeout=20)
        for _ in range(times):
            time.sleep(0.5)
            signal.pthread_kill(thread_id, signal.SIGINT)
            sent.set()

    thread = threading.Thread(target=interrupt)
    with handled(), pytest.raises(Stopped):
        thread.start()
        yield arrived, sent
    thread.join()
    with handled():
        pass  # forgets the signal, which the next training in this process would heed


def test_F03_ctrl_c_waits_for_the_answers_under_way_and_asks_for_no_more(tmp_path):
    def respond(body, number):
        arrived.release()
        sent.wait(20)
        time.sleep(0.3)
        return echo(body)

    with serving(respond) as (url, received), interrupted(after=2, times=1) as (arrived, sent):
        answered(url, tmp_path, 20, concurrency=2)
    assert len(received) == len(AnswerLog(tmp_path / "answers.jsonl").answers) == 2


def test_F03_the_second_ctrl_c_ends_the_requests_at_once(tmp_path):
    def respond(body, number):
        arrived.release()
        return "hang", 20.0

    started = time.monotonic()
    with serving(respond) as (url, received), interrupted(after=2, times=2) as (arrived, _):
        answered(url, tmp_path, 20, concurrency=2)
    assert time.monotonic() - started < 10 and len(received) == 2


def test_an_endpoint_is_asked_from_where_an_event_loop_runs_already_as_in_a_notebook(tmp_path):
    async def cell(url):
        return answered(url, tmp_path, 2)

    with serving(echo) as (url, _):
        answers = asyncio.run(cell(url))
    assert sorted(answer.text for answer in answers.values()) == ["answer to question 0", "answer to question 1"]
