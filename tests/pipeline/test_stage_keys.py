"""Names and keys of stages are names of folders on users' disks: what they finished with stays finished."""

import hashlib
import json

import pytest
from rich.console import Console

from cascade.pipeline.runner import StageRunner
from cascade.pipeline.stage_output import Checkpoint, Made
from cascade.runtime.progress import RunProgress
from cascade.store.stage_table import REMAKE_POINTS, STAGES

KEYS = {
    "pretrain": "ff1f24b51ae8bf67",
    "fit": "536230f8124a9542",
    "convert": "968c5a810a2741a1",
    "generate": "c07f1a02cd73c497",
    "framing": "acec580fa7947f91",
    "data": "468d59e388c6d0c6",
    "heldout": "d65c83153220eb49",
    "production": "4f67e98c20878076",
    "statistics": "46a1d3bccf429971",
    "candidate": "1850d4ab645b4ae3",
    "finalist": "743eb5a1c63a7c3a",
    "init": "1d0a0c9ecaad43c5",
    "prune": "c6bb50b4f9e4ec08",
    "repair": "2cb5f9e182a23b3c",
    "label": "706452d87a8f67f2",
    "rate": "e69193f4b748f750",
    "ce-rate": "a012474dccf9b6f0",
    "distill": "0a0d0d74910dba9e",
    "evaluate": "902fca0eac75af64",
    "drift": "e24e6149cfdf843a",
    "baseline-ce": "902f4909b5a1c7eb",
    "heldout-cut": "0ac2335d1fb24397",
    "heldout-repaired": "6935e60de6aa482c",
    "heldout-ce": "be3879fcb011c23b",
    "quantise": "3d4319de42dbc268",
    "evaluate-quantised": "da8efeacd3a56385",
}
"""Of settings {seed: 1, dims: {hidden_size: 48}} and inputs whose digests are d1 and c1."""

RECORDS = {
    "parent.data": "4998510de8096f45",
    "parent.evaluate": "adcf36c0abf36aa7",
    "parent.statistics": "b836036d693b5a6c",
    "big.statistics": "b836036d693b5a6c",
    "big.candidate": "97f3536d35822840",
    "big.prune": "6710c277fcda5386",
    "big.repair": "91bc118f3eec169a",
    "big.distill": "4770e8b5c389d36f",
    "big.baseline-ce": "1bf08904c1cf9ea6",
    "big.evaluate": "ab6e3eb670cdc2f2",
    "big.heldout-cut": "927bebb524eb80b8",
    "big.heldout-repaired": "c1958377350c8cf6",
    "big.heldout-ce": "1643fa624ac08d72",
}
"""Of what the tiny family's stages depend on, without shapes and digests, which a machine's arithmetic may change."""

READ = {
    "big.candidate": {"statistics": "parent.statistics", "data": "parent.data"},
    "big.prune": {"statistics": "parent.statistics", "data": "parent.data"},
    "big.repair": {"cut": "big.prune", "data": "parent.data"},
    "big.distill": {"start": "big.repair", "data": "parent.data"},
    "big.baseline-ce": {"start": "big.repair", "data": "parent.data"},
    "big.evaluate": {"checkpoint": "big.distill", "parent_evaluation": "parent.evaluate", "data": "parent.data"},
    "big.heldout-cut": {"checkpoint": "big.prune"},
    "big.heldout-repaired": {"checkpoint": "big.repair"},
    "big.heldout-ce": {"checkpoint": "big.baseline-ce"},
    "small.candidate": {"seed": "big.distill", "statistics": "big.statistics"},
    "small.repair": {"seed": "big.distill", "cut": "small.prune"},
}
"""Stage -> its inputs, each with the stage that has made it."""


def folders_of(run, name):
    return [folder for folder in run.glob(f"stages/{name}-*") if folder.name.rpartition("-")[0] == name]


def manifest_of(folder):
    return json.loads((folder / "MANIFEST.json").read_text())


@pytest.mark.parametrize("stage", KEYS)
def test_the_same_settings_and_inputs_give_the_folder_that_they_always_gave(stage, tmp_path):
    settings, inputs = {"seed": 1, "dims": {"hidden_size": 48}}, {"data": Made(tmp_path, "d1"), "checkpoint": "c1"}
    with RunProgress(Console(quiet=True), "r", {}) as progress:
        output = StageRunner(tmp_path, progress).make(
            stage, "half", settings=settings, inputs=inputs, write=lambda folder, on_step: None
        )
    assert output.folder == tmp_path / "stages" / f"half.{stage}-{KEYS[stage]}"


def test_the_stages_are_those_whose_keys_are_pinned_and_each_is_remade_from_a_point_of_from():
    assert STAGES.keys() == KEYS.keys()
    assert all(stage.name == name and stage.remade_from in ("", *REMAKE_POINTS) for name, stage in STAGES.items())


@pytest.mark.parametrize("name", RECORDS)
def test_a_familys_stages_depend_on_what_they_always_did(tiny_family, name):
    folders = folders_of(tiny_family, name)
    assert folders
    for folder in folders:
        manifest = manifest_of(folder)
        values = {key: value for key, value in manifest["settings"].items() if key not in ("dims", "hidden")}
        record = [manifest["stage"], sorted(manifest["settings"]), values, sorted(manifest["inputs"])]
        assert hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16] == RECORDS[name]


@pytest.mark.parametrize("name", READ)
def test_a_stage_depends_on_the_content_of_what_it_reads(tiny_family, name):
    from cascade.store.commits import output_digest

    for folder in folders_of(tiny_family, name):
        inputs = manifest_of(folder)["inputs"]
        for key, origin in READ[name].items():
            (read,) = folders_of(tiny_family, origin)
            assert inputs[key] == output_digest(read)


def test_an_input_is_its_digest_whatever_it_is(tmp_path):
    output = Made(tmp_path, "d1")
    with RunProgress(Console(quiet=True), "r", {}) as progress:
        runner = StageRunner(tmp_path, progress)
        (a, b, c) = (
            runner.make("prune", "half", settings={}, inputs={"seed": value}, write=lambda folder, on_step: None)
            for value in (output, output.model("half"), "d1")
        )
    assert a == b == c and output.model("half") == Checkpoint(output.model("half").source, "d1")
