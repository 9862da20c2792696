"""A parent that classifies, and the examples that it and its students read."""

from collections.abc import Sequence
from typing import Any

import torch

from cascade.data.bad_rows import BadRows
from cascade.data.examples import Examples, image_examples, read_examples, text_examples
from cascade.data.labels import is_number, require_known_labels
from cascade.data.splits import Heldout, Split
from cascade.evaluation.heldout import require_known_heldout_labels
from cascade.models.architecture.model_class import (
    as_classifier,
    config_from_values,
    image_shape,
    is_classifier,
    require_single_label,
)
from cascade.models.architecture.padding import set_padding
from cascade.models.architecture.vocabulary import require_ids
from cascade.models.checkpoint.load import (
    check_weights,
    load_config,
    load_tokenizer,
    resolve_model,
)
from cascade.planning.inputs import classes_of, labelled_data
from cascade.recipe.schema import Fit, Recipe
from cascade.runtime.errors import UserError


def made_dtype(recipe: Recipe) -> torch.dtype:
    """The dtype in which a language model that the run trains is stored."""
    dtype: torch.dtype = torch.bfloat16 if recipe.save.dtype == "parent" else getattr(torch, recipe.save.dtype)
    return dtype


def checked_classes(recipe: Recipe, config: Any) -> Any:
    """The config of a parent that classifies already, if it does so into the data's classes.

    Raises:
        UserError: it does not.
    """
    classes = classes_of(recipe)
    if not is_classifier(config):
        raise UserError(f"parent: {recipe.parent.model} is no classifier; with parent.fit it learns the classes first")
    require_single_label(config, recipe.task, f"parent: {recipe.parent.model}")
    numbered_classes(config, classes)
    return config


def numbered_classes(config: Any, classes: Sequence[str]) -> list[str]:
    """The data's labels in the order of the classes of a config: by their names there, or else by their numbers.

    Raises:
        UserError: they are not the config's, or it is not plain which of its classes a number means.
    """
    names = [str(config.id2label[number]) for number in range(config.num_labels)]
    numbers = all(is_number(name) for name in classes)
    count = max(map(int, classes)) + 1 if numbers and set(names) != set(classes) else len(classes)
    if len(names) == 1:
        raise UserError("parent: it has one output: it is a regression, which this task does not do")
    both = f"parent: its classes are {', '.join(names[:9])}; the data's are {', '.join(classes[:9])}"
    if len(names) != count:
        largest = count - 1
        hint = (
            f"Labels that are numbers count from 0, and {largest} would be class {count}: count from 0"
            if numbers and largest == len(names)
            else "Write the labels as the parent does"
        )
        raise UserError(
            f"parent: {len(names)} classes ({', '.join(names[:9])}), the data {len(classes)} "
            f"({', '.join(classes[:9])}). {hint}"
        )
    if len(set(names)) < len(names):
        raise UserError(f"{both}. Two of the parent's have one name")
    wrong = [name for name, number in (config.label2id or {}).items() if str(config.id2label.get(number)) != str(name)]
    if set(names) == set(classes):
        if wrong:
            raise UserError(f"{both}. The parent's config contradicts itself: label2id is not id2label at '{wrong[0]}'")
        return names
    if not numbers:
        raise UserError(f"{both}. Write the labels as the parent does")
    places = [str(number) for number in range(len(names))]
    if names != places and any(is_number(name) for name in names):
        raise UserError(f"{both}. Whether a number is a name or a place there cannot be told; write the parent's names")
    return places


def labels_read(recipe: Recipe, config: Any) -> str:
    """What the data's labels stand for, where they are not the names of the parent's classes; else ''."""
    names = [str(config.id2label[number]) for number in range(config.num_labels)]
    labels = numbered_classes(config, classes_of(recipe))
    if labels == names:
        return ""
    return ", ".join(f"{label} is {name}" for label, name in zip(labels, names, strict=True))


def check_labels(recipe: Recipe, config: Any) -> None:
    """Refuse a label of selection or held-out examples that is no class.

    Raises:
        UserError: there is one; its place is named.
    """
    classes, data = numbered_classes(config, classes_of(recipe)), labelled_data(recipe.data, recipe.task)
    require_known_labels(read_examples(data, "selection"), classes)
    require_known_heldout_labels(data, classes)


def fitted_config(recipe: Recipe, settings: Fit) -> Any:
    """The config of a parent that learns its classes here.

    Raises:
        UserError: transformers has no classifier of this type, or there is no token to pad texts with.
    """
    classes, tokenizer = classes_of(recipe), None
    if settings.config:
        config = config_from_values(settings.config, "parent.fit.config")
        require_single_label(config, recipe.task, "parent.fit.config")
        config = as_classifier(config, recipe.task, classes, "parent.fit.config")
    else:
        source = resolve_model(recipe.parent.model, revision=recipe.parent.revision)
        config = load_config(source)
        if recipe.task == "text_classification":
            tokenizer = load_tokenizer(source, vocab_size=config.vocab_size)
        config = as_classifier(config, recipe.task, classes, f"parent.model: {recipe.parent.model}")
        check_weights(source, config, new_head=True)
    if tokenizer is not None:
        set_padding(config, tokenizer, f"parent.model: {recipe.parent.model}")
    config.dtype = torch.float32 if recipe.save.dtype == "parent" else made_dtype(recipe)
    return config


def new_padding(recipe: Recipe) -> str:
    """The token that a parent which is fitted pads with, where its own files do not say so; else ''."""
    if recipe.task != "text_classification" or not recipe.parent.model:
        return ""
    source = resolve_model(recipe.parent.model, revision=recipe.parent.revision)
    tokenizer = load_tokenizer(source)
    changed = set_padding(load_config(source), tokenizer, f"parent.model: {recipe.parent.model}")
    return str(tokenizer.pad_token) if changed else ""


def examples_of(
    recipe: Recipe,
    config: Any,
    split: Split | Heldout,
    tokenizer: Any,
    *,
    for_parent: bool = False,
    bad: BadRows | None = None,
) -> Examples:
    """One split's examples as tensors, their classes numbered as the config of the parent has them.

    A parent that is fitted sees all labels, its students those of data.train_examples. Rows that cannot be used are
    counted in `bad`.

    Raises:
        UserError: they cannot be read, or are images of another size than the parent's.
    """
    if recipe.task == "embedding":
        raw = read_examples(labelled_data(recipe.data, recipe.task), split, bad)
        examples = text_examples(raw, [], tokenizer, recipe.data.max_length)
        require_ids(examples.tensors["input_ids"], config.vocab_size, tokenizer, f"data.{split}")
        return examples
    data = recipe.data.model_copy(update={"train_examples": None, "unlabelled": []}) if for_parent else recipe.data
    raw = read_examples(labelled_data(data, recipe.task), split, bad)
    classes = numbered_classes(config, classes_of(recipe))
    if recipe.task == "text_classification":
        examples = text_examples(raw, classes, tokenizer, recipe.data.max_length)
        require_ids(examples.tensors["input_ids"], config.vocab_size, tokenizer, f"data.{split}")
        return examples
    examples = image_examples(raw, classes)
    require_image_size(examples, config)
    return examples


def require_image_size(examples: Examples, config: Any) -> None:
    """Refuse images of another size than a model reads.

    Raises:
        UserError: they are.
    """
    shape = tuple(examples.tensors["pixel_values"].shape[1:])
    parent_shape = image_shape(config)
    if shape != parent_shape:
        raise UserError(
            f"data: images of {shape[0]} channels, {shape[1]} x {shape[2]}; the parent takes {parent_shape[0]} "
            f"channels, {parent_shape[1]} x {parent_shape[2]}"
        )
