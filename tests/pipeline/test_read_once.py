"""What a run reads of its parent's weights to name them: once, however many members it makes; a changed file again."""

import hashlib
import os
import shutil
import time
from types import SimpleNamespace

import pytest

from cascade.models.checkpoint.load import ModelSource, fingerprint
from cascade.pipeline.run import run_recipe
from cascade.recipe.load import load_recipe
from cascade.runtime import file_digests
from cascade.runtime.files import file_sha256
from cascade.teacher.targets import keys

CLOCK_STEP = 0.15
"""Seconds after which a file's time tells a change."""


@pytest.fixture
def hashed(monkeypatch):
    """The files whose content was hashed, and the digests taken of tensors."""
    calls, file_digest, tensors_digest = SimpleNamespace(files=[], tensors=0), hashlib.file_digest, keys.tensors_digest

    def counted_file(file, *arguments):
        calls.files.append(file.name)
        return file_digest(file, *arguments)

    def counted_tensors(tensors):
        calls.tensors += 1
        return tensors_digest(tensors)

    monkeypatch.setattr(hashlib, "file_digest", counted_file)
    monkeypatch.setattr(keys, "tensors_digest", counted_tensors)
    return calls


def test_a_run_with_three_members_hashes_its_parents_weights_once(recipe_folder, tiny_parent, tmp_path, hashed):
    parent = shutil.copytree(tiny_parent, tmp_path / "parent")
    time.sleep(CLOCK_STEP)
    sizes = ", ".join(f"{{name: m{share}, target: {{params: 0.{share}}}}}" for share in (8, 6, 5))
    recipe = load_recipe(
        recipe_folder / "tiny.yaml",
        [
            f"parent={parent}", f"members=[{sizes}]", "data.reuse=shared", "distill.features.hidden=none",
            f"distill.cache={{kind: sampled, folder: {tmp_path / 'cache'}}}", "baselines=[]", "evaluate.tasks=[]",
        ],
    )  # fmt: skip
    run = run_recipe(recipe, output=tmp_path / "run")
    assert len(list(run.glob("members/*/cascade.json"))) == 3
    assert [path for path in map(os.fspath, hashed.files) if path.startswith(str(parent))].count(
        str(parent / "model.safetensors")
    ) == 1
    assert hashed.tensors == 1


def test_weights_that_change_during_a_run_are_hashed_again(tiny_parent, tmp_path):
    source = ModelSource(shutil.copytree(tiny_parent, tmp_path / "parent"), "parent")
    weights = source.folder / "model.safetensors"
    time.sleep(CLOCK_STEP)
    digests, stat = [fingerprint(source)], weights.stat()
    for way in ("written", "replaced"):
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1 + len(digests)
        if way == "replaced":
            weights.unlink()
        weights.write_bytes(content)
        os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # looks as old as before
        digests.append(fingerprint(source))
        time.sleep(CLOCK_STEP)
        assert fingerprint(source) == digests[-1]
    assert len(set(digests)) == 3


def test_a_file_that_was_just_written_is_not_remembered(tmp_path, monkeypatch):
    path = tmp_path / "file"
    for content in ("one", "two"):  # within one step of the disk's clock, perhaps
        path.write_text(content)
        assert file_digests.sha256_once(path) == file_sha256(path)
    time.sleep(CLOCK_STEP)
    file_digests.sha256_once(path)
    monkeypatch.setattr(file_digests, "file_sha256", lambda path: pytest.fail("read again"))
    file_digests.sha256_once(path)
