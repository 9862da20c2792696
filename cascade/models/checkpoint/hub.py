"""Models of the Hugging Face hub."""

from pathlib import Path
from typing import Any

from cascade.runtime.errors import UserError
from cascade.runtime.secrets import redact


def fetch(repository: str, revision: str | None) -> Path:
    """The folder of a hub model at a commit, from the cache or downloaded; files that can hold code are left out.

    Raises:
        UserError: no revision is given, or the model cannot be fetched; with what to do.
    """
    if revision is None:
        raise UserError(
            f"{repository}: no such folder here; if it is a hub model, pin it: add `revision:` with a commit hash, "
            "so that the recipe means the same model tomorrow"
        )
    from huggingface_hub import snapshot_download

    bound_waiting()
    patterns = [
        "*.json",
        "*.safetensors",
        "*.model",
        "merges.txt",
        "vocab*",
        "*.jinja",
        "LICENSE*",
        "LICENCE*",
        "NOTICE*",
        "COPYING*",
        "USE_POLICY*",
        "README.md",  # whose head names the licence
    ]
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the client's own errors are those of whichever HTTP library it uses
        raise UserError(f"{repository}@{revision}: cannot be fetched from the hub: {hub_cause(error)}") from error


def bound_waiting() -> None:
    """Bound how long the hub's client waits, from now on: some of its requests have no or a long time limit."""
    from huggingface_hub import constants, get_session, set_client_factory

    seconds = float(constants.HF_HUB_DOWNLOAD_TIMEOUT)

    session: Any = get_session()
    hooks = getattr(session, "event_hooks", None)
    if hooks is None or _limit_waiting in hooks["request"]:
        return
    kind, hooks = type(session), {event: list(functions) for event, functions in hooks.items()}
    hooks["request"].append(_limit_waiting)
    set_client_factory(lambda: kind(event_hooks=hooks, follow_redirects=True, timeout=seconds))


def _limit_waiting(request: Any) -> None:
    """Bound the seconds that a request waits, whatever limits it was made with."""
    from huggingface_hub import constants

    timeouts = request.extensions.get("timeout") or {}
    # Seconds without a byte; datasets asks for a hundred of them, others for no limit.
    longest = float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
    limits = {name: timeouts.get(name) for name in ("connect", "read", "write", "pool")}
    request.extensions["timeout"] = {
        name: longest if seconds is None else min(seconds, longest) for name, seconds in limits.items()
    }


def hub_cause(error: Exception) -> str:
    """The client's message about a failed request, and what to do about it; without keys."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    kind = type(error).__name__
    message = redact((str(error).strip().splitlines() or [kind])[0])
    if kind == "GatedRepoError" or status in (401, 403):
        return (
            f"{message} Accept its terms on its page, and give a token that may read it: HF_TOKEN, or `hf auth login`"
        )
    if kind in ("RepositoryNotFoundError", "RevisionNotFoundError") or status == 404:
        return f"{message} Check the name and the commit; of a private one, HF_TOKEN"
    if status == 429:
        return f"{message} Too many requests: wait, or give HF_TOKEN"
    if isinstance(error, ValueError) and not isinstance(error, OSError):  # a name, a split: nothing the network does
        return message
    return f"{message} Is there a network? With HF_HUB_OFFLINE=1 only what was fetched before is there"
