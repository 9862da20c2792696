"""Rows of local files: JSON whose other fields change, Parquet, texts, compressed, in folders and patterns."""

import bz2
import dataclasses
import gzip
import json
import lzma

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_documents import Killed

from cascade.data import streaming
from cascade.data.framing import framing_of
from cascade.data.look import look_at, look_text
from cascade.data.packing import BlockFormat
from cascade.data.prepare import prepare_blocks
from cascade.data.rows import Place, read_rows, require_fields
from cascade.data.sources import TextData, cuts_passages, kept_elsewhere, read_documents
from cascade.data.splits import SPLITS
from cascade.evaluation.heldout import HELDOUT
from cascade.models.checkpoint.load import load_tokenizer, resolve_model
from cascade.planning.inputs import data_fingerprint
from cascade.recipe.data import Data
from cascade.recipe.load import load_recipe
from cascade.runtime.errors import UserError
from cascade.runtime.paths import files_of, ignored_files

BOM = b"\xef\xbb\xbf"
TEXTS = [f"text {number}\nof two lines" for number in range(9)]


def rows_in(path, fields=("text",), **options):
    return [(row.place.number, row.values) for row in read_rows(str(path), fields, **options)]


def all_texts(files):
    """The texts of all splits together, in order."""
    data = TextData("files", {"train": tuple(map(str, files)), "heldout": tuple(map(str, files))})
    return read_documents(data, HELDOUT)


def test_fields_that_are_not_read_may_change_from_row_to_row(tmp_path):
    rows = [
        {"text": "a", "id": 1, "meta": None},
        {"text": "b", "id": "two", "meta": {"at": "2020-01-01"}},
        {"text": "c", "id": [3], "new": {"deep": [1, "x"]}},
    ]
    filler = [{"text": "filling " * 200, "id": 0} for _ in range(8000)]  # past the first 10 MB
    with (tmp_path / "a.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in [*filler, *rows])
    assert [values for _, values in rows_in(tmp_path / "a.jsonl")][-3:] == [{"text": "a"}, {"text": "b"}, {"text": "c"}]


def test_a_text_that_looks_like_a_date_is_a_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "2020-01-01"}\n{"text": "2021-02-03T04:05:06"}\n')
    assert all_texts([tmp_path / "a.jsonl"]) == ["2020-01-01", "2021-02-03T04:05:06"]


@pytest.mark.parametrize("packed", ["", "gz", "bz2", "xz"])
@pytest.mark.parametrize(
    "form", ["lines", "CRLF and a byte-order mark", "list", "list over lines", "objects over lines"]
)
def test_json_is_read_however_it_is_written_and_packed(tmp_path, form, packed):
    rows = [{"text": text, "n": number} for number, text in enumerate(TEXTS)]
    content = {
        "lines": "".join(json.dumps(row) + "\n" for row in rows).encode(),
        "CRLF and a byte-order mark": BOM + "".join(json.dumps(row) + "\r\n" for row in rows).encode(),
        "list": json.dumps(rows).encode(),
        "list over lines": BOM + json.dumps(rows, indent=2).encode(),
        "objects over lines": "\n".join(json.dumps(row, indent=2) for row in rows).encode(),
    }[form]
    pack = {"": lambda data: data, "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[packed]
    path = tmp_path / f"a.json{'.' * bool(packed)}{packed}"
    path.write_bytes(pack(content))
    assert all_texts([path]) == TEXTS


def test_a_text_file_is_one_document_without_byte_order_mark_and_carriage_returns(tmp_path):
    for name in ("a.txt", "b.md", "c.py"):
        (tmp_path / name).write_bytes(BOM + "eins\r\nzwei\rdrei é\n".encode())
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(BOM + b"four\r\n"))
    files = [tmp_path / name for name in ("a.txt", "b.md", "c.py", "d.txt.gz")]
    assert all_texts(files) == ["eins\nzwei\ndrei é\n"] * 3 + ["four\n"]


def test_of_parquet_only_the_wanted_columns_are_read(tmp_path):
    table = pyarrow.table({"text": TEXTS, "other": [[1, 2]] * 9, "messages": [[{"role": "user", "content": "x"}]] * 9})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    assert rows_in(tmp_path / "a.parquet") == [(number + 1, {"text": text}) for number, text in enumerate(TEXTS)]
    (tmp_path / "b.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    assert all_texts([tmp_path / "b.parquet.gz"]) == TEXTS
    assert rows_in(tmp_path / "a.parquet", ["messages"])[8] == (9, {"messages": [{"role": "user", "content": "x"}]})
    with pytest.raises(
        UserError, match=r"a.parquet: no field 'body'; it has: text, other, messages. Set data.text_field"
    ):
        list(require_fields(read_rows(str(tmp_path / "a.parquet"), ["body"]), {"body": "Set data.text_field"}))


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "list", "parquet", "txt"])
@given(st.integers(0, 9))
def test_reading_goes_on_behind_any_row(tmp_path_factory, form, count):
    folder = tmp_path_factory.mktemp("rows")
    path = folder / f"a.{'json' if form == 'list' else form}"
    rows = [{"text": text} for text in TEXTS]
    lines = BOM + "".join(json.dumps(row) + "\r\n" + "\n" * (n % 2) for n, row in enumerate(rows)).encode()
    if form == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), path, row_group_size=4)
    else:
        listed, text = json.dumps(rows).encode(), TEXTS[0].encode()
        path.write_bytes({"jsonl": lines, "jsonl.gz": gzip.compress(lines), "list": listed, "txt": text}[form])
    whole = list(read_rows(str(path), ["text"]))
    count = min(count, len(whole))
    after = (whole[count - 1].place.number, whole[count - 1].offset) if count else (0, 0)
    assert list(read_rows(str(path), ["text"], after=after)) == whole[count:]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"} x\n', r"a.jsonl:3: not JSON \(Extra data"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a.jsonl:2: cannot be read as UTF-8"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), r"a.jsonl:1: cannot be read: it is UTF-16; save it as UTF-8"),
        ("a.txt", "Grüße\nGrüße".encode("latin-1"), r"a.txt: cannot be read as UTF-8"),
        ("a.txt", "Grusse\nGrüße".encode("latin-1"), r"a.txt:2: cannot be read as UTF-8"),
        ("a.json", b'[{"text": "a"}, {"text": "b"}', r"a.json: not JSON: after row 2 a comma or \] is missing"),
        ("a.json", b'[{"text": "a"},', r"a.json: not JSON: the list does not end"),
        ("a.json", b'[{"text": "a"}] {}', r"a.json: not JSON: something follows the list"),
        ("a.json", b'[{"text": "a"}, {"text": nan}]', r"a.json: row 2: not JSON"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999, mtime=0)[:-20], r"a.jsonl.gz: cannot be read"),
        ("a.jsonl.gz", b"no gzip", r"a.jsonl.gz: cannot be read"),
        ("a.parquet", b"PAR1 nothing", r"a.parquet: cannot be read"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named_with_the_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        rows_in(tmp_path / name)


def test_a_place_is_said_as_editors_understand_it():
    assert [str(Place("a.x", 3, unit)) for unit in ("line", "row", "")] == ["a.x:3", "a.x: row 3", "a.x"]


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "odd [name]" / "corpus"
    (folder / "more").mkdir(parents=True)
    for number, name in enumerate(("b.jsonl", "a.jsonl", "more/c.jsonl.gz", ".hidden.jsonl", "_SUCCESS.jsonl")):
        line = json.dumps({"text": f"shard {number}"}).encode() + b"\n"
        (folder / name).write_bytes(gzip.compress(line) if name.endswith("gz") else line)
    (folder / "LICENCE").write_text("none")
    return folder


def test_a_folder_stands_for_its_files_and_those_below_in_sorted_order(shards):
    assert files_of(str(shards), "data.train") == [
        str(shards / name) for name in ("a.jsonl", "b.jsonl", "more/c.jsonl.gz")
    ]
    assert ignored_files(str(shards)) == [str(shards / "LICENCE")]
    assert all_texts([shards]) == ["shard 1", "shard 0", "shard 2"]


def test_a_pattern_counts_from_the_recipes_folder_whatever_its_name(shards, tiny_parent):
    (shards.parent / "r.yaml").write_text(
        f"name: r\nparent: {tiny_parent}\nmembers: []\n"
        "data: {source: files, train: 'corpus/[ab].jsonl', heldout: corpus/../corpus/more, block_size: 32}\n"
    )
    data = load_recipe(shards.parent / "r.yaml").data
    assert files_of(data.train[0], "data.train") == [str(shards / "a.jsonl"), str(shards / "b.jsonl")]
    assert files_of(data.heldout[0], "data.heldout") == [str(shards / "more" / "c.jsonl.gz")]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("*.parquet", r"data.train: .*\*.parquet: no such file: nothing is of this pattern"),
        ("none", r"data.train: .*none: no such file"),
        ("empty", r"data.train: .*empty: no file of data in this folder; known kinds: .jsonl"),
        (
            "",
            r"data.train: .*files of several kinds are in this folder: 3 of JSON \(a.jsonl\), 1 of text \(notes.md\)",
        ),
    ],
)
def test_what_no_file_or_several_kinds_of_files_stand_for_is_refused(shards, entry, message, monkeypatch):
    (shards / "empty").mkdir()
    (shards / "notes.md").write_text("text to train on")
    monkeypatch.chdir(shards)
    with pytest.raises(UserError, match=message):
        files_of(entry or ".", "data.train")


def test_a_new_shard_in_a_folder_is_other_data(shards):
    data = Data(source="files", train=[str(shards)])
    before = data_fingerprint(data)
    assert data_fingerprint(data) == before
    (shards / "d.jsonl").write_text('{"text": "new"}\n')
    assert data_fingerprint(data) != before


def test_a_split_of_one_file_has_the_fingerprint_that_it_always_had(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n')
    one = Data(source="files", train=[str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
    assert data_fingerprint(one) == data_fingerprint(Data(source="files", train=[str(tmp_path)]))


class Hub:
    """Stands for `datasets.load_dataset` of a dataset of the hub with a column too many."""

    def __init__(self, texts):
        self.texts = texts

    def __call__(self, name, config, *, split, revision, streaming=False):
        import datasets

        self.streamed = streaming
        table = datasets.Dataset.from_dict({"other": list(range(len(self.texts))), "text": self.texts})
        return table.to_iterable_dataset(num_shards=3) if streaming else table


def test_a_dataset_of_the_hub_is_read_by_the_wanted_column_alone(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", Hub([*TEXTS, None]))
    splits = {"train": "train", **{name: "train" for name in SPLITS[1:]}}
    data = TextData("hub", {}, dataset="org/data", revision="a" * 40, hub_splits=splits, max_bad_rows=0.1)
    assert read_documents(data, HELDOUT) == TEXTS
    with pytest.raises(UserError, match=r"org/data \(train\): row 10: field 'text' is null"):
        read_documents(TextData("hub", {}, dataset="org/data", hub_splits=splits), HELDOUT)


def test_a_streamed_dataset_of_the_hub_gives_the_blocks_of_the_whole_and_goes_on_where_it_was_stopped(
    monkeypatch, tmp_path
):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", Hub([f"document {number} has these words" for number in range(900)]))
    splits = dict.fromkeys(SPLITS, "train")
    data = TextData("hub", {}, dataset="org/data", revision="a" * 40, hub_splits=splits)
    tokenizer = load_tokenizer(resolve_model("builtin:pico-python"))
    whole = prepare_blocks(data, HELDOUT, tokenizer, BlockFormat(block_size=32))
    streamed = dataclasses.replace(data, streaming=True)
    block_format = BlockFormat(block_size=32, max_blocks=10_000, framing=framing_of(tokenizer, "data"))
    arguments, options = (streamed, HELDOUT, tokenizer, block_format), {"folder": tmp_path, "shard_tokens": 2000}
    tokens, calls = streaming.encoded, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return tokens(*args)

    monkeypatch.setattr(streaming, "encoded", dies)
    with pytest.raises(Killed):
        streaming.stream_blocks(*arguments, **options)
    bad = streamed.bad_row_counter()
    found = streaming.stream_blocks(*arguments, bad=bad, **options)
    assert found.input_ids.equal(whole.input_ids) and bad.record()["rows"] == 900


def test_streamed_text_of_the_hub_is_never_fetched_whole(monkeypatch):
    import datasets

    hub = Hub([f"document {number} has these words" for number in range(900)])
    monkeypatch.setattr(datasets, "load_dataset", hub)
    data = TextData("hub", {}, dataset="org/data", hub_splits={"train": "train", "heldout": "test"}, streaming=True)
    tokenizer = load_tokenizer(resolve_model("builtin:pico-python"))
    for read in (
        lambda: cuts_passages(data),
        lambda: kept_elsewhere(data, "train"),
        lambda: look_at(data, "train", ("train",), tokenizer),
        lambda: prepare_blocks(data, HELDOUT, tokenizer, BlockFormat(block_size=32)),
    ):
        hub.streamed = None
        read()
        assert hub.streamed is True


def test_the_plan_counts_the_files_of_a_folder_and_names_those_it_passes_over(shards):
    data = TextData("files", {"train": (str(shards),)})
    lines = look_text("train", look_at(data, "train", data.files["train"], None))
    assert lines == [
        "data.train: 3 files (2 .jsonl, 1 .jsonl.gz), 3 rows.",
        "data.train: 1 file is passed over, being of other kinds or about the folder: LICENCE.",
    ]
