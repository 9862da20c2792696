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
    """The text of a template's file, filled with the values.

    In HTML all values are escaped. In Markdown none is: a template passes texts from outside through the filter `code`
    (in backquotes that they cannot leave) or `json` (in quotes).

    Raises:
        jinja2.UndefinedError: the template names a value that is not given.
    """
    return _ENVIRONMENT.get_template(template).render(values)
