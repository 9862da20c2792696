"""The room that a run is said to need on the disk: what it takes, neither much more nor less."""

import shutil

import pytest
from conftest import make_model

from cascade.distillation.optimizer import build_optimizer
from cascade.planning.disk_room import bytes_still_needed
from cascade.planning.estimates import MOMENT_BYTES, member_bytes
from cascade.planning.family import resolve_family
from cascade.planning.parent import parent_config
from cascade.recipe.load import load_recipe


def weights_in(*folders):
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*.safetensors"))


def test_what_is_counted_of_each_member_is_what_its_stages_hold(tiny_family, tiny_recipe):
    for member in resolve_family(tiny_recipe, parent_config(tiny_recipe)):
        kept = [one for one in tiny_family.glob(f"stages/{member.name}.*") if "statistics" not in one.name]
        held = weights_in(*(one / "checkpoint" for one in kept), tiny_family / "members" / member.name)
        assert 0.9 * held < member.disk_bytes < 1.1 * held


def test_a_finished_family_needs_nothing_more_and_an_unfinished_one_only_what_is_missing(
    tiny_family, tiny_recipe, tmp_path
):
    members = resolve_family(tiny_recipe, parent_config(tiny_recipe))
    whole = bytes_still_needed(tmp_path / "new", members)
    assert bytes_still_needed(tiny_family, members) == 0
    run = tmp_path / "run"
    shutil.copytree(tiny_family, run)
    shutil.rmtree(run / "members" / "small")
    small = members[-1]
    assert bytes_still_needed(run, members) < 1.1 * (small.disk_bytes + small.state_bytes) - small.disk_bytes / 2
    shutil.rmtree(run / "stages")
    assert bytes_still_needed(run, members) == pytest.approx(1.1 * (small.disk_bytes + small.state_bytes), abs=1)
    assert bytes_still_needed(run, members) < whole


def test_members_that_are_not_cut_or_not_repaired_need_no_room_for_it(recipe_folder, tiny_parent):
    def bytes_of(*changes):
        recipe = load_recipe(recipe_folder / "tiny.yaml", ["baselines=[]", *changes])
        return resolve_family(recipe, parent_config(recipe))[-1]

    cut = bytes_of()
    assert cut.disk_bytes == cut.sized.num_parameters * (8 + 2 * 2)  # float32 twice, then as the parent: bfloat16
    assert bytes_of("prune.repair.method=none").disk_bytes == cut.sized.num_parameters * (4 + 2 * 2)
    given = bytes_of(f"members=[{{name: given, student: {tiny_parent}}}]")
    assert given.disk_bytes == member_bytes(given.sized.num_parameters, 2, start="checkpoint", repaired=True, ce=False)
    assert given.disk_bytes == given.sized.num_parameters * 4
    assert bytes_of("distill.optimizer=adamw_8bit").state_bytes < 0.6 * cut.state_bytes
    assert bytes_of("distill.keep_states=5").state_bytes == 2 * cut.state_bytes


@pytest.mark.parametrize(
    "kind", [pytest.param(one, marks=pytest.mark.nightly) if "8bit" in one else one for one in MOMENT_BYTES]
)
def test_what_an_optimizer_is_said_to_remember_is_not_less_than_it_does(kind):
    model = make_model(vocab_size=2048, hidden_size=128, intermediate_size=256)
    optimizer = build_optimizer(kind, model, 1e-3, 0.0)
    optimizer.prepare_state()
    count = sum(weight.numel() for weight in model.parameters())
    held = sum(state.numel() * state.element_size() for _, _, state in optimizer.tensors())
    assert held < 1.05 * MOMENT_BYTES[kind] * count


@pytest.mark.parametrize("free", ["before the start", "while it runs"])
def test_a_disk_that_is_too_small_and_one_that_fills_up_give_the_same_exit_code(
    recipe_folder, tmp_path, monkeypatch, capsys, free
):
    import errno

    from cascade.cli.main import main

    if free == "before the start":
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    else:

        def full(*args):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("cascade.pipeline.run.write_task_files", full)
    with pytest.raises(SystemExit) as ended:
        main(["run", str(recipe_folder / "tiny.yaml"), "--output", str(tmp_path / "run")])
    assert ended.value.code == 75
    assert "Stopped: " in capsys.readouterr().err
