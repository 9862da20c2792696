"""What a user put into a folder that a run writes again is not lost."""

import json
import shutil

import pytest
from click.testing import CliRunner

from cascade.cli.main import main
from cascade.pipeline.publish import _publish
from cascade.pipeline.verify import verify_run
from cascade.report.write import set_damaged_aside
from cascade.store.commits import staged, verify_folder


@pytest.fixture
def publish(tmp_path):
    """Publishes a member of this lineage, as a run does; returns its folder."""
    checkpoint, evaluation = tmp_path / "checkpoint", tmp_path / "evaluation"
    checkpoint.mkdir()
    evaluation.mkdir()
    for name in ("eval.json", "lm_eval.json"):
        (evaluation / name).write_text("{}")

    def published(lineage, card="the card\n"):
        (checkpoint / "config.json").write_text(json.dumps({"made": lineage}))
        (checkpoint / "generation_config.json").write_text("{}")
        (checkpoint / "model.safetensors").write_text(f"weights {lineage}")
        _publish(tmp_path / "members" / "m", checkpoint, evaluation, {"name": "m", "made": lineage}, card, None)
        return tmp_path / "members" / "m"

    return published


def test_files_and_folders_that_no_run_wrote_stay_when_a_member_of_another_lineage_is_published(publish):
    folder = publish(1)
    (folder / "notes" / "deep").mkdir(parents=True)
    (folder / "notes" / "deep" / "idea.txt").write_text("mine")
    (folder / "model.gguf").write_text("converted")
    (folder / "empty").mkdir()
    (folder / "elsewhere").symlink_to("notes/deep")
    for lineage in (2, 3):  # a file that was carried over once is still nobody's but the user's
        publish(lineage)
        assert (folder / "notes" / "deep" / "idea.txt").read_text() == "mine"
        assert (folder / "model.gguf").read_text() == "converted" and (folder / "empty").is_dir()
        assert (folder / "elsewhere" / "idea.txt").read_text() == "mine" and (folder / "elsewhere").is_symlink()
        assert (folder / "model.safetensors").read_text() == f"weights {lineage}"
        assert verify_folder(folder) == []
        assert sorted(path.name for path in folder.parent.iterdir()) == ["m"]
    (folder / "model.gguf").write_text("converted again")
    assert verify_folder(folder) == []  # and may be changed


def test_a_card_that_was_written_on_stays_and_the_new_one_lies_beside_it(publish, caplog):
    folder = publish(1)
    (folder / "README.md").write_text("my words\n")
    for lineage, card in ((2, "second\n"), (3, "third\n")):
        publish(lineage, card)
        assert (folder / "README.md").read_text() == "my words\n"
        assert (folder / "README.new.md").read_text() == card
        assert "README.md: was written on and stays; the new card is README.new.md" in caplog.text
        assert not list(folder.glob("*.before"))
    (folder / "README.new.md").replace(folder / "README.md")  # the user takes the new one
    publish(4, "fourth\n")
    assert (folder / "README.md").read_text() == "fourth\n" and not (folder / "README.new.md").exists()


def test_a_new_card_that_was_written_on_is_not_lost_either(publish):
    folder = publish(1)
    (folder / "README.md").write_text("my words\n")
    publish(2, "second\n")
    (folder / "README.new.md").write_text("second, and mine\n")
    publish(3, "third\n")
    assert (folder / "README.new.md").read_text() == "third\n"
    assert (folder / "README.new.md.before").read_text() == "second, and mine\n"


def test_a_file_of_the_member_that_was_changed_stays_beside_the_one_that_was_measured(publish, caplog):
    folder = publish(1)
    for number, text in enumerate(('{"temperature": 0.5}', '{"temperature": 0.6}'), start=2):
        (folder / "generation_config.json").write_text(text)
        publish(number)
        assert (folder / "generation_config.json").read_text() == "{}"
    assert (folder / "generation_config.json.before").read_text() == '{"temperature": 0.5}'
    assert (folder / "generation_config.json.before-2").read_text() == '{"temperature": 0.6}'
    assert "is not as it was written; it stays as generation_config.json.before beside the new one" in caplog.text
    (folder / "model.safetensors").write_text("merged by hand")
    publish(3)
    assert (folder / "model.weights.before").read_text() == "merged by hand"
    assert not [path for path in folder.rglob("*.safetensors*") if path.name != "model.safetensors"]
    assert verify_folder(folder) == []


def test_where_the_manifest_is_gone_nothing_is_taken_for_the_runs_own(publish):
    folder = publish(1)
    (folder / "MANIFEST.json").unlink()
    (folder / "README.md").write_text("my words\n")
    (folder / "notes.txt").write_text("mine")
    publish(2)
    assert (folder / "README.md").read_text() == "my words\n" and (folder / "notes.txt").read_text() == "mine"
    assert (folder / "README.new.md").read_text() == "the card\n"
    assert (folder / "config.json.before").read_text() == '{"made": 1}'


def test_a_new_file_of_the_name_of_a_users_leaves_both(publish, tmp_path):
    folder = publish(1)
    (folder / "chat_template.jinja").write_text("mine")
    (tmp_path / "checkpoint" / "chat_template.jinja").write_text("the parent's")
    publish(2)
    assert (folder / "chat_template.jinja").read_text() == "the parent's"
    assert (folder / "chat_template.jinja.before").read_text() == "mine"


def test_a_disk_without_hard_links_carries_copies(publish, monkeypatch):
    folder = publish(1)
    (folder / "notes.txt").write_text("mine")

    def refuses(*_):
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refuses)
    publish(2)
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_death_before_the_new_folder_is_in_place_leaves_the_old_one_with_all_that_is_in_it(publish):
    folder = publish(1)
    (folder / "notes.txt").write_text("mine")

    class Killed(BaseException):
        pass

    def dies(earlier, staging):
        raise Killed

    with pytest.raises(Killed), staged(folder, {}, carry=dies) as staging:
        (staging / "config.json").write_text("new")
    assert (folder / "notes.txt").read_text() == "mine" and verify_folder(folder) == []


@pytest.fixture
def run(tiny_family, tmp_path):
    return shutil.copytree(tiny_family, tmp_path / "run")


def test_reports_that_a_user_wrote_on_are_set_aside_by_cascade_report_each_time(run):
    for number, suffix in enumerate((".damaged", ".damaged-2")):
        (run / "report.md").write_text(f"annotated {number}")
        assert CliRunner().invoke(main, ["report", str(run)]).exit_code == 0
        assert (run / f"report.md{suffix}").read_text() == f"annotated {number}"
        assert (run / "report.md").read_text().startswith("# Family")
    assert verify_run(run)[1] == []


def test_a_comment_in_a_runs_recipe_is_set_aside_before_it_is_written_again(run):
    text = (run / "recipe.yaml").read_text() + "# mine\n"
    (run / "recipe.yaml").write_text(text)
    set_damaged_aside(run)
    assert (run / "recipe.yaml.damaged").read_text() == text == (run / "recipe.yaml").read_text()


def test_what_a_user_changed_in_a_generated_dataset_is_not_lost_when_it_is_made_again(tmp_path):
    from rich.console import Console

    from cascade.pipeline.runner import StageRunner
    from cascade.runtime.progress import RunProgress

    def write(folder, on_step):
        (folder / "dataset.jsonl").write_text("as it was written\n")

    with RunProgress(Console(quiet=True), "r", {}) as progress:
        runner = StageRunner(tmp_path, progress)
        generated = runner.make("generate", "parent", settings={}, inputs={}, write=write)
        folder = generated.folder
        (folder / "dataset.jsonl").write_text("cleaned by hand\n")
        (folder / "notes.txt").write_text("mine")
        assert runner.make("generate", "parent", settings={}, inputs={}, write=write) == generated
    assert (folder / "dataset.jsonl").read_text() == "as it was written\n"
    assert (folder / "dataset.jsonl.before").read_text() == "cleaned by hand\n"
    assert (folder / "notes.txt").read_text() == "mine" and verify_folder(folder) == []
