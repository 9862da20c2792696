"""Records hold what trainings read and no more; those of older versions are read, and added to, as they are."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from conftest import make_blocks, make_model
from test_cache import SAMPLED, TOP_K, labelled, records

from cascade.data.token_targets import DrawnTargets, ListedTargets
from cascade.pipeline.kept_targets import open_cache
from cascade.planning.cache_choice import Choice, bytes_per_token
from cascade.recipe.load import load_recipe
from cascade.teacher.targets.reader import CachedTargets
from cascade.teacher.targets.record import Layout

EXACT = dataclasses.replace(SAMPLED, exact_ids=(0, 7))


@pytest.mark.parametrize(("layout", "spared"), [(SAMPLED, 6), (EXACT, 6), (TOP_K, 4)])
def test_a_token_takes_six_bytes_less_of_a_sample_and_four_less_of_the_likeliest(tmp_path, layout, spared):
    teacher, blocks, earlier = make_model(), make_blocks(6), dataclasses.replace(layout, version=1)
    own, old = (labelled(tmp_path / str(one.version), one, teacher, blocks) for one in (layout, earlier))
    new_records, old_records = records(own), records(old)
    tokens = blocks.block_size - 1
    for key, record in new_records.items():
        # The draws differ with the root, and with them the ids by a few bytes.
        assert len(old_records[key]) - len(record) == pytest.approx(spared * tokens, abs=0.5 * tokens)
    assert bytes_per_token(earlier) - bytes_per_token(layout) == pytest.approx(spared)


@pytest.mark.parametrize("layout", [SAMPLED, EXACT, TOP_K])
def test_all_of_what_is_kept_is_read_by_the_training_and_the_same_from_older_records(tmp_path, layout, monkeypatch):
    # The same draws whatever the root is called.
    monkeypatch.setattr(
        "cascade.teacher.targets.label.shifts", lambda root, key, count: torch.linspace(0, 0.99, count).double()
    )
    teacher, blocks, found = make_model(), make_blocks(4), []
    for version in (1, 2):
        one = dataclasses.replace(layout, version=version)
        windows = labelled(tmp_path / str(version), one, teacher, blocks)
        found.append(CachedTargets(windows, one, blocks).read(torch.arange(4)))
    old, new = found
    assert isinstance(new, DrawnTargets | ListedTargets)
    for field in dataclasses.fields(new):
        assert torch.equal(getattr(old, field.name), getattr(new, field.name))
    assert {field.name for field in dataclasses.fields(DrawnTargets)} == {"ids", "shares", "entropy"}


def test_a_training_does_not_depend_on_how_its_targets_are_packed():
    for layout in (SAMPLED, TOP_K):
        earlier = dataclasses.replace(layout, version=1)
        assert layout.content() == earlier.content() == earlier.as_dict() != layout.as_dict()
    hidden = Layout("hidden", 64, hidden_size=8, dtype="bfloat16")
    assert "version" not in hidden.as_dict()  # these records are as they were


def test_a_run_reads_on_what_an_older_version_has_kept_of_its_teacher(recipe_folder, tiny_parent, tmp_path):
    recipe = load_recipe(recipe_folder / "tiny.yaml", [f"distill.cache={{kind: sampled, folder: {tmp_path / 'kept'}}}"])
    parent = SimpleNamespace(folder=tiny_parent, reference="tiny", gguf_file=None)

    def opened(layout):
        return open_cache(recipe, Choice(layout, "as the recipe says", 0, 0, []), parent)

    layout = Layout("sampled", 2048, draws=38)
    first = opened(layout)
    assert first.layout.version == 2 and not list(first.windows.folder.glob("*.safetensors"))
    older = dataclasses.replace(layout, version=1)
    blocks, teacher = make_blocks(2, vocabulary=2048), make_model(vocab_size=2048)
    before = opened(older)
    before.label(teacher, blocks, torch.arange(2), None)
    again = opened(layout)
    assert again.layout.version == 1 and again.windows.root == before.windows.root and len(again.windows) == 2
    assert again.settings() == first.settings()
