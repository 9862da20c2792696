"""Whatever a recipe, a hub, a task or an environment holds: an answer with what to do, never code run or a key shown."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT, make_blocks, make_model
from fault_process import failing, fired
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.cli.main import main
from cascade.pipeline.run import run_recipe
from cascade.recipe.load import load_recipe
from cascade.report.records import family_of, load_family
from cascade.runtime import secrets
from cascade.runtime.errors import RecipeError, RunError, UserError
from cascade.store.strict_yaml import parse_yaml, write_yaml

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def plan(path, *options):
    """(exit code, output); what is no message of ours fails."""
    result = CliRunner().invoke(main, ["plan", str(path), *options])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.output


@settings(max_examples=60)
@given(
    st.sampled_from(RECIPES),
    st.lists(st.tuples(st.sampled_from(["flip", "cut", "insert", "repeat"]), st.floats(0, 1), st.binary(max_size=6))),
)
def test_F28_changed_bytes_of_a_recipe_are_a_recipe_or_an_error_of_ours(tmp_path_factory, path, changes):
    data = bytearray(path.read_bytes())
    for kind, place, content in changes:
        at = int(place * (len(data) - 1)) if data else 0
        if kind == "flip" and data:
            data[at] ^= content[0] if content else 1
        elif kind == "cut":
            del data[at : at + len(content)]
        elif kind == "insert":
            data[at:at] = content
        elif kind == "repeat":
            data[at:at] = data[at : at + 40]
    file = tmp_path_factory.mktemp("fuzz") / "r.yaml"
    file.write_bytes(bytes(data))
    try:
        load_recipe(file)
    except RecipeError as error:
        assert error.problems


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.sampled_from([10**400, -1, 0, 1 << 63]), st.floats(),
    st.text(max_size=8), st.sampled_from(["no", "1e-5", "012", "../../etc", "${HOME}", "!!python/object", "{{ 7 * 7 }}"]),
    st.lists(st.integers(), max_size=2), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip


@settings(max_examples=150)
@given(st.sampled_from(RECIPES), st.data())
def test_F28_odd_values_anywhere_in_a_recipe_are_taken_or_refused_with_their_place(tmp_path_factory, path, data):
    record = parse_yaml(path.read_text(), source=str(path)).data
    target = record
    for _ in range(data.draw(st.integers(1, 4))):
        keys = list(target) if isinstance(target, dict) else range(len(target))
        if not keys:
            break
        key = data.draw(st.sampled_from(list(keys)))
        if not isinstance(target[key], dict | list) or data.draw(st.booleans()):
            target[key] = data.draw(ODD)
            break
        target = target[key]
    file = tmp_path_factory.mktemp("fuzz") / "r.yaml"
    try:
        file.write_text(write_yaml(record))
    except ValueError:  # a surrogate, which no file can hold
        return
    try:
        again = load_recipe(file)
    except RecipeError as error:
        assert error.problems and all("r.yaml" in problem for problem in error.problems)
    else:
        assert type(again).model_validate(again.model_dump()) == again


DOCUMENTS = {
    "a deep nest": b"a: " + b"[" * 10_000,
    "50 MB": b"a: " + b"x" * 50_000_000,
    "NUL": b"name: a\x00b\n",
    "UTF-16": "name: x\n".encode("utf-16"),
    "tabs": b"data:\n\tsource: stdlib\n",
    "two keys": b"name: a\nname: b\n",
    "a merge key": b"a: &a {b: 1}\n<<: *a\n",
    "a Python object": b"name: !!python/object/apply:os.system ['touch canary']\n",
    "a Python name": b"name: !!python/name:os.system\n",
    "another tag": b"name: !include /etc/passwd\n",
    "aliases": b"a: &a [x, x]\nb: &b [*a, *a, *a]\nc: [" + b"*b, " * 20_000 + b"*b]\n",
    "an alias to itself": b"a: &a [*a]\n",
    "two documents": b"name: a\n---\nname: b\n",
    "no end": b'name: "abc\n',
    "only a comment": b"# nothing\n",
    "a number": b"7\n",
    "infinite": b"name: x\nseed: .inf\n",
    "too large": b"name: x\nseed: 1e400\n",
}


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_F28_documents_that_are_no_recipe_end_with_2_in_two_seconds_and_200_megabytes(tmp_path, kind, zygote):
    (tmp_path / "r.yaml").write_bytes(DOCUMENTS[kind])
    started = time.perf_counter()
    code, output = zygote.run("plan", tmp_path / "r.yaml", cwd=tmp_path, LIMIT_MORE_MEMORY="200000000")
    assert code == 2 and output.startswith("Error: ") and "Traceback" not in output
    assert time.perf_counter() - started < 5  # 2 on a quiet machine
    assert not (tmp_path / "canary").exists()


_TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.sampled_from(
        [
            "1e3",
            "08",
            "0o7",
            "no",
            "~",
            "",
            ".inf",
            "1_000",
            "\x85a",
            "\u2028",
            " a",
            "a: b",
            "#",
            "\ufeff",
            "2020-01-01",
        ]
    ),
)
_DATA = st.recursive(
    st.one_of(_TEXTS, st.none(), st.booleans(), st.integers(-(10**30), 10**30), st.floats(allow_nan=False, allow_infinity=False)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXTS.filter(lambda key: key != "<<"), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(_DATA)
@settings(max_examples=300)
def test_F28_what_is_written_as_yaml_is_read_back_as_it_was(data):
    assert parse_yaml(write_yaml(data), source="x").data == data


def test_F28_half_of_a_surrogate_pair_is_no_text(tmp_path):
    (tmp_path / "r.yaml").write_text('name: "\\ud800"\n')
    code, output = plan(tmp_path / "r.yaml")
    assert code == 2 and "r.yaml:1:7: half of a surrogate pair" in output


def test_F28_a_byte_order_mark_changes_nothing_and_a_device_without_end_is_refused(tmp_path):
    path = ROOT / "recipes" / "quickstart.yaml"
    (tmp_path / "r.yaml").write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_recipe(tmp_path / "r.yaml").name == load_recipe(path).name
    code, output = plan("/dev/zero")
    assert code == 2 and "more than the 1,000,000 bytes" in output


@pytest.mark.parametrize(
    "change",
    [
        "data.block_size=1_000_000_000_000", "data.block_size=9", "distill.tokens=1", "distill.batch_size=1_000_000_000",
        "calibration.num_blocks=1_000_000_000_000", "members.0.target.params=1e-300", "members.0.target.params=1.0",
        "members.0.target={dims: {hidden_size: 1_000_000}}", "members.0.target={dims: {num_hidden_layers: 0}}",
        "members.0.seed=small", "evaluate.tasks=['../../x']", "prune.layers=nothing",
        "data.train=/dev/null", "data.train=/proc/self/mem", "data.text_field=''", "parent=/", "parent=''",
        "parent=builtin:../../x", "distill.cache.exact_tokens=['\\ud800']", "seed=-1", "seed=1e3", "members=[]",
        "distill.cache.folder=/proc/x", "evaluate.limit=99999999999999999999999",
    ],
)  # fmt: skip
def test_F28_values_that_only_the_models_or_the_machine_rule_out_end_without_a_traceback(
    recipe_folder, tmp_path, change
):
    code, output = plan(recipe_folder / "tiny.yaml", "--output", str(tmp_path / "run"), "--set", change)
    assert code in (0, 2) and "Traceback" not in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("output=../../etc", "leads out of where the command runs"),
        ("output=/etc/cron.d", "leads out"),
        ("output=~/x", "leads out"),
        ("output=C:\\x", "leads out"),
        ("name='{{ cycler }}'", "cannot be a folder's name"),
        ("name='$(touch canary)'", "cannot be a folder's name"),
        ("members.0.name='../x'", "cannot be a folder's name"),
        ("members.0.name='a;touch canary'", "cannot be a folder's name"),
        ("plugin=os.system", "unknown key"),
        ("distill._target_=os.system", "unknown key"),
        ("distill.trackers=['os.system']", "distill.trackers"),
        ("prune={_component_: os.system}", "unknown key"),
        ("parent={model: x/y, revision: main}", "can move"),
        ("parent={model: x/y, revision: " + "a" * 40 + ", trust_remote_code: true}", "unknown key"),
    ],
)
def test_F29_recipes_cannot_name_code_or_places_elsewhere(recipe_folder, tmp_path, monkeypatch, change, said):
    monkeypatch.chdir(tmp_path)
    code, output = plan(recipe_folder / "tiny.yaml", "--set", change)
    assert code == 2 and said in output and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "http://169.254.169.254/latest", "gopher://x/", "http://[fe80::1]/v1"]
)
def test_F29_endpoints_are_https_or_this_machine(url):
    from cascade.recipe.generate import Endpoint
    from cascade.teacher.writing.address import check_endpoint

    with pytest.raises((UserError, ValueError)):
        check_endpoint(Endpoint(url=url, model="m"))


def test_F29_a_recipe_cannot_have_files_from_elsewhere_sent_to_a_server(recipe_folder, tmp_path, monkeypatch):
    (tmp_path / "id_rsa").write_text("a private key")
    near, there = recipe_folder / "prompts.jsonl", recipe_folder / "link.jsonl"
    near.write_text('{"prompt": "def f"}\n' * 3)
    there.unlink(missing_ok=True)
    there.symlink_to(tmp_path / "id_rsa")
    monkeypatch.chdir(recipe_folder)
    base = ["data={source: generated, block_size: 32}", "members=[]", "baselines=[]"]

    def load(files, url):
        sections = f"generate={{endpoint: {{url: '{url}', model: m}}, {files}}}"
        return load_recipe(recipe_folder / "tiny.yaml", [*base, sections])

    for files in (f"text: {tmp_path / 'id_rsa'}", "prompts: link.jsonl", "text: ../../../etc/hostname"):
        with pytest.raises(UserError, match="would be sent to https://h.example/v1, and lies neither beside or below"):
            load(files, "https://h.example/v1")
    assert load("prompts: prompts.jsonl", "https://h.example/v1").generate.prompts == [str(near)]
    assert load(f"text: {tmp_path / 'id_rsa'}", "http://127.0.0.1:9/v1").generate is not None
    monkeypatch.chdir(tmp_path)  # who starts it there means what lies there
    assert load(f"text: {tmp_path / 'id_rsa'}", "https://h.example/v1").generate is not None


def test_F29_variables_of_the_environment_are_not_put_into_recipes(recipe_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "q" * 34)
    for text in ("${HF_TOKEN}", "$HF_TOKEN", "%HF_TOKEN%", "{{ env.HF_TOKEN }}"):
        recipe = load_recipe(recipe_folder / "tiny.yaml", [f"data.text_field='{text}'"])
        assert recipe.data.text_field == text
        code, output = plan(
            recipe_folder / "tiny.yaml", "--set", f"data.text_field='{text}'", "--output", str(tmp_path / "r")
        )
        assert code == 2 and "qqqq" not in output


def test_F29_a_run_directory_that_leads_to_someone_elses_files_is_refused_and_they_stay(recipe_folder, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "precious").write_text("1")
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    result = CliRunner().invoke(main, ["run", str(recipe_folder / "tiny.yaml"), "--output", str(tmp_path / "link")])
    assert result.exit_code == 2 and "not a run of this program" in result.output
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["precious"]


def test_F29_task_files_run_no_code_unless_it_is_allowed_and_then_apart_and_without_keys(
    tiny_parent, tmp_path, monkeypatch
):
    from cascade.evaluation.evaluate import evaluate
    from cascade.evaluation.tasks_lm_eval.task_options import TaskOptions

    canary = tmp_path / "canary"
    (tmp_path / "rows.jsonl").write_text('{"q": "def f(): return", "a": " 1"}\n' * 4)
    (tmp_path / "own.py").write_text(
        "import json, os\n"
        f"open({str(canary)!r}, 'w').write(json.dumps({{'pid': os.getpid(), 'env': dict(os.environ)}}))\n"
        "def text(doc):\n    return doc['q']\n"
    )
    base = (
        "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\ntest_split: test\n"
        "output_type: loglikelihood\ndoc_to_target: '{{a}}'\nmetric_list: [{metric: acc}]\n"
    )
    (tmp_path / "mine.yaml").write_text(base + "doc_to_text: !function own.text\n")
    tasks = TaskOptions(names=["mine"], folders=[tmp_path])
    with pytest.raises(UserError, match="names Python functions of its own.*--allow-task-code"):
        evaluate(str(tiny_parent), tasks=tasks, measure_speed=False)
    assert not canary.exists()
    monkeypatch.setenv("HF_TOKEN", "hf_" + "z" * 34)
    monkeypatch.setenv("MY_API_KEY", "a-key-of-mine")
    found = evaluate(str(tiny_parent), tasks=replace(tasks, allow_code=True), measure_speed=False)
    assert found.failed == {} and any(metric.task == "mine" for metric in found.metrics)
    seen = json.loads(canary.read_text())
    assert seen["pid"] != os.getpid() and not {"HF_TOKEN", "MY_API_KEY"} & set(seen["env"])


@pytest.mark.parametrize(
    ("flag", "changes", "message"),
    [
        (
            "--allow-task-code",
            ["evaluate={tasks: [mine], task_folders: [FOLDER]}"],
            "names Python functions of its own",
        ),
        (
            "--allow-private",
            [
                "data={source: generated, block_size: 32}",
                "generate={endpoint: {url: 'https://10.0.0.5/v1', model: m, api: completions}, "
                "stdlib: true, num_prompts: 300}",
                "distill.teacher=text",
                "baselines=[cut]",
            ],
            "on a private network",
        ),
    ],
)
def test_F29_a_permission_is_that_of_one_command_and_of_no_later_one(recipe_folder, tmp_path, flag, changes, message):
    (tmp_path / "mine.yaml").write_text("task: mine\ndataset_path: json\ndoc_to_text: !function own.text\n")
    options = [part for change in changes for part in ("--set", change.replace("FOLDER", str(tmp_path)))]
    arguments = (recipe_folder / "tiny.yaml", "--output", str(tmp_path / "run"), *options)
    for _ in range(2):
        code, output = plan(*arguments)
        assert code == 2 and message in output and flag in output
        code, output = plan(*arguments, flag)
        assert code == 0, output


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("metric_list: [{metric: FOLDER/evil.py, aggregation: mean}]", "names the metric .*evil.py"),
        ("metric_list: [{metric: acc, hf_evaluate: true}]", "names the metric 'acc'"),
        ("metric_list: [{metric: [acc]}]", "names the metric"),
        ("dataset_path: pandas", "dataset_path: 'pandas'"),
        ("dataset_path: FOLDER/evil.py", "dataset_path: .*evil.py"),
        ("dataset_path: ../evil", "dataset_path: '../evil'"),
        ("dataset_path: org/data", "from the hub without dataset_kwargs: {revision: COMMIT}"),
        (
            "dataset_kwargs: {data_files: {test: rows.jsonl}, trust_remote_code: true}",
            "dataset_kwargs: 'trust_remote_co",
        ),
        ("use_prompt: FOLDER/evil.yaml:x", "has the key 'use_prompt'"),
        ("class: evil.Task", "has the key 'class'"),
        ("unsafe_code: true", "has the key 'unsafe_code'"),
    ],
)
def test_F29_task_files_cannot_have_code_fetched_or_imported_by_name(tmp_path, change, said):
    from cascade.evaluation.tasks_lm_eval.harness import find_tasks
    from cascade.evaluation.tasks_lm_eval.task_code import require_allowed

    (tmp_path / "rows.jsonl").write_text('{"q": "x", "a": " 1"}\n' * 4)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w').close()\n")
    base = {
        "task": "mine", "dataset_path": "json", "dataset_kwargs": "{data_files: {test: rows.jsonl}}",
        "test_split": "test", "output_type": "loglikelihood", "doc_to_text": "'{{q}}'", "doc_to_target": "'{{a}}'",
        "metric_list": "[{metric: acc}]",
    }  # fmt: skip

    def find(settings):
        (tmp_path / "mine.yaml").write_text("".join(f"{name}: {value}\n" for name, value in settings.items()))
        tasks = find_tasks(["mine"], [tmp_path])
        require_allowed(tasks, False)
        return tasks

    assert find(base)[0]["metric_list"] == [{"metric": "acc"}]
    name, _, value = change.replace("FOLDER", str(tmp_path)).partition(": ")
    with pytest.raises(UserError, match=f"{said}.*--allow-task-code"):
        find(base | {name: value})
    assert not (tmp_path / "canary").exists()


def test_F29_a_tasks_templates_cannot_reach_python(tiny_parent, tmp_path):
    from cascade.evaluation.evaluate import evaluate
    from cascade.evaluation.tasks_lm_eval.task_options import TaskOptions

    canary = tmp_path / "canary"
    (tmp_path / "rows.jsonl").write_text('{"q": "x", "a": " 1"}\n' * 4)
    evil = "{{ cycler.__init__.__globals__.os.system('touch " + str(canary) + "') }}"
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\ntest_split: test\n"
        f'output_type: loglikelihood\ndoc_to_text: "{evil}"\ndoc_to_target: "{{{{a}}}}"\nmetric_list: [{{metric: acc}}]\n'
    )
    tasks = TaskOptions(names=["mine"], folders=[tmp_path])
    found = evaluate(str(tiny_parent), tasks=tasks, measure_speed=False)
    assert "mine" in found.failed and not canary.exists()


KEY = "hf_" + "k" * 34


@pytest.mark.parametrize(
    "text", [KEY, "sk-" + "a1" * 20, "https://me:pass@host/v1", "ghp_" + "x" * 36, "AKIA" + "A" * 16]
)
def test_F32_a_recipe_with_a_key_in_it_is_refused_and_the_key_is_not_repeated(recipe_folder, tmp_path, text):
    (tmp_path / "r.yaml").write_text((recipe_folder / "tiny.yaml").read_text() + f"# \nsave: {{dtype: '{text}'}}\n")
    code, output = plan(tmp_path / "r.yaml")
    assert code == 2 and "save.dtype: looks like a key or password" in output and text not in output
    code, output = plan(recipe_folder / "tiny.yaml", "--set", f"data.text_field='{text}'")
    assert code == 2 and text not in output


def test_F32_the_redactor_takes_out_what_it_should_and_leaves_the_rest(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123")
    monkeypatch.setenv("SOME_TOKEN", "short")
    text = f"a {KEY} b https://u:p4ss@host/x c 0123456789abcdef0123 d short e sk-learn task_key=3 https://host/u:p"
    assert secrets.redact(text) == (
        "a [hidden] b https://[hidden]@host/x c [hidden] d short e sk-learn task_key=3 https://host/u:p"
    )
    assert secrets.without_secrets({"LANG": "C", "X_TOKEN": "2", "URL": "https://u:p@h"}) == {"LANG": "C"}


def test_F32_keys_with_hyphens_and_of_any_variable_that_ends_in_key_are_known():
    for key in (
        "sk-proj-AbC-1234567890abcdefXYZ",
        "sk-ant-api03-aB_c-0123456789012",
        "https://" + "t" * 20 + "@host/x",
    ):
        assert secrets.looks_secret(key) and "0123" not in secrets.redact(f"x {key} y")
    for word in ("risk-assessment-dataset-v2-final-english", "sk-learn-datasets-and-more-of-them", "https://me@host"):
        assert not secrets.looks_secret(word)
    assert secrets.is_secret_name("OPENAI_KEY") and not secrets.is_secret_name("KEYBOARD_LAYOUT")
    secrets.remember("plain-words-as-a-key")
    assert secrets.redact("a plain-words-as-a-key b") == "a [hidden] b"


LONG = "0123456789abcdefABCDEF"


@pytest.mark.parametrize(
    "text",
    [
        f"sk-or-v1-{LONG.lower()}", f"gsk_{LONG}", f"xai-{LONG}", f"nvapi-{LONG}", f"csk-{LONG}", f"fw_{LONG}", f"glpat-{LONG}",
        f"redis://:{LONG}@host", f"https://{LONG}:@host", f"https://bob:p@{LONG}@host", f"'x\\nhf_{LONG}'", f"a%3Dhf_{LONG}",
        f"Authorization: Bearer {LONG}", f"{{'Authorization': 'Basic {LONG}'}}", f"https://s3/x?X-Amz-Signature={LONG}&a=b",
        f"-----BEGIN RSA PRIVATE KEY-----\n{LONG}\n{LONG}\n-----END RSA PRIVATE KEY-----", f"-----BEGIN PRIVATE KEY-----\n{LONG}",
    ],
)  # fmt: skip
def test_F32_keys_of_many_services_and_forms_are_known_and_taken_out(text):
    assert secrets.looks_secret(text)
    assert LONG.lower() not in secrets.redact(f"before {text} after").lower()
    assert secrets.redact(f"before {text} after").startswith("before ")


def test_F32_values_of_this_process_are_taken_out_as_they_stand_in_addresses_too(monkeypatch):
    monkeypatch.setenv("MY_SECRET", "a b/c=d+e-f")
    assert secrets.redact("x a b/c=d+e-f y a%20b%2Fc%3Dd%2Be-f z") == "x [hidden] y [hidden] z"


def test_F32_foreign_code_gets_an_environment_of_what_it_may_know_alone():
    names = ("MYSQL_PWD", "DB_PASS", "GITHUB_PAT", "SSHPASS", "GPG_PASSPHRASE", "X_AUTH", "DOCKER_AUTH_CONFIG", "HF_TOKEN",
             "AZURE_STORAGE_CONNECTION_STRING", "SSH_AUTH_SOCK", "CASCADE_KEY", "DATABASE_URL", "WHATEVER")  # fmt: skip
    harmless = {
        "PATH": "/bin",
        "HOME": "/h",
        "LC_ALL": "C",
        "OMP_NUM_THREADS": "1",
        "HF_HOME": "/c",
        "PYTHONPATH": "/p",
    }
    assert secrets.without_secrets(dict.fromkeys(names, "value-of-it") | harmless) == harmless


def test_F32_keys_of_the_environment_are_in_no_file_no_output_and_no_traceback(zygote, recipe_folder, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    keys = {"HF_TOKEN": KEY, "WANDB_API_KEY": "f" * 40, "OPENAI_API_KEY": "sk-" + "b2" * 20,
            "XDG_CACHE_HOME": str(tmp_path / "cache")}  # fmt: skip
    # What is raised names the place: that is a key here, so that the traceback has to be redacted.
    place = "distill/store.written"
    command = ("run", recipe_folder / "tiny.yaml", "--output", run, "--set", "baselines=[]", "--set",
               "distill.trackers=[tensorboard]")  # fmt: skip
    status, output = zygote.run(*command, **keys, A_SECRET=place, **failing(f"{place}:raise", log))
    assert status == 1 and fired(log) == [place]
    assert "InjectedError: [hidden]" in output and place not in output
    status, output_2 = zygote.run(*command, **keys)
    assert status == 0 and list(run.rglob("events.out.tfevents*")) and list(run.rglob("lm_eval.json"))
    wanted = [value.encode() for name, value in keys.items() if name != "XDG_CACHE_HOME"]
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
        assert not any(value in path.read_bytes() for value in wanted), path
    assert not any(value.decode() in output + output_2 for value in wanted)


def test_F33_a_card_keeps_texts_from_outside_in_their_places(tiny_family):
    from cascade.report.card import member_card
    from cascade.report.provenance import Provenance

    rows = family_of(load_family(tiny_family)).rows
    evil = "x`\n---\nlicense: mit\n<script>alert(1)</script>\n```"
    lineage = json.loads((tiny_family / "members" / "big" / "cascade.json").read_text()) | {"parent": evil}
    origins = ({"name": evil, "licence": "", "terms": ""},)
    texts = dict.fromkeys(("parent", "start_from", "base_model", "teacher", "text_by"), evil)
    made = Provenance(**lineage["provenance"] | texts | {"origins": origins})
    card = member_card(rows[1], rows[0], made, lineage, "name: x\n````\n<script>\n")
    front = card.split("---\n")[1]
    assert json.dumps(evil) in front and "\nlicense:" not in front
    blocks = r"^(```+)[a-z]*\n.*?\n\1$|`[^`\n]*`"
    outside = re.sub(blocks, "", card.split("---\n", 2)[2], flags=re.S | re.M)
    assert "<script" not in outside and "license: mit" not in outside


def test_F34_four_threads_give_what_one_gives_but_for_rounding():
    from cascade.distillation.trainer import distill

    before, losses = torch.get_num_threads(), []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            student = make_model(seed=2)
            distill(student, make_model(seed=1), make_blocks(count=16), num_tokens=8 * 16 * 6)
            losses.append({name: value.clone() for name, value in student.state_dict().items()})
    finally:
        torch.set_num_threads(before)
    for name, value in losses[0].items():
        torch.testing.assert_close(losses[1][name], value, rtol=1e-4, atol=1e-5)


def test_F38_a_task_that_fails_costs_that_task_alone_and_the_next_run_asks_for_nothing_else(
    recipe_folder, tmp_path, monkeypatch
):
    import lm_eval

    from cascade.runtime import failpoints

    recipe = load_recipe(
        recipe_folder / "tiny.yaml",
        [
            "evaluate.tasks=[python_minimal_pairs, python_complete_line, python_next_line]",
            "evaluate.limit=4",
            "baselines=[]",
        ],
    )
    log, run, measured = tmp_path / "log", tmp_path / "run", []
    simple_evaluate = lm_eval.simple_evaluate

    def noted(**options):
        measured.extend(config["task"] for config in options["tasks"])
        return simple_evaluate(**options)

    monkeypatch.setattr(lm_eval, "simple_evaluate", noted)
    failpoints.arm(
        {"CASCADE_FAILPOINT": "task/begun:raise@5", "CASCADE_ALLOW_FAILPOINTS": "1", "CASCADE_FAILPOINT_LOG": str(log)}
    )
    try:
        with pytest.raises(RunError, match="not all of it could be measured:\n  big: python_complete_line: "):
            run_recipe(recipe, output=run)
    finally:
        failpoints.arm({})
    assert fired(log) == ["task/begun"] and len(measured) == 8
    rows = {row["name"]: row for row in load_family(run)["rows"]}
    tasks = {name: {one["task"] for one in row["metrics"]} for name, row in rows.items()}
    assert "python_complete_line" not in tasks["big"] and "python_complete_line" in tasks["small"]
    assert {"heldout", "python_minimal_pairs", "python_next_line"} <= tasks["big"]
    line = next(line for line in (run / "report.md").read_text().split("## Quality")[1].splitlines() if "big" in line)
    assert "| 0 |" not in line
    told = CliRunner().invoke(main, ["verify", str(run)])
    assert told.exit_code == 1 and "not measured: python_complete_line" in told.output
    measured.clear()
    run_recipe(recipe, output=run)
    assert measured == ["python_complete_line"]
    assert CliRunner().invoke(main, ["verify", str(run)]).exit_code == 0
    whole = run_recipe(recipe, output=tmp_path / "whole")
    for name, row in {row["name"]: row for row in load_family(whole)["rows"]}.items():
        found = next(one for one in load_family(run)["rows"] if one["name"] == name)
        assert found["metrics"] == row["metrics"]
    assert not list(run.glob("stages/.partial-*"))


def test_F38_a_parent_that_cannot_be_measured_stops_the_run_before_anything_is_trained(recipe_folder, tmp_path):
    from cascade.runtime import failpoints

    failpoints.arm({"CASCADE_FAILPOINT": "task/begun:raise@1", "CASCADE_ALLOW_FAILPOINTS": "1"})
    try:
        with pytest.raises(RunError, match="the parent's evaluation: python_minimal_pairs could not be measured"):
            run_recipe(load_recipe(recipe_folder / "tiny.yaml"), output=tmp_path / "run")
    finally:
        failpoints.arm({})
    assert not list((tmp_path / "run").glob("stages/*distill*"))


HUB = "org/model@" + "a" * 40


def test_F23_an_offline_hub_says_what_to_do_and_the_cache_serves_without_a_network(tiny_parent, tmp_path, monkeypatch):
    from huggingface_hub import constants

    from cascade.models.checkpoint.load import load_config, resolve_model

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="cannot be fetched from the hub: .*HF_HUB_OFFLINE=1 only what was fetched"):
        resolve_model(HUB)
    snapshot = tmp_path / "models--org--model" / "snapshots" / ("a" * 40)
    shutil.copytree(tiny_parent, snapshot)
    import huggingface_hub

    fetch = huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: fetch(*a, **k, cache_dir=str(tmp_path)))
    source = resolve_model(HUB)
    assert source.reference == HUB and load_config(source).model_type == "llama"


@pytest.mark.parametrize(
    ("status", "kind", "said"),
    [
        (401, "GatedRepoError", "Accept its terms .* HF_TOKEN"),
        (403, "HfHubHTTPError", "Accept its terms"),
        (404, "RepositoryNotFoundError", "Check the name and the commit"),
        (404, "RevisionNotFoundError", "Check the name and the commit"),
        (429, "HfHubHTTPError", "Too many requests"),
        (503, "HfHubHTTPError", "Is there a network"),
    ],
)
def test_F23_each_refusal_of_the_hub_says_what_to_do_without_showing_a_key(monkeypatch, status, kind, said):
    from types import SimpleNamespace

    import huggingface_hub
    from huggingface_hub import errors

    from cascade.models.checkpoint.load import resolve_model

    def refused(*rest, **named):
        response = SimpleNamespace(status_code=status, headers={}, request=None)
        raise getattr(errors, kind)(f"{status} for {KEY}", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refused)
    with pytest.raises(UserError, match=said) as found:
        resolve_model(HUB)
    assert KEY not in str(found.value)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionError("no route"), "no route Is there a network?"),
        (ValueError("Unknown split 'trian'. Should be one of ['train']."), r"Should be one of \['train'\]\.$"),
    ],
)
def test_F23_a_dataset_of_the_hub_that_cannot_be_had_says_what_to_do(recipe_folder, monkeypatch, error, said):
    import datasets

    def refused(*rest, **named):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", refused)
    pinned = f"data={{source: hub, dataset: org/data, revision: {'a' * 40}, train: trian}}"
    code, output = plan(recipe_folder / "tiny.yaml", "--set", pinned)
    told = re.sub(r"\s+", " ", output).strip()
    assert code == 2 and re.search(f"data: org/data@a+, split trian: cannot be loaded: .*{said}", told), output


@pytest.mark.nightly  # half a minute of the hub's own tries
@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            f"from cascade.models.checkpoint.hub import fetch; fetch('org/model', '{'a' * 40}')",
            "cannot be fetched from the hub",
        ),
        (
            "from cascade.data.sources import TextData, part_rows\n"
            f"data = TextData('hub', {{'train': ('train',)}}, dataset='org/data', revision='{'a' * 40}')\n"
            "list(part_rows(data, 'train'))",
            "split train: cannot be loaded",
        ),
    ],
)
def test_F24_a_hub_that_never_answers_is_given_up(tmp_path, asked, said):
    server = socket.create_server(("127.0.0.1", 0))
    held = []
    threading.Thread(target=lambda: [held.append(server.accept()) for _ in range(50)], daemon=True).start()
    environment = os.environ | {
        "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}", "HF_HUB_ETAG_TIMEOUT": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    code = asked
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    server.close()
    assert done.returncode == 1 and said in done.stderr
    assert time.monotonic() - started < 90


def test_the_doctor_finds_what_would_stop_a_run_and_passes_what_would_not(recipe_folder, tmp_path, monkeypatch):
    from cascade.planning import doctor

    result = CliRunner().invoke(main, ["doctor", str(recipe_folder / "tiny.yaml"), "--output", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    for said in ("ok       machine", "torch", "write, sync, rename", "GPU", "every check of `cascade plan` passes"):
        assert said in result.output
    assert list(tmp_path.iterdir()) == []
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        patch.setattr(doctor.importlib.metadata, "requires", lambda name: ["torch>=99", "nothing-like-it>=1"])
        patch.setenv("CASCADE_FAILPOINT", "x:kill")
        patch.setenv("CASCADE_ALLOW_FAILPOINTS", "1")
        result = CliRunner().invoke(
            main, ["doctor", str(recipe_folder / "tiny.yaml"), "--json", "--output", str(tmp_path / "r")]
        )
    found = {one["name"]: one for one in json.loads(result.stdout)}
    assert result.exit_code == 1
    assert found["torch"]["do"] == "pip install 'torch>=99'" and found["nothing-like-it"]["said"] == "not installed"
    assert found["disk for the recipe"]["status"] == "fault" and found["environment"]["do"] == "unset it"
    result = CliRunner().invoke(
        main,
        ["doctor", str(recipe_folder / "tiny.yaml"), "--set", f"parent={{model: org/model, revision: {'a' * 40}}}"],
    )
    assert result.exit_code == 1 and "the hub is switched off" in result.output


@pytest.mark.parametrize("answers", [True, False])
def test_the_doctor_asks_the_hub_for_what_a_recipe_names_and_for_nothing_else(recipe_folder, monkeypatch, answers):
    import huggingface_hub
    from huggingface_hub import errors

    asked = []

    def info(self, name, **named):
        asked.append((name, named["repo_type"], named["revision"], named["timeout"] > 0))
        if not answers:
            response = type("Response", (), {"status_code": 403, "headers": {}, "request": None})()
            raise errors.GatedRepoError(f"403 for {KEY}", response=response)

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", info)
    result = CliRunner().invoke(main, ["doctor", str(recipe_folder / "tiny.yaml"), "--json"])
    assert asked == [] and {one["name"]: one for one in json.loads(result.stdout)}["hub"]["status"] == "ok"
    pinned = f"parent={{model: org/model, revision: {'a' * 40}}}"
    result = CliRunner().invoke(main, ["doctor", str(recipe_folder / "tiny.yaml"), "--json", "--set", pinned])
    assert asked == [("org/model", "model", "a" * 40, True)] and KEY not in result.output
    found = {one["name"]: one for one in json.loads(result.stdout)}["model org/model"]
    assert (found["status"], found["said"]) == (("ok", "on the hub") if answers else ("fault", "403 for [hidden]"))
    assert answers or "is it gated, is a token set?" in found["do"]


def test_F39_members_whose_names_differ_in_capitals_alone_are_refused(recipe_folder):
    twice = "members=[{name: Big, target: {params: 0.5}}, {name: big, target: {params: 0.4}}]"
    code, output = plan(recipe_folder / "tiny.yaml", "--set", twice)
    assert code == 2 and "members: the name Big, big stands twice" in output


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("parent=~nosuchuser/x", "~nosuchuser"),
        ('parent="a\\0b"', "no path has a NUL in it"),
        ("data.train=~nosuchuser/x", "~nosuchuser"),
    ],
)
def test_F29_paths_that_cannot_be_end_without_a_traceback(recipe_folder, change, said):
    code, output = plan(recipe_folder / "tiny.yaml", "--set", change)
    assert code == 2 and said in output


def test_F28_tags_are_refused_on_mappings_and_lists_too():
    for text in ("a: !!python/object:os.x {b: 1}", "a: !foo {}", "a: !foo [1]", "a: !!set {b}", "a: !!bool yes"):
        with pytest.raises(RecipeError, match="x:1:4: (tag .* is not allowed|'yes' is neither true nor false)"):
            parse_yaml(text, source="x")
    assert parse_yaml("a: !!map {b: !!seq [!!str 1]}", source="x").data == {"a": {"b": ["1"]}}


@pytest.mark.parametrize("kind", ["mount", "here", "file", "closed", "full"])
def test_F39_where_a_single_commands_output_cannot_be_is_said_before_anything_is_made(tmp_path, monkeypatch, kind):
    (tmp_path / "here").mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path / "here")
    place, said = {
        "mount": ("/proc/", "something there|mounted there"), "here": (".", "the command runs there"),
        "file": (str(tmp_path / "file" / "x"), "cannot be written to"), "closed": ("/sys/x", "cannot be written to"),
        "full": (str(tmp_path), "something there already"),
    }[kind]  # fmt: skip
    result = CliRunner().invoke(main, ["distill", "a", "--teacher", "b", "--tokens", "1", "--output", place])
    assert result.exit_code == 2 and re.search(said, result.output), result.output


def test_F39_an_output_that_is_a_link_is_written_where_it_leads(tmp_path):
    from cascade.store.commits import require_empty

    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert require_empty(tmp_path / "link") == tmp_path / "real"


@pytest.mark.parametrize(("signal_", "status"), [(2, 130), (15, 143)])
def test_F03_a_signal_ends_a_single_command_with_its_code_and_leaves_nothing(
    zygote, tiny_parent, tmp_path, signal_, status
):
    log = tmp_path / "log"
    command = zygote.start("distill", tiny_parent, "--teacher", tiny_parent, "--tokens", "4096", "--learning-rate", "1e-4",
                           "--data", "stdlib", "--output", tmp_path / "out", "--block-size", "64",
                           **failing("*distill.step:sleep=30@2", log))  # fmt: skip
    command.until(lambda: fired(log))
    os.kill(command.pid, signal_)
    assert command.wait(20) == status and "Nothing is left of it" in command.output
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_F03_a_signal_that_nobody_can_be_told_of_is_taken_all_the_same(monkeypatch):
    from cascade.runtime import stopping

    class Closed:
        def write(self, text):
            raise BrokenPipeError

        flush = write

    with stopping.handled(), stopping.saving():
        monkeypatch.setattr(sys, "stderr", Closed())
        signal.raise_signal(signal.SIGINT)
        assert stopping.stop_requested()
    with stopping.handled():  # a new command begins without the signal
        assert not stopping.stop_requested()


def test_F21_allocators_words_are_known():
    from cascade.runtime.retry_smaller import is_out_of_memory

    for words in ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling", "std::bad_alloc", "CUDA error: out of memory"):
        assert is_out_of_memory(RuntimeError(words))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


@pytest.mark.parametrize("command", ["verify", "report", "run", "plan", "doctor"])
def test_F39_a_run_directory_whose_name_is_too_long_is_told_without_a_traceback(recipe_folder, tmp_path, command):
    place = tmp_path / ("a" * 300)
    recipe = [str(recipe_folder / "tiny.yaml"), "--output", str(place)]
    result = CliRunner().invoke(main, [command, *([str(place)] if command in ("verify", "report") else recipe)])
    assert isinstance(result.exception, SystemExit) and result.exit_code == (1 if command == "doctor" else 2)
    assert "File name too long" in result.output
