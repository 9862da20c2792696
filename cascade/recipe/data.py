"""The `data` section: the text."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, ValidationInfo, model_validator

from cascade.models.checkpoint.revision import COMMIT
from cascade.recipe.places import RecipePath, RecipePaths, absolute_path, public_path
from cascade.recipe.section import Fraction, PositiveFloat, PositiveInt, Section, as_list


def _absolute_file(path: str, info: ValidationInfo) -> str:
    """A split of source files is a path; that of a hub dataset is the dataset's name for it."""
    return absolute_path(path, info) if info.data.get("source") == "files" else path


Splits = Annotated[
    list[Annotated[str, AfterValidator(_absolute_file), PlainSerializer(public_path)]], BeforeValidator(as_list)
]
"""Files, or the hub's name of a split."""


class Data(Section):
    """The text (or labelled examples) that models are trained, judged and measured on."""

    source: Literal["stdlib", "files", "hub", "generated", "digits"]
    """Where the text comes from. `stdlib`: the Python standard library's source; `files`: local JSON, JSON lines,
    Parquet or text files, compressed (.gz, .bz2, .xz) or not; `hub`: a dataset of the Hugging Face Hub; `generated`:
    what the section `generate` has written, split by prompt; `digits`: scikit-learn's handwritten digits, for
    `task: image_classification`."""
    train: Splits = []
    """Training text. Source `files`: paths relative to the recipe's folder (files, folders, or patterns such as
    `shards/*.jsonl.gz`), read in sorted order; source `hub`: the name of the dataset's split."""
    calibration: Splits = []
    """Text for importance statistics and repair, given as `train` is; cut from `train` where empty."""
    selection: Splits = []
    """Text on which choices are made (shapes, learning rates), given as `train` is; cut from `train` where empty."""
    heldout: Splits = []
    """Text on which results are reported, given as `train` is; cut from `train` where empty. Nothing else reads it."""
    weights: list[PositiveFloat] = []
    """Source `files`: the share of training tokens of each entry of `train`; in proportion to their size where not
    given. Short entries are repeated, so that none runs out early."""
    production: RecipePaths = []
    """Files with a sample of the text that the members will meet in use, in the same form as the training text; never
    trained on. The report shows how teacher and members do on it, and whether the recipe's text fits it."""
    text_field: str = "text"
    """Name of the field with the text."""
    label_field: str = "label"
    """Classification tasks: name of the field with the class, a name or a number."""
    image_field: str = "image"
    """`task: image_classification`: name of the field with rows of pixels, an image, or the path of one; images
    and paths need the extra `[images]`."""
    unlabelled: Annotated[list[Literal["rest"] | RecipePath], BeforeValidator(as_list)] = []
    """Classification tasks: files whose examples only the teacher labels; `rest`: the examples that `train_examples`
    leaves out."""
    train_examples: PositiveInt | None = None
    """Classification tasks: number of labelled examples that members train on, spread evenly; all where not given. A
    parent with `fit` trains on all of them."""
    max_length: PositiveInt = 128
    """`task: text_classification` and `task: embedding`: tokens per example at most; longer texts are cut."""
    mask_copies: PositiveInt = 4
    """`task: masked_language`: copies of each training block, each with other tokens hidden."""
    messages_field: str = ""
    """Instead of `text_field`: name of the field with chat messages (`{role, content}`). They go through the parent's
    chat template, and only the assistant's turns count for the loss."""
    template: Literal["model", "none"] = "model"
    """How messages become text. `model`: by the parent's chat template; `none`: one after another, followed by an end
    token."""
    turns: Literal["all", "last"] = "all"
    """Which answers of a conversation count for the loss. `all`: each of the assistant's turns, as an example of its
    own where the template writes a turn differently once a later one follows; `last`: the last turn alone."""
    bad_rows: Literal["skip", "stop"] = "skip"
    """What happens to a row that cannot be used (no text, a number in its place, empty messages, messages that the chat
    template refuses). `skip`: it is left out, counted, and named in plan and report; `stop`: it is an error."""
    max_bad_rows: Fraction = 0.01
    """Largest share of rows that `bad_rows: skip` may leave out; above it the run stops."""
    streaming: bool = False
    """Read documents one after another, and only as many as `max_tokens` needs: for text that does not fit into memory.
    The training text is then the start of the files, in their order."""
    document_masks: bool | None = None
    """Whether attention stays inside each document of a block. Not given: true for conversations and generated text,
    false for other text."""
    dataset: str = ""
    """Source `hub`: id of the dataset."""
    revision: str = ""
    """Source `hub`: commit of the dataset (40 hexadecimal digits)."""
    dataset_config: str = ""
    """Source `hub`: name of the dataset's configuration."""
    block_size: Annotated[int, Field(ge=8)] = 256
    """Tokens per block. Documents are packed one after another, each between its begin and end tokens."""
    begin_token: Literal["auto", "documents", "blocks"] = "auto"
    """Where the token stands with which the parent's tokenizer begins a text, if it has one. `documents`: at the start
    of each document (in a chat: what its template writes); `blocks`: also at the start of blocks that begin inside a
    document; `auto`: the one of the two with which the parent has the smaller loss on selection text."""
    end_token: Literal["auto", "documents", "none"] = "auto"
    """`documents`: an end token follows each document; `none`: the next document's begin token separates them; `auto`:
    `documents`, but `none` where the parent finds the end token less likely there than a uniform guess, as a model does
    that was trained without it."""
    max_tokens: PositiveInt = 20_000_000
    """Training tokens to prepare at most; a training that needs more starts over in another order."""

    reuse: Literal["auto", "shared", "continue"] = "auto"
    """What a member reads that is cut from another member. `shared`: the same text from its start, which the teacher
    then labels once for all; `continue`: text that the other has not read; `auto`: `shared` where members learn the
    parent's probabilities of text, else `continue`."""

    @property
    def masks_documents(self) -> bool:
        """Whether the documents of a block are kept apart."""
        chats = bool(self.messages_field) or self.source == "generated"
        return chats if self.document_masks is None else self.document_masks

    @model_validator(mode="after")
    def _complete(self) -> "Data":
        if self.weights and (self.source != "files" or len(self.weights) != len(self.train)):
            raise ValueError(
                f"`weights`: {len(self.weights)} numbers for {len(self.train)} entries of `train` (source files only)"
            )
        if self.streaming and (self.source not in ("files", "hub") or self.weights):
            raise ValueError("`streaming` is for source files or hub, and without `weights`")
        if self.source == "stdlib" and self.messages_field:
            raise ValueError("source stdlib has no chat messages; remove `messages_field`")
        splits = {
            "train": self.train,
            "calibration": self.calibration,
            "selection": self.selection,
            "heldout": self.heldout,
        }
        if self.source in ("stdlib", "generated", "digits") and any(splits.values()):
            raise ValueError(
                f"source {self.source} has splits of its own; remove train, calibration, selection and heldout"
            )
        if self.source == "generated" and self.messages_field:
            raise ValueError("source generated knows its messages; remove `messages_field`")
        if [name for name in self.unlabelled if name != "rest"] and self.source != "files":
            raise ValueError("`unlabelled` names files; with another source than files it can only be `rest`")
        if "rest" in self.unlabelled and self.train_examples is None:
            raise ValueError("`unlabelled: rest` is what `train_examples` leaves out; give that, too")
        if self.source != "hub" and (self.dataset or self.revision or self.dataset_config):
            raise ValueError(f"source {self.source} has no `dataset`, `revision` or `dataset_config`; remove them")
        if self.revision and not COMMIT.fullmatch(self.revision):
            raise ValueError(f"revision '{self.revision}' can move; give the commit's 40 hexadecimal digits")
        if self.source in ("files", "hub") and not self.train:
            raise ValueError(f"source {self.source} needs `train`")
        if self.source == "hub" and not (self.dataset and self.revision):
            raise ValueError("source hub needs `dataset` and a pinned `revision`")
        if self.source == "hub" and any(len(names) > 1 for names in splits.values()):
            raise ValueError("source hub takes one split name for each of train, calibration, selection and heldout")
        return self
