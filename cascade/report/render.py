"""Reports and cards from the templates in `templates/`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from cascade.report.provenance import code_text

# Everything but Markdown is escaped, so that a new template is safe before anybody thinks of it.
_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=select_autoescape(disabled_extensions=("md.jinja",), default=True),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_ENVIRONMENT.filters |= {"code": code_text, "json": json.dumps}


def render(template: str, values: Mapping[str, Any]) -> str:
    """A template filled with values.

    HTML templates escape all values. Markdown templates escape none: they pass text from outside the program through
    the filter `code` (in backquotes) or `json` (in quotes).

    Raises:
        jinja2.UndefinedError: the template names a value that is missing.
    """
    return _ENVIRONMENT.get_template(template).render(values)
