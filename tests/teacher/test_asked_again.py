"""What is answered already is neither announced, nor paid for, nor does it need a key."""

import json

import pytest
from endpoint_server import serving
from test_generate import NUMBERS, WRITTEN

from cascade.pipeline.run import run_generate
from cascade.planning.preview import preview
from cascade.planning.preview_text import preview_text
from cascade.recipe.load import load_recipe
from cascade.runtime.errors import UserError

PRICE = "budget: {price_per_million_answer: 1000000}"


def recipe_for(tmp_path, parent, url):
    (tmp_path / "w.yaml").write_text(WRITTEN.format(parent=parent, numbers=NUMBERS))
    endpoint = f"{{url: '{url}', model: m, api: completions, key_env: LOCAL_KEY, {PRICE}}}"
    return load_recipe(tmp_path / "w.yaml", [f"generate.endpoint={endpoint}"])


def answer(body, number):
    return 200, {}, {"choices": [{"text": f"words of answer {number}", "finish_reason": "stop"}]}


def test_a_plan_announces_the_answers_that_are_missing_and_asks_for_a_key_for_them_alone(
    tiny_parent, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    monkeypatch.setenv("LOCAL_KEY", "none")
    with serving(answer) as (url, received):
        recipe = recipe_for(tmp_path, tiny_parent, url)
        fresh = preview(recipe, folder)["generate"]
        assert (fresh["answers"], fresh["missing"], fresh["money"]) == (640, 640, 640 * 24.0)
        made = run_generate(recipe, output=folder)
        assert made["answers"] == len(received) == 640
        monkeypatch.delenv("LOCAL_KEY")
        finished = preview(recipe, folder)
        assert (finished["generate"]["missing"], finished["generate"]["money"]) == (0, 0.0)
        assert "640 answers of at most 24 tokens" in preview_text(finished)
        assert "which are there already: nothing is asked." in preview_text(finished)
        lines = (folder / "answers" / "answers.jsonl").read_text().splitlines()
        for stage in (folder / "stages").glob("parent.generate-*"):
            stage.rename(folder / "stages" / f"removed-{stage.name}")
        assert preview(recipe, folder)["generate"]["missing"] == 0  # by the answers alone
        run_generate(recipe, output=folder)
        assert len(received) == 640
        for stage in (folder / "stages").glob("parent.generate-*"):
            stage.rename(folder / "stages" / f"again-{stage.name}")
        (folder / "answers" / "answers.jsonl").write_text("\n".join(lines[:600]) + "\n")
        with pytest.raises(UserError, match="the environment variable LOCAL_KEY is not set"):
            preview(recipe, folder)
        monkeypatch.setenv("LOCAL_KEY", "none")
        part = preview(recipe, folder)
    assert (part["generate"]["missing"], part["generate"]["money"]) == (40, 40 * 24.0)
    assert "; 40 are not there yet, for at most 960.00" in preview_text(part)


def test_a_dataset_that_is_made_asks_for_nothing_also_where_prompts_were_refused(tiny_parent, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_KEY", "none")

    def respond(body, number):
        return (400, {}, {"error": {"message": "flagged"}}) if number % 50 == 7 else answer(body, number)

    with serving(respond) as (url, _):
        recipe = recipe_for(tmp_path, tiny_parent, url)
        made = run_generate(recipe, output=tmp_path / "run")
        assert made["dropped (refused)"] == 13
        assert preview(recipe, tmp_path / "run")["generate"]["missing"] == 0


def test_a_teacher_heres_answers_are_counted_too(tiny_parent, tmp_path):
    (tmp_path / "w.yaml").write_text(WRITTEN.format(parent=tiny_parent, numbers=NUMBERS))
    recipe = load_recipe(tmp_path / "w.yaml", ["generate.max_new_tokens=4"])
    run_generate(recipe, output=tmp_path / "run")
    path = tmp_path / "run" / "answers" / "answers.jsonl"
    for stage in (tmp_path / "run" / "stages").glob("parent.generate-*"):
        stage.rename(stage.with_name(f"removed-{stage.name}"))
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[:-9]))
    assert preview(recipe, tmp_path / "run")["generate"]["missing"] == 9
    assert json.loads(path.read_text().splitlines()[0])["finish_reason"] in ("stop", "length")
