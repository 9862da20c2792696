"""What a server's body says: an answer, an error (with whatever status), or a parameter that it does not take."""

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
"""Errors by name -> the status that stands for them."""

_NOT_TAKEN = re.compile(
    r"(?i)unsupported|n[o']t support|unknown|unrecogni[sz]ed|unexpected|extra[ _](?:inputs|forbidden)|not permitted"
    r"|not allowed|not available|deprecated|no longer|instead|not compatible|incompatible"
)
_LENGTHS = re.compile(r"\bmax_\w+_tokens\b")


@dataclass(frozen=True)
class Reply:
    """One answer of a body."""

    text: str | None
    """None where there is no answer in the body."""
    finish_reason: str
    """As `read_reason` gives it; '' where the server gives none."""
    reasoned: bool
    """Whether the model has thought: beside the answer, or uncounted in it."""
    logprobs: dict[str, Any] | None


def reply_of(found: dict[str, Any], *, chat: bool) -> Reply:
    """The answer in a chat completion's or a completion's body."""
    choice = _choice(found)
    said = choice.get("message")
    message: dict[str, Any] = said if isinstance(said, dict) else {}
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
        bool(parted or beside or _counted_thoughts(found)),
        logprobs if isinstance(logprobs, dict) else None,
    )


def error_of(found: dict[str, Any]) -> tuple[int, str] | None:
    """(the status that the error stands for, or 0; its text) of a body with an error in it, whatever its own status."""
    choice = _choice(found)
    error = found.get("error") or choice.get("error")
    if not error and found.get("object") == "error":
        error = found
    if not error and choice.get("finish_reason") == "error":
        error = "finish_reason: error"
    if not error:
        return None
    told = error if isinstance(error, dict) else {"message": error}
    codes = [told.get(name) for name in ("code", "status", "type")]
    numbers = [int(str(one)) if str(one).isdecimal() else _NAMED.get(str(one), 0) for one in codes]
    return next((one for one in numbers if 400 <= one < 600), 0), str(told.get("message") or told)


def refused_parameter(body: bytes, sent: Collection[str]) -> str:
    """Which of the keys that were sent the server does not take, by an error's own words; '' where it is none."""
    text = body.decode(errors="replace")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = {"message": text}
    error = found.get("error", found) if isinstance(found, dict) else {}
    error = error if isinstance(error, dict) else {"message": error}
    details = error.get("detail") or error.get("message")
    for one in details if isinstance(details, list) else []:  # of pydantic, which servers in Python show as it is
        place = one.get("loc") if isinstance(one, dict) else None
        if place and str(place[-1]) in sent and _NOT_TAKEN.search(f"{one.get('type')} {one.get('msg')}"):
            return str(place[-1])
    if isinstance(details, list) or not _NOT_TAKEN.search(f"{error.get('code')} {details}"):
        return ""
    if str(error.get("param")) in sent:
        return str(error["param"])
    quoted = re.findall(r"[`'\"]([\w.]+)[`'\"]", str(details))
    return next((name for name in quoted if name in sent), "")


def length_named(body: bytes) -> str:
    """What a server that does not take `max_tokens` calls it."""
    match = _LENGTHS.search(body.decode(errors="replace"))
    return match.group() if match else "max_completion_tokens"


def _choice(found: dict[str, Any]) -> dict[str, Any]:
    choices = found.get("choices")
    return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}


def _joined(content: Any) -> tuple[Any, bool]:
    """(a message's text, whether there are thoughts beside it); a list of parts is joined."""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        return content, False
    texts = [part.get("text") for part in content if part.get("type") == "text"]
    return "".join(text for text in texts if isinstance(text, str)), len(texts) < len(content)


def _counted_thoughts(found: dict[str, Any]) -> bool:
    """Whether the server has counted tokens of reasoning that it does not show."""
    usage = found.get("usage")
    details = usage.get("completion_tokens_details") if isinstance(usage, dict) else None
    count = details.get("reasoning_tokens") if isinstance(details, dict) else 0
    return isinstance(count, int) and count > 0
