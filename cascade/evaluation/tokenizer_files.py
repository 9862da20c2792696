"""Whether a member's folder will cut text as it was trained, found before any weight is read."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoTokenizer

from cascade.evaluation.reload import ReloadError, require_same_text
from cascade.evaluation.reload_process import tokenizer_facts
from cascade.models.checkpoint.load import ModelSource, copy_companions, load_tokenizer
from cascade.runtime.errors import UserError


def require_tokenizer_files(config: Any, source: ModelSource, name: str) -> None:
    """Refuse a member of `config` whose type makes another tokenizer of the files of `source`, which go with it.

    transformers chooses the class of a tokenizer by the model's type for some types (Qwen2's, in 5.24), whatever the
    files say; such a folder cuts text otherwise than it was trained.

    Raises:
        UserError: with the first text or setting that differs.
    """
    tokenizer = load_tokenizer(source)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config.save_pretrained(folder)
        if source.gguf_file:
            tokenizer.save_pretrained(folder)
        else:
            copy_companions(source.folder, folder)
        try:
            facts = tokenizer_facts(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
            require_same_text(tokenizer_facts(tokenizer), facts, f"members: {name}: model type '{config.model_type}'")
        except (ReloadError, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(
                f"{error}\nA folder of this type would not cut text as the member is trained; give a student of the "
                "parent's type, or of one for which transformers reads the tokenizer's files as they are (llama)"
            ) from error


def require_same_ids(teacher: Any, student: Any, name: str) -> None:
    """Refuse a student whose own tokenizer cuts text into other ids of the same vocabulary than its teacher's.

    Raises:
        UserError: with the first text that differs.
    """
    expected, facts = tokenizer_facts(teacher), tokenizer_facts(student)
    key = "ids without special tokens"
    for text, ids in expected[key].items():
        if ids != facts[key][text]:
            raise UserError(
                f"{name}: its tokenizer has the teacher's tokens, and cuts text otherwise: "
                f"{text!r} is {ids[:9]} for the teacher, {facts[key][text][:9]} for it. Its folder would not cut text "
                "as it is trained; copy the teacher's tokenizer files into it"
            )
