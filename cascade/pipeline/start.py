"""The stages that lead from a seed to what a member's training starts from, and what each of them depends on."""

from cascade.data.examples import Examples, load_training
from cascade.models.architecture.dims import dims_of
from cascade.models.architecture.vocabulary import common_vocabulary, require_ids
from cascade.models.checkpoint.load import fingerprint, load_config, load_tokenizer, resolve_model
from cascade.pipeline.context import Run
from cascade.pipeline.rows import FinishedMember
from cascade.pipeline.stage_output import Checkpoint, Start
from cascade.pipeline.stages.cut import Base, cut_by_scores, take_layers
from cascade.pipeline.stages.init import draw_weights
from cascade.pipeline.stages.repair import repair_cut
from cascade.pipeline.stages.shape_search import Candidate, search_shape
from cascade.pipeline.stages.statistics import with_statistics
from cascade.planning.family import ResolvedMember


def make_start(run: Run, member: ResolvedMember, seed: FinishedMember | None) -> Start:
    """The stages before the training; `seed` is the member that this one is cut from, None where that is the parent."""
    if member.vocab_size is not None and not member.seed:
        _require_common_ids(run, member.vocab_size, member.name)
    match member.member.start:
        case "checkpoint":
            return _start_from_checkpoint(run, member)
        case "random":
            return Start(model=draw_weights(run, member).model(member.name))
        case "layers":
            base = _base(run, member, seed)
            cut, repaired = take_layers(run, member, base), None
        case _:
            base = with_statistics(run, member, _base(run, member, seed))
            cut = cut_by_scores(run, member, base)
            repaired = repair_cut(run, member, base, cut)
    lineage = None if base.lineage is None else [*base.lineage, cut]
    return Start(model=(repaired or cut).model(member.name), cut=cut, repaired=repaired, lineage=lineage)


def find_shape(run: Run, member: ResolvedMember, seed: FinishedMember | None) -> list[Candidate]:
    """The shapes that were tried for a member, the chosen one first; empty where there is nothing to choose."""
    choosing = run.recipe.prune.search is not None or len(member.hidden_choices) > 1
    if member.member.start != "prune" or not choosing or member.target is None or not member.target.bounds():
        return []
    run = run.for_member(member)
    return search_shape(run, member, with_statistics(run, member, _base(run, member, seed)))


def _require_common_ids(run: Run, vocab_size: int, name: str) -> None:
    """Refuse now a training text with ids that a member and its teacher do not have in common."""
    for split in ("train", "selection"):
        text = load_training(run.data.folder / f"{split}.safetensors")
        ids = text.tensors["input_ids"] if isinstance(text, Examples) else text.input_ids
        require_ids(ids, vocab_size, load_tokenizer(run.parent.source), f"members: {name}: data.{split}")


def _start_from_checkpoint(run: Run, member: ResolvedMember) -> Start:
    source, parent = resolve_model(member.member.student), run.parent.source
    if member.sized.dims.vocab_size:
        tokenizers = load_tokenizer(parent), load_tokenizer(source)
        rows = dims_of(load_config(parent)).vocab_size, member.sized.dims.vocab_size
        common_vocabulary(*tokenizers, *rows, f"members: {member.name}")
    return Start(model=Checkpoint(source, fingerprint(source)))


def _base(run: Run, member: ResolvedMember, seed: FinishedMember | None) -> Base:
    """The model that a member is cut from, without statistics."""
    if seed is None:
        return Base(model=run.parent, lineage=[])
    return Base(model=seed.distilled.model(member.seed), lineage=seed.lineage)
