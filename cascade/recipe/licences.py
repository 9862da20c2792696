"""Whose words and weights a student is made of, and under which terms. No legal advice: what to read, and when.

Licences as of 2026; where one says something about what its output may be used for, the recipe has to say that it was
read (`acknowledged`).
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
    """What a licence says of output, as far as it matters here."""

    says: str
    derived: bool = True
    """Whether that also concerns students that are derived from the model itself: cut from it."""


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
"""By a model's licence as its card names it, or by whose endpoint answers."""

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
    """Of the recipe."""
    name: str
    licence: str
    """'' where none was found."""
    derived: bool = False
    """Whether all students are cut from it."""

    @property
    def terms(self) -> str:
        """What of its licence concerns these students; '' for nothing that is known here."""
        terms = TERMS.get(self.licence)
        return "" if terms is None or (self.derived and not terms.derived) else terms.says

    def record(self) -> dict[str, Any]:
        """For cards and provenance, without the folders of this machine."""
        name = self.name if self.place == "generate.endpoint" else public_model(self.name)
        return {"name": name, "licence": self.licence, "terms": self.terms}


def licence_of(folder: Path) -> str:
    """A model folder's licence: as its card's head names it, else as its licence file begins; '' if neither does."""
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
    """Whose terms go with an endpoint's output: a name of `TERMS`, or ''."""
    host = (urlsplit(url).hostname or "").lower()
    return next((name for ending, name in _HOSTS.items() if host == ending or host.endswith(f".{ending}")), "")


def require_acknowledged(origins: Sequence[Origin], acknowledged: Sequence[str]) -> None:
    """Refuse to learn from what has terms that the recipe does not say were read.

    Raises:
        UserError: with the terms, and what to write.
    """
    for origin in origins:
        if origin.terms and origin.licence not in acknowledged:
            raise UserError(
                f"{origin.place}: {origin.name}: terms '{origin.licence}': {origin.terms}. Read them; if what "
                f"you do keeps to them, write `acknowledged: [{origin.licence}]` into the recipe"
            )
