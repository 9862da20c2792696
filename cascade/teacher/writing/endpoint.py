"""A teacher behind OpenAI's interface: several requests at a time, retries with pauses, a budget.

The key comes from the environment, goes into one header, and is removed from every message. Answers are never edited;
the text of an answer that holds the key is not kept.
"""

import json
import random
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from cascade.recipe.generate import Endpoint
from cascade.runtime.errors import RunError, UserError
from cascade.runtime.permissions import NO_PERMISSIONS, Permissions
from cascade.runtime.secrets import is_key, is_placeholder
from cascade.teacher.writing.address import check_endpoint, require_address
from cascade.teacher.writing.answers import HOLDS_KEY, Answer, AnswerLog, Request
from cascade.teacher.writing.http_client import HTTPClient, Response, http_client
from cascade.teacher.writing.logprobs import top_logprobs
from cascade.teacher.writing.reply import error_of, length_named, refused_parameter, reply_of
from cascade.teacher.writing.spending import Spending

_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)
"""Statuses that may change a moment later: the request is tried again."""

_THIS_PROMPT = (400, 413, 422)
"""Statuses that may be about the prompt alone: it is too long, or refused."""

_PATHS = {"chat": "chat/completions", "completions": "completions"}
"""An endpoint's api -> where its requests go, below its url."""

_MOST_REFUSED = 5
"""After so many refusals in a row, the prompts are not the reason."""

_KEY_LETTERS = 20
"""A key of fewer letters may stand in an answer by chance."""

_NO_LOGPROBS = "leave generate.endpoint.top_logprobs out, and give distill.teacher: text"


class EndpointError(RunError):
    """The endpoint does not answer; its earlier answers are kept."""


def ask(
    endpoint: Endpoint,
    requests: Sequence[Request],
    log: AnswerLog,
    spending: Spending,
    *,
    sampling: dict[str, Any],
    permissions: Permissions = NO_PERMISSIONS,
    on_answer: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Ask for every request that the log has no answer to, and append each answer as it comes.

    `on_answer(n)` is called with the number of answers so far. Returns the refusals. They are not kept, and the next
    start asks again, as the prompt may not be their reason (an empty account, a model that is not loaded).

    Raises:
        BudgetSpent, EndpointError: nothing more is sent; the requests under way are waited for.
        UserError: the key is missing or wrong, the model is unknown, or the address is refused.
    """
    missing = [request for request in requests if request.key not in log.answers]
    if not missing:
        return []
    key = check_endpoint(endpoint, permissions)
    outcome = _Outcome(log, len(requests) - len(missing), on_answer)

    def require_peer(address: str) -> None:
        require_address(address, endpoint.url, permissions)

    url = f"{endpoint.url.rstrip('/')}/{_PATHS[endpoint.api]}"
    with http_client(url, require_peer, max_connections=endpoint.concurrency) as http:
        client = _Client(endpoint, key, http, spending, sampling, outcome)
        with ThreadPoolExecutor(endpoint.concurrency) as pool:
            futures = [pool.submit(client.work, request) for request in missing]
            try:
                wait(futures)
            except BaseException:  # Ctrl-C: what is under way, and paid for, is waited for; the second cancels it
                client.stopped.set()
                raise
    if client.error is not None:
        raise client.error
    return outcome.refused


class _Outcome:
    """What the requests have led to; several threads hand in their answers."""

    def __init__(self, log: AnswerLog, done: int, on_answer: Callable[[int], None] | None) -> None:
        self.log, self.done, self.on_answer = log, done, on_answer
        self.refused: list[Answer] = []
        self.refused_in_a_row = 0
        self.has_logprobs = any(answer.logprobs for answer in log.answers.values())
        """Whether some answer came with log-probabilities: then one without is an exception."""
        self.lock = threading.Lock()

    def take(self, answer: Answer, usable: bool, url: str) -> None:
        """Keep an answer in the log, or note a refusal.

        Raises:
            EndpointError: so many refusals came in a row that their prompts are not the reason.
        """
        if usable:
            self.log.add([answer])
        with self.lock:
            self.done += usable
            self.refused_in_a_row = 0 if usable else self.refused_in_a_row + 1
            self.refused.extend([] if usable else [answer])
            if self.refused_in_a_row >= _MOST_REFUSED:
                raise EndpointError(f"{url}: refused {_MOST_REFUSED} prompts in a row: {answer.text}")
            if self.on_answer is not None:
                self.on_answer(self.done)


class _Client:
    """One endpoint, asked by several threads."""

    def __init__(
        self,
        endpoint: Endpoint,
        key: str,
        http: HTTPClient,
        spending: Spending,
        sampling: dict[str, Any],
        outcome: _Outcome,
    ) -> None:
        self.endpoint, self.key, self.http = endpoint, key, http
        self.spending, self.sampling, self.outcome = spending, sampling, outcome
        self.url = http.url
        self.secret = key if is_key(key) else ""
        self.stopped = threading.Event()
        self.error: BaseException | None = None
        self.lock = threading.Lock()

    def work(self, request: Request) -> None:
        """Ask for one answer and keep it; the first failure stops all threads, and its reason is kept in `error`."""
        if self.stopped.is_set():
            return
        try:
            result = self.answer(request)
            if result is not None:
                self.outcome.take(*result, self.url)
        except BaseException as error:
            with self.lock:
                self.error = self.error or error
            self.stopped.set()

    def answer(self, request: Request) -> tuple[Answer, bool] | None:
        """(the answer, whether it is usable), after some tries; None where all was stopped meanwhile."""
        jitter = random.Random(request.seed)
        for attempt in range(self.endpoint.max_retries + 1):
            self.spending.send()
            response = self._post(request)
            status, body, problem = response.status, response.body, response.problem
            if status == 200:
                result = self._read(request, body)
                if isinstance(result, Answer):
                    return result, True
                status, problem = result
            if status in _THIS_PROMPT:
                self._require_taken(request, body)
                return Answer(request.key, problem or self._excerpt(status, body), "refused", 0, 0), False
            if status and status not in _AGAIN:
                raise self._hopeless(status, body)
            if attempt < self.endpoint.max_retries and self.stopped.wait(
                self._pause(attempt, response.headers, jitter)
            ):
                return None
        raise EndpointError(
            f"{self.url}: no answer after {self.endpoint.max_retries + 1} tries; the last: "
            f"{self._clean(problem or self._excerpt(status, body))}"
        )

    def _post(self, request: Request) -> Response:
        content = json.dumps(self._body(request)).encode()
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return self.http.post(content, headers, seconds=self.endpoint.timeout_seconds)

    def _body(self, request: Request) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.endpoint.model, "seed": request.seed} | self.sampling
        count = self.endpoint.top_logprobs
        if self.endpoint.api == "chat":
            body["messages"] = request.prompt.messages
            body |= {"logprobs": True, "top_logprobs": count} if count else {}
        else:
            body["prompt"] = request.prompt.text
            body |= {"logprobs": count} if count else {}
        return {name: setting for name, setting in (body | self.endpoint.extra_body).items() if setting is not None}

    def _read(self, request: Request, body: bytes) -> Answer | tuple[int, str]:
        """The answer in a body, or (the status that its error stands for, or 0; what is wrong). Its cost is counted."""
        try:
            content = json.loads(body)
        except (ValueError, RecursionError) as error:
            return 0, f"not JSON ({error}): {self._clean(body.decode(errors='replace'))[:200]}"
        excerpt = self._clean(str(content))[:300]
        if not isinstance(content, dict):
            return 0, f"no answer: {excerpt}"
        reply = reply_of(content, chat=self.endpoint.api == "chat")
        usage = self._usage(content, reply.text or "")
        self.spending.receive(*usage)
        fault = error_of(content)
        if fault is not None:
            return fault[0], f"an error instead of an answer: {excerpt}"
        if reply.text is None:
            return 0, f"no answer in it: {excerpt}"
        if top_logprobs([reply.logprobs]):
            self.outcome.has_logprobs = True
        if self.endpoint.top_logprobs and reply.text and not self.outcome.has_logprobs:
            raise UserError(f"{self.url}: the answers come without log-probabilities; {_NO_LOGPROBS}")
        if len(self.secret) >= _KEY_LETTERS and self.secret in json.dumps([reply.text, reply.logprobs]):
            return Answer(request.key, "", HOLDS_KEY, *usage)
        # Half of a surrogate pair, where a server has cut an answer, is no text.
        whole = reply.text.encode("utf-8", "replace").decode()
        logprobs = None if reply.logprobs is None else [reply.logprobs]
        return Answer(
            request.key, whole, reply.finish_reason or self._assumed_reason(usage[1]), *usage, logprobs, reply.reasoned
        )

    def _assumed_reason(self, answer_tokens: int) -> str:
        """The finish reason where the server gives none: an answer that used up all its tokens was cut."""
        return "length" if answer_tokens >= self.sampling.get("max_tokens", answer_tokens + 1) else "stop"

    def _require_taken(self, request: Request, body: bytes) -> None:
        """Stop where the server says that it takes a parameter from nobody.

        Raises:
            UserError: with the parameter and the remedy.
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
            keys = ", ".join(f"{key}: {setting}" for key, setting in ({name: "null"} | renamed).items())
            remedy = f"in the recipe, generate.endpoint.extra_body: {{{keys}}} mends it"
        raise UserError(f"{self.url}: the server does not take `{name}`; {remedy}. It said: {self._excerpt(400, body)}")

    def _usage(self, body: dict[str, Any], text: str) -> tuple[int, int]:
        """Prompt and answer tokens; four letters count as a token where the server does not count."""
        usage = body.get("usage")
        if isinstance(usage, dict):
            read, written = usage.get("prompt_tokens"), usage.get("completion_tokens")
            if isinstance(read, int) and isinstance(written, int) and min(read, written) >= 0:
                return read, written
        return 0, -(-len(text) // 4)

    def _pause(self, attempt: int, headers: Mapping[str, str], jitter: random.Random) -> float:
        """Seconds until the next try: what the server asks for, else twice as long each time, with jitter."""
        longest = self.endpoint.max_backoff_seconds
        retry_after = headers.get("Retry-After")
        if retry_after:
            try:
                seconds = float(retry_after)
            except ValueError:
                try:
                    seconds = (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds()
                except (ValueError, TypeError):
                    seconds = 0.0
            if seconds > 10 * longest:
                raise EndpointError(
                    f"{self.url}: asks to come back in {seconds:.0f} seconds; start again then, or raise "
                    "generate.endpoint.max_backoff_seconds"
                )
            if seconds > 0:
                return seconds + jitter.random() * min(1.0, seconds)
        return min(longest, 2.0**attempt) * (0.5 + jitter.random() / 2)

    def _hopeless(self, status: int, body: bytes) -> Exception:
        excerpt = self._excerpt(status, body)
        if status in (401, 403):
            where = f"${self.endpoint.key_env}" if self.endpoint.key_env else "generate.endpoint.key_env (none given)"
            return UserError(f"{self.url}: the key is not accepted ({excerpt}); look at {where}")
        if 300 <= status < 400:
            return UserError(
                f"{self.url}: answers with a redirect ({excerpt}), which is not followed; give the right url"
            )
        return UserError(f"{self.url}: {excerpt}; look at generate.endpoint.url and model '{self.endpoint.model}'")

    def _excerpt(self, status: int, body: bytes) -> str:
        return f"{status} {self._clean(body.decode(errors='replace'))[:300]}".strip()

    def _clean(self, text: str) -> str:
        """A server's text without the key, also as JSON or Python write it; a short key is removed as a word."""
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
