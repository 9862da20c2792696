"""What the README shows is what the program does."""

import json
import re
import sys

from conftest import ROOT
from readme_commands import commands

from cascade.recipe.load import load_recipe

sys.path.insert(0, str(ROOT / "tests" / "tools"))
import draw_family

README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.S | re.M)


def rows_of_table(text, first_column):
    """The cells of each table row whose first cell matches."""
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [row for row in rows if re.fullmatch(first_column, row[0])]


def test_the_first_two_commands_are_the_ones_promised():
    lines = commands(README).splitlines()
    assert lines[:2] == [
        "pip install . && cascade run recipes/quickstart.yaml",
        'pip install -e ".[test]" && pytest',
    ]


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150 and len(README.split()) <= 900


def test_the_python_example_runs_as_printed():
    (example,) = blocks("python")
    example = example.replace("num_tokens=100_000", "num_tokens=1024")
    names = {"my_texts": [f"def function_{n}(value):\n    return value + {n}\n" for n in range(2000)]}
    exec(compile(example, "README.md", "exec"), names)
    size = names["student"].num_parameters() / names["parent"].num_parameters()
    assert 0.48 <= size <= 0.5 and names["metrics"].num_tokens == 1024


def test_the_recipe_example_is_valid(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(next(text for text in blocks("yaml") if text.startswith("name: mine")))
    recipe = load_recipe(path)
    assert [(member.name, member.target.params, member.seed) for member in recipe.members] == [
        ("mine-60", 0.6, "previous"),
        ("mine-30", 0.3, "previous"),
    ]
    assert recipe.distill.tokens == 20_000_000 and recipe.data.train == [str(tmp_path / "corpus.jsonl.gz")]


def test_the_table_of_results_is_what_the_experiment_measured():
    folder = ROOT / "recipes" / "experiments" / "results" / "stories"
    measured = {}
    for arm, kinds in {"default": ("member", "ce"), "direct": ("member",), "minitron": ("member",)}.items():
        for row in json.loads((folder / f"{arm}-s0-400000.json").read_text())["rows"]:
            if row["kind"] in kinds:
                (divergence,) = [part["value"] for part in row["metrics"] if part["metric"] == "kl_to_teacher"]
                size = re.search(r"stories-(\d+)", row["name"]).group(1)
                measured.setdefault(f"{size}%", {})[arm, row["kind"]] = f"{divergence:.3f}"
    columns = [("default", "member"), ("default", "ce"), ("direct", "member"), ("minitron", "member")]
    assert [row[0] for row in rows_of_table(README, r"\d+%")] == ["60%", "35%", "20%", "10%"]
    for size, *cells in rows_of_table(README, r"\d+%"):
        assert cells == [measured[size][column] for column in columns]


def test_the_quickstarts_table_says_what_the_page_of_results_says():
    results = (ROOT / "docs" / "results.md").read_text()
    printed = re.findall(
        r"^(pico-\d+|parent) +([\d,]+) +(\d+%) .*?(?:(\d\.\d+) ± [\d.]+ +)?(\d\.\d+) ± [\d.]+ \((\d+%)",
        README,
        flags=re.M,
    )
    assert [name for name, *_ in printed] == ["parent", "pico-60", "pico-35", "pico-20"]
    for name, parameters, share, divergence, accuracy, retention in printed:
        (row,) = rows_of_table(results, re.escape(name))
        assert row[1] == f"{parameters} ({share})" and row[4].split(" ")[0] == accuracy
        assert retention == "100%" if name == "parent" else f"({retention})" in row[4]
        assert not divergence if name == "parent" else abs(float(row[2].split(" ")[0]) - float(divergence)) <= 0.0051


def test_the_picture_is_drawn_from_the_results():
    assert draw_family.PICTURE.read_text() == draw_family.picture(), "run python tests/tools/draw_family.py"


def test_the_pictures_are_there_and_light():
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert "docs/images/stories.svg" in pictures
    assert all((ROOT / picture).stat().st_size < 200_000 for picture in pictures)


def test_the_rooms_are_the_folders_of_the_package():
    (rooms,) = [text for text in blocks("text") if text.startswith("cli ")]
    folders = [path.name for path in (ROOT / "cascade").iterdir() if (path / "__init__.py").is_file()]
    assert sorted(line.split()[0] for line in rooms.splitlines()) == sorted(folders)
