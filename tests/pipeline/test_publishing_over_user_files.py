"""Publishing again over a member's folder that a user has worked in: nothing of the user's is lost or overwritten.

Beside `test_publishing_again.py`, which has each rule by itself: a finished family that is run again, several kinds of
changes at once, and what lies where the new files go.
"""

import json
import os
import shutil

import pytest

from cascade.pipeline.run import run_recipe
from cascade.recipe.load import load_recipe
from cascade.store.commits import MANIFEST, read_manifest, staged, verify_folder
from cascade.store.user_files import carry_over


@pytest.fixture
def member(tmp_path):
    """Writes a member's folder as a run does: `member({name: text})` publishes these files; returns the folder."""
    folder = tmp_path / "members" / "m"

    def published(files):
        with staged(folder, {"stage": "publish"}, carry=carry_over) as staging:
            for name, text in files.items():
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                (staging / name).write_text(text)
        return folder

    return published


def contents(folder):
    """Text of every file below a folder, by its path from there, without the manifest."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


FIRST = {"config.json": "config 1", "model.safetensors": "weights 1", "README.md": "card 1", "eval.json": "scores"}
SECOND = {"config.json": "config 2", "model.safetensors": "weights 2", "README.md": "card 2", "eval.json": "scores"}


def test_many_changes_at_once_are_all_kept_and_the_new_files_are_those_of_the_run(member):
    folder = member(FIRST)
    users = {
        "README.md": "my card", "config.json": "my config", "model.safetensors": "my weights", "notes.txt": "notes",
        "plots/a.txt": "plot", "MANIFEST.json.bak": "backup", "model.gguf": "gguf", "eval.json.before": "earlier",
    }  # fmt: skip
    (folder / "plots").mkdir()
    for name, text in users.items():
        (folder / name).write_text(text)
    member(SECOND)
    after = contents(folder)
    assert set(users.values()) <= set(after.values())  # each text of the user's is somewhere
    assert {name: after[name] for name in SECOND if name != "README.md"} == {
        name: text for name, text in SECOND.items() if name != "README.md"
    }
    assert after["README.md"] == "my card" and after["README.new.md"] == "card 2"
    assert [name for name in ("plots/a.txt", "notes.txt", "model.gguf") if after[name] != users[name]] == []
    assert set(read_manifest(folder)) == set(SECOND)


def test_nothing_is_lost_over_many_publications_with_a_change_between_each(member):
    folder, texts = member(FIRST), set()
    for number in range(2, 6):
        (folder / "config.json").write_text(f"my config {number}")
        (folder / f"note-{number}.txt").write_text(f"my note {number}")
        texts |= {f"my config {number}", f"my note {number}"}
        member(FIRST | {"config.json": f"config {number}"})
        assert texts <= set(contents(folder).values())
        assert (folder / "config.json").read_text() == f"config {number}" and verify_folder(folder) == []
    names = sorted(path.name for path in folder.glob("config.json.before*"))
    assert names == ["config.json.before", "config.json.before-2", "config.json.before-3", "config.json.before-4"]


def test_a_users_file_where_a_run_now_has_a_folder_stays_beside_it(member):
    folder = member(FIRST)
    (folder / "1_Pooling").write_text("mine")
    member(SECOND | {"1_Pooling/config.json": "pooling"})
    assert (folder / "1_Pooling" / "config.json").read_text() == "pooling"
    assert (folder / "1_Pooling.before").read_text() == "mine" and verify_folder(folder) == []


def test_a_users_folder_where_a_run_now_has_a_file_stays_beside_it(member):
    folder = member(FIRST)
    (folder / "vocab.json").mkdir()
    (folder / "vocab.json" / "mine.txt").write_text("mine")
    member(SECOND | {"vocab.json": "vocabulary"})
    assert (folder / "vocab.json").read_text() == "vocabulary" and verify_folder(folder) == []
    assert (folder / "vocab.json.before" / "mine.txt").read_text() == "mine"


def test_a_file_that_the_new_model_has_no_more_goes_unless_the_user_changed_it(member):
    folder = member(FIRST | {"merges.txt": "merges", "added.json": "added"})
    (folder / "added.json").write_text("added by me")
    member(SECOND)
    assert not (folder / "merges.txt").exists() and not (folder / "added.json").exists()
    assert (folder / "added.json.before").read_text() == "added by me"


def test_a_users_shards_of_weights_are_kept_and_nothing_loads_them(member):
    folder = member(FIRST)
    (folder / "model.safetensors").write_text("merged by hand")
    member(SECOND)
    assert "merged by hand" in contents(folder).values()
    assert [path.name for path in folder.rglob("*.safetensors*")] == ["model.safetensors"]
    assert (folder / "model.safetensors").read_text() == "weights 2"


def test_what_a_user_deleted_comes_back_as_the_run_writes_it(member):
    folder = member(FIRST)
    (folder / "README.md").unlink()
    (folder / "config.json").unlink()
    member(SECOND)
    assert contents(folder) == SECOND and verify_folder(folder) == []


def test_a_link_that_a_user_put_in_place_of_a_file_is_not_written_through(member, tmp_path):
    folder = member(FIRST)
    outside = tmp_path / "outside.json"
    outside.write_text("precious")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(outside)
    member(SECOND)
    assert outside.read_text() == "precious"
    assert (folder / "config.json").read_text() == "config 2" and not (folder / "config.json").is_symlink()
    assert (folder / "config.json.before").is_symlink()


def test_a_broken_link_of_a_users_stays_as_it_is(member):
    folder = member(FIRST)
    (folder / "later.bin").symlink_to("not-there-yet")
    member(SECOND)
    assert os.readlink(folder / "later.bin") == "not-there-yet"


def test_the_kept_copies_of_a_users_file_share_nothing_with_what_is_written_next(member):
    """Files are carried over by hard links: a later publication must not write into them."""
    folder = member(FIRST)
    (folder / "notes.txt").write_text("mine")
    member(SECOND)
    first = (folder / "notes.txt").stat().st_ino
    member(FIRST | {"notes.txt": "the run's own notes"})
    assert (folder / "notes.txt").read_text() == "the run's own notes"
    assert (folder / "notes.txt.before").read_text() == "mine"
    assert (folder / "notes.txt.before").stat().st_ino == first


@pytest.fixture
def family(tiny_family, tmp_path):
    """A copy of a finished run."""
    return shutil.copytree(tiny_family, tmp_path / "family")


def test_a_family_that_is_run_again_after_a_change_of_its_evaluation_keeps_all_that_its_user_added(
    family, recipe_folder
):
    folder = family / "members" / "small"
    users = {"README.md": "# My model\n", "generation_config.json": '{"temperature": 0.5}', "notes.txt": "mine"}
    for name, text in users.items():
        (folder / name).write_text(text)
    weights = (folder / "model.safetensors").read_bytes()
    run_recipe(load_recipe(recipe_folder / "tiny.yaml", ["evaluate.limit=4"]), output=family)
    after = {path.name: path for path in folder.iterdir()}
    assert after["README.md"].read_text() == "# My model\n" and after["notes.txt"].read_text() == "mine"
    assert after["README.new.md"].read_text().startswith("---\nlibrary_name")
    assert after["generation_config.json.before"].read_text() == '{"temperature": 0.5}'
    assert json.loads(after["generation_config.json"].read_text()) != {"temperature": 0.5}
    assert after["model.safetensors"].read_bytes() == weights
    assert [name for name in verify_folder(folder) if name != "README.md"] == []
    other = family / "members" / "big"
    assert not list(other.glob("*.before*")) and not (other / "README.new.md").exists()


def test_a_family_that_is_run_again_unchanged_leaves_a_users_words_where_they_are(family, recipe_folder):
    folder = family / "members" / "small"
    (folder / "README.md").write_text("# My model\n")
    (folder / "notes.txt").write_text("mine")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    run_recipe(load_recipe(recipe_folder / "tiny.yaml"), output=family)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
