"""Where a published model comes from and who taught it, said once: card, cascade.json and report render this record."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from cascade.report.tables import Table

Start = Literal["prune", "layers", "random", "checkpoint", "copy"]
Teacher = Literal["parent", "text", "logprobs", "none"]


@dataclass(frozen=True)
class Provenance:
    """One published model; every name as others may read it, without folders of the machine it was made on."""

    name: str
    parent: str
    """The first model of the family."""
    start: Start
    """prune: cut by scores; layers: whole layers; random: random weights; checkpoint: a model that was there already;
    copy: another published model, in fewer bits."""
    start_from: str
    """prune, layers and copy: 'parent' or a member's name; checkpoint: the model; random: the model type."""
    derived_from: Literal["parent", "checkpoint", "random"]
    """Whose weights it has in the end, along the chain of what it was cut or copied from."""
    base_model: str
    """The hub id of the model that its weights come from; '' where that is not on the hub."""
    licence: str
    """Of the model that its weights come from; '' where none was found, or none is."""
    taught_by: Teacher
    """parent: by its probabilities; logprobs: by those of an endpoint; text: cross-entropy; none: not trained."""
    teacher: str
    """The model that teaches, by probabilities or by its text; '' where that is nobody's that the recipe names."""
    text_by: str
    """Who wrote the training text; '' where no model that the recipe names did."""
    text_share: float
    """Share of cross-entropy with the text beside the teacher's probabilities."""
    on_policy: bool
    """Whether it also wrote text itself, for the teacher to judge."""
    counts: Literal["tokens", "examples"]
    """What its training is counted in."""
    num_trained: int
    num_cumulative: int
    """The same along its chain of seeds."""
    quantised: str
    """int8 or int4; '' where its weights are plain."""
    origins: tuple[dict[str, Any], ...]
    """Models whose terms concern it: `name`, `licence`, `terms`."""

    def record(self) -> dict[str, Any]:
        """For cascade.json."""
        return asdict(self) | {"origins": list(self.origins)}


def base_model_relation(provenance: Provenance) -> str:
    """How the hub's model tree shows it beneath its base model; '' where it has none."""
    if not provenance.base_model:
        return ""
    return "quantized" if provenance.start == "copy" and provenance.start_from == "parent" else "finetune"


def tags(provenance: Provenance) -> list[str]:
    """Of the card's head."""
    cut = provenance.derived_from == "parent" and not (provenance.start == "copy" and provenance.start_from == "parent")
    names = ["cascade", *(["pruned"] if cut or provenance.start in ("prune", "layers") else [])]
    names += ["distilled"] if provenance.teacher else []
    return [*names, provenance.quantised] if provenance.quantised else names


def sentence(provenance: Provenance) -> str:
    """What it was made from and how, without an end."""
    beginning = {
        "prune": f"cut from {code_text(provenance.start_from)}",
        "layers": f"made of whole layers of {code_text(provenance.start_from)}",
        "random": f"begun with random weights ({code_text(provenance.start_from)})",
        "checkpoint": f"begun as the existing model {code_text(provenance.start_from)}, not cut",
        "copy": f"{code_text(provenance.start_from)} with weights in {provenance.quantised} (torchao)",
    }[provenance.start]
    if provenance.taught_by == "none":
        return f"{beginning}, as they are" if provenance.start == "copy" else beginning
    cut = provenance.start in ("prune", "layers")
    verb = "recovered" if cut else "trained so" if provenance.start == "copy" else "trained"
    chain = (
        f" ({provenance.num_cumulative:,} along its chain)" if provenance.start in ("prune", "layers", "copy") else ""
    )
    return f"{beginning}, and {verb} {lesson(provenance)} on {provenance.num_trained:,} {provenance.counts}{chain}"


def lesson(provenance: Provenance) -> str:
    """How it was taught, and by whom: 'by distillation from `parent`'."""
    if provenance.taught_by == "none":
        return "not at all"
    written = f" written by {code_text(provenance.text_by)}" if provenance.text_by else ""
    if provenance.taught_by == "text":
        return f"by cross-entropy with text{written}" if written else "by cross-entropy with the text alone"
    if provenance.taught_by == "logprobs":
        taught = f"by the log-probabilities that {code_text(provenance.teacher)} gave for its own text"
    else:
        taught = f"by distillation from {code_text(provenance.teacher)}" + (f" with text{written}" if written else "")
    if provenance.on_policy:
        taught += ", in part on text of its own"
    if provenance.text_share > 0:
        taught += f", and by cross-entropy with the text ({provenance.text_share:.0%} of the loss)"
    return taught


def provenance_table(records: Sequence[dict[str, Any]]) -> Table:
    """One line for each published model."""
    table = [["", "start", "weights come from", "taught", "on"]]
    for record in records:
        provenance = Provenance(**record | {"origins": tuple(record["origins"])})
        source = {
            "parent": provenance.parent,
            "random": "nothing: random",
            "checkpoint": provenance.base_model or provenance.start_from,
        }
        start = f"{provenance.start}: {provenance.start_from}"
        trained = f"{provenance.num_trained:,} {provenance.counts}" if provenance.taught_by != "none" else ""
        table.append(
            [provenance.name, start, source[provenance.derived_from], lesson(provenance).replace("`", ""), trained]
        )
    return table


def load_provenances(run_folder: Path) -> dict[str, dict[str, Any]]:
    """Of each published model, as its cascade.json has it; those of older versions have none."""
    records = {}
    for path in sorted(run_folder.glob("members/*/cascade.json")):
        lineage = json.loads(path.read_text(encoding="utf-8"))
        if "provenance" in lineage:
            records[path.parent.name] = lineage["provenance"]
    return records


def code_text(text: str) -> str:
    """A text from outside in backquotes that it cannot leave."""
    return f"`{' '.join(text.replace('`', chr(39)).split())}`"
