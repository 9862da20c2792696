"""One member: its stages, and what each of them depends on."""

from cascade.pipeline.context import Run
from cascade.pipeline.rows import FinishedMember
from cascade.pipeline.stage_output import Made
from cascade.pipeline.stages.baseline import baseline_kinds, evaluate_baseline
from cascade.pipeline.stages.evaluate import evaluate_checkpoint
from cascade.pipeline.stages.quantise import make_copies
from cascade.pipeline.stages.recover import train
from cascade.pipeline.start import make_start
from cascade.planning.family import ResolvedMember


def make_member(run: Run, member: ResolvedMember, seed: FinishedMember | None, labels: Made | None) -> FinishedMember:
    """All stages of one member; `seed` is None where that is the parent, `labels` of `make_label_stage`."""
    run = run.for_member(member)
    start = make_start(run, member, seed)
    recovery = train(run, member, start, "distill")
    baselines = [evaluate_baseline(run, member, start, kind) for kind in baseline_kinds(run.recipe, start)]
    evaluation = evaluate_checkpoint(run, "evaluate", member.name, recovery.output, member.name)
    copies = make_copies(run, member.name, recovery.output.model(member.name))
    trainings = {member.name: recovery}
    trainings |= {baseline.row.name: baseline.training for baseline in baselines if baseline.training}
    return FinishedMember(
        cut=start.cut,
        repaired=start.repaired,
        rate=recovery.search,
        distilled=recovery.output,
        evaluation=evaluation,
        labels=labels,
        lineage=start.lineage,
        baselines=[baseline.row for baseline in baselines],
        copies=copies,
        rates={name: training.rate() for name, training in trainings.items()},
        measured={member.name: evaluation} | {baseline.row.name: baseline.evaluation for baseline in baselines},
    )
