"""A run directory that an earlier version left half done; half_done_run.tar.xz is one, made at commit dc2e306.

It was killed in the training of its second and last member: `cascade run tiny.yaml` in recipe/, with the parent, the
text and the teacher's kept targets beside it in /tmp/family.
"""

import json
import tarfile
from pathlib import Path

import pytest

from cascade.pipeline.run import run_recipe
from cascade.recipe.load import load_recipe
from cascade.report.records import load_family
from cascade.store.commits import MANIFEST, verify_folder

ARCHIVE = Path(__file__).with_name("half_done_run.tar.xz")
LEFT = {"small.distill", "small.heldout-cut", "small.evaluate"}
"""Stages that had not been made."""
ADDED = {"parent.heldout"}
"""Stages that later versions have added."""


@pytest.fixture
def family(tmp_path):
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    recipe = tmp_path / "run" / "recipe.yaml"  # as a run that was made here, and died before it sealed its own files
    recipe.write_text(recipe.read_text().replace("/tmp/family/", f"{tmp_path}/"))
    (tmp_path / "run" / MANIFEST).unlink()
    return tmp_path


def stages(run):
    return {path.name: (path / MANIFEST).read_text() for path in (run / "stages").glob("[!.]*-*")}


def test_a_run_that_an_earlier_version_left_half_done_is_gone_on_with(family):
    run = family / "run"
    before = stages(run)
    assert len(before) == 17 and list((run / "stages").glob(".staging-*"))
    run_recipe(load_recipe(family / "recipe" / "tiny.yaml"), output=run)
    after = stages(run)
    assert {name: after[name] for name in before} == before
    made = {name.rpartition("-")[0] for name in after.keys() - before.keys()}
    assert LEFT <= made <= LEFT | ADDED
    assert {row["name"]: row["status"] for row in load_family(run)["rows"] if row["role"] == "member"} == {
        "big": "done",
        "small": "done",
    }
    assert all(verify_folder(run / "members" / name) == [] for name in ("big", "small"))
    finished = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert ("big", "distill") in {
        (event.get("member"), event.get("stage")) for event in finished if event["event"] == "skipped"
    }
