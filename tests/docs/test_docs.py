"""What README and docs/ show holds: links, recipes, commands, Python, the paths and tests that they name."""

import ast
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from conftest import ROOT

from cascade.cli.main import main
from cascade.recipe.experiment import load_experiment
from cascade.recipe.load import load_recipe
from cascade.store.stage_table import REMAKE_POINTS
from cascade.store.strict_yaml import read_yaml, write_yaml

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
"""Pages of docs/ that are written beside these; they may be missing until both are merged."""

PART = "# part of a recipe"
"""How the pages of docs/ mark YAML that is no whole recipe."""
WHOLE = {
    "name": "mine",
    "parent": "./my-model",
    "data": {"source": "files", "train": "corpus.jsonl.gz"},
    "members": [
        {"name": "mine-60", "target": {"params": 0.6}},
        {"name": "mine-30", "target": {"params": 0.3}},
    ],
    "distill": {"tokens": 1000},
}
"""What a part of a recipe is laid into."""
STANDS_ALONE = {"data": ("source",), "distill": ("tokens", "examples")}
"""Sections that replace those of WHOLE where they have one of these keys; others are added to them."""

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, *languages: str) -> list[str]:
    """The page's code blocks in these languages."""
    fence = re.compile(rf"^```(?:{'|'.join(languages)})\n(.*?)^```", flags=re.S | re.M)
    return fence.findall(page.read_text())


def anchors(page: Path) -> set[str]:
    """What the page's headings are called in links, as GitHub does it."""
    names: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?) *$", without_code_blocks(page), flags=re.M):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        same = sum(other == name or re.fullmatch(rf"{re.escape(name)}-\d+", other) is not None for other in names)
        names.add(f"{name}-{same}" if same else name)
    return names


def without_code_blocks(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)


@pages
def test_every_link_of_a_page_leads_to_a_file_and_to_a_heading_of_it(page):
    dead = []
    for link in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", without_code_blocks(page)):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists():
            dead.append(link)
        elif anchor and anchor not in anchors(target):
            dead.append(link)
    assert not dead


def test_every_page_can_be_reached_from_the_first_one():
    seen: set[Path] = set()
    waiting = [DOCS / "index.md"]
    while waiting:
        page = waiting.pop()
        if page in seen or not page.is_file():
            continue
        seen.add(page)
        links = re.findall(r"\]\((?!https?:)([^)#\s]+\.md)", page.read_text())
        waiting += [(page.parent / link).resolve() for link in links]
    assert set(DOCS.rglob("*.md")) <= seen


def laid_into_a_recipe(part: dict[str, object]) -> dict[str, object]:
    """A whole recipe with the sections of `part`."""
    recipe = dict(WHOLE)
    for name, section in part.items():
        before = recipe.get(name)
        alone = not isinstance(before, dict) or any(key in section for key in STANDS_ALONE.get(name, ()))
        recipe[name] = section if alone else before | section
    return recipe


@pages
def test_every_recipe_of_a_page_is_one_that_the_program_takes(page, tmp_path):
    for text in blocks(page, "yaml", "yml"):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        part = read_yaml(path).data
        if "arms" in part:
            load_experiment(path)
            continue
        if "name" not in part:
            assert page.parent == ROOT or text.startswith(PART), f"not marked with `{PART}`:\n{text}"
            path.write_text(write_yaml(laid_into_a_recipe(part)))
        assert load_recipe(path).members or "pretrain" in text


def test_a_part_with_a_wrong_key_is_refused(tmp_path):
    from cascade.runtime.errors import RecipeError

    (tmp_path / "recipe.yaml").write_text(write_yaml(laid_into_a_recipe({"prune": {"layer": "block_influence"}})))
    with pytest.raises(RecipeError, match="unknown key 'layer'"):
        load_recipe(tmp_path / "recipe.yaml")


def shell_lines(text: str) -> Iterator[str]:
    """Each simple command of a shell block, continued lines joined."""
    for line in text.replace("\\\n", " ").splitlines():
        yield from (part.strip() for part in re.split(r"&&|\|\||;|(?<!\|)\|(?!\|)", line) if part.strip())


def cascade_words(line: str) -> list[str]:
    """The words after `cascade`, by whatever it is started; empty where the line runs something else."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    if words[:1] == ["cascade"]:
        return words[1:]
    for place in range(len(words) - 1):
        if words[place : place + 2] == ["-m", "cascade"]:
            return words[place + 2 :]
    return []


def parsed(words: list[str]) -> dict[str, object]:
    """The values that click reads from the words, without running anything.

    Raises:
        click.UsageError: the command, an option or a value is none that the program takes.
    """
    command: click.Command = main
    while isinstance(command, click.Group):
        name = words[0] if words else ""
        if name in ("--help", "-h", "--version"):
            return {}
        if name not in command.commands:
            raise click.UsageError(f"no such command: {name or '(none)'}")
        command, words = command.commands[name], words[1:]
    context = click.Context(command)
    values, rest, _ = command.make_parser(context).parse_args(list(words))
    if rest:
        raise click.UsageError(f"too many words: {rest}")
    for parameter in command.params:
        given = isinstance(values.get(parameter.name), str | list | tuple | bool | int)
        if parameter.required and not given:
            raise click.UsageError(f"{parameter.name} is missing")
        if given and not isinstance(parameter.type, click.Path):
            values[parameter.name] = parameter.type_cast_value(context, values[parameter.name])
    return values


@pages
def test_every_command_of_a_page_is_one_that_the_program_takes(page, tmp_path):
    plain = tmp_path / "mine.yaml"
    plain.write_text(write_yaml(WHOLE | {"finish": [{"quantise": "int8"}]}))
    for text in blocks(page, "bash", "sh"):
        for line in shell_lines(text):
            words = cascade_words(line)
            if not words:
                continue
            values = parsed(words)
            named = ROOT / str(values.get("recipe") or values.get("file") or "none.yaml")
            in_the_repository = named.is_relative_to(ROOT / "recipes")
            assert named.is_file() or not in_the_repository, line
            if values.get("overrides"):
                load_recipe(named if in_the_repository else plain, values["overrides"])
            assert values.get("from_stage") in (None, *REMAKE_POINTS), line


@pytest.mark.parametrize(
    "words",
    [["run", "a.yaml", "--fast"], ["bake"], ["cache", "info", "x"], ["distill", "m", "--tokens", "few"], ["run"]],
)
def test_commands_that_the_program_does_not_take_are_noticed(words):
    with pytest.raises(click.UsageError):
        parsed(words)


@pages
def test_scripts_and_tests_that_the_shell_blocks_of_a_page_name_are_there(page):
    for text in blocks(page, "bash", "sh", "text"):
        for path in re.findall(r"(?<![\w/.-])(?:tests|notebooks|recipes)/[\w./-]+\.\w+", text):
            assert (ROOT / path).exists(), path


@pages
def test_the_tests_and_files_that_a_page_names_are_there(page):
    text = without_code_blocks(page)
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert not [name for name in re.findall(r"`(test_\w+)`", text) if f"def {name}(" not in sources]
    assert not [path for path in re.findall(r"`((?:tests|recipes|docs)/[\w./-]+)`", text) if not (ROOT / path).exists()]


@pages
def test_the_modules_that_a_page_names_are_there(page):
    named = re.findall(r"`(cascade/[\w./-]*)`", without_code_blocks(page))
    assert not [path for path in named if not (ROOT / path).exists()]


def test_the_reliability_page_has_every_fault_that_has_a_test_and_no_other():
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    tested = {fault for name in re.findall(r"def test_((?:F\d\d_)+)", sources) for fault in name.split("_") if fault}
    rows = re.findall(r"^\| (F\d\d) \|.*\| `(test_\w+)` \|$", (DOCS / "reliability.md").read_text(), flags=re.M)
    assert {fault for fault, _ in rows} == tested
    assert all(fault in name for fault, name in rows)


def test_the_glossary_is_in_alphabetical_order_and_has_each_word_once():
    words = re.findall(r"^\*\*(.+?)\*\*", (DOCS / "glossary.md").read_text(), flags=re.M)
    assert len(words) > 40 and words == sorted(set(words), key=lambda word: word.lower().strip("`"))


@pages
def test_the_python_of_a_page_is_python(page):
    for text in blocks(page, "python"):
        ast.parse(text)


def test_the_python_guide_runs_as_printed_on_less_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {
        "my_texts": [f"def function_{n}(value):\n    return value + {n}\n" for n in range(2000)]
    }
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for number, text in enumerate(blocks(DOCS / "guides" / "python.md", "python")):
        if "run_recipe(" in text:  # a family takes minutes: the test below reads one instead
            continue
        exec(compile(re.sub(r"\b\d+_000\b", "1024", text), f"python.md, block {number}", "exec"), names)
    size = names["student"].num_parameters() / names["parent"].num_parameters()
    assert 0.48 <= size <= 0.5 and names["metrics"].num_tokens == 1024
    assert json.loads((tmp_path / "half" / "config.json").read_text())["num_hidden_layers"] <= 6
