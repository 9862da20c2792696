"""How an answer ended, read from the finish_reason that its server wrote."""

COMPLETE = frozenset({"stop", "eos", "eos_token", "end_turn", "stop_sequence"})
"""The model has ended its answer, or written a stop text that was asked for.

OpenAI, vLLM, SGLang, llama.cpp, Ollama and transformers write stop; Together eos; TGI eos_token and stop_sequence;
gateways to Anthropic end_turn and stop_sequence.
"""

REFUSALS = frozenset({"refused", "refusal", "content_filter"})
"""The teacher refused to answer, or a filter cut its answer."""

CALLS_TOOL = "tool_calls"
"""The message calls a tool: its text is not the answer."""

_TOOLS = frozenset({CALLS_TOOL, "function_call", "tool_use"})


def read_reason(finish_reason: object, *, calls_tool: bool) -> str:
    """A server's finish_reason in lower case; '' where it gives none."""
    reason = str(finish_reason or "").strip().lower()
    if calls_tool or reason in _TOOLS:
        return CALLS_TOOL
    return "refused" if reason in REFUSALS else reason


def is_complete(reason: str) -> bool:
    """Whether the model ended the answer itself; an unknown reason counts as cut off."""
    return reason in COMPLETE


def truncation(reason: str) -> str:
    """The name under which an answer that was cut off is counted."""
    return "truncated" if reason == "length" else f"truncated ({reason})"
