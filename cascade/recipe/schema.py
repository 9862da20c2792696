"""Every key of a recipe, with its unit and default.

Hugging Face names are used verbatim. There are no keys that do nothing: what is not built yet is refused.
"""

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from cascade.distillation.options import OPTIMIZERS
from cascade.models.checkpoint.revision import COMMIT
from cascade.recipe.baseline import Baseline, Kind
from cascade.recipe.data import Data
from cascade.recipe.distill import Distill
from cascade.recipe.finish import Finish
from cascade.recipe.generate import Generate
from cascade.recipe.licences import TERMS
from cascade.recipe.names import require_distinct_rows
from cascade.recipe.places import ModelReference, RecipePaths, RunPath
from cascade.recipe.prune import Prune
from cascade.recipe.section import Fraction, Names, OneOf, PositiveFloat, PositiveInt, Section
from cascade.recipe.target import TargetSize
from cascade.recipe.task import require_finish, require_task, require_teacher
from cascade.runtime.paths import inside

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Tokenizer(Section):
    """A byte-level BPE tokenizer that is trained on the recipe's training text."""

    vocab_size: Annotated[int, Field(ge=300)]
    """Tokens in the vocabulary, including the 256 bytes and the end token."""


class Pretrain(Section):
    """A parent that is trained from random weights with cross-entropy on the training text."""

    config: dict[str, object]
    """The transformers config: `model_type` and the architecture's own keys. `vocab_size` comes from the tokenizer."""
    tokenizer: Tokenizer
    """The tokenizer to train."""
    tokens: PositiveInt
    """Training tokens."""
    block_size: PositiveInt = 512
    """Tokens per block."""
    batch_size: PositiveInt = 8
    """Blocks per optimizer step."""
    microbatch_size: PositiveInt = 8
    """Blocks per forward pass; changes memory and speed, not the result."""
    learning_rate: PositiveFloat = 4e-3
    """Peak learning rate."""
    optimizer: Annotated[str, OneOf(*OPTIMIZERS)] = "adamw"
    """As `distill.optimizer`, but without `auto`."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay per step, as a multiple of the learning rate."""
    warmup_fraction: Fraction = 0.03
    """Share of the optimizer steps with a linear warm-up."""
    final_learning_rate_fraction: Fraction = 0.02
    """Learning rate at the end of the schedule, as a share of the peak."""
    selection_every: PositiveInt = 100
    """Optimizer steps between two measurements of the loss on selection text."""


class Fit(Section):
    """A classifier as parent, trained on the labels before the family is made."""

    config: dict[str, object] = {}
    """Instead of `parent.model`: the transformers config of a classifier with random weights. The classes come from the
    data."""
    examples: PositiveInt
    """Training examples."""
    batch_size: PositiveInt = 32
    """Examples per optimizer step."""
    microbatch_size: PositiveInt = 32
    """Examples per forward pass; changes memory and speed, not the result."""
    learning_rate: Literal["auto"] | PositiveFloat = "auto"
    """Peak learning rate. `auto`: 5e-5 for a given model, 1e-3 for one with random weights."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay per step, as a multiple of the learning rate."""
    warmup_fraction: Fraction = 0.1
    """Share of the optimizer steps with a linear warm-up."""
    final_learning_rate_fraction: Fraction = 0.0
    """Learning rate at the end of the schedule, as a share of the peak."""


class Parent(Section):
    """The first model of the family, and the teacher of every member."""

    model: ModelReference = ""
    """`builtin:NAME`, a folder, a GGUF file, or a Hugging Face Hub id. A text in place of the section `parent` is its
    `model`."""
    revision: str | None = None
    """Commit of the Hub repository (40 hexadecimal digits); required for Hub ids."""
    pretrain: Pretrain | None = None
    """Instead of `model`: train the parent from random weights."""
    fit: Fit | None = None
    """Classification tasks: train the parent on the labels first. A head is put on `model`, or a model is made from
    `fit.config`."""

    @model_validator(mode="after")
    def _require_one_source(self) -> "Parent":
        has_config = bool(self.fit and self.fit.config)
        if [bool(self.model), self.pretrain is not None, has_config].count(True) != 1:
            raise ValueError("give one of `model`, `pretrain` and fit.config")
        if self.fit is not None and self.pretrain is not None:
            raise ValueError("`pretrain` makes a language model, `fit` a classifier; give one")
        if self.revision is not None and (self.model.startswith("builtin:") or not self.model):
            raise ValueError("only a hub model has a `revision`; remove it")
        if self.revision is not None and not COMMIT.fullmatch(self.revision):
            raise ValueError(f"revision '{self.revision}' can move; give the commit's 40 hexadecimal digits")
        return self


def _parent(section: object) -> object:
    return {"model": section} if isinstance(section, str) else section


class Member(Section):
    """One model of the family: its size or shape, and what it starts from."""

    name: str
    """Name of the member, of its folder and of its row in the results; up to 64 letters, digits, `.`, `_` and `-`."""
    target: TargetSize | None = None
    """The size to cut to. Exactly one of `target`, `student` and `config` is given."""
    student: ModelReference = ""
    """Instead of a target: an existing checkpoint of any shape with the teacher's vocabulary. It is recovered, not
    cut."""
    config: dict[str, object] = {}
    """Instead of a target: a transformers config of any shape (`model_type` and the architecture's own keys), filled
    with random weights. Vocabulary, special tokens and context length are the teacher's where the config does not
    say."""
    init: Literal["prune", "layers", "random", "checkpoint"] | None = None
    """What the student starts from. `prune` (with a target): cut from its seed by importance scores; `layers`: whole
    layers of its seed, evenly spread, as in DistilBERT; `random`: random weights in the shape of `target` or `config`;
    `checkpoint`: the weights of `student`. Not given: `prune` with a target, `checkpoint` with a student, `random` with
    a config."""
    seed: str = "previous"
    """The model that the member is cut from (the random seed is the recipe's `seed`): `previous` (the next larger
    member of the chain), `parent`, or the name of another member."""
    chain: bool = True
    """Whether a smaller member with `seed: previous` may be cut from this one; false for variants beside the chain."""
    tokens: PositiveInt | None = None
    """Training tokens of this member; `distill.tokens` where not given."""
    examples: PositiveInt | None = None
    """Classification tasks: training examples of this member; `distill.examples` where not given."""

    @field_validator("name")
    @classmethod
    def _safe(cls, name: str) -> str:
        if not NAME.fullmatch(name):
            raise ValueError(f"'{name}' cannot be a folder's name; use letters, digits, '.', '_' and '-'")
        if name.lower() in ("previous", "parent"):
            raise ValueError(
                f"'{name}' stands for something else here (capitals make no difference); give another name"
            )
        return name

    @model_validator(mode="after")
    def _require_one_source(self) -> "Member":
        if [self.target is not None, bool(self.student), bool(self.config)].count(True) != 1:
            raise ValueError("give one of `target`, `student` and `config`")
        key = "target" if self.target else "student" if self.student else "config"
        if self.start not in STARTS[key]:
            raise ValueError(f"init '{self.init}' does not go with `{key}`; use {' or '.join(STARTS[key])}")
        if self.seed != "previous" and self.start not in ("prune", "layers"):
            raise ValueError(f"what starts from init '{self.start}' is not cut, so it has no `seed`; remove it")
        if not self.chain and self.start not in ("prune", "layers"):
            raise ValueError(f"what starts from init '{self.start}' is never in the chain; remove `chain`")
        return self

    @property
    def start(self) -> str:
        """What the student starts from: `init`, or what the other keys imply."""
        return self.init or ("prune" if self.target else "checkpoint" if self.student else "random")


STARTS = {"target": ("prune", "layers", "random"), "student": ("checkpoint",), "config": ("random",)}
"""What a member can start from, by what says its size."""


class Calibration(Section):
    """The text on which importance statistics are taken."""

    num_blocks: PositiveInt = 64
    """Blocks of the calibration split, spread over it."""
    batch_size: PositiveInt = 8
    """Blocks per forward pass."""


class Evaluate(Section):
    """What is measured on the parent, every member and every baseline."""

    tasks: Names = []
    """Names of lm-eval tasks: those of the package, of `task_folders`, and of lm-eval."""
    task_folders: RecipePaths = []
    """Folders of lm-eval task files, relative to the recipe's folder."""
    limit: PositiveInt | None = None
    """Items per task; all items where not given."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Examples in front of each item; the task's own number where not given."""
    batch_size: PositiveInt = 16
    """Items of a task per forward pass."""
    heldout_blocks: PositiveInt = 128
    """Blocks of the held-out split, spread over it, on which loss and KL are measured."""
    at_least: dict[str, float] = {}
    """Thresholds by `task/metric`, such as `heldout/accuracy: 0.9` (an upper limit where lower is better). The report
    says which members meet all of them."""


class Save(Section):
    """How members are written to disk."""

    dtype: Literal["parent", "float32", "bfloat16", "float16"] = "parent"
    """Data type of the stored weights; `parent`: that of the parent's weights."""


class Recipe(Section):
    """The keys at the top level: one file describes one family."""

    name: str
    """Name of the family; up to 64 letters, digits, `.`, `_` and `-`."""
    task: Literal["language", "masked_language", "text_classification", "image_classification", "embedding"] = (
        "language"
    )
    """What the models do. `language`: continue text; `masked_language`: predict hidden tokens, as BERT does;
    `text_classification`, `image_classification`: predict a class, learnt from the teacher's class probabilities on
    labelled or unlabelled examples (image models are not cut); `embedding`: sentence embeddings of an encoder, the mean
    of its last hidden states."""
    parent: Annotated[Parent, BeforeValidator(_parent)]
    """The first model of the family, and the teacher of every member."""
    data: Data
    """The text or examples."""
    generate: Generate | None = None
    """Text that a teacher writes; it is read with `data.source: generated`."""
    members: list[Member] = []
    """The models to make, in any order; larger ones are made first."""
    distill: Distill | None = None
    """How members are recovered; required where there are members."""
    calibration: Calibration = Calibration()
    """The text on which importance statistics are taken."""
    prune: Prune = Prune()
    """How members are cut."""
    evaluate: Evaluate = Evaluate()
    """What is measured."""
    baselines: list[Baseline] = []
    """Rows to compare each member with, measured on held-out text but not on the tasks. `cut`: the cut model before
    repair and training; `repaired`: after the repair, before training; `ce`: trained with cross-entropy alone from the
    same start on the same tokens, at a learning rate from a search of its own, also where `distill.learning_rate` is
    given; `{ce: {learning_rate: 3e-3}}` gives it a rate."""
    save: Save = Save()
    """How members are written."""
    acknowledged: list[str] = []
    """Names of licences and terms of use that you have read and keep to. Where a teacher's terms say what its output
    may be used for, the run asks for their name here."""
    seed: int = 0
    """Random seed of the whole run."""
    output: RunPath = ""
    """The run directory, relative to where the command runs; `runs/NAME` where not given."""
    finish: list[Finish] = []
    """Copies of finished members, and of the parent, with weights in 8 or 4 bits."""

    @field_validator("acknowledged")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        unknown = [name for name in names if name not in TERMS]
        if unknown:
            raise ValueError(f"'{unknown[0]}' is none that is asked for; known: {', '.join(TERMS)}")
        return names

    @field_validator("name")
    @classmethod
    def _safe(cls, name: str) -> str:
        if not NAME.fullmatch(name):
            raise ValueError(f"'{name}' cannot be a folder's name; use letters, digits, '.', '_' and '-'")
        return name

    @field_validator("output")
    @classmethod
    def _require_inside(cls, path: str) -> str:
        if path and (path.startswith("~") or not inside(path)):
            raise ValueError(f"'{path}' leads out of where the command runs; for another place give --output")
        return path

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        names = [member.name for member in self.members]
        small = [name.lower() for name in names]
        twice = sorted({name for name in names if small.count(name.lower()) > 1})
        if twice:
            raise ValueError(
                f"members: the name {', '.join(twice)} stands twice; capitals make no difference, as on some disks"
            )
        for member in self.members:
            if member.seed not in ("previous", "parent", *names) or member.seed == member.name:
                raise ValueError(
                    f"members: {member.name}: unknown seed '{member.seed}'; use previous, parent or another member"
                )
        if (self.generate is not None) != (self.data.source == "generated"):
            raise ValueError("`generate` and data.source: generated belong together")
        if self.parent.pretrain is not None and self.generate is not None:
            raise ValueError("parent.pretrain reads the texts of data.source; train the parent in a run of its own")
        require_teacher(self)
        if self.parent.pretrain is not None and (self.data.messages_field or self.data.streaming):
            raise ValueError("parent.pretrain reads texts, all at once; remove data.messages_field and data.streaming")
        if len(set(self.baseline_kinds)) < len(self.baselines):
            raise ValueError("baselines: one of them stands twice")
        if self.members and self.distill is None:
            raise ValueError("`distill` is missing; members need at least distill.tokens")
        require_finish(self)
        require_distinct_rows(self)
        require_task(self)
        return self

    @property
    def shares_text(self) -> bool:
        """Whether members that are cut from each other read the same text."""
        if self.data.reuse != "auto":
            return self.data.reuse == "shared"
        return not self.counts_examples and self.distill is not None and self.distill.teacher == "parent"

    @property
    def baseline_kinds(self) -> list[Kind]:
        """The baselines without what is said of them."""
        return [baseline if isinstance(baseline, str) else "ce" for baseline in self.baselines]

    @property
    def ce_learning_rate(self) -> float | Literal["auto"]:
        """The cross-entropy baseline's own; auto: to be found."""
        rates = [baseline.ce.learning_rate for baseline in self.baselines if not isinstance(baseline, str)]
        return rates[0] if rates else "auto"

    @property
    def classifies(self) -> bool:
        """Whether examples have classes."""
        return self.task in ("text_classification", "image_classification")

    @property
    def counts_examples(self) -> bool:
        """Whether texts or images are read one by one, instead of blocks of tokens."""
        return self.classifies or self.task == "embedding"
