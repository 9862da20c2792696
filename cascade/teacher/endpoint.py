"""A teacher behind OpenAI's interface: many requests at a time, patient with the server, careful with the money.

The key comes from the environment, goes into one header, and is struck out of every message.
"""

import ipaddress
import json
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import requests

from cascade.errors import RunError, UserError
from cascade.recipe.generate import Endpoint
from cascade.teacher.answers import Answer, AnswerLog, Request
from cascade.teacher.spending import Spending

_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)
"""Answers that may be others a moment later."""

_THIS_PROMPT = (400, 413, 422)
"""Answers that may be about the prompt alone: too long, or not wanted."""

_MOST_REFUSED = 5
"""So many refusals before the first answer are no matter of the prompts."""

_MOST_BYTES = 64_000_000
"""Of one answer's body."""


class EndpointError(RunError):
    """The endpoint does not answer; what it has answered before is kept."""


def check_endpoint(endpoint: Endpoint) -> str:
    """The key, or '' where none is asked for; refuses addresses that no key should be sent to.

    Raises:
        UserError: the key's variable is empty, or the address is not https, or of the local network's own kind.
    """
    place = f"generate.endpoint.url: {endpoint.url}"
    try:
        parts = urlsplit(endpoint.url)
        host = parts.hostname or ""
    except ValueError as error:
        raise UserError(f"{place}: {error}") from error
    if parts.scheme not in ("http", "https") or not host:
        raise UserError(f"{place}: expected https://HOST/v1 (http for this machine)")
    if parts.username or parts.password or parts.query:
        raise UserError(f"{place}: no user, password or query in it; the key goes into an environment variable")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        address = None
    here = host == "localhost" or (address is not None and address.is_loopback)
    if address is not None and address.is_link_local:
        raise UserError(f"{place}: link-local addresses are not asked")
    if parts.scheme == "http" and not here and not endpoint.allow_http:
        raise UserError(f"{place}: plain http would show key and text to the network; use https, or allow_http: true")
    if not endpoint.key_env:
        return ""
    key = os.environ.get(endpoint.key_env, "").strip()
    if not key:
        raise UserError(f"generate.endpoint.key_env: the environment variable {endpoint.key_env} is not set")
    return key


def ask(
    endpoint: Endpoint,
    wanted: Sequence[Request],
    log: AnswerLog,
    spending: Spending,
    *,
    sampling: dict[str, Any],
    on_answer: Callable[[int], None] | None = None,
) -> None:
    """Ask for every request that the log has no answer to, and append each answer as it comes.

    `on_answer(n)` is called with the number of answers so far.

    Raises:
        BudgetSpent, EndpointError: with the first of them no more is sent; what is under way is waited for.
        UserError: no key, a wrong one, or an unknown model.
    """
    client = _Client(endpoint, check_endpoint(endpoint), spending, sampling)
    missing = [one for one in wanted if one.key not in log.answers]
    lock = threading.Lock()
    refused: list[Answer] = []

    def one(request: Request) -> None:
        if client.stopped.is_set():
            return
        try:
            answer = client.answer(request)
        except BaseException:
            client.stopped.set()
            raise
        with lock:
            if answer.finish_reason == "refused":
                refused.append(answer)
                all_refused = len(refused) >= _MOST_REFUSED and not client.answered
                if all_refused:
                    client.stopped.set()
                    raise UserError(f"generate.endpoint: the first {len(refused)} prompts were refused: {answer.text}")
            else:
                client.answered = True
        log.add([answer])
        if on_answer is not None:
            on_answer(sum(one.key in log.answers for one in wanted))

    with ThreadPoolExecutor(endpoint.concurrency) as pool:
        futures = [pool.submit(one, request) for request in missing]
        try:
            for future in futures:
                future.result()
        except BaseException:
            client.stopped.set()
            for future in futures:
                future.cancel()
            raise


class _Client:
    """One endpoint, asked by several threads."""

    def __init__(self, endpoint: Endpoint, key: str, spending: Spending, sampling: dict[str, Any]) -> None:
        self.endpoint, self.key, self.spending, self.sampling = endpoint, key, spending, sampling
        self.stopped = threading.Event()
        self.answered = False
        self.local = threading.local()
        path = "chat/completions" if endpoint.api == "chat" else "completions"
        self.url = f"{endpoint.url.rstrip('/')}/{path}"

    def answer(self, request: Request) -> Answer:
        """One answer, however many tries it takes."""
        retries = random.Random(request.seed)
        for tried in range(self.endpoint.max_retries + 1):
            self.spending.send()
            status, headers, body, problem = self._post(request)
            if status == 200:
                found = self._read(request, body)
                if isinstance(found, Answer):
                    self.spending.receive(found.prompt_tokens, found.answer_tokens)
                    return found
                problem = found
            elif status in _THIS_PROMPT:
                return Answer(request.key, self._said(status, body), "refused", 0, 0)
            elif status and status not in _AGAIN:
                raise self._hopeless(status, body)
            if tried < self.endpoint.max_retries:
                pause = self._pause(tried, headers, retries)
                if self.stopped.wait(pause):
                    raise EndpointError("stopped")
        raise EndpointError(
            f"{self.url}: no answer after {self.endpoint.max_retries + 1} tries; the last: "
            f"{self._clean(problem or self._said(status, body))}"
        )

    def _post(self, request: Request) -> tuple[int, Any, bytes, str]:
        """(status or 0, headers, body, what went wrong on the way)."""
        if not hasattr(self.local, "session"):
            self.local.session = requests.Session()
            self.local.session.trust_env = False  # no .netrc passwords, no proxies that the recipe does not name
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        seconds = self.endpoint.timeout_seconds
        deadline = time.monotonic() + seconds
        try:
            with self.local.session.post(
                self.url,
                json=self._body(request),
                headers=headers,
                timeout=(min(seconds, 30.0), seconds),
                allow_redirects=False,
                stream=True,
            ) as found:
                body = b""
                for part in found.iter_content(65536):
                    body += part
                    if len(body) > _MOST_BYTES:
                        return 0, {}, b"", f"its answer is larger than {_MOST_BYTES:,} bytes"
                    if time.monotonic() > deadline:
                        return 0, {}, b"", f"no whole answer within {seconds:g} seconds"
                return found.status_code, found.headers, body, ""
        except requests.RequestException as error:
            return 0, {}, b"", f"{type(error).__name__}: {error}"

    def _body(self, request: Request) -> dict[str, Any]:
        asked: dict[str, Any] = {"model": self.endpoint.model, "seed": request.seed} | self.sampling
        if self.endpoint.api == "chat":
            asked["messages"] = request.prompt.messages
        else:
            asked["prompt"] = request.prompt.text
        return asked | self.endpoint.extra_body

    def _read(self, request: Request, body: bytes) -> Answer | str:
        """The answer, or what is wrong with it."""
        try:
            found = json.loads(body)
        except ValueError as error:
            return f"not JSON ({error}): {body[:200]!r}"
        if not isinstance(found, dict) or found.get("error"):
            return f"an error instead of an answer: {str(found)[:300]}"
        choices = found.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None
        if choice is None:
            return f"no choices in it: {str(found)[:300]}"
        message = choice.get("message")
        text = choice.get("text") if self.endpoint.api == "completions" else (message or {}).get("content")
        if text is None and isinstance(message, dict) and message.get("refusal"):
            return Answer(request.key, self._clean(str(message["refusal"])), "refused", *self._usage(found, ""))
        if text is None:
            text = ""
        if not isinstance(text, str):
            return f"its answer is no text: {str(choice)[:300]}"
        logprobs = choice.get("logprobs")
        kept = logprobs if isinstance(logprobs, dict) else None
        reason = str(choice.get("finish_reason") or "stop")
        return Answer(request.key, text, reason, *self._usage(found, text), [kept] if kept else None)

    def _usage(self, found: dict[str, Any], text: str) -> tuple[int, int]:
        """Prompt and answer tokens; a server that does not count is taken at four letters a token."""
        usage = found.get("usage")
        if isinstance(usage, dict):
            asked, answered = usage.get("prompt_tokens"), usage.get("completion_tokens")
            if isinstance(asked, int) and isinstance(answered, int) and min(asked, answered) >= 0:
                return asked, answered
        return 0, -(-len(text) // 4)

    def _pause(self, tried: int, headers: Any, retries: random.Random) -> float:
        """Seconds until the next try: what the server asks for, else twice as long each time, with jitter."""
        longest = self.endpoint.max_backoff_seconds
        asked = headers.get("Retry-After") if headers else None
        if asked:
            try:
                seconds = float(asked)
            except ValueError:
                try:
                    seconds = (parsedate_to_datetime(asked) - datetime.now(UTC)).total_seconds()
                except (ValueError, TypeError):
                    seconds = 0.0
            if seconds > 10 * longest:
                raise EndpointError(
                    f"{self.url}: asks to come back in {seconds:.0f} seconds; start again then, or raise "
                    "generate.endpoint.max_backoff_seconds"
                )
            if seconds > 0:
                return seconds + retries.random() * min(1.0, seconds)
        return min(longest, 2.0**tried) * (0.5 + retries.random() / 2)

    def _hopeless(self, status: int, body: bytes) -> Exception:
        said = self._said(status, body)
        if status in (401, 403):
            where = f"${self.endpoint.key_env}" if self.endpoint.key_env else "generate.endpoint.key_env (none given)"
            return UserError(f"{self.url}: the key is not accepted ({said}); look at {where}")
        if 300 <= status < 400:
            return UserError(f"{self.url}: answers with a redirect ({said}), which is not followed; give the right url")
        return UserError(f"{self.url}: {said}; look at generate.endpoint.url and model '{self.endpoint.model}'")

    def _said(self, status: int, body: bytes) -> str:
        return self._clean(f"{status} {body[:300].decode(errors='replace')}".strip())

    def _clean(self, text: str) -> str:
        return text.replace(self.key, "[key]") if self.key else text
