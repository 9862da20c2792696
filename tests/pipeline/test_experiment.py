"""cascade experiment: arms are compared fairly, in pairs, and what is finished is found again."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import ROOT

from cascade.cli.main import main
from cascade.pipeline.experiment.cells import plan_cells
from cascade.pipeline.experiment.comparison import experiment_texts, summarise, write_experiment
from cascade.pipeline.experiment.results import code_version
from cascade.pipeline.experiment.run import list_experiment, run_experiment
from cascade.recipe.experiment import Arm, Experiment, load_experiment
from cascade.report.paired import paired_difference
from cascade.report.rates import is_at_edge
from cascade.runtime.errors import RecipeError, RunError, UserError
from cascade.runtime.failpoints import InjectedError, arm

ARMS = """\
arms:
  default:
  direct:
    set:
      members.*.seed: parent
  direct-accumulated: {set: ["members.*.seed=parent"], tokens: accumulated}
  ce: {of: default, row: ce}
"""


def write_experiment_file(folder, recipe_folder, *, arms=ARMS, more="", sets="evaluate.tasks: []"):
    """An experiment over the tiny recipe, whose rates are given so that tests are short."""
    path = folder / "experiment.yaml"
    path.write_text(
        f"name: tiny\nrecipe: {recipe_folder / 'tiny.yaml'}\nset: {{{sets}}}\n{arms}{more or 'fixed_rates: true'}\n"
    )
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, recipe_folder):
    """An experiment of two seeds and one budget, made; (its file, its folder)."""
    folder = tmp_path_factory.mktemp("experiment")
    path = write_experiment_file(folder, recipe_folder, more="fixed_rates: true\nseeds: [0, 1]\ntokens: [512]")
    return path, run_experiment(path, output=folder / "made")


def refused(tmp_path, recipe_folder, **given):
    with pytest.raises(UserError) as error:
        plan_cells(load_experiment(write_experiment_file(tmp_path, recipe_folder, **given)))
    return str(error.value)


def summary(folder):
    return json.loads((folder / "experiment.json").read_text())


def entries(folder, account):
    return {(row["arm"], row["size"]): row for row in summary(folder)["accounts"][account]["rows"]}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the tests are not run from a git checkout")
def test_a_result_made_in_a_checkout_names_its_commit():
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    assert code_version()["commit"].rstrip("+") == head.stdout.strip()


def test_every_cell_is_a_family_and_has_a_result_without_weights(finished):
    _, folder = finished
    names = {f"{arm}-s{seed}-512" for arm in ("default", "direct", "direct-accumulated") for seed in (0, 1)}
    assert {path.name for path in (folder / "cells").iterdir()} == names
    assert {path.stem for path in (folder / "results").iterdir()} == names
    for name in names:
        result = json.loads((folder / "results" / f"{name}.json").read_text())
        run = folder / "cells" / name
        assert set(result["weights"]) == {"big", "small"}
        for member, files in result["weights"].items():
            manifest = json.loads((run / "members" / member / "MANIFEST.json").read_text())["files"]
            assert files == {"model.safetensors": manifest["model.safetensors"]["sha256"]}
        assert result["recipe"]["distill.tokens"] == 512 and "/" not in result["recipe"]["parent.model"]
        assert {"cascade", "torch"} < set(result["made_with"])


def test_block_sums_are_the_metrics_of_every_row(finished):
    _, folder = finished
    result = json.loads((folder / "results" / "default-s0-512.json").read_text())
    rows = [row for row in result["rows"] if row["kind"] != "parent"]
    assert {row["kind"] for row in rows} == {"member", "ce"} and len(rows) == 4
    for row in rows:
        values = {one["metric"]: one["value"] for one in row["metrics"] if one["task"] == "heldout"}
        for metric in ("loss", "kl_to_teacher", "top1_agreement"):
            assert sum(row["blocks"][metric]) / sum(row["blocks"]["tokens"]) == pytest.approx(values[metric], rel=1e-5)
    assert len({row["blocks"]["text"] for row in rows}) == 1


def test_both_accountings_have_equal_tokens(finished):
    _, folder = finished
    new, accumulated = entries(folder, "new"), entries(folder, "accumulated")
    assert {arm for arm, _ in new} == {"default", "direct", "ce"}
    assert {arm for arm, _ in accumulated} == {"default", "direct-accumulated"}
    assert all(row["tokens"]["hop"] == [512] for row in new.values())
    assert all(
        row["tokens"]["accumulated"] == accumulated["default", size]["tokens"]["accumulated"]
        for (_, size), row in accumulated.items()
    )
    assert accumulated["direct-accumulated", "small"]["tokens"] == {"hop": [1024], "accumulated": [1024]}
    assert new["direct", "small"]["tokens"] == {"hop": [512], "accumulated": [512]}
    # The baseline starts from the chain's own cut.
    assert new["ce", "small"]["tokens"] == {"hop": [512], "accumulated": [1024]}


def test_the_same_training_differs_by_nothing_and_is_made_once(finished):
    _, folder = finished
    new = entries(folder, "new")
    # The largest member of both arms is cut from the parent.
    same = new["direct", "big"]["kl_to_teacher_difference"]
    assert (same["value"], same["low"], same["high"], same["verdict"]) == (0, 0, 0, "tie")
    events = (folder / "cells" / "direct-s0-512" / "events.jsonl").read_text().splitlines()
    taken = {
        (event["member"], event["stage"]) for line in events if (event := json.loads(line))["event"] == "taken over"
    }
    assert {("parent", "data"), ("parent", "evaluate"), ("big", "distill")} <= taken
    assert ("small", "distill") not in taken


def test_differences_are_those_of_the_families(finished):
    _, folder = finished
    row = entries(folder, "new")["ce", "small"]
    values = []
    for seed in (0, 1):
        family = json.loads((folder / "cells" / f"default-s{seed}-512" / "family.json").read_text())
        kl = {
            one["name"]: next(metric["value"] for metric in one["metrics"] if metric["metric"] == "kl_to_teacher")
            for one in family["rows"]
            if one["name"] in ("small", "small-ce")
        }
        values.append(kl["small-ce"] - kl["small"])
    found = row["kl_to_teacher_difference"]
    assert found["value"] == pytest.approx(np.mean(values), rel=1e-3, abs=1e-6)
    assert found["low"] <= found["value"] <= found["high"] and found["num_seeds"] == 2
    counts = summary(folder)["accounts"]["new"]["counts"]["ce"]["kl_to_teacher"]
    assert sum(counts.values()) == 2


def test_a_cell_taken_over_in_part_is_as_one_made_alone(finished, tmp_path):
    from cascade.pipeline.run import run_recipe
    from cascade.pipeline.verify import verify_run

    path, folder = finished
    cell = next(planned for planned in plan_cells(load_experiment(path)) if planned.name == "direct-s1-512")
    alone = run_recipe(cell.recipe, output=tmp_path / "alone")
    shared = folder / "cells" / cell.name
    for member in ("big", "small"):
        weights = [(run / "members" / member / "model.safetensors").read_bytes() for run in (alone, shared)]
        assert weights[0] == weights[1]
    assert verify_run(shared)[1] == []


def test_damage_in_one_cell_is_not_taken_over(finished, tmp_path):
    from cascade.store.commits import take_over

    _, folder = finished
    source = next((folder / "cells" / "default-s0-512" / "stages").glob("parent.data-*"))
    assert take_over(source, tmp_path / "stages" / source.name)
    copied = tmp_path / "copied"
    shutil.copytree(source, copied)
    (copied / "train.safetensors").write_bytes(b"other")
    assert not take_over(copied, tmp_path / "stages" / "x")
    assert not (tmp_path / "stages" / "x").exists()


def test_a_second_start_makes_nothing(finished, capsys):
    path, folder = finished
    before = {file: file.stat().st_mtime_ns for file in folder.glob("cells/*/events.jsonl")}
    run_experiment(path, output=folder)
    assert before == {file: file.stat().st_mtime_ns for file in folder.glob("cells/*/events.jsonl")}


def test_a_killed_experiment_goes_on_where_it_was(tmp_path, recipe_folder):
    path = write_experiment_file(tmp_path, recipe_folder, more="fixed_rates: true\ntokens: [256]")
    output = tmp_path / "made"
    try:
        arm({"CASCADE_FAILPOINT": "experiment.cell:raise@2", "CASCADE_ALLOW_FAILPOINTS": "1"})
        with pytest.raises(InjectedError):
            run_experiment(path, output=output)
        assert [path.stem for path in (output / "results").iterdir()] == ["default-s0-256"]
        first = (output / "results" / "default-s0-256.json").read_bytes()
        arm({"CASCADE_FAILPOINT": "experiment.made:raise", "CASCADE_ALLOW_FAILPOINTS": "1"})
        with pytest.raises(InjectedError):
            run_experiment(path, output=output)
    finally:
        arm({})
    # Half a result is none: the cell's family is there, and read again.
    (output / "results" / "default-s0-256.json").write_bytes(first[: len(first) // 2])
    weights = (output / "cells/direct-s0-256/members/small/model.safetensors").stat().st_mtime_ns
    run_experiment(path, output=output)
    assert (output / "results" / "default-s0-256.json").read_bytes() == first
    assert (output / "cells/direct-s0-256/members/small/model.safetensors").stat().st_mtime_ns == weights
    assert all(cell["done"] for cell in summary(output)["cells"])


def test_a_cell_whose_arm_has_changed_is_made_again_from_what_stayed_the_same(tmp_path, recipe_folder):
    arms = "arms:\n  default:\n  direct: {set: {members.*.seed: parent%s}}\n"
    more = "fixed_rates: true\ntokens: [256]"
    path = write_experiment_file(tmp_path, recipe_folder, arms=arms % "", more=more)
    folder = run_experiment(path, output=tmp_path / "made")
    before = (folder / "results" / "direct-s0-256.json").read_bytes()
    write_experiment_file(tmp_path, recipe_folder, arms=arms % ", distill.weight_decay: 0.1", more=more)
    run_experiment(path, output=folder)
    assert (folder / "results" / "direct-s0-256.json").read_bytes() != before
    (again,) = (folder / "cells").glob("direct-s0-256-*")
    events = [json.loads(line) for line in (again / "events.jsonl").read_text().splitlines()]
    taken = {(event["member"], event["stage"]) for event in events if event["event"] == "taken over"}
    assert ("parent", "data") in taken and not any(stage == "distill" for _, stage in taken)
    written = (again / "events.jsonl").stat().st_mtime_ns
    run_experiment(path, output=folder)
    assert (again / "events.jsonl").stat().st_mtime_ns == written


def test_results_kept_elsewhere_are_taken_where_they_are_of_the_same(finished, tmp_path, recipe_folder):
    _, folder = finished
    shutil.copytree(folder / "results", tmp_path / "kept")
    more = "fixed_rates: true\nseeds: [0, 1]\ntokens: [512]\nresults: kept"
    path = write_experiment_file(tmp_path, recipe_folder, more=more)
    first_folder = run_experiment(path, output=tmp_path / "made")
    assert not list((first_folder / "cells").iterdir())
    assert summary(first_folder)["accounts"] == summary(folder)["accounts"]
    # Another setting: none is taken, and what differs is said.
    path = write_experiment_file(tmp_path, recipe_folder, more=more, sets="evaluate.tasks: [], distill.batch_size: 2")
    rows = list_experiment(path, output=tmp_path / "other")["cells"]
    assert not any(row["done"] for row in rows)
    assert all("recipe.distill.batch_size: 4 there, 2 now" in row["why"] for row in rows)
    assert not (tmp_path / "other").exists()
    # A figure that somebody has changed: no result.
    for file in (tmp_path / "kept").iterdir():
        file.write_text(file.read_text().replace('"num_parameters": ', '"num_parameters": 1', 1))
    path = write_experiment_file(tmp_path, recipe_folder, more=more)
    assert {row["why"].rpartition(": ")[2] for row in list_experiment(path, output=tmp_path / "other")["cells"]} == {
        "is not as it was written"
    }


def test_a_cell_that_fails_costs_no_other(tmp_path, recipe_folder, monkeypatch):
    import cascade.pipeline.experiment.run

    def run(recipe, **options):
        if recipe.members[0].seed == "parent":
            raise RunError("the loss ran off")
        return made(recipe, **options)

    made = cascade.pipeline.experiment.run.run_recipe
    monkeypatch.setattr(cascade.pipeline.experiment.run, "run_recipe", run)
    arms = 'arms:\n  bad: {set: ["members.*.seed=parent"]}\n  good:\n'
    path = write_experiment_file(tmp_path, recipe_folder, arms=arms, more="fixed_rates: true\ntokens: [128]")
    with pytest.raises(RunError, match="bad-s0-128: the loss ran off"):
        run_experiment(path, output=tmp_path / "made")
    found = summary(tmp_path / "made")
    assert [(cell["arm"], cell["done"]) for cell in found["cells"]] == [("bad", False), ("good", True)]
    assert found["accounts"]["new"]["rows"][0]["kl_to_teacher_difference"] == {"why": "the reference is not made"}


def test_the_command_lists_and_prints(finished):
    path, folder = finished
    runner = CliRunner()
    listed = runner.invoke(main, ["experiment", str(path), "--output", str(folder), "--list"])
    assert listed.exit_code == 0 and "6 of 6 cells are done" in listed.output
    result = runner.invoke(main, ["experiment", str(path), "--output", str(folder)])
    assert result.exit_code == 0, result.output
    assert re.search(r"ce against default: KL to the parent \d wins?, \d ties?, \d loss(es)?;", result.stdout)
    assert "At equal accumulated tokens" in result.stdout and "fixed_rates: true" in result.stdout
    printed = runner.invoke(main, ["experiment", str(path), "--output", str(folder), "--json"])
    assert json.loads(printed.stdout) == summary(folder)
    page = (folder / "experiment.html").read_text()
    assert page.count("<svg") == 4 and "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "no task" in (folder / "experiment.md").read_text()


def test_what_is_not_measured_is_said(tmp_path, recipe_folder):
    arms = 'arms:\n  default:\n  direct: {set: ["members.*.seed=parent"]}\n'
    path = write_experiment_file(tmp_path, recipe_folder, arms=arms, more="fixed_rates: true\ntokens: [128]")
    result = CliRunner().invoke(
        main, ["experiment", str(path), "--output", str(tmp_path / "made"), "--only", "default"], catch_exceptions=False
    )
    assert result.exit_code == 0
    assert "not measured: no arm has `tokens: accumulated`" in result.stdout
    assert "Not made yet: direct-s0-128" in result.stdout and "There is one seed (0)" in result.stdout


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"arms": "arms:\n  a:\n  b: {sett: [seed=1]}\n"}, r"experiment.yaml:6:7: unknown key 'sett'; did you mean 'set'"),
        ({"arms": "arms:\n  a:\n  b: {of: a, row: cee}\n"}, r"arms.b.row: .*'cut', 'repaired', 'ce'.*got 'cee'"),
        ({"arms": "arms:\n  a:\n  A:\n"}, r"a and A are one name"),
        ({"arms": "arms:\n  a:\n  a:\n"}, r"key 'a' stands twice"),
        ({"arms": "arms:\n  a:\n"}, r"experiment.yaml:4:1: arms: .*at least 2"),
        ({"more": "reference: other"}, r"unknown arm 'other'; known: default, direct"),
        ({"more": "reference: ce"}, r"'ce' is a baseline row"),
        ({"arms": "arms:\n  a:\n  b: {of: c, row: ce}\n"}, r"arms.b.of: 'c' is no arm with members; use one of a"),
        ({"sets": "prune.repair.method: none", "arms": "arms:\n  a:\n  b: {of: a, row: repaired}\n"}, r"arms.b.row: the members of a have no 'repaired'"),
        ({"arms": "arms:\n  a:\n  b: {row: ce}\n"}, r"`of` and `row` go together"),
        ({"more": "seeds: []"}, r"seeds"),
        ({"more": "tokens: [512, 512]"}, r"512 stands twice"),
        ({"more": "seeds: [0]"}, r"arms.default: distill.learning_rate: 0.003 is given.*fixed_rates: true"),
        ({"more": "fixed_rates: true\ntokens: [100]"}, r"tokens.0: 100 tokens are less than one optimizer step.* = 128"),
        ({"arms": "arms:\n  a:\n  b: {set: [distill.tokns=5]}\n"}, r"arms.b.set: .*unknown key 'tokns'; did you mean 'tokens'"),
        ({"arms": "arms:\n  a:\n  b: {set: ['members.*.sed=parent']}\n"}, r"arms.b.set: .*unknown key 'sed'; did you mean 'seed'"),
        ({"arms": "arms:\n  a:\n  b: {set: ['members.*.seed=previous']}\n"}, r"changes nothing: every member has it already"),
        ({"arms": "arms:\n  a:\n  b: {set: [distill.batch_size=4]}\n"}, r"distill.batch_size=4 changes nothing"),
        ({"arms": "arms:\n  a:\n  b:\n"}, r"arms.b: is the same as a"),
        ({"arms": "arms:\n  a:\n  b: {set: [data.block_size=64]}\n"}, r"differs from a in data.block_size.*may_differ: \[data\]"),
        ({"arms": "arms:\n  a:\n  b: {set: ['parent=builtin:pico-python']}\n"}, r"differs from a in parent.model"),
        ({"arms": "arms:\n  a:\n  b: {set: [seed=3]}\n"}, r"seed is not for an override here; give `seeds`"),
        ({"arms": "arms:\n  a:\n  b: {set: ['members.1.tokens=512']}\n"}, r"members.1.tokens is not for an override here"),
        ({"arms": "arms:\n  a:\n  b: {set: [evaluate.heldout_blocks=4]}\n"}, r"all arms are measured alike"),
        ({"arms": "arms:\n  a:\n  b: {set: ['members.1.name=other']}\n"}, r"has the members big, other, a has big, small"),
        ({"arms": "arms:\n  a:\n  b: {set: ['members.1.target={params: 1e-9}']}\n"}, r"arms.b: members: small: "),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused_with_its_place(tmp_path, recipe_folder, given, said):
    given = {"more": "fixed_rates: true"} | given
    told = refused(tmp_path, recipe_folder, **given)
    assert re.search(said, told, flags=re.S), told
    assert "experiment.yaml" in told


def test_refusals_have_no_traceback_and_exit_code_2(tmp_path, recipe_folder):
    path = write_experiment_file(tmp_path, recipe_folder, more="seeds: [0]")
    done = subprocess.run(
        [sys.executable, "-m", "cascade", "experiment", str(path)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr and "fixed_rates" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_another_folder_is_not_written_into(tmp_path, recipe_folder):
    path = write_experiment_file(tmp_path, recipe_folder)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="no experiment"):
        run_experiment(path, output=tmp_path)


def test_data_may_differ_where_the_file_says_so(tmp_path, recipe_folder):
    arms = "arms:\n  a:\n  b: {set: [data.max_tokens=1024]}\n"
    path = write_experiment_file(tmp_path, recipe_folder, arms=arms, more="fixed_rates: true\nmay_differ: [data]")
    assert len(plan_cells(load_experiment(path))) == 2


def test_every_member_that_the_file_gives_instead_of_the_recipes_is_meant_by_a_star(tmp_path, recipe_folder):
    members = (
        "members: [" + ", ".join(f"{{name: m{size}, target: {{params: 0.{size}}}}}" for size in (9, 8, 7, 6)) + "]"
    )
    path = write_experiment_file(tmp_path, recipe_folder, sets=f"evaluate.tasks: [], {members}")
    seeds = {cell.arm: [member.seed for member in cell.members] for cell in plan_cells(load_experiment(path))}
    assert seeds["default"] == ["parent", "m9", "m8", "m7"]
    assert seeds["direct"] == ["parent"] * 4


def test_the_recipe_in_the_repository_has_all_its_cells(tmp_path):
    file = load_experiment(ROOT / "recipes" / "experiments" / "stories.yaml")
    if not (ROOT.parent / "shared" / "data").is_dir():
        pytest.skip("the shared data folder is not beside this checkout")
    families = [arm for arm in file.form.arms.values() if not arm.is_row]
    assert len(plan_cells(file)) == len(families) * len(file.form.seeds) * len(file.form.tokens)


def made_up_result(arm, seed, tokens, *, kl, retentions=(), text="same", parent="p"):
    """A cell's result with one member, its KL the same in each of eight blocks of ten tokens, but for some noise."""
    draw = np.random.default_rng(seed)
    sums = [10 * kl + noise for noise in draw.normal(0, 0.1, size=8)]
    metrics = [
        {"task": "heldout", "metric": name, "value": kl, "retention": None} for name in ("kl_to_teacher", "loss")
    ]
    metrics += [{"task": task, "metric": "acc", "value": 1, "retention": value} for task, value in retentions]
    rate = {"learning_rate": 1e-3, "searched": True, "num_tokens": 100, "edge": arm == "b"}
    blocks = {"text": text, "tokens": [10] * 8, "kl_to_teacher": sums, "loss": sums}
    row = {"member": "m", "kind": "member", "num_parameters": 1000, "tokens": {"hop": tokens, "accumulated": tokens}}
    row |= {"rate": rate, "metrics": metrics, "blocks": blocks}
    whole = row | {"member": "", "kind": "parent", "metrics": metrics[:2]}
    made_with = {"cascade": "0", "torch": "2", "transformers": "5", "threads": 1, "device": "cpu"}
    cell = {"arm": arm, "seed": seed, "tokens": tokens}
    return {"cell": cell, "inputs": {"parent": parent}, "rows": [whole, row], "made_with": made_with}


def summarised(**changes):
    """Two arms of three seeds and two budgets, the second arm better by 0.1; `changes` are of its results."""
    form = Experiment(
        name="x", recipe="r", arms={"a": Arm(), "b": Arm(set=["k=1"])}, seeds=[0, 1, 2], tokens=[100, 200]
    )
    results = {}
    for seed in form.seeds:
        for tokens in form.tokens:
            results[f"a-s{seed}-{tokens}"] = made_up_result("a", seed, tokens, kl=0.5)
            results[f"b-s{seed}-{tokens}"] = made_up_result("b", seed, tokens, **({"kl": 0.4} | changes))
    return summarise(form, form.tokens, results, {})


def of_arm(experiment, name):
    return next(row for row in experiment["accounts"]["new"]["rows"] if row["arm"] == name)


def test_retention_is_the_mean_over_tasks_that_have_one():
    kept = (("t", 0.8), ("t", 0.6), ("u", 0.1), ("weak", None), ("production", 0.9))
    assert of_arm(summarised(retentions=kept), "b")["retention"] == pytest.approx((0.7 + 0.1) / 2)
    found = of_arm(summarised(retentions=(("weak", None),)), "b")
    assert found["retention"] is None and found["num_tasks"] == 0


def test_a_search_that_ended_at_its_edge_is_told():
    def rate(*losses):
        return {"tried": [{"learning_rate": 10.0**power, "loss": loss} for power, loss in enumerate(losses)]}

    assert is_at_edge(rate(3.0, 2.0, 1.0)) and is_at_edge(rate(1.0, 2.0, None))
    assert not is_at_edge(rate(3.0, 1.0, None)) and not is_at_edge(rate())


def test_what_is_not_of_the_same_text_or_parent_is_not_compared():
    assert of_arm(summarised(), "b")["kl_to_teacher_difference"]["verdict"] == "win"
    assert of_arm(summarised(text="other"), "b")["loss_difference"] == {"why": "other held-out text"}
    row = of_arm(summarised(parent="other"), "b")
    assert row["kl_to_teacher_difference"] == {"why": "another parent"}
    assert row["loss_difference"]["verdict"] == "win"


def test_tables_have_each_budget_and_count_all(tmp_path):
    experiment = summarised()
    assert experiment["accounts"]["new"]["counts"]["b"]["loss"] == {"win": 2, "tie": 0, "loss": 0}
    write_experiment(tmp_path, experiment)
    text = experiment_texts(tmp_path)
    assert "budget 100" in text and "budget 200" in text and "-0.1000" in text and "win (3/3 seeds)" in text
    assert "0.001 (edge), 0.001 (edge), 0.001 (edge)" in text and "more than is shown: b." in " ".join(text.split())
    assert "in about 55% of cases with 2 seeds" in " ".join(text.split())
    # KL and loss: against size at two budgets, against tokens at one size.
    assert (tmp_path / "experiment.html").read_text().count("<svg") == 6


def test_seeds_and_blocks_are_in_the_interval():
    draw = np.random.default_rng(0)
    tokens = np.full((3, 50), 10.0)
    noise, shift = draw.normal(size=(3, 50)), np.array([[-1.0], [5.0], [11.0]])
    both = paired_difference(noise + shift, np.zeros((3, 50)), tokens)
    # Three seeds far apart: all of one, or all of another, is 1/27 of the draws each.
    assert both.low == pytest.approx(-0.1, abs=0.1) and both.high == pytest.approx(1.1, abs=0.1)
    assert both.verdict == "tie" and both.value == pytest.approx(0.5, abs=0.05)
    # Blocks that are hard for all seeds do not average out over seeds.
    shared = np.repeat(draw.normal(size=(1, 50)), 3, axis=0)
    one, three = (paired_difference(part, np.zeros_like(part), tokens[: len(part)]) for part in (shared[:1], shared))
    assert three.high - three.low == pytest.approx(one.high - one.low, rel=0.1)
    spread = shared[0].std() / 10 / np.sqrt(50)
    assert one.high - one.low == pytest.approx(2 * 1.96 * spread, rel=0.1)


def test_pairs_see_what_their_own_errors_hide():
    draw = np.random.default_rng(0)
    blocks, tokens = draw.normal(100, 30, size=(1, 80)), np.full((1, 80), 20.0)
    worse = paired_difference(blocks + 1 + draw.normal(0, 0.5, size=(1, 80)), blocks, tokens)
    assert worse.verdict == "loss" and worse.value == pytest.approx(0.05, rel=0.1)
    assert paired_difference(blocks, blocks + 1, tokens).verdict == "win"
    assert paired_difference(blocks, blocks, tokens).verdict == "tie"
    assert worse == paired_difference(blocks + worse.value * 20, blocks, tokens) or worse.low < worse.value < worse.high
    again = [paired_difference(blocks * 1.1, blocks, tokens) for _ in range(2)]
    assert again[0] == again[1]


def test_blocks_with_more_tokens_weigh_more():
    difference = paired_difference([[10.0, 0.0]], [[0.0, 0.0]], [[10.0, 90.0]])
    assert difference.value == pytest.approx(0.1)


def test_a_broken_file_is_told_as_recipes_are(tmp_path):
    (tmp_path / "bad.yaml").write_text("- a\n")
    with pytest.raises(RecipeError, match="an experiment is a mapping of keys"):
        load_experiment(tmp_path / "bad.yaml")
