"""A member's model card: where its weights come from, how they were trained, and how well it does."""

import json
from typing import Any

from cascade.models.checkpoint.older_keys import READ_BY
from cascade.report.provenance import Provenance, base_model_relation, sentence, tags
from cascade.report.records import Row
from cascade.report.render import render
from cascade.report.tables import markdown_table, quality_table, stage_table

_PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForImageClassification": "image-classification",
    "AutoModel": "feature-extraction",
}

_FENCE = "````"
"""The fence around the recipe in card.md.jinja."""


def member_card(row: Row, teacher: Row, provenance: Provenance, lineage: dict[str, Any], recipe_yaml: str) -> str:
    """The README.md of a member. Text from outside the program appears in quotes or code blocks only."""
    auto_class = lineage.get("auto_class", "AutoModelForCausalLM")
    values = {
        "row": row,
        "provenance": provenance,
        "front": _front(provenance, auto_class),
        "share": row.num_parameters / teacher.num_parameters,
        "sentence": sentence(provenance),
        "auto_class": auto_class,
        "reads_images": auto_class == "AutoModelForImageClassification",
        "config_readers": READ_BY,
        "quality_table": markdown_table(quality_table([teacher, row])),
        "stage_table": markdown_table(stage_table([row])),
        "lineage": json.dumps(lineage, indent=1),
        "recipe": recipe_yaml.replace(_FENCE, ""),
    }
    return render("card.md.jinja", values)


def _front(provenance: Provenance, auto: str) -> dict[str, Any]:
    """The card's YAML head; it names a base model and a licence only where they are known."""
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": _PIPELINES[auto]}
    if provenance.base_model:
        front |= {"base_model": provenance.base_model, "base_model_relation": base_model_relation(provenance)}
    front["tags"] = tags(provenance)
    return front | ({"license": provenance.licence} if provenance.licence else {})
