"""Files that were cut off, changed, exchanged or made to deceive are found, and never used."""

import hashlib
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from fault_process import failing, fired, results_of
from safetensors.torch import load_file, save_file

from cascade.cli.main import main
from cascade.models.checkpoint.file_header import check_header
from cascade.models.checkpoint.load import load_model, load_tokenizer, resolve_model
from cascade.models.checkpoint.safety import check_model_folder, plain_name
from cascade.pipeline.run import run_recipe
from cascade.pipeline.verify import verify_run
from cascade.report.logs import training_logs
from cascade.runtime.errors import UserError
from cascade.store.commits import MANIFEST, is_committed, staged, verify_folder


@pytest.fixture
def run(tiny_family, tmp_path):
    """A finished run to damage."""
    folder = tmp_path / "run"
    shutil.copytree(tiny_family, folder)
    return folder


def faults(run):
    return {fault.place: fault.what for fault in verify_run(run)[1]}


def cut(path, size):
    data = path.read_bytes()
    path.write_bytes(data[: size if size >= 0 else len(data) + size])


def flip(path, at=-9):
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(bytes(data))


def distilled(run):
    return next(run.glob("stages/big.distill-*"))


def weights(run):
    files = sorted(run.glob("members/*/model.safetensors"))
    return {path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def header_size(path):
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


@pytest.mark.parametrize("where", ["0", "4", "8", "header-1", "header", "middle", "-1"])
def test_F14_a_file_that_was_cut_off_anywhere_is_refused_told_and_made_again(run, tiny_recipe, tiny_family, where):
    before = weights(tiny_family)
    for path in (distilled(run) / "checkpoint" / "model.safetensors", run / "members" / "big" / "model.safetensors"):
        sizes = {"header-1": header_size(path) - 1, "header": header_size(path), "middle": path.stat().st_size // 2}
        cut(path, sizes[where] if where in sizes else int(where))
        with pytest.raises(UserError, match="damaged|cut off|no safetensors|header"):
            load_model(resolve_model(str(path.parent)))
    found = faults(run)
    assert {f"{distilled(run).relative_to(run)}/checkpoint/model.safetensors", "members/big/model.safetensors"} <= set(
        found
    )
    if where in ("4", "middle"):  # the others are found the same way
        run_recipe(tiny_recipe, output=run)
        assert weights(run) == before and faults(run) == {}


@pytest.mark.parametrize(
    "name",
    [
        "checkpoint/model.safetensors",
        "checkpoint/config.json",
        "reference.safetensors",
        "losses.json",
        MANIFEST,
        "log.jsonl",
    ],
)
def test_F15_one_bit_in_any_file_of_a_stage_is_found_and_the_stage_is_made_again_to_the_same_bits(
    run, tiny_recipe, tiny_family, name, caplog
):
    flip(distilled(run) / name)
    place = f"{distilled(run).relative_to(run)}/{name}"
    assert place in faults(run) and set(faults(run)) <= {place, "members/big"}
    run_recipe(tiny_recipe, output=run)
    assert f"damaged ({name})" in caplog.text and faults(run) == {}
    assert weights(run) == weights(tiny_family)


def test_F15_a_stage_that_all_others_read_is_made_again_to_the_same_bytes_and_none_of_them_with_it(run, tiny_recipe):
    (run / "events.jsonl").unlink()
    for _ in range(4):  # an order left to chance would show
        flip(next(run.glob("stages/parent.data-*")) / "train.safetensors")
        run_recipe(tiny_recipe, output=run)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert {event["stage"] for event in events if event["event"] == "finished"} == {"data"}
    assert faults(run) == {}


@pytest.mark.parametrize("metadata", [{"a": "1", "b": "2", "c": 'ü\n"x\\'}, {"only": "one"}, None])
def test_F34_equal_tensors_and_metadata_are_equal_bytes(tmp_path, metadata):
    from safetensors import safe_open

    from cascade.models.checkpoint.tensor_file import sort_metadata

    path, seen = tmp_path / "x.safetensors", set()
    for order in range(12):
        items = list((metadata or {}).items())
        save_file({"t": torch.arange(3)}, path, metadata=dict(items if order % 2 else items[::-1]) or None)
        sort_metadata(path)
        seen.add(path.read_bytes())
    assert len(seen) == 1
    check_header(path)
    with safe_open(path, "pt") as file:
        assert (file.metadata() or {}) == (metadata or {}) and file.get_tensor("t").tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["family.json", "report.html", "recipe.yaml", "family.csv", "verdicts.json"])
def test_F15_a_change_in_what_lies_in_the_run_itself_is_found(run, name):
    assert faults(run) == {}
    with (run / name).open("a") as file:
        file.write(" ")
    assert set(faults(run)) == {name}


@pytest.mark.parametrize("name", ["family.json", "tail.json", "verdicts.json"])
def test_F15_a_damaged_report_is_set_aside_and_made_again(run, tiny_recipe, tiny_family, name):
    before = json.loads((tiny_family / "family.json").read_text())["rows"]
    cut(run / name, 1)
    run_recipe(tiny_recipe, output=run)
    assert faults(run) == {} and (run / f"{name}.damaged").exists()
    after = json.loads((run / "family.json").read_text())["rows"]
    assert [row["name"] for row in after] == [row["name"] for row in before]


@pytest.mark.parametrize("name", ["family.json", "verdicts.json", "tail.json", "recipe.yaml"])
def test_F15_no_report_is_made_of_files_that_are_not_as_the_run_left_them(run, name):
    (run / name).write_text((run / name).read_text().replace("e", "3", 1) + " ")
    before = (run / MANIFEST).read_bytes()
    result = CliRunner().invoke(main, ["report", str(run)])
    assert result.exit_code == 2 and name in result.output
    assert name in faults(run) and (run / MANIFEST).read_bytes() == before


def test_F15_a_damaged_report_is_made_again_from_whole_files(run):
    was = (run / "report.html").read_bytes()
    flip(run / "report.html")
    assert CliRunner().invoke(main, ["report", str(run)]).exit_code == 0
    assert faults(run) == {} and (run / "report.html").read_bytes() == was


@pytest.mark.parametrize("count", range(1, 8))
def test_F01_a_death_between_any_two_reports_leaves_whole_files_and_the_next_run_all_rows(
    zygote, run, recipe_folder, tmp_path, count
):
    (run / "events.jsonl").unlink()
    before, log = results_of(run), tmp_path / "log"
    fault = failing(f"report/file.renamed:kill@{count}", log)
    only = ("run", recipe_folder / "tiny.yaml", "--output", run, "--only", "big")
    assert zygote.run(*only, **fault)[0] == -9 and fired(log)
    assert set(faults(run)) <= {MANIFEST}
    assert zygote.run(*only)[0] == 0
    assert faults(run) == {} and results_of(run) == before and not list(run.glob("*.damaged"))


def test_F15_what_is_gone_altogether_is_told_and_what_a_user_wrote_on_a_card_is_not(run, tiny_recipe):
    (run / "members" / "big" / "README.md").write_text("my own words\n")
    assert faults(run) == {}
    shutil.rmtree(run / "members" / "small")
    shutil.rmtree(distilled(run))
    assert set(faults(run).values()) == {"is missing", "is missing; the member was made from it"}
    run_recipe(tiny_recipe, output=run)
    assert faults(run) == {}


def test_F35_a_stage_of_before_manifests_had_a_sum_of_their_own_is_not_made_again(run):
    folder = distilled(run)
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["sha256"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert verify_folder(folder) == []
    flip(folder / "losses.json")
    assert verify_folder(folder) == ["losses.json"]


def test_F15_a_cut_off_line_of_events_is_told_and_the_next_one_begins_on_its_own(run, tiny_recipe):
    cut(run / "events.jsonl", -5)
    number = len((run / "events.jsonl").read_text().splitlines())
    assert set(faults(run)) == {f"events.jsonl:{number}"}
    run_recipe(tiny_recipe, output=run)
    assert set(faults(run)) == {f"events.jsonl:{number}"}


SAID = {
    "missing": "missing",
    "left out": "lacks|missing",
    **dict.fromkeys(
        ("outside", "absolute", "windows", "entry"), "missing|shards are .safetensors files of the same folder"
    ),
}


@pytest.mark.parametrize("fault", ["missing", "extra", "outside", "absolute", "windows", "entry", "left out"])
def test_F16_shards_that_are_missing_added_or_elsewhere_are_refused_and_told(run, tmp_path, fault):
    member = run / "members" / "big"
    tensors = load_file(member / "model.safetensors")
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:3]}, member / "model-00001-of-00002.safetensors")
    save_file({name: tensors[name] for name in names[3:]}, member / "model-00002-of-00002.safetensors")
    table = {name: f"model-0000{1 + (number > 2)}-of-00002.safetensors" for number, name in enumerate(names)}
    if fault == "missing":
        (member / "model-00002-of-00002.safetensors").unlink()
    elif fault == "left out":
        del table[names[-1]]
        save_file({name: tensors[name] for name in names[3:-1]}, member / "model-00002-of-00002.safetensors")
    elif fault != "extra":
        shutil.copyfile(member / "model-00002-of-00002.safetensors", run / "members" / "x.safetensors")
        wanted = {"outside": "../x.safetensors", "absolute": str(run / "members" / "x.safetensors"),
                  "windows": "..\\x.safetensors", "entry": "x.safetensors"}  # fmt: skip
        table[names[-1]] = wanted[fault]
    if fault != "extra":
        (member / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
        (member / "model.safetensors").unlink()
        with pytest.raises(UserError, match=f"big.*({SAID[fault]})"):
            load_model(resolve_model(str(member)))
    found = faults(run)
    assert any(place.startswith("members/big") and ("loaded with it" in what) for place, what in found.items())
    if fault not in ("extra", "left out"):
        assert re.search(SAID[fault], found["members/big"])


def test_F16_weights_planted_in_a_stage_are_told_and_never_loaded(run, tiny_recipe):
    planted = distilled(run) / "checkpoint" / "model.safetensors.index.json"
    planted.write_text(json.dumps({"weight_map": {}}))
    place = planted.relative_to(run).as_posix()
    assert faults(run) == {place: "is not of this stage, and would be loaded with it"}
    with pytest.raises(UserError, match=f"{planted}: no run has written this, and it would be loaded; remove it"):
        run_recipe(tiny_recipe, output=run)
    planted.unlink()
    run_recipe(tiny_recipe, output=run)
    assert faults(run) == {}


def test_verify_finds_each_planted_fault_says_what_to_do_and_ends_with_1(run):
    result = CliRunner().invoke(main, ["verify", str(run)])
    assert result.exit_code == 0 and "no faults" in result.output
    flip(run / "members" / "small" / "model.safetensors")
    (distilled(run) / "losses.json").unlink()
    (run / "stages" / "evil.pkl").write_bytes(pickle.dumps({}))
    result = CliRunner().invoke(main, ["verify", str(run)])
    assert result.exit_code == 1 and "3 faults" in result.output
    for said in ("has another content than was written. Run the same command again", "losses.json: is missing",
                 "evil.pkl: can hold code"):  # fmt: skip
        assert said in result.output
    told = json.loads(CliRunner().invoke(main, ["verify", str(run), "--json"]).output)
    assert len(told["faults"]) == 3 and told["files"] > 50
    result = CliRunner().invoke(main, ["verify", str(run.parent)])
    assert result.exit_code == 2 and "no recipe.yaml" in result.output


def test_a_manifest_that_names_files_elsewhere_or_was_edited_is_none(tmp_path):
    with staged(tmp_path / "x", {"stage": "x"}) as staging:
        (staging / "file").write_text("1")
    path = tmp_path / "x" / MANIFEST
    good = json.loads(path.read_text())
    assert is_committed(tmp_path / "x") and verify_folder(tmp_path / "x") == []
    for files in ({"../x/file": good["files"]["file"]}, {str(tmp_path / "x" / "file"): good["files"]["file"]}, {}, 3):
        path.write_text(json.dumps(good | {"files": files}))
        assert not is_committed(tmp_path / "x") and verify_folder(tmp_path / "x") == [MANIFEST]


def test_F31_no_state_is_a_pickle_and_one_that_is_put_there_is_not_read(run, tiny_recipe, tmp_path):
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {canary}",)

    assert not [path for path in run.rglob("*") if path.suffix in (".pt", ".pth", ".bin", ".pkl", ".ckpt")]
    for folder in (distilled(run), distilled(run) / "checkpoint", run / "members" / "big", run / "stages"):
        for name in ("rng_state.pth", ".metadata", "pytorch_model.bin", "training_args.bin", "optimizer.pt"):
            (folder / name).write_bytes(pickle.dumps(Evil()))
    run_recipe(tiny_recipe, output=run, from_stage="evaluate")
    assert not canary.exists()


def test_F31_nothing_in_the_package_reads_or_writes_pickles():
    import ast

    from conftest import ROOT

    for path in sorted((ROOT / "cascade").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"} & set(names), path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
                assert node.attr not in ("load", "save"), path


@pytest.mark.parametrize("change", ["version", "newer key", "format"])
def test_F35_a_run_of_another_version_is_gone_on_with_or_refused_and_never_misread(
    run, tiny_recipe, change, monkeypatch
):
    from dataclasses import replace

    from cascade.pipeline import runner

    before = weights(run)
    if change == "format":  # this stage's output means something else now: it is made again
        monkeypatch.setitem(runner.STAGES, "distill", replace(runner.STAGES["distill"], format=99))
        run_recipe(tiny_recipe, output=run, only=["big"])
        assert len(list(run.glob("stages/big.distill-*"))) == 2 and weights(run)["big"] == before["big"]
        return
    path = run / "recipe.yaml"
    if change == "version":  # torch and package are provenance: what is finished stays
        monkeypatch.setattr(runner, "__version__", "99.0")
        run_recipe(tiny_recipe, output=run)
        assert weights(run) == before
        return
    path.write_text(path.read_text() + "from_the_future: 1\n")
    with pytest.raises(UserError, match="was written by another version of this program"):
        run_recipe(tiny_recipe, output=run)


def test_F35_a_training_state_of_another_torch_is_told_and_of_another_format_not_used(tmp_path, caplog):
    from conftest import distill_with, make_blocks, make_model

    from cascade.distillation import training_state

    class Killed(BaseException):
        pass

    def dies(done, total):
        if done == 4:
            raise Killed

    options = {"num_tokens": 8 * 16 * 8, "state_folder": tmp_path, "save_every_minutes": 0}
    with pytest.raises(Killed):
        distill_with(make_model(seed=2), make_model(seed=1), make_blocks(count=24), **options, on_step=dies)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "__version__", "9.9.0")
        steps = []
        distill_with(make_model(seed=2), make_model(seed=1), make_blocks(count=24), **options,
                on_step=lambda done, total: steps.append(done))  # fmt: skip
        assert steps[0] in (4, 5) and "another torch; the result may differ in the bits" in caplog.text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_state, "FORMAT", 2)
        steps = []
        distill_with(make_model(seed=2), make_model(seed=1), make_blocks(count=24), **options,
                on_step=lambda done, total: steps.append(done))  # fmt: skip
        assert steps[0] == 1


def header(path, table, data=b"", length=None):
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


F32 = {"dtype": "F32", "shape": [2]}


@pytest.mark.parametrize(
    ("table", "data"),
    [
        ({"a": F32 | {"data_offsets": [0, 8]}, "b": F32 | {"data_offsets": [4, 12]}}, b"\0" * 12),  # overlap
        ({"a": F32 | {"data_offsets": [0, 8]}, "b": F32 | {"data_offsets": [16, 24]}}, b"\0" * 24),  # a hole
        ({"a": F32 | {"data_offsets": [0, 8]}}, b"\0" * 12),  # more than the tensors need
        ({"a": F32 | {"data_offsets": [0, 8]}}, b"\0" * 4),  # less
        ({"a": F32 | {"data_offsets": [0, 12]}}, b"\0" * 12),  # more than its shape takes
        ({"a": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 8]}}, b"\0" * 8),  # a huge shape
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, b"\0" * 8),
        ({"a": {"dtype": "F32", "shape": [0, 1 << 60], "data_offsets": [0, 8]}}, b"\0" * 8),
        ({"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, b"\0" * 8),
        ({"a": {"dtype": "F32", "shape": [2]}}, b"\0" * 8),
        ({"a": {"dtype": 3, "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
         b"\0" * 8),  # a name twice
        (b"[" * 100_000, b""),
        (b"[]", b""),
        (b"\xff\xfe", b""),
    ],
)  # fmt: skip
def test_F30_headers_that_lie_are_refused_at_once(tmp_path, table, data):
    with pytest.raises(UserError, match="damaged|cannot be read"):
        check_header(header(tmp_path / "model.safetensors", table, data))


def test_F30_a_header_longer_than_its_file_or_of_100_000_entries_takes_no_memory_and_no_time(tmp_path):
    import time

    with pytest.raises(UserError, match="claims"):
        check_header(header(tmp_path / "a.safetensors", b"{}", length=1 << 62))
    many = {f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(100_000)}
    started = time.perf_counter()
    check_header(header(tmp_path / "b.safetensors", many))
    assert time.perf_counter() - started < 10


@pytest.fixture
def model(tiny_parent, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_parent, folder)
    return folder


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_F30_models_that_bring_code_are_refused_before_it_is_imported(model, tmp_path):
    canary = tmp_path / "canary"
    (model / "modeling_evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
    for place, values in (
        ("config.json", {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}),
        ("config.json", {"vision_config": {"deep": [{"trust_remote_code": True}]}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["modeling_evil.Evil", None]}}),
        ("generation_config.json", {"custom_pipelines": {"x": {"impl": "modeling_evil.Evil"}}}),
    ):
        path = model / place
        before = path.read_text() if path.exists() else "{}"
        path.write_text(json.dumps(json.loads(before) | values))
        with pytest.raises(UserError, match=f"{place}: .* asks for code that is not transformers' own"):
            resolve_model(str(model))
        path.write_text(before)
    resolve_model(str(model))  # as it was, it is taken
    assert not canary.exists()


def test_F30_pickled_weights_are_refused_and_never_fallen_back_to(model, tmp_path):
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {canary}",)

    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    load_model(resolve_model(str(model)))  # the safetensors beside it are read
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no safetensors weights \(found pytorch_model.bin, which can run code"):
        resolve_model(str(model))
    (model / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError):
        load_model(resolve_model(str(model)))
    assert not canary.exists()


def test_F30_a_chat_template_cannot_reach_python(model, tmp_path):
    canary = tmp_path / "canary"
    evil = "{{ cycler.__init__.__globals__.os.system('touch " + str(canary) + "') }}"
    (model / "chat_template.jinja").write_text(evil)
    tokenizer = load_tokenizer(resolve_model(str(model)))
    with pytest.raises(Exception, match="unsafe|undefined|access"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert not canary.exists()


@pytest.mark.parametrize("victim", ["../victim/model.safetensors", "pytorch_model.bin"])
def test_F30_weights_that_a_config_names_are_not_followed(model, tmp_path, victim):
    shutil.copytree(model, tmp_path / "victim")
    (model / "pytorch_model.bin").write_bytes(b"")
    before = (model / "config.json").read_text()
    names = list(load_file(model / "model.safetensors"))
    (model / "w.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, victim)})
    )
    with pytest.raises(
        UserError, match="w.safetensors.index.json: names .*; shards are .safetensors files of the same"
    ):
        resolve_model(str(model))
    (model / "w.safetensors.index.json").unlink()
    change(model / "config.json", transformers_weights="w.safetensors")
    with pytest.raises(UserError, match="transformers_weights names other weights"):
        resolve_model(str(model))
    (model / "config.json").write_text(before)
    resolve_model(str(model))


@pytest.mark.parametrize(
    "values",
    [{"attn_implementation": "org/kernel"}, {"_attn_implementation": "org/kernel@v1:f"},
     {"text_config": {"_experts_implementation": "a/b"}}, {"attn_implementation": {"": "sdpa", "text_config": "a/b"}}],
)  # fmt: skip
def test_F30_kernels_that_a_config_would_have_fetched_are_refused(model, values):
    change(model / "config.json", _attn_implementation="sdpa")
    resolve_model(str(model))
    change(model / "config.json", **values)
    with pytest.raises(UserError, match="implementation: .* would be fetched and run; remove the key"):
        resolve_model(str(model))


def test_F30_a_hub_model_is_pinned_however_it_is_written():
    with pytest.raises(UserError, match="org/model@main: 'main' can move; give a commit"):
        resolve_model("org/model@main")


def test_F15_a_damaged_list_of_what_is_missing_is_told(run):
    folder = next(run.glob("stages/big.evaluate-*"))
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["sha256"]
    manifest["files"]["incomplete.json"] = {"size": 2, "sha256": "0" * 64}
    (folder / MANIFEST).write_text(json.dumps({"stage": "evaluate", "files": manifest["files"]}))
    (folder / "incomplete.json").write_text("{")
    assert f"{folder.relative_to(run)}/incomplete.json" in faults(run)


def test_F13_a_line_of_a_log_that_a_full_disk_has_cut_off_costs_that_line_alone(run, tiny_family):
    log = distilled(run) / "log.jsonl"
    whole = log.read_text().splitlines()
    log.write_text("\n".join([whole[0][:5], *whole[1:]]) + "\n[1]\n")
    assert training_logs(run)["big"] == training_logs(tiny_family)["big"][1:]
    assert CliRunner().invoke(main, ["report", str(run)]).exit_code == 0


def test_F30_links_out_of_a_models_folder_are_refused_and_those_of_the_hubs_cache_are_not(model, tmp_path):
    (tmp_path / "secret").write_text("a private key")
    (model / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="LICENSE: is a link to .*secret, out of the model's folder"):
        resolve_model(str(model))
    (model / "LICENSE").unlink()
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / ("c" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in model.iterdir():
        shutil.move(path, blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    load_tokenizer(resolve_model(str(snapshot)))


def test_F30_paths_in_a_models_settings_are_not_opened(model, tmp_path):
    (tmp_path / "someone-elses-file").write_text("{}")
    keys = ("vocab_file", "merges_file", "tokenizer_file", "special_tokens_map_file", "added_tokens_file", "spm_file",
            "chat_template_file", "name_or_path", "_name_or_path", "tokenizer_name", "tokenizer_object")  # fmt: skip
    for name, path in (
        ("tokenizer_config.json", str(tmp_path / "someone-elses-file")),
        ("config.json", "../someone-elses-file"),
    ):
        change(model / name, **dict.fromkeys(keys, path))
    code = (
        "import sys\n"
        "seen = []\n"
        "sys.addaudithook(lambda event, of: seen.append(str(of[0])) if event == 'open' else None)\n"
        "from cascade.models.checkpoint.load import load_model, load_tokenizer, resolve_model\n"
        "from cascade.runtime.errors import UserError\n"
        f"source = resolve_model({str(model)!r})\n"
        "for load in (load_model, load_tokenizer):\n"
        "    try:\n        load(source)\n"
        "    except UserError as error:\n        print('refused', error)\n"
        "assert any('config.json' in one for one in seen)\n"
        "sys.exit(any('someone-elses-file' in one for one in seen))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_F30_code_named_beside_a_gguf_file_is_refused(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    (tmp_path / "other.json").write_text("no JSON at all: somebody's downloads")
    resolve_model(str(tmp_path / "a.gguf"))
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["x.Evil", null]}}')
    with pytest.raises(UserError, match="tokenizer_config.json: auto_map asks for code"):
        resolve_model(str(tmp_path / "a.gguf"))


@pytest.mark.parametrize("name", ["../x", "/x", "C:\\x", "C:x", "..\\x", "a\\b", "\\\\server\\x", "a\0b", ""])
def test_F31_a_manifest_that_leads_out_of_its_folder_on_any_system_is_none(tmp_path, name):
    with staged(tmp_path / "a", {}) as staging:
        (staging / "x").write_text("x")
    assert verify_folder(tmp_path / "a") == []
    manifest = json.loads((tmp_path / "a" / MANIFEST).read_text())
    del manifest["sha256"]
    (tmp_path / "a" / MANIFEST).write_text(
        json.dumps({"stage": "x", "files": manifest["files"] | {name: {"size": 1, "sha256": "0"}}})
    )
    assert verify_folder(tmp_path / "a") == [MANIFEST] and not is_committed(tmp_path / "a")


def test_F30_names_of_shards_are_names_on_every_system():
    assert plain_name("model-00001-of-00002.safetensors")
    for name in ("../x", "/x", "a/b", "..", ".", "", "C:x", "C:\\x", "..\\x", "\\\\server\\x", "a\0b", 3, None):
        assert not plain_name(name), name


def test_F30_files_that_are_no_json_or_nested_without_end_are_refused(model):
    for content in ("{", "[" * 200_000, "\x00"):
        (model / "config.json").write_text(content)
        with pytest.raises(UserError, match="config.json: is no JSON"):
            check_model_folder(model)


def test_F37_members_reload_in_plain_transformers_to_the_logits_in_memory_and_a_changed_one_is_found(run):
    from cascade.evaluation.reload import check_reload

    stage = distilled(run)
    measured = check_reload(stage / "checkpoint", stage / "reference.safetensors", prompt_tokens=8, new_tokens=2)
    assert measured["reload_difference"] <= 1e-5
