"""What the README shows is what the program does."""

import re

from conftest import ROOT
from readme_commands import commands

README = (ROOT / "README.md").read_text()


def test_the_first_two_commands_are_the_ones_promised():
    lines = commands(README).splitlines()
    assert lines[:2] == [
        "pip install . && cascade run recipes/quickstart.yaml",
        'pip install -e ".[test]" && pytest',
    ]


def test_the_python_example_runs_as_printed():
    (example,) = re.findall(r"^```python\n(.*?)^```", README, flags=re.S | re.M)
    example = example.replace("num_tokens=100_000", "num_tokens=1024")
    names = {"my_texts": [f"def function_{n}(value):\n    return value + {n}\n" for n in range(2000)]}
    exec(compile(example, "README.md", "exec"), names)
    size = names["student"].num_parameters() / names["parent"].num_parameters()
    assert 0.48 <= size <= 0.5 and names["metrics"].num_tokens == 1024


def test_the_recipe_example_is_valid(tmp_path):
    from cascade.recipe.load import load_recipe
    from cascade.store.strict_yaml import read_yaml, write_yaml

    example, section, generated, classified, finished, other = re.findall(
        r"^```yaml\n(.*?)^```", README, flags=re.S | re.M
    )
    (tmp_path / "other.yaml").write_text(other)
    (tmp_path / "mine.yaml").write_text(example + section)
    load_recipe(tmp_path / "mine.yaml")
    for block in (generated, classified, finished):
        (tmp_path / "block.yaml").write_text(block)
        changed = read_yaml(tmp_path / "mine.yaml").data | read_yaml(tmp_path / "block.yaml").data | {"prune": {}}
        (tmp_path / "changed.yaml").write_text(write_yaml(changed | {"baselines": ["cut"]}))
        assert load_recipe(tmp_path / "changed.yaml").members
    whole = read_yaml(tmp_path / "mine.yaml").data | read_yaml(tmp_path / "other.yaml").data
    (tmp_path / "mine.yaml").write_text(write_yaml(whole))
    assert [member.name for member in load_recipe(tmp_path / "mine.yaml").members] == [
        "mine-60",
        "mine-30",
        "wide",
        "other",
        "new",
        "shallow",
    ]


def test_every_link_into_the_repository_leads_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
