"""The mean length of a recipe's examples in tokens, which their cost depends on."""

from functools import lru_cache

from cascade.data.examples import read_examples
from cascade.models.checkpoint.load import load_tokenizer, resolve_model
from cascade.planning.inputs import data_fingerprint, labelled_data
from cascade.recipe.data import Data
from cascade.recipe.schema import Recipe

_SAMPLE = 512
"""Examples that are measured, spread evenly over the training split."""


def tokens_per_example(recipe: Recipe) -> float:
    """The mean length of the training texts in the parent's tokens, special ones included, `max_length` at most.

    Raises:
        UserError: the texts or the tokenizer cannot be read.
        ValueError: the recipe reads no single texts.
    """
    if recipe.task not in ("text_classification", "embedding"):
        raise ValueError(f"task {recipe.task} reads no texts one by one")
    data, parent = recipe.data, recipe.parent
    return _mean_length(data.model_dump_json(), recipe.task, data_fingerprint(data), parent.model, parent.revision)


@lru_cache(maxsize=8)
def _mean_length(data_json: str, task: str, fingerprint: str, model: str, revision: str | None) -> float:
    data = Data.model_validate_json(data_json)
    tokenizer = load_tokenizer(resolve_model(model, revision=revision))
    texts = [example.content for example in read_examples(labelled_data(data, task), "train")]
    sample = [texts[number * len(texts) // _SAMPLE] for number in range(_SAMPLE)] if len(texts) > _SAMPLE else texts
    lengths = [len(ids) for ids in tokenizer(sample, truncation=True, max_length=data.max_length)["input_ids"]]
    return sum(lengths) / max(1, len(lengths))
