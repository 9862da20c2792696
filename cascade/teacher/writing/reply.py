"""Reads a server's body: an answer, an error (with whatever status), or a parameter that the server does not take."""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from cascade.teacher.writing.endings import read_reason

_NAMED = {
    "invalid_api_key": 401, "authentication_error": 401, "permission_error": 403, "model_not_found": 404,
    "context_length_exceeded": 400, "invalid_request_error": 400, "unsupported_parameter": 400,
    "unsupported_value": 400, "unknown_parameter": 400, "rate_limit_exceeded": 429, "overloaded_error": 529,
}  # fmt: skip
"""Name of an error -> the HTTP status that it stands for."""

_NOT_TAKEN = re.compile(
    r"(?i)unsupported|n[o']t support|unknown|unrecogni[sz]ed|unexpected|extra[ _](?:inputs|forbidden)|not permitted"
    r"|not allowed|not available|deprecated|no longer|instead|not compatible|incompatible"
)
_LENGTHS = re.compile(r"\bmax_\w+_tokens\b")


@dataclass(frozen=True)
class Reply:
    """The answer in a server's body."""

    text: str | None
    """None where the body holds no answer."""
    finish_reason: str
    """The reason as `read_reason` returns it; '' where the server gives none."""
    reasoned: bool
    """Whether the model has reasoned beside the answer, shown or only counted."""
    logprobs: dict[str, Any] | None


def reply_of(body: dict[str, Any], *, chat: bool) -> Reply:
    """The answer in a chat completion's or a completion's body."""
    choice = _choice(body)
    message: dict[str, Any] = choice["message"] if isinstance(choice.get("message"), dict) else {}
    content, parted = _joined(message.get("content")) if chat else (choice.get("text"), False)
    calls = any(message.get(name) for name in ("tool_calls", "function_call"))
    reason = read_reason(choice.get("finish_reason"), calls_tool=calls)
    if content is None and message.get("refusal"):
        content, reason = message["refusal"], "refused"
    if content is None and (message or "text" in choice):
        content = ""  # an answer without a word
    beside = any(message.get(name) or choice.get(name) for name in ("reasoning_content", "reasoning", "thinking"))
    logprobs = choice.get("logprobs")
    return Reply(
        content if isinstance(content, str) else None,
        reason,
        bool(parted or beside or _counted_thoughts(body)),
        logprobs if isinstance(logprobs, dict) else None,
    )


def error_of(body: dict[str, Any]) -> tuple[int, str] | None:
    """(the status that an error stands for, or 0; its text) of a body with an error, whatever the response's status."""
    choice = _choice(body)
    error = body.get("error") or choice.get("error")
    if not error and body.get("object") == "error":
        error = body
    if not error and choice.get("finish_reason") == "error":
        error = "finish_reason: error"
    if not error:
        return None
    details = error if isinstance(error, dict) else {"message": error}
    codes = [details.get(name) for name in ("code", "status", "type")]
    statuses = [int(str(code)) if str(code).isdecimal() else _NAMED.get(str(code), 0) for code in codes]
    return next((status for status in statuses if 400 <= status < 600), 0), str(details.get("message") or details)


def refused_parameter(body: bytes, sent: Collection[str]) -> str:
    """The key of a request that an error says the server does not take; '' where the error says something else."""
    text = body.decode(errors="replace")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = {"message": text}
    error = content.get("error", content) if isinstance(content, dict) else {}
    error = error if isinstance(error, dict) else {"message": error}
    details = error.get("detail") or error.get("message")
    for detail in details if isinstance(details, list) else []:  # pydantic's own, which servers in Python pass on
        place = detail.get("loc") if isinstance(detail, dict) else None
        if place and str(place[-1]) in sent and _NOT_TAKEN.search(f"{detail.get('type')} {detail.get('msg')}"):
            return str(place[-1])
    if isinstance(details, list) or not _NOT_TAKEN.search(f"{error.get('code')} {details}"):
        return ""
    if str(error.get("param")) in sent:
        return str(error["param"])
    quoted = re.findall(r"[`'\"]([\w.]+)[`'\"]", str(details))
    return next((name for name in quoted if name in sent), "")


def length_named(body: bytes) -> str:
    """The name that a server which does not take `max_tokens` has for it."""
    match = _LENGTHS.search(body.decode(errors="replace"))
    return match.group() if match else "max_completion_tokens"


def _choice(body: dict[str, Any]) -> dict[str, Any]:
    choices = body.get("choices")
    return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}


def _joined(content: Any) -> tuple[Any, bool]:
    """(a message's text, whether there are thoughts beside it); the texts of a list of parts are joined."""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        return content, False
    texts = [part.get("text") for part in content if part.get("type") == "text"]
    return "".join(text for text in texts if isinstance(text, str)), len(texts) < len(content)


def _counted_thoughts(body: dict[str, Any]) -> bool:
    """Whether the server has counted tokens of reasoning that it does not show."""
    usage = body.get("usage")
    details = usage.get("completion_tokens_details") if isinstance(usage, dict) else None
    count = details.get("reasoning_tokens") if isinstance(details, dict) else 0
    return isinstance(count, int) and count > 0
