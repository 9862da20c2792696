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
    """The text."""

    source: Literal["stdlib", "files", "hub", "generated", "digits"]
    """stdlib: the Python standard library's source; files: local JSONL(.gz), Parquet, text; hub: a hub dataset;
    generated: what the section `generate` has written, its splits cut by prompt; digits: the handwritten digits that
    scikit-learn ships, for image_classification."""
    train: Splits = []
    """source files: paths, relative to the recipe's folder: files, folders of them, or patterns such as
    shards/*.jsonl.gz, read in sorted order; source hub: the dataset's split name"""
    calibration: Splits = []
    """What statistics are taken on; cut from train where empty."""
    selection: Splits = []
    """What choices are made on; cut from train where empty."""
    heldout: Splits = []
    """What results are reported on; cut from train where empty."""
    weights: list[PositiveFloat] = []
    """source files: of each entry of `train`, its share of the training tokens; by their size where not given. Short
    sources are repeated, so that none is cut short."""
    production: RecipePaths = []
    """Files with a sample of what the members will really meet, in the same form as the text; never trained on. The
    report shows how the teacher and the members do there, and whether the recipe's text is the wrong diet."""
    text_field: str = "text"
    label_field: str = "label"
    """Classification: the field with the class, a name or a number."""
    image_field: str = "image"
    """image_classification: the field with rows of pixels, a picture, or the path of one."""
    unlabelled: Annotated[list[Literal["rest"] | RecipePath], BeforeValidator(as_list)] = []
    """Classification: files whose examples only the teacher labels; `rest`: those that train_examples leaves out."""
    train_examples: PositiveInt | None = None
    """Classification: so many labelled examples for the members, spread evenly; all where not given. A parent that is
    fitted has all of them."""
    max_length: PositiveInt = 128
    """text_classification: tokens of an example at most."""
    mask_copies: PositiveInt = 4
    """masked_language: how often each training block is there, each time with other tokens to guess."""
    messages_field: str = ""
    """Instead of text: the field with chat messages ({role, content}). They go through the parent's own chat template;
    only what the assistant says counts for the loss."""
    template: Literal["model", "none"] = "model"
    """How messages become text. model: by the parent's chat template; none: one after another, and an end token."""
    turns: Literal["all", "last"] = "all"
    """Which answers of a conversation count. all: each of the assistant's turns, as an example of its own where the
    template writes a turn differently once a later one follows; last: the last one alone."""
    bad_rows: Literal["skip", "stop"] = "skip"
    """What is done about a row that cannot be used: no text, a number for one, messages that are empty or that the
    chat template refuses. skip: it is left out, counted, and named in the plan and the report; stop: it is an error."""
    max_bad_rows: Fraction = 0.01
    """The share of rows that may be left out; where more cannot be used, it is an error after all."""
    streaming: bool = False
    """Read documents one after another, only as many as max_tokens take; for text that does not
    fit into memory. The training text is then the start of the files, in their order."""
    document_masks: bool | None = None
    """Whether the documents of a block do not see each other. Not given: conversations do not, texts do."""
    dataset: str = ""
    """source hub: the dataset's id"""
    revision: str = ""
    """source hub: a commit"""
    dataset_config: str = ""
    """source hub: the dataset's configuration name"""
    block_size: Annotated[int, Field(ge=8)] = 256
    """Tokens per block; documents are packed one after another, each between the tokens that begin and end it."""
    begin_token: Literal["auto", "documents", "blocks"] = "auto"
    """Where the token stands with which the parent's tokenizer begins a text, if it has one. documents: at the start of
    each document (of a chat what its template writes); blocks: also at the start of blocks that begin inside one. auto:
    blocks, or documents where the parent has the smaller loss so on selection text."""
    end_token: Literal["auto", "documents", "none"] = "auto"
    """documents: the end token stands behind each document; none: the next document's begin token ends it. auto:
    documents, but none where the parent finds the end token less likely there than a guess among all tokens, as one
    does that was not trained with it."""
    max_tokens: PositiveInt = 20_000_000
    """Training tokens to prepare at most; training past the end starts over in another order."""

    reuse: Literal["auto", "shared", "continue"] = "auto"
    """What a member reads that is cut from another. shared: the same text from its start, which the teacher then labels
    once for all of them; continue: what the other has not read. auto: shared where members learn the parent's
    probabilities of text, continue for examples and where the parent is not asked."""

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
