"""The whole line on a tiny family: what it leaves behind, what it resumes, what it refuses."""

import json
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from conftest import write_texts
from jsonschema import Draft202012Validator
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cascade.cli.main import main
from cascade.pipeline.run import run_recipe
from cascade.pipeline.runner import StageRunner
from cascade.recipe.load import load_recipe
from cascade.report.records import load_family
from cascade.runtime.errors import UserError
from cascade.store.commits import verify_folder

BASELINES = "baselines: [cut, repaired, {ce: {learning_rate: 3e-3}}]"

VOLATILE = ("speed", "cost")


def settled(folder):
    """family.json without what differs from run to run."""
    family = load_family(folder)
    for row in family["rows"]:
        for key in VOLATILE:
            row.pop(key)
    return family


def skipped(folder):
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    last = max(index for index, event in enumerate(events) if event["event"] == "started")
    return {(e["member"], e["stage"]) for e in events[last:] if e["event"] == "skipped"}, {
        (e["member"], e["stage"]) for e in events[last:] if e["event"] == "finished"
    }


def test_family_json_follows_its_schema(tiny_family):
    from importlib.resources import files

    schema = json.loads(files("cascade.report").joinpath("family.schema.json").read_text())
    Draft202012Validator(schema).validate(load_family(tiny_family))


def test_the_family_has_teacher_members_and_baselines_with_their_losses(tiny_family):
    rows = {row["name"]: row for row in load_family(tiny_family)["rows"]}
    baselines = [f"{name}-{kind}" for name in ("big", "small") for kind in ("cut", "repaired", "ce")]
    candidates = {name for name, row in rows.items() if row["role"] == "candidate"}
    assert [name for name in rows if name not in candidates] == ["parent", "big", "small", *baselines]
    assert rows["big"]["seed"] == "parent" and rows["small"]["seed"] == "big"
    total = rows["parent"]["num_parameters"]
    assert 0.77 <= rows["big"]["num_parameters"] / total <= 0.8
    assert 0.48 <= rows["small"]["num_parameters"] / total <= 0.5
    assert rows["small"]["tokens"] == {"hop": 512, "cumulative": 1024, "teacher_labelled": 512}
    for name in ("big", "small"):
        cut, repaired = (rows[name]["stages"][stage]["kl_to_teacher"] for stage in ("cut", "repaired"))
        assert repaired <= cut  # nothing is repaired where that makes the selection text worse
        assert rows[name]["stages"]["cut"]["loss"] > 0 and rows[name]["stages"]["recovered"]["kl_to_teacher"] >= 0
        assert rows[name]["speed"]["decode_tokens_per_s"] > 0
        tasks = {(metric["task"], metric["metric"]) for metric in rows[name]["metrics"]}
        assert {("heldout", "loss"), ("heldout", "kl_to_teacher"), ("python_minimal_pairs", "acc")} <= tasks


def test_the_stream_is_rotated_or_not_by_what_is_nearer_the_parent_on_selection_text(tiny_family):
    rows = load_family(tiny_family)["rows"]
    for name in ("big", "small"):
        tried = [row for row in rows if row["name"].startswith(f"{name}-shape")]
        assert {row["name"].partition("_")[2] for row in tried} == {"activation_norm", "pca"}
        kls = [row["stages"]["recovered"]["kl_to_teacher"] for row in tried]
        assert tried[kls.index(min(kls))]["status"] == "chosen"
        member = next(row for row in rows if row["name"] == name)
        # Each is counted as what it is, with a head of its own or without: none is larger than what was asked for.
        share = {"big": 0.8, "small": 0.5}[name]
        assert all(row["num_parameters"] <= share * rows[0]["num_parameters"] for row in tried)
        assert member["dims"] == tried[0]["dims"] and member["num_parameters"] == tried[0]["num_parameters"]
        rotated = bool(list((tiny_family / "stages").glob(f"{name}.prune-*/plan.rotation.safetensors")))
        assert rotated == tried[0]["name"].endswith("_pca")


def test_members_are_stock_checkpoints_in_the_parents_dtype_that_generate(tiny_family, tiny_parent):
    for name in ("big", "small"):
        folder = tiny_family / "members" / name
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert model.dtype == torch.bfloat16 and type(model).__name__ == "LlamaForCausalLM"
        output = model.generate(**tokenizer("import os\n", return_tensors="pt"), max_new_tokens=4, do_sample=False)
        assert output.shape[1] > 4
        assert (folder / "tokenizer.json").read_bytes() == (tiny_parent / "tokenizer.json").read_bytes()
        contract = {
            "config.json",
            "model.safetensors",
            "README.md",
            "cascade.json",
            "eval.json",
            "lm_eval.json",
        }
        assert contract <= {file.name for file in folder.iterdir()}


def test_F37_saving_a_reloaded_member_again_gives_the_same_weights(tiny_family, tmp_path):
    folder = tiny_family / "members" / "small"
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_every_committed_file_has_the_content_of_its_manifest(tiny_family):
    folders = [path.parent for path in tiny_family.glob("**/MANIFEST.json")]
    assert len(folders) > 10
    assert all(verify_folder(folder) == [] for folder in folders)
    assert not list(tiny_family.glob("**/.staging-*"))


def test_the_card_tells_the_lineage(tiny_family):
    card = (tiny_family / "members" / "small" / "README.md").read_text()
    lineage = json.loads((tiny_family / "members" / "small" / "cascade.json").read_text())
    assert lineage["seed"] == "big" and len(lineage["parent_sha256"]) == 64
    assert card.startswith("---\nlibrary_name:") and "cut from `big`" in card and "distill:" in card


def test_a_second_run_repeats_nothing_and_changes_nothing(tiny_family, tiny_recipe):
    before = settled(tiny_family)
    run_recipe(tiny_recipe, output=tiny_family)
    done, made = skipped(tiny_family)
    assert made == set() and ("small", "distill") in done
    assert settled(tiny_family) == before


class Killed(BaseException):
    """Stands for a death that no handler sees."""


@pytest.mark.nightly  # every kind of place is in test_faults_run.py
def test_killed_after_every_stage_and_started_again_the_family_is_the_same(
    tiny_family, tiny_recipe, tmp_path, monkeypatch
):
    folder, original, deaths = tmp_path / "run", StageRunner.make, 0

    def dies_after_one_new_stage(self, stage, owner, **named):
        before = set(self.folder.glob("stages/*"))
        result = original(self, stage, owner, **named)
        if set(self.folder.glob("stages/*")) != before:
            raise Killed
        return result

    monkeypatch.setattr(StageRunner, "make", dies_after_one_new_stage)
    while True:
        try:
            run_recipe(tiny_recipe, output=folder)
            break
        except Killed:
            deaths += 1
            assert deaths < 40
    assert deaths == 24  # two stages of the parent, nine of each member and its two candidates
    assert settled(folder) == settled(tiny_family)
    weights = "members/small/model.safetensors"
    assert (folder / weights).read_bytes() == (tiny_family / weights).read_bytes()


def test_killed_while_training_it_goes_on_from_the_last_state_to_the_same_bits(
    recipe_folder, tiny_family, tmp_path, monkeypatch
):
    from cascade.distillation import training_state
    from cascade.distillation.optimizer import Optimizer

    folder, original, saved = tmp_path / "run", training_state.save_state, []
    recipe = load_recipe(recipe_folder / "tiny.yaml", ("distill.save_every_minutes=0.0",))

    def dies_after_a_state(state_folder, *rest):
        original(state_folder, *rest)
        saved.append(state_folder)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(training_state, "save_state", dies_after_a_state)
        with pytest.raises(Killed):
            run_recipe(recipe, output=folder)
    assert saved[0].parent == folder / "stages" and list(saved[0].glob("step-*"))
    steps = []
    with monkeypatch.context() as patch:
        own = Optimizer.set_rate
        patch.setattr(Optimizer, "set_rate", lambda optimizer, rate: (steps.append(rate), own(optimizer, rate)))
        run_recipe(recipe, output=folder)
    assert settled(folder) == settled(tiny_family)
    for name in ("big", "small"):
        weights = f"members/{name}/model.safetensors"
        assert (folder / weights).read_bytes() == (tiny_family / weights).read_bytes()
    assert not list(folder.glob("**/.partial-*"))
    whole = (
        2 * 2 * load_family(folder)["rows"][1]["tokens"]["hop"] // (recipe.data.block_size * recipe.distill.batch_size)
    )
    # One step had been done before; each of the two shapes that are tried for `small` has one, too.
    assert len(steps) == whole - 1 + 2


def test_killed_inside_a_stage_leaves_nothing_half_done(tiny_recipe, tiny_family, tmp_path, monkeypatch):
    from cascade.pipeline.stages import recover

    def dies(*rest):
        folder, _ = rest[-2:]
        (folder / "checkpoint").mkdir()
        (folder / "checkpoint" / "config.json").write_text("{}")
        raise Killed

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(recover, "make_recovered", dies)
        with pytest.raises(Killed):
            run_recipe(tiny_recipe, output=folder)
    assert not list(folder.glob("stages/*distill*")) and not (folder / "members").exists()
    run_recipe(tiny_recipe, output=folder, only=["big"])
    rows = {row["name"]: row for row in settled(folder)["rows"]}
    assert rows["big"] == {row["name"]: row for row in settled(tiny_family)["rows"]}["big"]
    assert "small" not in rows


def test_a_size_added_to_a_finished_family_leaves_the_others_alone(tiny_family, recipe_folder, tmp_path):
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(tiny_family, folder)
    text = (recipe_folder / "tiny.yaml").read_text()
    added = text.replace("  - name: small", "  - name: middle\n    target: {params: 0.65}\n  - name: small")
    (recipe_folder / "added.yaml").write_text(added)
    run_recipe(load_recipe(recipe_folder / "added.yaml"), output=folder)
    done, made = skipped(folder)
    assert {member for member, _ in made} <= {"middle", "big"} and ("big", "distill") in done
    assert {("small", "distill"), ("small", "evaluate")} <= done
    rows = {row["name"]: row for row in load_family(folder)["rows"]}
    assert rows["middle"]["seed"] == "big" and rows["small"]["seed"] == "big"


def test_from_a_stage_on_everything_is_made_again(tiny_family, tiny_recipe):
    before = settled(tiny_family)
    run_recipe(tiny_recipe, output=tiny_family, only=["small"], from_stage="distill")
    done, made = skipped(tiny_family)
    heldout = {("small", f"heldout-{kind}") for kind in ("cut", "repaired", "ce")}
    assert made == {("small", "distill"), ("small", "baseline-ce"), ("small", "evaluate")} | heldout
    assert ("small", "prune") in done and ("big", "distill") in done
    assert settled(tiny_family) == before


def test_a_directory_of_another_recipe_is_refused_with_the_keys_that_differ(tiny_family, recipe_folder):
    recipe = load_recipe(recipe_folder / "tiny.yaml", ["distill.tokens=1024", "seed=1"])
    with pytest.raises(UserError, match=r"distill.tokens: 512 there, 1024 now\n  seed: 0 there, 1 now"):
        run_recipe(recipe, output=tiny_family)


def test_a_smaller_microbatch_goes_on_with_the_same_run(tiny_family, recipe_folder):
    run_recipe(load_recipe(recipe_folder / "tiny.yaml", ["distill.microbatch_size=2"]), output=tiny_family)
    assert skipped(tiny_family)[1] == set()


def test_a_mistake_found_before_any_stage_is_finished_can_be_mended(recipe_folder, tmp_path):
    wrong = load_recipe(recipe_folder / "tiny.yaml", ["data.text_field=body"])
    with pytest.raises(UserError, match="no field 'body'"):
        run_recipe(wrong, output=tmp_path / "run")
    only_parent = load_recipe(recipe_folder / "tiny.yaml", ["members=[]", "evaluate.tasks=[]", "baselines=[]"])
    run_recipe(only_parent, output=tmp_path / "run")


def test_what_a_user_added_to_a_member_stays(tiny_family, tiny_recipe):
    (tiny_family / "members" / "big" / "mine.gguf").write_text("mine")
    run_recipe(tiny_recipe, output=tiny_family)
    assert (tiny_family / "members" / "big" / "mine.gguf").read_text() == "mine"


def test_a_directory_that_is_no_run_is_refused(tiny_recipe, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="holds something that is not a run"):
        run_recipe(tiny_recipe, output=tmp_path)


def test_an_existing_student_is_recovered_without_a_cut(recipe_folder, tiny_family, tmp_path):
    student = tiny_family / "members" / "small"
    text = (recipe_folder / "tiny.yaml").read_text()
    start, end = text.index("  - name: big"), text.index("calibration: {num")
    (recipe_folder / "student.yaml").write_text(
        text[:start] + f"  - name: given\n    student: {student}\n" + text[end:]
    )
    folder = run_recipe(load_recipe(recipe_folder / "student.yaml"), output=tmp_path / "run")
    rows = {row["name"]: row for row in load_family(folder)["rows"]}
    assert list(rows) == ["parent", "given", "given-ce"]
    assert rows["given"]["seed"] is None and rows["given"]["stages"]["cut"] is None


def test_seed_parent_cuts_from_the_parent(recipe_folder, tmp_path):
    recipe = load_recipe(recipe_folder / "tiny.yaml", ["members.1.seed=parent", "baselines=[]", "evaluate.tasks=[]"])
    folder = run_recipe(recipe, output=tmp_path / "run")
    rows = {row["name"]: row for row in load_family(folder)["rows"]}
    assert rows["small"]["seed"] == "parent" and rows["small"]["tokens"]["cumulative"] == 512


def test_a_parent_can_be_trained_by_the_recipe(recipe_folder, tmp_path):
    text = (recipe_folder / "tiny.yaml").read_text()
    parent, end = text.index("parent:"), text.index("data:")
    pretrain = """parent:
  pretrain:
    config: {model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4,
      num_key_value_heads: 2, head_dim: 8, max_position_embeddings: 64, tie_word_embeddings: true}
    tokenizer: {vocab_size: 300}
    tokens: 1024
    block_size: 32
"""
    members, rest = text.index("members:"), text.index("calibration: {num")
    (recipe_folder / "scratch.yaml").write_text(
        text[:parent]
        + pretrain
        + text[end:members]
        + "evaluate: {heldout_blocks: 8}\n"
        + "#"
        + text[rest:].split("\n")[0]
        + "\n"
    )
    folder = run_recipe(load_recipe(recipe_folder / "scratch.yaml"), output=tmp_path / "run")
    (checkpoint,) = folder.glob("stages/parent.pretrain-*/checkpoint")
    assert AutoModelForCausalLM.from_pretrained(checkpoint).dtype == torch.bfloat16
    assert len(AutoTokenizer.from_pretrained(checkpoint)) == 300
    assert [row["role"] for row in load_family(folder)["rows"]] == ["teacher"]


def cascade(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "cascade", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def run_cli(*arguments):
    finished = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert finished.exit_code == 0, finished.output
    return finished.stdout


def test_the_command_ends_with_2_and_a_message_on_a_users_mistake(recipe_folder, tmp_path):
    (tmp_path / "bad.yaml").write_text("name: x\nkd_weigth: 1\n")
    (recipe_folder / "short.jsonl").write_text('{"text": "too short"}\n')
    cases = [
        (["run", tmp_path / "bad.yaml"], "unknown key 'kd_weigth'"),
        (["run", tmp_path / "missing.yaml"], "cannot be read: No such file"),
        (
            ["run", recipe_folder / "tiny.yaml", "--only", "nobody", "--output", tmp_path / "o"],
            "no such member; the recipe has: big, small",
        ),
        (
            ["run", recipe_folder / "tiny.yaml", "--from", "nowhere", "--output", tmp_path / "o"],
            "no such stage; known: statistics",
        ),
        (
            ["plan", recipe_folder / "tiny.yaml", "--set", "evaluate.tasks=[python_minimal_pair]"],
            "unknown task 'python_minimal_pair'. Did you mean python_minimal_pairs",
        ),
        (
            ["plan", recipe_folder / "tiny.yaml", "--set", "members.0.target.params=5000000"],
            "5,000,000 parameters is larger than the parent's",
        ),
        (["plan", recipe_folder / "tiny.yaml", "--set", "parent=/nowhere"], "no such folder"),
        (
            ["plan", recipe_folder / "tiny.yaml", "--set", "data.block_size=1024"],
            "longer than the parent's context of 512",
        ),
        (
            [
                "plan",
                recipe_folder / "tiny.yaml",
                "--set",
                "data.selection=short.jsonl",
                "--set",
                "data.block_size=512",
            ],
            "do not fill one block",
        ),
        (["evaluate", "builtin:nothing"], "no such built-in model; known: pico-python"),
        (["nonsense"], "No such command"),
    ]
    for arguments, message in cases:
        finished = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert finished.exit_code == 2, (arguments, finished.output)
        assert message in finished.stderr and "Traceback" not in finished.stderr, finished.stderr
    finished = cascade("run", tmp_path / "bad.yaml")
    assert finished.returncode == 2 and "Traceback" not in finished.stderr and "kd_weigth" in finished.stderr


def test_plan_prints_every_member_and_json_without_loading_weights(recipe_folder, tmp_path):
    planned = json.loads(run_cli("plan", recipe_folder / "tiny.yaml", "--json", "--output", tmp_path / "o"))
    assert [member["name"] for member in planned["members"]] == ["big", "small"]
    assert planned["members"][1]["seed"] == "big" and max(planned["proof"].values()) < 1e-4
    assert not (tmp_path / "o").exists()
    text = run_cli("plan", recipe_folder / "tiny.yaml", "--output", tmp_path / "o")
    assert "FLOPs/token" in text and "small" in text


def test_single_stages_work_on_checkpoints_from_the_command_line(tiny_parent, tmp_path):
    write_texts(tmp_path / "text.jsonl.gz", 300)
    common = ["--data", tmp_path / "text.jsonl.gz", "--block-size", "32", "--json"]
    cut = json.loads(run_cli("prune", tiny_parent, "--params", "0.7", "--output", tmp_path / "cut", *common))
    assert cut["num_parameters"] > 0 and (tmp_path / "cut" / "plan.json").is_file()
    plain = ["--no-repair", "--hidden", "pca", "--dim", "hidden_size=32", "--output", tmp_path / "turned"]
    turned = json.loads(run_cli("prune", tiny_parent, *plain, *common))
    plan = tmp_path / "turned" / "plan.json"
    on_disk = json.loads(run_cli("prune", tiny_parent, "--plan", plan, "--output", tmp_path / "disk", "--json"))
    assert on_disk["num_parameters"] == turned["num_parameters"] > 0
    stored = load_file(tmp_path / "disk" / "model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == on_disk["num_parameters"]
    arguments = [
        "distill",
        tmp_path / "cut",
        "--teacher",
        tiny_parent,
        "--tokens",
        "1024",
        "--output",
        tmp_path / "kd",
    ]
    trained = json.loads(run_cli(*arguments, *common))
    assert trained["num_tokens"] == 1024 and trained["selection_kl"] >= 0
    evaluation = json.loads(
        run_cli("evaluate", tmp_path / "kd", "--teacher", tiny_parent, "--heldout-blocks", "4", *common)
    )
    assert {"loss", "kl_to_teacher"} <= {metric["metric"] for metric in evaluation["metrics"]}
    assert evaluation["speed"]["decode_tokens_per_s"] > 0
    assert cut["text"] == trained["text"] == evaluation["text"] == str(tmp_path / "text.jsonl.gz")


def test_report_writes_the_same_files_again(tiny_family):
    before = {name: (tiny_family / name).read_text() for name in ("family.csv", "report.md", "report.html")}
    for name in before:
        (tiny_family / name).unlink()
    assert cascade("report", tiny_family).returncode == 0
    assert {name: (tiny_family / name).read_text() for name in before} == before


def test_two_runs_on_one_directory_are_refused(tiny_family, tiny_recipe):
    from cascade.store.lock import locked

    with locked(tiny_family), pytest.raises(UserError, match="another run is writing here"):
        run_recipe(tiny_recipe, output=tiny_family)


def test_single_stages_never_write_over_something(tiny_parent, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    for arguments in (
        ["prune", tiny_parent, "--params", "0.5"],
        ["distill", tiny_parent, "--teacher", tiny_parent, "--tokens", "9"],
    ):
        finished = CliRunner().invoke(main, [str(a) for a in [*arguments, "--output", tmp_path / "full"]])
        assert finished.exit_code == 2 and "there is something there already" in finished.output
    assert (tmp_path / "full" / "precious").read_text() == "x"


def test_a_checkpoint_with_missing_weights_is_refused(tiny_parent, tmp_path):
    import shutil

    from safetensors.torch import save_file

    from cascade.models.checkpoint.load import load_model, resolve_model

    shutil.copytree(tiny_parent, tmp_path / "model")
    weights = load_file(tiny_parent / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks model\.layers\.1\.mlp\.up_proj"):
        load_model(resolve_model(str(tmp_path / "model")))
    (tmp_path / "model" / "model.safetensors").write_bytes((tiny_parent / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(UserError, match="is damaged"):
        load_model(resolve_model(str(tmp_path / "model")))


def test_broken_parents_are_refused(recipe_folder, tiny_parent, tmp_path):
    import shutil

    from cascade.models.checkpoint.load import load_tokenizer, resolve_model

    shutil.copytree(tiny_parent, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(UserError, match="no safetensors weights.*pytorch_model.bin"):
        resolve_model(str(tmp_path / "pickled"))
    with pytest.raises(UserError, match="no config.json"):
        resolve_model(str(tmp_path))
    with pytest.raises(UserError, match="pin it"):
        resolve_model("nobody/nothing")
    with pytest.raises(UserError, match="2048 tokens, the model's vocabulary 100"):
        load_tokenizer(resolve_model(str(tiny_parent)), vocab_size=100)


def test_a_searched_shape_is_the_best_of_those_recovered_and_nothing_is_tried_twice(
    recipe_folder, tmp_path, monkeypatch
):
    text = (recipe_folder / "tiny.yaml").read_text().replace(BASELINES, "baselines: []")
    text = text.replace("tasks: [python_minimal_pairs], limit: 6, ", "")
    path = recipe_folder / "search.yaml"
    path.write_text(text + "prune: {search: {candidates: 4, finalists: 2, tokens: 256}, repair: {num_blocks: 4}}\n")
    recipe, folder, original = load_recipe(path), tmp_path / "run", StageRunner.make
    stages = []

    def dies_after_a_finalist(self, stage, owner, **named):
        result = original(self, stage, owner, **named)
        stages.append(stage)
        if stages.count("finalist") == 1:
            raise Killed
        return result

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(StageRunner, "make", dies_after_a_finalist)
        run_recipe(recipe, output=folder)
    run_recipe(recipe, output=folder)
    done, _ = skipped(folder)
    assert ("big", "candidate") in done and ("big", "finalist") in done
    rows = load_family(folder)["rows"]
    for name in ("big", "small"):
        shapes = [row for row in rows if row["name"].startswith(f"{name}-shape")]
        tried = {(json.dumps(row["dims"], sort_keys=True), row["name"].partition("_")[2]): row for row in shapes}
        assert len(tried) == len(shapes) == 4
        finalists = [row for row in shapes if row["status"] != "candidate"]
        assert len(finalists) == 2 and all(row["stages"]["recovered"] for row in shapes)
        chosen = min(finalists, key=lambda row: row["stages"]["recovered"]["kl_to_teacher"])
        assert chosen["status"] == "chosen"
        first_round = {}
        for stage in folder.glob(f"stages/{name}.candidate-*"):
            settings = json.loads((stage / "MANIFEST.json").read_text())["settings"]
            losses = json.loads((stage / "losses.json").read_text())["recovered"]
            assert settings["tokens"] == 256 / 4
            first_round[json.dumps(settings["dims"], sort_keys=True), settings["hidden"]] = losses["kl_to_teacher"]
        best = sorted(first_round, key=first_round.get)[:2]
        assert sorted(tried[shape]["name"] for shape in best) == sorted(row["name"] for row in finalists)
        member = next(row for row in rows if row["name"] == name)
        assert member["dims"] == chosen["dims"]
        config = json.loads((folder / "members" / name / "config.json").read_text())
        assert config["hidden_size"] == chosen["dims"]["hidden_size"]
    assert "Shapes tried" in (folder / "report.md").read_text()
    before = (folder / "family.json").read_text()
    run_recipe(recipe, output=folder)
    assert (folder / "family.json").read_text() == before


def test_a_recipe_with_every_other_score_runs_to_the_end(recipe_folder, tmp_path):
    text = (recipe_folder / "tiny.yaml").read_text().replace(BASELINES, "baselines: [repaired]")
    text = text.replace("tasks: [python_minimal_pairs], limit: 6, ", "")
    path = recipe_folder / "scores.yaml"
    path.write_text(
        text
        + "prune: {layers: removal_loss, heads: contribution, neurons: taylor, hidden: pca, merge_heads: true, "
        + "repair: {num_blocks: 4}}\n"
    )
    folder = run_recipe(load_recipe(path), output=tmp_path / "run", only=["big"])
    config = json.loads((folder / "members" / "big" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False  # a rotation unties: the target counts the head, too
    row = next(row for row in load_family(folder)["rows"] if row["name"] == "big")
    tensors = load_file(folder / "members" / "big" / "model.safetensors")
    assert row["num_parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert row["stages"]["repaired"]["kl_to_teacher"] < row["stages"]["cut"]["kl_to_teacher"]


def test_a_target_in_decode_time_is_measured_once_and_kept_by_the_run(tiny_parent, tmp_path, monkeypatch):
    from test_latency import costing

    import cascade.pruning.size.latency as latency_of
    from cascade.models.architecture.sized import Sized
    from cascade.planning.family import resolve_family
    from cascade.planning.latencies import find_latencies, keep_latencies
    from cascade.planning.parent import parent_config

    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"name: fast\nparent: {tiny_parent}\ndata: {{source: stdlib}}\ndistill: {{tokens: 512}}\n"
        "members:\n- name: quick\n  target: {decode_ms: 0.85, context: 16}\n"
    )
    recipe = load_recipe(str(path))
    config = parent_config(recipe)
    monkeypatch.setattr(latency_of, "measure_decode_ms", costing((0.001, 0.001, 5.0, 0.4)))
    first = find_latencies(recipe, config, tmp_path / "run")
    keep_latencies(recipe, config, tmp_path / "run", first)
    monkeypatch.setattr(latency_of, "measure_decode_ms", lambda *args, **options: pytest.fail("measured again"))
    again = find_latencies(recipe, config, tmp_path / "run")
    assert again == first
    shapes = [resolve_family(recipe, config, latencies=found)[0] for found in (first, again)]
    assert shapes[0].sized.dims == shapes[1].sized.dims
    whole, quick = Sized(config), shapes[0].sized
    milliseconds = first["quick"].milliseconds
    assert milliseconds(quick.axes, quick.dims) <= 0.85 * milliseconds(whole.axes, whole.dims)


def test_the_learning_rate_is_found_once_and_trained_at(recipe_folder, tmp_path):
    text = (recipe_folder / "tiny.yaml").read_text().replace(BASELINES, "baselines: []")
    text = text.replace("tasks: [python_minimal_pairs], limit: 6, ", "").replace("learning_rate: 3e-3, ", "")
    path = recipe_folder / "rate.yaml"
    path.write_text(text)
    folder = tmp_path / "run"
    run_recipe(load_recipe(path), output=folder, only=["big"])
    rate = json.loads(next((folder / "stages").glob("big.rate-*/rate.json")).read_text())
    assert len(rate["tried"]) >= 3
    logged = next((folder / "stages").glob("big.distill-*/log.jsonl")).read_text().splitlines()
    assert max(json.loads(line)["learning_rate"] for line in logged) == pytest.approx(rate["learning_rate"], rel=0.1)
    lineage = json.loads((folder / "members" / "big" / "cascade.json").read_text())
    assert lineage["stages"]["rate"]["folder"].startswith("stages/big.rate-")
    run_recipe(load_recipe(path), output=folder, only=["big"])
    done, made = skipped(folder)
    assert ("big", "rate") in done and not made


def test_a_member_taken_out_of_the_chain_of_a_finished_run_is_not_taken_for_the_same_run(recipe_folder, tmp_path):
    from cascade.planning.ownership import check_ownership, resolved_recipe

    members = "members=[{name: large, target: {params: 0.9}}, {name: small, target: {params: 0.7}}]"
    recipe = load_recipe(recipe_folder / "tiny.yaml", [members])
    record = resolved_recipe(recipe, [])
    (tmp_path / "stages" / "parent.data-1").mkdir(parents=True)
    (tmp_path / "stages" / "parent.data-1" / "MANIFEST.json").write_text("{}")
    (tmp_path / "recipe.yaml").write_text(json.dumps(record))
    out = load_recipe(recipe_folder / "tiny.yaml", [members.replace("0.9}}", "0.9}, chain: false}")])
    check_ownership(tmp_path, recipe)
    with pytest.raises(UserError, match="members.large.chain: True there, False now"):
        check_ownership(tmp_path, out)
    for member in record["members"]:
        del member["chain"]  # as before there was such a key
    (tmp_path / "recipe.yaml").write_text(json.dumps(record))
    check_ownership(tmp_path, recipe)
    with pytest.raises(UserError, match="members.large.chain: True there, False now"):
        check_ownership(tmp_path, out)
