"""A member's card: what it was made from and how, and how good it is."""

import json
from typing import Any

from cascade.models.older_keys import READ_BY
from cascade.report.provenance import Provenance, base_model_relation, code_text, sentence, tags
from cascade.report.records import Row
from cascade.report.tables import markdown_table, quality_table, stage_table

_PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForImageClassification": "image-classification",
    "AutoModel": "feature-extraction",
}


def member_card(row: Row, teacher: Row, made: Provenance, lineage: dict[str, Any], recipe_yaml: str) -> str:
    """README.md of a member. Texts from outside stand in quotes or code blocks only."""
    auto = lineage.get("auto_class", "AutoModelForCausalLM")
    images = auto == "AutoModelForImageClassification"
    head = "\n".join(f"{key}: {json.dumps(value)}" for key, value in _front(made, auto).items())
    share = row.num_parameters / teacher.num_parameters
    fence = "````"
    return (
        "\n\n".join(
            [
                f"---\n{head}\n---",
                f"# {row.name}",
                f"{row.num_parameters:,} parameters ({share:.0%} of {code_text(made.parent)}'s), {sentence(made)}.",
                f"```python\nfrom transformers import {auto}{'' if images else ', AutoTokenizer'}\n\n"
                f'model = {auto}.from_pretrained(".")\n'
                + ("```" if images else 'tokenizer = AutoTokenizer.from_pretrained(".")\n```'),
                *([] if made.quantised or images else [f"Its config.json is written for {READ_BY}."]),
                "## Quality",
                markdown_table(quality_table([teacher, row])),
                *([] if made.quantised else ["## Cut and recovery", markdown_table(stage_table([row]))]),
                *(["## Licences"] if made.origins else []),
                *[_licence(origin) for origin in made.origins],
                "## Lineage",
                f"```json\n{json.dumps(lineage, indent=1)}\n```",
                "## Recipe",
                f"{fence}yaml\n{recipe_yaml.replace(fence, '')}{fence}",
            ]
        )
        + "\n"
    )


def _front(made: Provenance, auto: str) -> dict[str, Any]:
    """The card's head: of the base model and its licence only what is known and so."""
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": _PIPELINES[auto]}
    if made.base_model:
        front |= {"base_model": made.base_model, "base_model_relation": base_model_relation(made)}
    front["tags"] = tags(made)
    return front | ({"license": made.licence} if made.licence else {})


def _licence(origin: dict[str, str]) -> str:
    """A model that this one has learned from, and what is known of its terms."""
    named = code_text(origin["licence"]) if origin["licence"] else "not found: look where the model comes from"
    return f"{code_text(origin['name'])}: {named}." + (f" Terms: {origin['terms']}." if origin["terms"] else "")
