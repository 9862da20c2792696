"""The generated reference pages say what the code does now, about every key and every option."""

import subprocess
import sys

import pytest
from conftest import ROOT

from cascade.recipe.experiment import Experiment
from cascade.recipe.schema import Recipe

sys.path.insert(0, str(ROOT / "tests" / "tools"))
import write_reference


@pytest.mark.parametrize("path", list(write_reference.pages()), ids=lambda path: path.name)
def test_a_page_is_what_the_code_says(path):
    assert path.read_text() == write_reference.pages()[path], "stale: run python tests/tools/write_reference.py"


def test_a_stale_page_is_noticed_and_left_as_it_is(tmp_path, monkeypatch, capsys):
    page = tmp_path / "docs" / "cli.md"
    page.parent.mkdir()
    page.write_text("of before")
    monkeypatch.setattr(write_reference, "ROOT", tmp_path)
    monkeypatch.setattr(write_reference, "pages", lambda: {page: "of now"})
    monkeypatch.setattr(sys, "argv", ["write_reference.py", "--check"])
    with pytest.raises(SystemExit) as stopped:
        write_reference.main()
    assert stopped.value.code == 1 and page.read_text() == "of before"
    assert "docs/cli.md is stale" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["write_reference.py"])
    with pytest.raises(SystemExit) as stopped:
        write_reference.main()
    assert stopped.value.code == 0 and page.read_text() == "of now"


@pytest.mark.parametrize("model", [Recipe, Experiment])
def test_every_key_of_every_section_has_a_description(model):
    keys = {
        f"{place}.{key.name}".strip("."): key.text
        for place, section in write_reference.sections(model)
        for key in write_reference.keys_of(section, place)
    }
    assert "distill.features.fade_fraction" in keys or "arms.set" in keys
    assert not [name for name, text in keys.items() if len(text.split()) < 2 or not text.endswith(".")]


def test_every_option_and_argument_of_every_command_has_a_help_text():
    options = {
        (path, row.name): row.text
        for path, command in write_reference.commands(write_reference.load_command())
        for row in write_reference.options_of(command)
    }
    assert ("cascade prune", "--params") in options and ("cascade cache info", "--json") in options
    assert not [place for place, text in options.items() if not text.endswith(".")]


def test_the_reference_names_accepted_values_limits_and_defaults():
    rows = {
        key.name: key
        for key in write_reference.keys_of(Recipe.model_fields["distill"].annotation.__args__[0], "distill")
    }
    assert rows["learning_rate"].accepts == "`auto` or a number, above 0"
    assert rows["keep_states"].accepts == "a whole number, at least 2" and rows["keep_states"].default == "`2`"
    assert rows["cache"].accepts == "[section](#distillcache)"
    assert "`forward_kl`" in rows["loss"].accepts and rows["loss"].default == "`forward_kl`"


def test_the_script_runs_by_itself():
    script = ROOT / "tests" / "tools" / "write_reference.py"
    assert subprocess.run([sys.executable, script, "--check"], cwd=ROOT).returncode == 0
