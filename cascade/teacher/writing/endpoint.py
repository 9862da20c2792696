"""A teacher behind OpenAI's interface: many requests at a time, patient with the server, careful with the money.

The key comes from the environment, goes into one header, and is struck out of every message. Answers are never edited:
one that holds the key is not kept.
"""

import json
import random
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import requests

from cascade.recipe.generate import Endpoint
from cascade.runtime.errors import RunError, UserError
from cascade.runtime.secrets import is_key, is_placeholder
from cascade.teacher.writing.address import check_endpoint, is_here, require_address
from cascade.teacher.writing.answers import HOLDS_KEY, Answer, AnswerLog, Request
from cascade.teacher.writing.deadline import PromptSession
from cascade.teacher.writing.logprobs import top_logprobs
from cascade.teacher.writing.reply import error_of, length_named, refused_parameter, reply_of
from cascade.teacher.writing.spending import Spending

_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)
"""Answers that may be others a moment later."""

_THIS_PROMPT = (400, 413, 422)
"""Answers that may be about the prompt alone: too long, or not wanted."""

_MOST_REFUSED = 5
"""So many refusals in a row are no matter of the prompts."""

_KEY_LETTERS = 20
"""A shorter key may stand in an answer by chance."""

_NO_LOGPROBS = "leave generate.endpoint.top_logprobs out, and give distill.teacher: text"

_MOST_BYTES = 64_000_000
"""Of one answer's body."""


class EndpointError(RunError):
    """The endpoint does not answer; what it has answered before is kept."""


def ask(
    endpoint: Endpoint,
    wanted: Sequence[Request],
    log: AnswerLog,
    spending: Spending,
    *,
    sampling: dict[str, Any],
    on_answer: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Ask for every request that the log has no answer to, and append each answer as it comes.

    `on_answer(n)` is called with the number of answers so far. Returns the refusals: they are not kept, as their reason
    may be another than the prompt (an empty account, a model that is not loaded), and asked for again next time.

    Raises:
        BudgetSpent, EndpointError: with the first of them no more is sent; what is under way is waited for.
        UserError: no key, a wrong one, or an unknown model.
    """
    missing = [one for one in wanted if one.key not in log.answers]
    if not missing:
        return []
    told = any(one.logprobs for one in log.answers.values())
    client = _Client(endpoint, check_endpoint(endpoint), spending, sampling, told)
    done = len(wanted) - len(missing)
    refused: list[Answer] = []
    lock = threading.Lock()

    def take(answer: Answer, kept: bool) -> None:
        nonlocal done
        if kept:
            log.add([answer])
        with lock:
            done += kept
            client.refused_in_a_row = 0 if kept else client.refused_in_a_row + 1
            refused.extend([] if kept else [answer])
            if client.refused_in_a_row >= _MOST_REFUSED:
                raise EndpointError(f"{client.url}: refused {_MOST_REFUSED} prompts in a row: {answer.text}")
            if on_answer is not None:
                on_answer(done)

    def one(request: Request) -> None:
        if client.stopped.is_set():
            return
        try:
            found = client.answer(request)
            if found is not None:
                take(*found)
        except BaseException as error:
            client.fail(error)

    with ThreadPoolExecutor(endpoint.concurrency) as pool:
        futures = [pool.submit(one, request) for request in missing]
        try:
            wait(futures)
        except BaseException:  # Ctrl-C: what is under way is waited for, the rest is not begun
            client.stopped.set()
            raise
    if client.error is not None:
        raise client.error
    return refused


class _Client:
    """One endpoint, asked by several threads."""

    def __init__(
        self, endpoint: Endpoint, key: str, spending: Spending, sampling: dict[str, Any], has_told: bool
    ) -> None:
        self.endpoint, self.key, self.spending, self.sampling = endpoint, key, spending, sampling
        self.secret = key if is_key(key) else ""
        self.stopped = threading.Event()
        self.error: BaseException | None = None
        self.refused_in_a_row = 0
        self.has_told = has_told
        """Whether some answer came with log-probabilities: then one without is an exception."""
        self.local, self.lock = threading.local(), threading.Lock()
        path = "chat/completions" if endpoint.api == "chat" else "completions"
        self.url = f"{endpoint.url.rstrip('/')}/{path}"

    def fail(self, error: BaseException) -> None:
        """Stop all threads; the first reason is the one that is told."""
        with self.lock:
            self.error = self.error or error
        self.stopped.set()

    def require_peer(self, address: str) -> None:
        """Refuse where a name has led to since it was looked at."""
        require_address(address, self.endpoint.url, is_here(self.endpoint.url))

    def answer(self, request: Request) -> tuple[Answer, bool] | None:
        """(one answer, whether it is one to keep), however many tries it takes; None if all was stopped meanwhile."""
        retries = random.Random(request.seed)
        for tried in range(self.endpoint.max_retries + 1):
            self.spending.send()
            status, headers, body, problem = self._post(request)
            if status == 200:
                found = self._read(request, body)
                if isinstance(found, Answer):
                    return found, True
                status, problem = found
            if status in _THIS_PROMPT:
                self._require_taken(request, body)
                return Answer(request.key, problem or self._said(status, body), "refused", 0, 0), False
            if status and status not in _AGAIN:
                raise self._hopeless(status, body)
            if tried < self.endpoint.max_retries and self.stopped.wait(self._pause(tried, headers, retries)):
                return None
        raise EndpointError(
            f"{self.url}: no answer after {self.endpoint.max_retries + 1} tries; the last: "
            f"{self._clean(problem or self._said(status, body))}"
        )

    def _post(self, request: Request) -> tuple[int, Any, bytes, str]:
        """(status or 0, headers, body, what went wrong on the way)."""
        if not hasattr(self.local, "session"):
            self.local.session = PromptSession(self.require_peer)
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        seconds = self.endpoint.timeout_seconds
        asked = {"json": self._body(request), "headers": headers, "allow_redirects": False, "stream": True}
        with self.local.session.deadline(seconds) as over:
            try:
                with self.local.session.post(self.url, timeout=(min(seconds, 30.0), seconds), **asked) as found:
                    body = b""
                    for part in found.iter_content(65536):
                        body += part
                        if len(body) > _MOST_BYTES:
                            return 0, {}, b"", f"its answer is larger than {_MOST_BYTES:,} bytes"
                    if not over.is_set():
                        return found.status_code, found.headers, body, ""
            except (requests.exceptions.InvalidHeader, requests.exceptions.InvalidURL) as error:
                raise UserError(f"{self.url}: cannot be asked ({type(error).__name__}); look at url and key") from None
            except requests.RequestException as error:
                if not over.is_set():
                    return 0, {}, b"", f"{type(error).__name__}: {error}"
        return 0, {}, b"", f"no whole answer within {seconds:g} seconds"

    def _body(self, request: Request) -> dict[str, Any]:
        asked: dict[str, Any] = {"model": self.endpoint.model, "seed": request.seed} | self.sampling
        count = self.endpoint.top_logprobs
        if self.endpoint.api == "chat":
            asked["messages"] = request.prompt.messages
            asked |= {"logprobs": True, "top_logprobs": count} if count else {}
        else:
            asked["prompt"] = request.prompt.text
            asked |= {"logprobs": count} if count else {}
        return {name: value for name, value in (asked | self.endpoint.extra_body).items() if value is not None}

    def _read(self, request: Request, body: bytes) -> Answer | tuple[int, str]:
        """The answer, or (the status that its error stands for, or 0; what is wrong); its cost is counted."""
        try:
            found = json.loads(body)
        except (ValueError, RecursionError) as error:
            return 0, f"not JSON ({error}): {self._clean(body.decode(errors='replace'))[:200]}"
        shown = self._clean(str(found))[:300]
        if not isinstance(found, dict):
            return 0, f"no answer: {shown}"
        reply = reply_of(found, chat=self.endpoint.api == "chat")
        usage = self._usage(found, reply.text or "")
        self.spending.receive(*usage)
        fault = error_of(found)
        if fault is not None:
            return fault[0], f"an error instead of an answer: {shown}"
        if reply.text is None:
            return 0, f"no answer in it: {shown}"
        told = bool(top_logprobs([reply.logprobs]))
        self.has_told = self.has_told or told
        if self.endpoint.top_logprobs and reply.text and not self.has_told:
            raise UserError(f"{self.url}: the answers come without log-probabilities; {_NO_LOGPROBS}")
        if len(self.secret) >= _KEY_LETTERS and self.secret in json.dumps([reply.text, reply.logprobs]):
            return Answer(request.key, "", HOLDS_KEY, *usage)
        # Half of a surrogate pair, where a server has cut an answer, is no text.
        whole = reply.text.encode("utf-8", "replace").decode()
        logprobs = None if reply.logprobs is None else [reply.logprobs]
        return Answer(
            request.key, whole, reply.finish_reason or self._unsaid(usage[1]), *usage, logprobs, reply.reasoned
        )

    def _unsaid(self, answer_tokens: int) -> str:
        """The end of an answer whose server does not say: a length that used up all the tokens was cut."""
        return "length" if answer_tokens >= self.sampling.get("max_tokens", answer_tokens + 1) else "stop"

    def _require_taken(self, request: Request, body: bytes) -> None:
        """Refuse to ask on with a parameter that the server takes from nobody.

        Raises:
            UserError: it says so; with the remedy.
        """
        sent = self._body(request).keys() - {"model", "messages", "prompt"}
        name = refused_parameter(body, sent)
        if not name:
            return
        if name in self.endpoint.extra_body:
            remedy = f"leave `{name}` out of generate.endpoint.extra_body, or give it another value"
        elif name in ("logprobs", "top_logprobs"):
            remedy = _NO_LOGPROBS
        else:
            renamed = {length_named(body): self.sampling[name]} if name == "max_tokens" else {}
            keys = ", ".join(f"{key}: {value}" for key, value in ({name: "null"} | renamed).items())
            remedy = f"in the recipe, generate.endpoint.extra_body: {{{keys}}} mends it"
        raise UserError(f"{self.url}: the server does not take `{name}`; {remedy}. It said: {self._said(400, body)}")

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
        return f"{status} {self._clean(body.decode(errors='replace'))[:300]}".strip()

    def _clean(self, text: str) -> str:
        """A server's words without the key, also as JSON or Python write it; a short key is taken out as a word."""
        if not self.key or is_placeholder(self.key):
            return text
        as_json = json.dumps(self.key)[1:-1]
        in_go = "".join(f"\\u{ord(sign):04x}" if sign in "<>&" else sign for sign in as_json)
        forms = {self.key, as_json, in_go, as_json.replace("/", "\\/"), repr(self.key)[1:-1]}
        forms |= {
            escaped for form in forms for escaped in (form.replace("\\", "\\\\"), json.dumps(form)[1:-1])
        }  # a body in the text of another
        for form in sorted(forms, key=len, reverse=True):
            sign = re.escape(form)
            text = re.sub(sign if self.secret else rf"(?<![\w-]){sign}(?![\w-])", "[key]", text)
        return text
