"""The token ids over which a member is compared with its teacher, and whether the text contains others."""

from collections.abc import Iterator
from typing import Any

from cascade.data.examples import read_examples
from cascade.data.sources import read_documents
from cascade.data.splits import Split
from cascade.evaluation.heldout import heldout_documents, heldout_rows, production_documents
from cascade.models.architecture.dims import dims_of
from cascade.models.architecture.vocabulary import common_vocabulary, require_texts, tokens_beyond
from cascade.models.checkpoint.load import load_config, load_tokenizer, resolve_model
from cascade.planning.inputs import labelled_data, text_data
from cascade.recipe.schema import Member, Recipe
from cascade.runtime.errors import UserError


def text_tokenizer(recipe: Recipe) -> Any:
    """The tokenizer that a recipe's text is cut with, its parent's; None where that is made in the run, or none.

    Raises:
        UserError: the parent's embedding lacks ordinary tokens of it.
    """
    if not recipe.parent.model or recipe.task == "image_classification":
        return None
    source = resolve_model(recipe.parent.model, revision=recipe.parent.revision)
    return load_tokenizer(source, vocab_size=dims_of(load_config(source)).vocab_size)


def common_ids(recipe: Recipe, member: Member, config: Any, parent_config: Any) -> int | None:
    """Ids, from 0 on, that a member that is not cut is compared with the parent over; None: all rows of both.

    Raises:
        UserError: its tokenizer is another than the parent's, or its embedding lacks ordinary tokens of it.
    """
    rows, parent_rows = dims_of(config).vocab_size, dims_of(parent_config).vocab_size
    if not rows or not parent_rows:
        return None
    common, tokenizer = min(rows, parent_rows), text_tokenizer(recipe)
    if member.student and tokenizer is not None:
        student_tokenizer = load_tokenizer(resolve_model(member.student))
        common = common_vocabulary(tokenizer, student_tokenizer, parent_rows, rows, f"members: {member.name}")
    elif tokenizer is not None:
        beyond = set(tokens_beyond(tokenizer, common).values()) - set(tokenizer.get_added_vocab())
        if beyond:
            raise UserError(
                f"members: {member.name}: config.vocab_size: {rows} is less than the {len(tokenizer)} tokens of the "
                "text's tokenizer; leave it out, and it is the teacher's"
            )
        common = common_vocabulary(tokenizer, tokenizer, parent_rows, rows, f"members: {member.name}: config")
    return None if common == rows == parent_rows else common


def require_common_text(recipe: Recipe, tokenizer: Any, shared: int) -> None:
    """Refuse text in which tokens stand that not all models of a run have: the tokenizer may know them all the same.

    `shared` are the ids, from 0 on, that all have; `tokenizer` is the text's.

    Streamed text is not looked through here; its ids are checked as they are packed.

    Raises:
        UserError: with the token and the document.
    """
    beyond = tokens_beyond(tokenizer, shared)
    if not beyond or recipe.generate is not None or recipe.data.streaming:
        return
    for place, documents in _texts(recipe):
        require_texts([_as_text(document) for document in documents], beyond, shared, place)


def _texts(recipe: Recipe) -> Iterator[tuple[str, list[Any]]]:
    split: Split
    if recipe.counts_examples:
        for split in ("train", "selection"):
            examples = read_examples(labelled_data(recipe.data, recipe.task), split)
            yield f"data.{split}", [example.content for example in examples]
        yield "data.heldout", [example.content for example in heldout_rows(labelled_data(recipe.data, recipe.task))]
        return
    text = text_data(recipe.data)
    for split in ("train", "calibration", "selection"):
        yield f"data.{split}", read_documents(text, split)
    yield "data.heldout", heldout_documents(text)
    if recipe.data.production:
        yield "data.production", production_documents(text, recipe.data.production)


def _as_text(document: Any) -> str:
    if isinstance(document, str):
        return document
    return "\n".join(str(part.get("content")) if isinstance(part, dict) else str(part) for part in document)
