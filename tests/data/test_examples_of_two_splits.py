"""Held-out examples are not trained on, wherever else they stand; the same rows are told once."""

import json
import logging

import pytest
import torch

from cascade.data.bad_rows import BadRows, tell_once
from cascade.data.examples import LabelledData, class_names, read_examples
from cascade.data.rows import Place
from cascade.data.sources import TextData
from cascade.evaluation.heldout import HELDOUT
from cascade.runtime.errors import UserError


def write(path, numbers):
    path.write_text("".join(json.dumps({"text": f"text {n}", "label": n % 2}) + "\n" for n in numbers))
    return (str(path),)


def texts(data, split):
    return [one.content for one in read_examples(data, split)]


def test_heldout_examples_that_stand_among_the_training_files_are_left_out_and_counted(tmp_path, caplog):
    files = {
        "train": write(tmp_path / "train.jsonl", range(100)),
        "selection": write(tmp_path / "selection.jsonl", range(90, 110)),
        "heldout": write(tmp_path / "heldout.jsonl", range(80, 100)),
    }
    data = LabelledData(TextData("files", files), False, unlabelled=write(tmp_path / "more.jsonl", range(85, 120)))
    with caplog.at_level(logging.WARNING):
        train, selection, heldout = (texts(data, split) for split in ("train", "selection", HELDOUT))
        read_examples(data, "train")
    assert heldout == [f"text {n}" for n in range(80, 100)]
    assert selection == [f"text {n}" for n in range(100, 110)]
    assert [f"text {n}" for n in range(110, 120)] == train[-10:]  # unlabelled
    assert not set(train) & {*selection, *heldout}
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 3 and all("stand in the files of a later split" in one for one in told)
    assert told[0].startswith("data.train: ") and told[1].startswith("data.unlabelled: 25 of 35 examples ")
    assert told[2].startswith("data.selection: 10 of 20 examples ")


def test_a_training_file_that_is_the_heldout_file_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", range(50))
    data = LabelledData(TextData("files", {"train": path, "heldout": path}), False)
    with pytest.raises(UserError, match="no examples for the train split that are not in another"):
        class_names(data)


def test_images_of_two_splits_belong_to_one(tmp_path):
    rows = [{"image": [[n, n], [n, n + 1]], "label": n % 2} for n in range(60)]
    for name, some in (("train", rows), ("heldout", rows[40:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    files = {name: (str(tmp_path / f"{name}.jsonl"),) for name in ("train", "heldout")}
    data = LabelledData(TextData("files", files), True)
    train, heldout = read_examples(data, "train"), read_examples(data, HELDOUT)
    assert len(heldout) == 20
    assert not any(torch.equal(one.content, other.content) for one in train for other in heldout)


def test_messages_name_the_key_of_the_file(tmp_path):
    files = {"train": write(tmp_path / "a.jsonl", range(20)), "heldout": (str(tmp_path / "b.jsonl"),)}
    data = LabelledData(TextData("files", files), False)
    (tmp_path / "b.jsonl").write_text('{"text": "a", "label": -1}\n')
    with pytest.raises(UserError, match=r"^data.heldout: .*b.jsonl:1: the label -1 marks"):
        read_examples(data, HELDOUT)
    (tmp_path / "b.jsonl").write_text('{"body": "a", "label": 1}\n')
    with pytest.raises(UserError, match=r"^data.heldout: .*b.jsonl: no field 'text'"):
        read_examples(data, HELDOUT)


def test_the_same_bad_rows_are_told_once_in_a_process(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            bad = BadRows(most=1.0)
            bad.read(Place(str(tmp_path), 1, "line"))
            bad.skip(Place(str(tmp_path), 1, "line"), "is null")
            bad.require_few([str(tmp_path)])
            tell_once(logging.getLogger("cascade"), f"{tmp_path} again")
    assert len(caplog.records) == 2
