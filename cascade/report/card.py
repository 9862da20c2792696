"""A member's card: what it was made from and how, and how good it is."""

import json
from typing import Any

from cascade.report.records import Row
from cascade.report.tables import markdown_table, quality_table, stage_table

_PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForImageClassification": "image-classification",
    "AutoModel": "feature-extraction",
}


def member_card(row: Row, teacher: Row, lineage: dict[str, Any], recipe_yaml: str) -> str:
    """README.md of a member. Texts from outside stand in quotes or code blocks only."""
    auto = lineage.get("auto_class", "AutoModelForCausalLM")
    images = auto == "AutoModelForImageClassification"
    unit = "tokens" if auto == "AutoModelForCausalLM" else "examples"
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": _PIPELINES[auto],
        "base_model": lineage["parent"],
        "base_model_relation": "finetune",
        "tags": ["cascade", "pruned", "distilled"],
    }
    origins = lineage["origins"]
    rounded, cut = "quantised" in lineage, bool(lineage["seed"]) or lineage.get("copy_of") == "parent"
    if rounded:
        front |= {"base_model_relation": "quantized", "tags": ["cascade", lineage["quantised"]]}
    if cut and origins and origins[0]["licence"] and origins[0]["name"] == lineage["parent"]:
        front["license"] = origins[0]["licence"]
    parent = _code(lineage["parent"])
    head = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    share = row["num_parameters"] / teacher["num_parameters"]
    if "quantised" in lineage:
        made = f"`{lineage['copy_of']}` with weights in {lineage['quantised']} (torchao)"
        made += f", trained so on {row['tokens']['hop']:,} {unit}." if row["tokens"]["hop"] else ", as they are."
    else:
        origin = f"cut from `{lineage['seed']}`" if lineage["seed"] else "an existing student, not cut"
        made = (
            f"{origin} and recovered by distillation from `{parent}` on {row['tokens']['hop']:,} {unit} "
            f"({row['tokens']['cumulative']:,} along its chain)."
        )
    fence = "````"
    return (
        "\n\n".join(
            [
                f"---\n{head}\n---",
                f"# {row['name']}",
                f"{row['num_parameters']:,} parameters ({share:.0%} of its parent), {made}",
                f"```python\nfrom transformers import {auto}{'' if images else ', AutoTokenizer'}\n\n"
                f'model = {auto}.from_pretrained(".")\n'
                + ("```" if images else 'tokenizer = AutoTokenizer.from_pretrained(".")\n```'),
                "## Quality",
                markdown_table(quality_table([teacher, row])),
                *([] if "quantised" in lineage else ["## Cut and recovery", markdown_table(stage_table([row]))]),
                *(["## Licences"] if origins else []),
                *[_licence(origin) for origin in origins],
                "## Lineage",
                f"```json\n{json.dumps(lineage, indent=1)}\n```",
                "## Recipe",
                f"{fence}yaml\n{recipe_yaml.replace(fence, '')}{fence}",
            ]
        )
        + "\n"
    )


def _code(text: str) -> str:
    """A text from outside that cannot leave the backquotes it is put into."""
    return " ".join(text.replace("`", "'").split())


def _licence(origin: dict[str, str]) -> str:
    """A model that this one has learned from, and what is known of its terms."""
    named = f"`{origin['licence']}`" if origin["licence"] else "not found: look where the model comes from"
    return f"`{_code(origin['name'])}`: {named}." + (f" Terms: {origin['terms']}." if origin["terms"] else "")
