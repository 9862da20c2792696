"""The licences of models that a student learns from, and what they say about output. No legal advice.

Licences as of 2026. Where a licence limits the use of a model's output, the recipe has to say that somebody has read it
(`acknowledged`).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cascade.recipe.places import public_model
from cascade.runtime.errors import UserError

_LLAMA_ONLY = (
    "its output may not be used to improve other large language models than Llama and what is derived from it "
    "(section 1.b.v of its community licence)"
)
_LLAMA_NAMED = (
    "a model that is trained with it or with its output carries `Llama` at the beginning of its name and shows "
    "`Built with Llama` (section 1.b.i of its community licence)"
)
_GEMMA = (
    "a model that is trained on its output to behave like it counts as derived from it: its terms and its policy of "
    "prohibited uses go along (Gemma Terms of Use)"
)
_NOT_COMMERCIAL = "what is made of it may not be used commercially"
_NO_COMPETITORS = "output may not be used to develop models that compete with theirs"


@dataclass(frozen=True)
class Terms:
    """What a licence says about the use of a model's output to train other models."""

    says: str
    derived: bool = True
    """Whether the terms also apply to students that are cut from the model itself."""


TERMS: dict[str, Terms] = {
    "llama2": Terms(_LLAMA_ONLY, derived=False),
    "llama3": Terms(f"{_LLAMA_ONLY}; what is made from it carries `Llama 3` at the beginning of its name (1.b.i)"),
    "llama3.1": Terms(_LLAMA_NAMED),
    "llama3.2": Terms(_LLAMA_NAMED),
    "llama3.3": Terms(_LLAMA_NAMED),
    "llama4": Terms(_LLAMA_NAMED),
    "gemma": Terms(_GEMMA),
    **{
        f"cc-by-nc{kind}-{version}": Terms(_NOT_COMMERCIAL)
        for kind in ("", "-sa", "-nd")
        for version in ("2.0", "2.5", "3.0", "4.0")
    },
    "openai": Terms(_NO_COMPETITORS),
    "anthropic": Terms(_NO_COMPETITORS),
    "google-gemini": Terms(_NO_COMPETITORS),
}
"""Terms by the licence in a model's card, or by the company whose endpoint answers."""

_HOSTS = {
    "openai.com": "openai",
    "openai.azure.com": "openai",
    "anthropic.com": "anthropic",
    "generativelanguage.googleapis.com": "google-gemini",
}

_BEGINNINGS = {
    "Apache License": "apache-2.0",
    "MIT License": "mit",
    "LLAMA 2 COMMUNITY": "llama2",
    "META LLAMA 3 COMMUNITY": "llama3",
    "LLAMA 3.1 COMMUNITY": "llama3.1",
    "LLAMA 3.2 COMMUNITY": "llama3.2",
    "LLAMA 3.3 COMMUNITY": "llama3.3",
    "LLAMA 4 COMMUNITY": "llama4",
    "Gemma Terms of Use": "gemma",
}


@dataclass(frozen=True)
class Origin:
    """A model that a student learns from."""

    place: str
    """The recipe's key that names the model."""
    name: str
    licence: str
    """'' where no licence is known."""
    derived: bool = False
    """Whether all students are cut from this model."""

    @property
    def terms(self) -> str:
        """The terms of its licence that apply to these students; '' where none are known."""
        terms = TERMS.get(self.licence)
        return "" if terms is None or (self.derived and not terms.derived) else terms.says

    def record(self) -> dict[str, Any]:
        """Name, licence and terms for cards and provenance, without folders of this machine."""
        name = self.name if self.place == "generate.endpoint" else public_model(self.name)
        return {"name": name, "licence": self.licence, "terms": self.terms}


def licence_of(folder: Path) -> str:
    """The licence of a model's folder, from the head of its card or else the first lines of its licence file; or ''."""
    card = folder / "README.md"
    if card.is_file():
        head = re.match(r"---\s*\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), flags=re.DOTALL)
        line = r"^(license(?:_name)?):[ \t]*(?:\n[ \t]*-)?[ \t]*['\"]?(\w[\w.\-]*)"
        named = dict(re.findall(line, head.group(1), flags=re.M)) if head else {}
        licence = str(named.get("license", "")).lower()
        licence = str(named.get("license_name", licence)).lower() if licence in ("other", "") else licence
        if licence:
            return licence
    for file in sorted([*folder.glob("LICEN[SC]E*"), *folder.glob("COPYING*")]):
        begins = file.read_text(encoding="utf-8", errors="replace")[:400].lower()
        for words, name in _BEGINNINGS.items():
            if words.lower() in begins:
                return name
    return ""


def endpoint_terms(url: str) -> str:
    """The name in `TERMS` of the company behind an endpoint; '' where none is known."""
    host = (urlsplit(url).hostname or "").lower()
    return next((name for ending, name in _HOSTS.items() if host == ending or host.endswith(f".{ending}")), "")


def require_acknowledged(origins: Sequence[Origin], acknowledged: Sequence[str]) -> None:
    """Refuse models with terms that the recipe does not acknowledge.

    Raises:
        UserError: quotes the terms, and says what to write into the recipe.
    """
    for origin in origins:
        if origin.terms and origin.licence not in acknowledged:
            raise UserError(
                f"{origin.place}: {origin.name}: terms '{origin.licence}': {origin.terms}. Read them; if what "
                f"you do keeps to them, write `acknowledged: [{origin.licence}]` into the recipe"
            )
