"""The kinds of stage: how each is called and how the runner treats it. A new stage is one line of `STAGES`."""

from dataclasses import dataclass

REMAKE_POINTS = ("statistics", "prune", "repair", "label", "distill", "quantise", "evaluate", "report")
"""A member's stages in order, as --from takes them."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One kind of stage."""

    name: str
    """As in its key and in its folder's name, stages/OWNER.NAME-KEY."""
    format: int
    """Version of the stage's files, raised by hand when their meaning changes; older outputs are then made again."""
    remade_from: str = ""
    """The last of `REMAKE_POINTS` from which --from makes the stage again; empty where --from never does."""
    every_rank: bool = False
    """Whether all processes make the stage together; else the first process makes it alone."""
    several: bool = False
    """Whether a member can have several stages of this kind, with a key each."""
    before_training: bool = False
    """Whether a member whose training is finished needs the stage no longer."""
    read_by_users: bool = False
    """Whether users work in the stage's folder: their changes are not lost where the stage is made again."""


STAGES = {
    stage.name: stage
    for stage in (
        Stage(name="pretrain", format=1),
        Stage(name="fit", format=2),
        Stage(name="convert", format=1),
        Stage(name="generate", format=2, read_by_users=True),
        Stage(name="framing", format=1),
        Stage(name="data", format=2),
        Stage(name="heldout", format=1, several=True),
        Stage(name="production", format=1, several=True),
        Stage(name="statistics", format=3, remade_from="statistics", every_rank=True, before_training=True),
        Stage(name="candidate", format=2, remade_from="prune", several=True, before_training=True),
        Stage(name="finalist", format=2, remade_from="prune", several=True, before_training=True),
        Stage(name="init", format=1, remade_from="prune"),
        Stage(name="prune", format=3, remade_from="prune", before_training=True),
        Stage(name="repair", format=2, remade_from="repair", before_training=True),
        Stage(name="label", format=1, remade_from="label", every_rank=True, before_training=True),
        Stage(name="rate", format=1, remade_from="distill", every_rank=True, before_training=True),
        Stage(name="ce-rate", format=1, remade_from="distill", every_rank=True),
        Stage(name="distill", format=2, remade_from="distill", every_rank=True),
        Stage(name="evaluate", format=3, remade_from="evaluate"),
        Stage(name="drift", format=1, remade_from="evaluate"),
        Stage(name="baseline-ce", format=3, remade_from="distill", every_rank=True),
        Stage(name="heldout-cut", format=3, remade_from="evaluate"),
        Stage(name="heldout-repaired", format=3, remade_from="evaluate"),
        Stage(name="heldout-ce", format=3, remade_from="evaluate"),
        Stage(name="quantise", format=1, remade_from="quantise", several=True),
        Stage(name="evaluate-quantised", format=2, remade_from="evaluate", several=True),
    )
}
"""Name of a stage -> the stage."""
