"""Which files an entry of the data stands for: no backups, no file twice, linked folders, no empty path."""

import json

import pytest

from cascade.data.examples import LabelledData, read_examples
from cascade.data.look import look_at, look_text
from cascade.data.rows import read_rows
from cascade.data.sources import TextData, read_documents
from cascade.evaluation.heldout import HELDOUT
from cascade.runtime.errors import UserError
from cascade.runtime.paths import distinct_files, files_of, ignored_files, kind_of, lead_to


def write(path, text="some text"):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"text": text, "label": "a"}) + "\n")
    return str(path)


@pytest.mark.parametrize("entry", ["", " "])
def test_an_empty_path_is_not_the_current_directory(tmp_path, monkeypatch, entry):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="data.train: an empty path"):
        files_of(entry, "data.train")
    assert lead_to(entry) == []


def test_the_end_of_a_name_says_what_a_file_holds():
    assert [kind_of(f"a{end}") for end in (".jsonl", ".json.gz", ".parquet", ".txt.xz", ".py.bz2", ".v2.md")] == [
        "JSON",
        "JSON",
        "Parquet",
        "text",
        "text",
        "text",
    ]
    for end in (".jsonl.bak", ".jsonl.sha256", ".py.orig", ".jsonl.gz.gz", ".jsonl.gz.part", ".gz", ".jsonl.zst", ""):
        assert kind_of(f"a{end}") == "", end


def test_a_folder_has_no_backups_and_a_named_backup_is_refused(tmp_path):
    for name in ("a.jsonl", "a.jsonl.bak", "a.jsonl.sha256", "run.py.orig"):
        write(tmp_path / name)
    assert files_of(str(tmp_path), "data.train") == [str(tmp_path / "a.jsonl")]
    assert len(ignored_files(str(tmp_path))) == 3
    with pytest.raises(UserError, match=r"a.jsonl.bak: unknown kind of file: its name has to end in one of .jsonl"):
        list(read_rows(str(tmp_path / "a.jsonl.bak"), ["text"], key="data.train"))


def test_zst_is_refused_by_name_also_in_a_folder(tmp_path):
    write(tmp_path / "a.jsonl")
    path = write(tmp_path / "b.jsonl.zst")
    with pytest.raises(UserError, match=r"data.train: .*b.jsonl.zst: zst is not read; gz, bz2 and xz are"):
        files_of(str(tmp_path), "data.train")
    with pytest.raises(UserError, match=r"zst is not read; gz, bz2 and xz are"):
        list(read_rows(path, ["text"]))


def test_texts_about_a_folder_are_passed_over_and_told(tmp_path):
    about = ["README.md", "LICENSE.txt", "NOTICE.md", "CHANGELOG.md", "readme_de.txt"]
    for name in [*about, "noticed.txt", "b.md"]:
        (tmp_path / name).write_text("text")
    data = TextData("files", {"train": (str(tmp_path),)})
    assert files_of(str(tmp_path), "data.train") == [str(tmp_path / "b.md"), str(tmp_path / "noticed.txt")]
    assert look_text("train", look_at(data, "train", data.files["train"], None))[1] == (
        f"data.train: 5 files are passed over, being of other kinds or about the folder: {', '.join(sorted(about))}."
    )
    assert files_of(str(tmp_path / "README.md"), "data.train") == [str(tmp_path / "README.md")]


def test_linked_folders_are_read_once_and_without_end(tmp_path):
    write(tmp_path / "far" / "b.jsonl")
    write(tmp_path / "here" / "a.jsonl")
    (tmp_path / "here" / "link").symlink_to(tmp_path / "far")
    (tmp_path / "here" / "again").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "loop").symlink_to(tmp_path / "here")
    here = tmp_path / "here"
    assert files_of(str(here), "data.train") == [str(here / "a.jsonl"), str(here / "again" / "b.jsonl")]


@pytest.mark.parametrize("more", ["a.jsonl", ".", "other/../a.jsonl", "link.jsonl", "*.jsonl"])
def test_a_file_that_two_entries_name_is_refused_with_both(tmp_path, more):
    write(tmp_path / "a.jsonl")
    (tmp_path / "other").mkdir()
    if more == "link.jsonl":
        (tmp_path / more).symlink_to(tmp_path / "a.jsonl")
    entries = (str(tmp_path / "a.jsonl"), f"{tmp_path}/{more}")
    told = r"data.train: .* is named by .*a.jsonl (and .*|twice).*would be read twice"
    with pytest.raises(UserError, match=told):
        distinct_files(entries, "data.train")
    data = TextData("files", {"train": entries})
    with pytest.raises(UserError, match=told):
        read_documents(data, "train")
    with pytest.raises(UserError, match=told):
        read_examples(LabelledData(data, False), "train")


def test_one_file_may_stand_in_two_splits_files(tmp_path):
    path = write(tmp_path / "a.jsonl")
    data = TextData("files", {"train": (path,), "heldout": (path,)})
    assert read_documents(data, HELDOUT) == ["some text"]
