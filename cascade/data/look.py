"""What a plan says of the data: how many files and rows it has, which rows cannot be used, what counts for the loss."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cascade.data.messages import Example, conversation_examples, require_chat, shown_tokens
from cascade.data.sources import TextData, cuts_passages, documents_of, passages_of
from cascade.models.architecture.vocabulary import require_ids, tokens_beyond
from cascade.runtime.errors import UserError
from cascade.runtime.paths import ignored_files

_STREAMED_ROWS = 5000
"""Documents of streamed text that a plan looks at."""

_EVERY = 1000
"""Conversations that are all written with the chat template; of later ones ever fewer are."""

_NAMED = 20
"""Bad rows that a plan names by file and line."""


def look_at(
    data: TextData, name: str, names: Sequence[str], tokenizer: Any | None, vocab_size: int | None = None
) -> dict[str, Any]:
    """The files of one key of the recipe, 'data.`name`': {'files', 'rows', 'skipped', 'named', ...}.

    All rows are read (of streamed text the first thousands), and conversations tried with the chat template: all of the
    first thousand and a sample of the later ones. `vocab_size` are the ids that all models have.

    Raises:
        UserError: the files cannot be read, too many rows of them cannot be used, or what a template writes, or
            streamed text, has a token beyond `vocab_size`.
    """
    key, bad = f"data.{name}", data.bad_row_counter()
    if data.messages_field and tokenizer is not None:
        require_chat(tokenizer, key, template=data.chat_template)
    num_tried, refused, example, documents = 0, 0, None, 0
    whole = True
    beyond = tokens_beyond(tokenizer, vocab_size) if vocab_size and tokenizer is not None else {}
    for documents, (place, document) in enumerate(documents_of(data, names, bad, key=key), start=1):
        if data.streaming and documents > _STREAMED_ROWS:
            whole = False
            break
        if isinstance(document, str) and vocab_size and data.streaming:
            ids = [number for number, token in beyond.items() if token in document]
            require_ids(torch.tensor(ids, dtype=torch.int64), vocab_size, tokenizer, str(place))
        if isinstance(document, str) or tokenizer is None or (documents - 1) % (1 + documents // _EVERY):
            continue
        num_tried += 1
        try:
            examples = conversation_examples(document, tokenizer, template=data.chat_template, turns=data.turns)
            example = example or examples[0]
        except UserError as error:
            refused += 1
            bad.skip(place, str(error), key=key)
            continue
        if beyond and vocab_size:
            ids = [number for rendered in examples for number in rendered.ids]
            require_ids(torch.tensor(ids, dtype=torch.int64), vocab_size, tokenizer, str(place))
    rows = sum(bad.last_row.values())
    named = bad.named()
    share = (len(named) - refused) / max(1, rows) + refused / max(1, num_tried)
    bad.require_few(data.places_of(names), key=key, whole=whole, share=share if whole else None)
    return _counts(data, names) | {
        "rows": rows,
        "all_rows": whole,
        "tried_with_template": num_tried,
        "documents": documents,
        "empty": sum(bad.num_empty.values()),
        "skipped": len(named),
        "named": named[:_NAMED],
        "example": None if example is None else _shown(example, tokenizer),
    }


def look_at_passages(data: TextData) -> dict[str, int] | None:
    """{split: letters} where the documents are too few and are cut into passages; None where they are not."""
    if not cuts_passages(data):
        return None
    return {split: sum(map(len, parts)) for split, parts in passages_of(data, data.bad_row_counter()).items()}


def look_text(name: str, facts: dict[str, Any]) -> list[str]:
    """What `look_at` gave, as lines for a terminal."""
    files = f"{facts['files']:,} file{'s' * (facts['files'] != 1)}" + (f" ({facts['kinds']})" if facts["kinds"] else "")
    rows = (
        f"{facts['rows']:,} row{'s' * (facts['rows'] != 1)}"
        if facts["all_rows"]
        else f"the first {facts['rows']:,} rows were looked at"
    )
    line = f"data.{name}: {files}, {rows}"
    if facts["tried_with_template"] and facts["tried_with_template"] < facts["documents"]:
        line += f", {facts['tried_with_template']:,} tried with the chat template"
    if facts["empty"]:
        line += f", {facts['empty']:,} without a letter"
    lines = [f"{line}."]
    if facts["ignored"]:
        count = facts["ignored_files"]
        more = ", ..." if count > len(facts["ignored"].split(", ")) else ""
        lines.append(
            f"data.{name}: {count:,} file{'s are' if count > 1 else ' is'} passed over, being of other kinds or about "
            f"the folder: {facts['ignored']}{more}."
        )
    return [*lines, *skipped_lines(name, facts)]


def skipped_lines(name: str, facts: dict[str, Any]) -> list[str]:
    """The rows that are left out, the first by name."""
    if not facts["skipped"]:
        return []
    named = [f"  {row['place']}: {row['reason']}" for row in facts["named"][:5]]
    more = [f"  and {facts['skipped'] - len(named):,} more"] if facts["skipped"] > len(named) else []
    return [
        f"data.{name}: left out, as they cannot be used: {facts['skipped']:,} of {facts['rows']:,} rows:",
        *named,
        *more,
    ]


def example_text(segments: Sequence[Sequence[Any]]) -> str:
    """An example with what counts for the loss between [[ and ]]."""
    return "".join(f"[[{text}]]" if counts else str(text) for text, counts in segments)


def _shown(example: Example, tokenizer: Any) -> list[list[Any]]:
    return [[text, counts] for text, counts in shown_tokens(example, tokenizer)]


def _counts(data: TextData, names: Sequence[str]) -> dict[str, Any]:
    files = data.parts_of(names)
    kinds = Counter("".join(Path(file).suffixes[-2:]) for file in files) if data.source == "files" else Counter()
    ignored = [file for name in names for file in ignored_files(name)] if data.source == "files" else []
    return {
        "files": len(files),
        "kinds": ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(kinds.items())) if len(files) > 1 else "",
        "ignored_files": len(ignored),
        "ignored": ", ".join(Path(file).name for file in ignored[:5]),
    }
