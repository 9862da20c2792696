"""The stage label: the teacher's targets for every block that a member trains on, computed once and cached.

Depends on: the cache root, the blocks that the member's steps draw, and the data. Leaves: targets in the cache, and
`label.json` with what the labelling took.
"""

from functools import partial
from pathlib import Path

from cascade.data.examples import Examples, load_training
from cascade.pipeline.context import Run
from cascade.pipeline.kept_targets import LABELS, TeacherCache, member_rows
from cascade.pipeline.stage_output import Made
from cascade.pipeline.stages.training import teacher_for_training
from cascade.planning.family import ResolvedMember
from cascade.runtime.progress import OnStep
from cascade.store.strict_json import write_json


def make_label_stage(run: Run, member: ResolvedMember) -> Made | None:
    """The stage label of a member; None where the run caches no targets."""
    run = run.for_member(member)
    distill, cache = run.recipe.distill, run.cache
    if cache is None:
        return None
    return run.runner.make(
        "label",
        member.name,
        settings={"root": cache.windows.root, "first_position": member.first_position, "num_steps": member.num_steps}
        | {"batch_size": distill.batch_size if distill else 0, "seed": run.recipe.seed}
        | ({"on_policy": distill.on_policy.fraction} if distill and distill.on_policy else {}),
        inputs={"data": run.data},
        write=partial(make_labels, run, member, cache),
    )


def make_labels(run: Run, member: ResolvedMember, cache: TeacherCache, folder: Path, on_step: OnStep) -> None:
    """Label the blocks that a member trains on, and write label.json.

    Raises:
        ValueError: the data are single examples, whose targets are never cached.
    """
    teacher = run.teacher()
    blocks = load_training(run.data.folder / "train.safetensors")
    if isinstance(blocks, Examples):
        raise ValueError("targets of single examples are not cached")
    rows = member_rows(run.recipe, member, len(blocks))
    write_json(folder / LABELS, cache.label(teacher_for_training(teacher, run.parent.source), blocks, rows, on_step))
