"""The cross-entropy baseline is trained at a rate of its own, found with the effort that distillation's is."""

import json

import pytest

from cascade.distillation import range_test
from cascade.pipeline.run import run_recipe
from cascade.planning.estimates import stage_seconds
from cascade.recipe.load import load_recipe
from cascade.report.rates import load_rates
from cascade.report.records import load_family
from cascade.runtime.errors import RecipeError

BRIEF = ["evaluate.tasks=[]", "prune.repair.method=none", "prune.hidden=activation_norm", "baselines=[ce]"]
ONE = "members=[{name: m, target: {params: 0.6}}]"


def rates_logged(folder, stage):
    log = next(folder.glob(f"stages/m.{stage}-*/log.jsonl")).read_text().splitlines()
    return [json.loads(line)["learning_rate"] for line in log]


@pytest.fixture
def searches(monkeypatch):
    """What each search was done with."""
    seen, original = [], range_test.distill

    def spied(student, teacher, blocks, **options):
        seen.append(
            {
                "teacher": teacher is not None,
                "tokens": options["num_tokens"],
                "rate": options["optimization"].learning_rate,
            }
        )
        return original(student, teacher, blocks, **options)

    monkeypatch.setattr(range_test, "distill", spied)
    return seen


def test_the_baseline_is_searched_for_as_the_member_is_and_by_its_own_loss(recipe_folder, tmp_path, searches):
    changes = [*BRIEF, ONE, "distill.learning_rate=auto"]
    folder = run_recipe(load_recipe(recipe_folder / "tiny.yaml", changes), output=tmp_path / "run")
    by_teacher, by_text = ([entry for entry in searches if entry["teacher"] == taught] for taught in (True, False))
    assert {entry["tokens"] for entry in by_teacher} == {entry["tokens"] for entry in by_text} and len(by_text) >= 3
    assert by_teacher[0]["rate"] == by_text[0]["rate"] == 4 * range_test.FIRST_RATE  # both with Muon
    rates = load_rates(folder)
    assert list(rates) == ["m", "m-ce"] and all(entry["searched"] for entry in rates.values())
    for stage, name in (("distill", "m"), ("baseline-ce", "m-ce")):
        assert max(rates_logged(folder, stage)) == pytest.approx(rates[name]["learning_rate"], rel=0.1)
    record = json.loads(next(folder.glob("stages/m.ce-rate-*/rate.json")).read_text())
    assert record["tried"] == rates["m-ce"]["tried"] and record["tried"] != rates["m"]["tried"]
    losses = [entry["loss"] for entry in record["tried"]]
    assert min(losses) > 2  # cross-entropy of a random model of 2,048 tokens, not its distance from a teacher
    report = (folder / "report.md").read_text()
    assert "## Learning rates" in report and f"{rates['m-ce']['learning_rate']:.3g}" in report
    row = next(entry for entry in load_family(folder)["rows"] if entry["name"] == "m-ce")
    spent = [
        json.loads(path.read_text())["seconds"]
        for stage in ("ce-rate", "baseline-ce", "heldout-ce")
        for path in folder.glob(f"stages/m.{stage}-*/cost.json")
    ]
    assert len(spent) == 3 and row["cost"]["seconds"] == pytest.approx(sum(spent))


def test_a_rate_that_is_given_for_distillation_is_not_taken_for_the_baseline(recipe_folder, tmp_path, searches):
    folder = run_recipe(load_recipe(recipe_folder / "tiny.yaml", [*BRIEF, ONE]), output=tmp_path / "run")
    assert {search["teacher"] for search in searches} == {False}
    rates = load_rates(folder)
    assert rates["m"] == {"learning_rate": 3e-3, "searched": False, "tried": [], "num_tokens": 0}
    assert rates["m-ce"]["searched"] and max(rates_logged(folder, "distill")) == pytest.approx(3e-3, rel=0.1)
    count = len(searches)
    named = load_recipe(recipe_folder / "tiny.yaml", [*BRIEF, ONE, "baselines=[{ce: {learning_rate: 7e-4}}]"])
    run_recipe(named, output=tmp_path / "run")
    assert len(searches) == count and load_rates(folder)["m-ce"]["learning_rate"] == 7e-4
    newest = max(folder.glob("stages/m.baseline-ce-*"), key=lambda path: path.stat().st_mtime)
    logged = [json.loads(line)["learning_rate"] for line in (newest / "log.jsonl").read_text().splitlines()]
    assert max(logged) == pytest.approx(7e-4, rel=0.1)


def test_baselines_are_kinds_or_say_how_the_cross_entropy_is_trained(recipe_folder):
    def read(text):
        return load_recipe(recipe_folder / "tiny.yaml", [f"baselines={text}"])

    assert read("[cut, ce]").baseline_kinds == ["cut", "ce"] and read("[cut, ce]").ce_learning_rate == "auto"
    recipe = read("[{ce: {learning_rate: 3e-3}}, repaired]")
    assert recipe.baseline_kinds == ["ce", "repaired"] and recipe.ce_learning_rate == 3e-3
    assert recipe.model_dump(mode="json")["baselines"] == [{"ce": {"learning_rate": 3e-3}}, "repaired"]
    assert type(recipe).model_validate(recipe.model_dump(mode="json")) == recipe
    for text, message in (
        ("[ce, {ce: {}}]", "baselines: one of them stands twice"),
        ("[{ce: {rate: 1}}]", "unknown key 'rate'"),
        ("[{cut: {}}]", "unknown key 'cut'"),
        ("[{ce: {learning_rate: 0}}]", "Input should be greater than 0"),
        ("[sft]", "baselines.0: Input should be 'cut', 'repaired' or 'ce'"),
    ):
        with pytest.raises(RecipeError, match=message):
            read(text)


def test_the_plan_counts_the_baselines_search(recipe_folder):
    def planned(*changes):
        recipe = load_recipe(recipe_folder / "tiny.yaml", ["baselines=[ce]", *changes])
        return stage_seconds(recipe, 1e6, 2e6, 100_000, cut=True)

    assert "rate" not in planned() and planned()["ce-rate"] > 1
    assert planned("distill.learning_rate=auto")["rate"] > planned()["ce-rate"]  # the teacher reads, too
    assert "ce-rate" not in planned("baselines=[{ce: {learning_rate: 1e-3}}]")
