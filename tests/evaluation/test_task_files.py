"""A run's own task files can be read by lm-eval as it is, from wherever it is started."""

import json

import pytest

from cascade.evaluation.tasks_lm_eval.harness import find_tasks, run_tasks
from cascade.evaluation.tasks_lm_eval.task_files import write_task_files
from cascade.evaluation.tasks_lm_eval.task_options import HarnessOptions, TaskOptions
from cascade.models.checkpoint.load import load_model, load_tokenizer, resolve_model
from cascade.runtime.errors import UserError

TASK = """\
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: [rows/a.jsonl, rows/b.jsonl]}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{a}}"
doc_to_choice: "{{[b, c]}}"
doc_to_target: 0
target_delimiter: ""
description: "yes: 'no', 012\\n"
metric_list: [{metric: acc}]
metadata: {version: 1}
"""


@pytest.fixture
def task_folder(tmp_path):
    folder = tmp_path / "mine"
    (folder / "rows").mkdir(parents=True)
    for name in "ab":
        rows = ({"a": f"x = {n}", "b": " + 1", "c": f" {name}~"} for n in range(6))
        (folder / "rows" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sums.yaml").write_text(TASK)
    return folder


def test_stock_lm_eval_gives_from_the_copies_what_the_run_measured(task_folder, tmp_path, monkeypatch):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    names = ["sums", "python_minimal_pairs"]
    source = resolve_model("builtin:pico-python")
    model, tokenizer = load_model(source), load_tokenizer(source)
    measured = run_tasks(
        model, tokenizer, TaskOptions(names=names, folders=[task_folder], harness=HarnessOptions(limit=10))
    )
    run = tmp_path / "run"
    write_task_files(run, names, [task_folder])
    monkeypatch.chdir("/")
    manager = TaskManager(include_path=str(run / "tasks"), include_defaults=False)
    assert set(names) <= set(manager.all_tasks)
    adapter = HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=16, max_length=model.config.max_position_embeddings
    )
    found = simple_evaluate(model=adapter, tasks=names, limit=10, bootstrap_iters=0, task_manager=manager)
    for name in names:
        ours = next(metric.value for metric in measured.metrics if (metric.task, metric.metric) == (name, "acc"))
        assert found["results"][name]["acc,none"] == ours


def test_what_members_are_published_with_names_no_place_on_this_machine(tiny_family):
    for path in tiny_family.glob("members/*/lm_eval.json"):
        raw = json.loads(path.read_text())
        config = raw["configs"]["python_minimal_pairs"]
        assert config["dataset_kwargs"]["data_files"] == {"test": "python_minimal_pairs.jsonl.gz"}
        assert "/" not in raw["config"]["model"] and str(tiny_family) not in path.read_text()


def test_a_run_has_copies_of_the_tasks_that_it_measured(tiny_family):
    assert [path.name for path in (tiny_family / "tasks").iterdir()] == ["python_minimal_pairs.yaml"]


def test_copies_of_tasks_that_are_no_longer_asked_for_go_and_lm_evals_own_need_none(task_folder, tmp_path, monkeypatch):
    run = tmp_path / "run"
    write_task_files(run, ["sums"], [task_folder])
    assert [path.name for path in (run / "tasks").iterdir()] == ["sums.yaml"]
    (again,) = find_tasks(["sums"], [run / "tasks"])
    assert again == find_tasks(["sums"], [task_folder])[0]
    monkeypatch.setattr("cascade.evaluation.tasks_lm_eval.task_files.find_tasks", lambda names, folders: ["arc_easy"])
    write_task_files(run, ["arc_easy"], [])
    assert not (run / "tasks").exists()


def test_a_folder_of_data_that_lm_eval_would_look_for_elsewhere_is_refused(task_folder):
    text = TASK.replace("{data_files: {test: [rows/a.jsonl, rows/b.jsonl]}}", "{data_dir: rows}")
    (task_folder / "sums.yaml").write_text(text)
    with pytest.raises(UserError, match="data_dir: rows is looked for where lm-eval is started"):
        find_tasks(["sums"], [task_folder])
