"""Whose terms a student is under: found, carried along, and asked about."""

import json
from shutil import copytree

import pytest
from endpoint_server import chat_answer, serving

from cascade.models.checkpoint.load import BUILTIN_FOLDER
from cascade.pipeline.run import run_generate, run_recipe
from cascade.planning.preview import preview
from cascade.recipe.licences import TERMS, endpoint_terms, licence_of
from cascade.recipe.load import load_recipe
from cascade.runtime.errors import UserError


@pytest.mark.parametrize(
    ("file", "text", "licence"),
    [
        ("README.md", "---\nlicense: apache-2.0\nlanguage: en\n---\n# Model", "apache-2.0"),
        ("README.md", "---\nlicense: other\nlicense_name: llama3.1\n---\n", "llama3.1"),
        ("README.md", '---\nlicense: "Llama2"\n---\n', "llama2"),
        ("README.md", "# license: gpl\nno head at all", ""),
        ("README.md", "---\nlicense: x`y\n---\n", "x"),
        ("README.md", "---\nlicense:\n- gemma\nlanguage: en\n---\n", "gemma"),
        ("README.md", "---\nlicense:\nlibrary_name: transformers\n---\n", ""),
        ("LICENSE", "                 Apache License\n           Version 2.0", "apache-2.0"),
        ("LICENSE.txt", "META LLAMA 3 COMMUNITY LICENSE AGREEMENT\n", "llama3"),
        ("LICENSE", "All of it is mine.", ""),
    ],
)
def test_a_folders_licence_is_what_its_card_or_its_licence_file_says(tmp_path, file, text, licence):
    (tmp_path / file).write_text(text)
    assert licence_of(tmp_path) == licence


def test_the_built_in_models_licence_is_found():
    assert licence_of(BUILTIN_FOLDER / "pico-python") == "apache-2.0"


@pytest.mark.parametrize(
    ("url", "terms"),
    [
        ("https://api.openai.com/v1", "openai"),
        ("https://mine.openai.azure.com/openai/v1", "openai"),
        ("https://notopenai.com/v1", ""),
        ("http://127.0.0.1:8000/v1", ""),
    ],
)
def test_an_endpoints_terms_go_by_its_host(url, terms):
    assert endpoint_terms(url) == terms and (not terms or terms in TERMS)


@pytest.fixture
def parent(tiny_parent, tmp_path):
    def with_licence(licence):
        folder = copytree(tiny_parent, tmp_path / licence)
        (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
        return folder

    return with_licence


def test_terms_are_asked_about_before_anything_is_done_and_carried_along_once_acknowledged(
    recipe_folder, parent, tmp_path
):
    changes = [f"parent={parent('gemma')}", "members=[{name: small, target: {params: 0.5}}]", "evaluate.tasks=[]",
               "baselines=[]", "prune.repair.method=none"]  # fmt: skip
    recipe = load_recipe(recipe_folder / "tiny.yaml", changes)
    for refused in (lambda: preview(recipe, tmp_path / "run"), lambda: run_recipe(recipe, output=tmp_path / "run")):
        with pytest.raises(UserError, match=r"parent: .*: terms 'gemma': .*write `acknowledged: \[gemma\]`"):
            refused()
    assert not (tmp_path / "run" / "stages").exists()
    recipe = load_recipe(recipe_folder / "tiny.yaml", [*changes, "acknowledged=[gemma]"])
    folder = run_recipe(recipe, output=tmp_path / "run") / "members" / "small"
    card = (folder / "README.md").read_text()
    assert 'license: "gemma"' in card and "Terms: a model that is trained on its output" in card
    (origin,) = json.loads((folder / "cascade.json").read_text())["origins"]
    assert origin["licence"] == "gemma" and origin["terms"] == TERMS["gemma"].says


def test_what_is_cut_from_a_llama_may_learn_from_it_and_another_model_may_not(recipe_folder, parent):
    changes = [f"parent={parent('llama2')}", "baselines=[]", "evaluate.tasks=[]"]
    preview(load_recipe(recipe_folder / "tiny.yaml", changes))
    other = "members=[{name: other, target: {params: 0.5}, init: random}]"
    with pytest.raises(UserError, match="may not be used to improve other large language models"):
        preview(load_recipe(recipe_folder / "tiny.yaml", [*changes, other]))


def test_a_student_that_is_there_already_has_its_own_licence(recipe_folder, parent, tmp_path):
    changes = [f"parent={parent('mit')}", "baselines=[]", "evaluate.tasks=[]",
               f"members=[{{name: given, student: {parent('gemma')}}}]"]  # fmt: skip
    with pytest.raises(UserError, match="members.student: .*terms 'gemma'"):
        preview(load_recipe(recipe_folder / "tiny.yaml", changes))
    recipe = load_recipe(recipe_folder / "tiny.yaml", [*changes, "acknowledged=[gemma]"])
    card = (run_recipe(recipe, output=tmp_path / "run") / "members" / "given" / "README.md").read_text()
    assert 'license: "gemma"' in card.split("---")[1] and "`gemma`" in card and "`mit`" in card


def test_a_datasets_provenance_names_its_writers_terms(parent, tmp_path):
    prompts = "".join(json.dumps({"prompt": f"question {number}"}) + "\n" for number in range(300))
    (tmp_path / "p.jsonl").write_text(prompts)
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|endoftext|>{% endfor %}"
    folder = parent("mit")
    (folder / "chat_template.jinja").write_text(template + "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    with serving(lambda body, number: (200, {}, chat_answer(f"answer {number}"))) as (url, _):
        (tmp_path / "r.yaml").write_text(
            f"name: r\nparent: {folder}\ngenerate: {{endpoint: {{url: {url}, model: m}}, prompts: p.jsonl}}\n"
            "data: {source: generated, block_size: 16}\n"
        )
        summary = run_generate(load_recipe(tmp_path / "r.yaml"), output=tmp_path / "run")
    provenance = json.loads((tmp_path / "run" / summary["dataset"]).with_name("provenance.json").read_text())
    assert [origin["licence"] for origin in provenance["origins"]] == ["mit", ""]
    paid = "generate.endpoint.url=https://api.openai.com/v1"
    with pytest.raises(UserError, match=r"generate.endpoint: m at .*terms 'openai'.*acknowledged: \[openai\]"):
        run_generate(load_recipe(tmp_path / "r.yaml", [paid]), output=tmp_path / "other")


def test_an_acknowledged_name_that_nothing_asks_for_is_refused(recipe_folder):
    with pytest.raises(UserError, match="'lama' is none that is asked for; known: llama2"):
        load_recipe(recipe_folder / "tiny.yaml", ["acknowledged=[lama]"])
