"""Where a published model comes from and who taught it: one record, which card, cascade.json and report render."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from cascade.report.tables import Table
from cascade.runtime.files import read_json

Start = Literal["prune", "layers", "random", "checkpoint", "copy"]
Teacher = Literal["parent", "text", "logprobs", "none"]


@dataclass(frozen=True)
class Provenance:
    """The provenance of a published model. Names are public: no folders of the machine that made the model."""

    name: str
    parent: str
    """The first model of the family."""
    start: Start
    """prune: cut by scores; layers: whole layers; random: random weights; checkpoint: an existing model; copy: another
    published model, in fewer bits."""
    start_from: str
    """prune, layers and copy: 'parent' or a member's name; checkpoint: the model; random: the model type."""
    derived_from: Literal["parent", "checkpoint", "random"]
    """Where its weights come from, at the end of the chain of models that it was cut or copied from."""
    base_model: str
    """The hub id of the model that its weights come from; '' where that is not on the hub."""
    licence: str
    """Licence of the model that its weights come from; '' where there is no such model or no known licence."""
    taught_by: Teacher
    """parent: the parent's probabilities; logprobs: those of an endpoint; text: cross-entropy; none: not trained."""
    teacher: str
    """The model that teaches, by probabilities or by its text; '' where the recipe names no such model."""
    text_by: str
    """The model that wrote the training text; '' where the recipe names no such model."""
    text_share: float
    """Share of cross-entropy with the text beside the teacher's probabilities."""
    on_policy: bool
    """Whether the student also wrote text that the teacher then judged."""
    counts: Literal["tokens", "examples"]
    """The unit of the training budget."""
    num_trained: int
    num_cumulative: int
    """Training tokens or examples of the model and of all members that it was cut from."""
    quantised: str
    """int8 or int4; '' where the weights are not quantised."""
    origins: tuple[dict[str, Any], ...]
    """Models whose terms apply to this one: `name`, `licence`, `terms`."""

    def record(self) -> dict[str, Any]:
        """The fields as cascade.json holds them."""
        return asdict(self) | {"origins": list(self.origins)}


def base_model_relation(provenance: Provenance) -> str:
    """The model's relation to its base model in the hub's model tree; '' where it has no base model there."""
    if not provenance.base_model:
        return ""
    return "quantized" if provenance.start == "copy" and provenance.start_from == "parent" else "finetune"


def tags(provenance: Provenance) -> list[str]:
    """The tags in the head of a model's card."""
    cut = provenance.derived_from == "parent" and not (provenance.start == "copy" and provenance.start_from == "parent")
    names = ["cascade", *(["pruned"] if cut or provenance.start in ("prune", "layers") else [])]
    names += ["distilled"] if provenance.teacher else []
    return [*names, provenance.quantised] if provenance.quantised else names


def sentence(provenance: Provenance) -> str:
    """What a model was made from and how, as a sentence without a full stop."""
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
    """How a model was taught, and by whom, such as 'by distillation from `parent`'."""
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
    """A line for each published model: start, source of the weights, teaching, training budget."""
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
    """The provenance of each published model that its cascade.json states, by name; older versions state none."""
    records = {}
    for path in sorted(run_folder.glob("members/*/cascade.json")):
        lineage = read_json(path)
        if "provenance" in lineage:
            records[path.parent.name] = lineage["provenance"]
    return records


def code_text(text: str) -> str:
    """A text from outside the program in backquotes, without backquotes of its own that would end them."""
    return f"`{' '.join(text.replace('`', chr(39)).split())}`"
