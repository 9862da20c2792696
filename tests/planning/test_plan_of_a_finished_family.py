"""`cascade plan` of a run that was begun shows what was found in it, and what is left to do."""

import shutil

import pytest

from cascade.planning.preview import preview
from cascade.planning.preview_text import preview_text
from cascade.recipe.load import load_recipe
from cascade.report.records import load_family


@pytest.fixture
def run(tiny_family, tmp_path):
    return shutil.copytree(tiny_family, tmp_path / "run")


def rows_of(folder):
    return {row["name"]: row for row in load_family(folder)["rows"]}


def test_a_finished_family_is_planned_as_it_is_and_has_nothing_left_to_do(tiny_recipe, tiny_family):
    found, rows = preview(tiny_recipe, tiny_family), rows_of(tiny_family)
    assert found["finished"] == ["big", "small"] and found["hidden_tried"] == []
    for member in found["members"]:
        row = rows[member["name"]]
        assert member["dims"] == row["dims"] and member["num_parameters"] == row["num_parameters"]
        assert member["seconds"] == {}
    assert found["disk_needed_bytes"] == 0
    assert found["seconds"] == 0
    text = preview_text(found)
    assert "Made already, of the shapes above: big, small." in text and "both ways" not in text


def test_what_is_left_is_planned_from_the_shapes_that_were_found(tiny_recipe, run):
    before = preview(tiny_recipe, run.with_name("new"))
    shutil.rmtree(run / "members" / "small")
    for folder in run.glob("stages/small.*"):
        shutil.rmtree(folder)
    found, rows = preview(tiny_recipe, run), rows_of(run)
    assert found["finished"] == ["big"] and found["hidden_tried"] == ["small"]
    big, small = found["members"]
    assert big["dims"] == rows["big"]["dims"] and big["seconds"] == {}
    # Statistics are its seed's, and so on the disk or not by themselves.
    planned = before["members"][1]["seconds"]
    assert small["seconds"].keys() >= planned.keys() - {"statistics"}
    assert 0 < found["seconds"] < before["seconds"] and found["disk_needed_bytes"] < before["disk_needed_bytes"]


def test_a_stage_that_the_recipe_would_have_otherwise_now_is_left_to_do(recipe_folder, run):
    def left(*changes):
        found = preview(load_recipe(recipe_folder / "tiny.yaml", changes), run)
        return {stage for member in found["members"] for stage in member["seconds"]}

    assert left("evaluate.limit=5") == {"evaluate", "report"}
    assert left("evaluate.heldout_blocks=4") == {"evaluate", "report", "heldout-cut", "heldout-repaired", "heldout-ce"}
    assert left("baselines=[ce]") == {"ce-rate", "baseline-ce", "heldout-ce", "report"}
    assert left("baselines=[{ce: {learning_rate: 1e-3}}]") == {"baseline-ce", "heldout-ce", "report"}
    assert left("baselines=[]") == set()


def test_a_damaged_plan_of_a_member_is_no_error_of_the_plan(tiny_recipe, run):
    for path in run.glob("stages/big.prune-*/plan.json"):
        path.write_text("{")
    assert len(preview(tiny_recipe, run)["members"]) == 2
