"""How an answer ended, by the finish_reason that its server wrote."""

COMPLETE = frozenset({"stop", "eos", "eos_token", "end_turn", "stop_sequence"})
"""The model has ended its answer, or written a stop text that was asked for.

OpenAI, vLLM, SGLang, llama.cpp, Ollama and transformers write stop; Together eos; TGI eos_token and stop_sequence;
gateways to Anthropic end_turn and stop_sequence.
"""

REFUSALS = frozenset({"refused", "refusal", "content_filter"})
"""The teacher would not answer, or a filter has cut what it was saying."""

CALLS_TOOL = "tool_calls"
"""The message is a call of a tool: what it says is not the answer."""

_TOOLS = frozenset({CALLS_TOOL, "function_call", "tool_use"})


def read_reason(value: object, *, calls_tool: bool) -> str:
    """A server's finish_reason in lower case; '' where it gives none."""
    reason = str(value or "").strip().lower()
    if calls_tool or reason in _TOOLS:
        return CALLS_TOOL
    return "refused" if reason in REFUSALS else reason


def is_complete(reason: str) -> bool:
    """Whether the answer's end is the model's own; everything that is not known to be counts as cut off."""
    return reason in COMPLETE


def truncation(reason: str) -> str:
    """What an answer that was cut off is counted as."""
    return "truncated" if reason == "length" else f"truncated ({reason})"
