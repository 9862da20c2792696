"""A training finds its records by the shards' indexes: it reads its own, each once and checked, and no others."""

import errno
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from conftest import distill_with, make_blocks, make_model
from test_cache import HIDDEN, SAMPLED, labelled, opened, records

from cascade.pipeline.kept_targets import TeacherCache
from cascade.runtime.errors import RunError
from cascade.teacher.targets import shards
from cascade.teacher.targets.index import index_path, read_index
from cascade.teacher.targets.inspect import damage, remove_damaged
from cascade.teacher.targets.keys import weights_digest, window_keys
from cascade.teacher.targets.label import label
from cascade.teacher.targets.reader import CachedTargets


def shards_of(windows):
    return sorted(windows.folder.glob("*.safetensors"))


def flip(path, place, *, keep_time=True):
    """Damage a byte; a disk that forgets does not change a file's time."""
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    if keep_time:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def flip_record(windows, key, **options):
    """Damage a window's record where it lies."""
    ((shard, number),) = windows._places[key]
    flip(shard.path, int(shard.index.starts[number]), **options)


def bytes_read():
    """Bytes that this process has read from files so far, from the disk or from the system's memory."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])


@pytest.fixture
def checked(monkeypatch):
    """The lengths of the records whose checksums were computed."""
    lengths, checksum = [], shards.record_checksum

    def counted(root, key, record):
        lengths.append(len(record))
        return checksum(root, key, record)

    monkeypatch.setattr(shards, "record_checksum", counted)
    return lengths


def test_a_training_of_a_twentieth_of_a_cache_reads_a_twentieth_of_its_records_once(tmp_path, checked, monkeypatch):
    monkeypatch.setattr(shards, "MAX_SHARD_BYTES", 1 << 16)
    teacher, blocks = make_model(), make_blocks(400)
    windows = labelled(tmp_path, HIDDEN, teacher, blocks)
    assert len(shards_of(windows)) > 5
    rows = torch.arange(0, 400, 20)
    needed = [len(windows.read(key)) for key in window_keys(blocks.rows(rows))]
    overhead = sum(index_path(shard).stat().st_size + 1000 for shard in shards_of(windows))  # and the shards' headers
    checked.clear()
    reopened = opened(tmp_path, HIDDEN, teacher)
    before = bytes_read()
    reopened = shards.Windows(reopened.folder, reopened.root).refresh()
    targets = TeacherCache(reopened, HIDDEN, "").targets(teacher, blocks, rows)
    assert checked == []  # that nothing is missing is known without any record
    for step in rows.split(4):
        targets.read(step)
    read = bytes_read() - before
    assert sorted(checked) == sorted(needed)
    assert sum(needed) < read < sum(needed) + overhead + 2000  # and root.json
    assert read < 0.1 * sum(shard.stat().st_size for shard in shards_of(windows))


def test_caches_of_earlier_versions_get_their_indexes_with_the_next_labelling(tmp_path):
    teacher, blocks = make_model(), make_blocks(6)
    windows = labelled(tmp_path, SAMPLED, teacher, blocks)
    (shard,) = shards_of(windows)
    before = index_path(shard).read_bytes()
    index_path(shard).unlink()
    looked_at = opened(tmp_path, SAMPLED, teacher)
    assert records(looked_at) == records(windows) and not index_path(shard).exists()  # looking writes nothing
    assert label(looked_at, SAMPLED, teacher, blocks, check_records=False).made == 0
    assert index_path(shard).read_bytes() == before


@pytest.mark.parametrize("place", ["line", "row", "end", "of another shard", "emptied"])
def test_an_index_that_is_damaged_or_of_another_shard_is_not_used_and_made_again(tmp_path, place):
    teacher, blocks = make_model(), make_blocks(6)
    windows = labelled(tmp_path, SAMPLED, teacher, blocks.rows(torch.arange(4)))
    (shard,) = shards_of(windows)
    path, whole = index_path(shard), index_path(shard).read_bytes()
    if place == "of another shard":
        label(windows, SAMPLED, teacher, blocks)
        (other,) = set(shards_of(windows)) - {shard}
        shutil.copyfile(index_path(other), path)
    elif place == "emptied":
        path.write_bytes(b"")
    else:
        flip(path, {"line": whole.index(b"shard_bytes") + 15, "row": whole.index(b"\n") + 20, "end": -1}[place])
    assert read_index(shard) is None
    reopened = opened(tmp_path, SAMPLED, teacher)
    assert records(reopened) == records(windows)
    label(reopened, SAMPLED, teacher, blocks, check_records=False)
    assert path.read_bytes() == whole


def test_a_shard_of_another_size_or_header_is_not_opened_by_its_index(tmp_path):
    teacher, blocks = make_model(), make_blocks(6)
    (shard,) = shards_of(labelled(tmp_path, SAMPLED, teacher, blocks))
    content = shard.read_bytes()
    for changed in (
        content[:-1],
        content + b"\0",
        content[:8] + content[8:].replace(b"data_offsets", b"data_offsetz", 1),
    ):
        shard.write_bytes(changed)
        assert read_index(shard) is None
    assert len(opened(tmp_path, SAMPLED, teacher)) == 0


@pytest.mark.parametrize("keep_time", [True, False])
def test_a_record_that_is_damaged_is_labelled_again_in_the_middle_of_a_training_to_the_same_bits(tmp_path, keep_time):
    teacher, blocks = make_model(), make_blocks(24)
    trained = []
    for name in ("whole", "damaged"):
        windows = labelled(tmp_path / name, SAMPLED, teacher, blocks)
        targets = TeacherCache(windows, SAMPLED, "").targets(teacher, blocks, torch.arange(24))
        keys = window_keys(blocks)
        if name == "damaged":
            for row in (3, 11, 12):
                flip_record(windows, keys[row], keep_time=keep_time)
        student = make_model(seed=1)
        distill_with(student, None, blocks, num_tokens=16 * 24, batch_size=4, microbatch_size=2, targets=targets)
        trained.append(student.state_dict())
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())
    assert windows.num_damaged == 3 or (windows.num_damaged > 3 and not keep_time)  # written again: looked at again
    assert label(opened(tmp_path / "damaged", SAMPLED, teacher), SAMPLED, teacher, blocks).made == 0


def test_a_record_found_damaged_stays_out_of_the_index_until_it_is_labelled_again(tmp_path):
    teacher, blocks = make_model(), make_blocks(6)
    windows = labelled(tmp_path, SAMPLED, teacher, blocks)
    whole, key = records(windows), window_keys(blocks)[2]
    flip_record(windows, key)
    fresh = opened(tmp_path, SAMPLED, teacher)
    assert label(fresh, SAMPLED, teacher, blocks, check_records=False).made == 0  # nothing has read it yet
    with pytest.raises(RunError, match=r"block 2 is missing or damaged"):
        CachedTargets(fresh, SAMPLED, blocks).read(torch.arange(6))
    again = opened(tmp_path, SAMPLED, teacher)
    assert key not in again and len(again) == 5
    assert label(again, SAMPLED, teacher, blocks, check_records=False).made == 1
    assert records(opened(tmp_path, SAMPLED, teacher)) == whole


def test_a_check_of_the_cache_believes_no_index(tmp_path):
    teacher, blocks = make_model(), make_blocks(6)
    windows = labelled(tmp_path, SAMPLED, teacher, blocks)
    (shard,), key = shards_of(windows), window_keys(blocks)[2]
    flip_record(windows, key)
    assert windows.read(key) is None
    windows.save_indexes()
    assert key not in opened(tmp_path, SAMPLED, teacher)
    assert damage(windows.folder) == {"record": [], "shards": [shard.name], "windows": [key.hex()]}
    held = shard.stat().st_size + index_path(shard).stat().st_size
    assert remove_damaged(windows.folder) == held and not index_path(shard).exists()


def test_a_folder_that_takes_no_index_costs_no_shard(tmp_path, monkeypatch, caplog):
    replace = shards.replace_file

    def full(path, content, kind):
        if kind == "index":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(path, content, kind)

    monkeypatch.setattr(shards, "replace_file", full)
    teacher, blocks = make_model(), make_blocks(6)
    windows = labelled(tmp_path, SAMPLED, teacher, blocks)
    assert "indexes are not kept" in caplog.text and not list(windows.folder.glob("*.index"))
    assert label(opened(tmp_path, SAMPLED, teacher), SAMPLED, teacher, blocks).made == 0


def test_an_index_is_written_after_its_shard(tmp_path, monkeypatch):
    written, replace = [], shards.replace_file

    def noted(path, content, kind):
        written.append((path.name.partition(".")[0], kind))
        replace(path, content, kind)

    monkeypatch.setattr(shards, "replace_file", noted)
    monkeypatch.setattr(shards, "MAX_SHARD_BYTES", 1)
    labelled(tmp_path, SAMPLED, make_model(), make_blocks(3))
    pairs = [written[place : place + 2] for place in range(1, len(written), 2)]  # after root.json
    assert len(pairs) == 3 and all(pair == [(pair[0][0], "shard"), (pair[0][0], "index")] for pair in pairs)


def test_a_shard_that_is_labelled_again_to_the_same_bytes_has_its_new_index(tmp_path):
    teacher, blocks = make_model(), make_blocks(3)
    windows = labelled(tmp_path, SAMPLED, teacher, blocks)
    for key in list(windows.keys()):
        flip_record(windows, key)
    again = opened(tmp_path, SAMPLED, teacher)
    assert label(again, SAMPLED, teacher, blocks).made == 3
    assert len(opened(tmp_path, SAMPLED, teacher)) == 3
    assert label(opened(tmp_path, SAMPLED, teacher), SAMPLED, teacher, blocks).made == 0


def test_a_shard_that_cannot_be_read_for_a_moment_is_not_noted_as_damaged(tmp_path, monkeypatch):
    teacher, blocks = make_model(), make_blocks(3)
    labelled(tmp_path, SAMPLED, teacher, blocks)
    windows = opened(tmp_path, SAMPLED, teacher)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "read_at", lambda *args: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
        assert all(windows.read(key) is None for key in list(windows.keys()))
    windows.save_indexes()
    assert len(opened(tmp_path, SAMPLED, teacher)) == 3


def test_a_teacher_whose_file_changed_in_size_and_time_alike_has_another_digest(tmp_path):
    model, folder, cache = make_model(), tmp_path / "model", tmp_path / "cache"
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    old = path.stat()
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns - 10**12))
    time.sleep(0.1)
    before, stat = weights_digest(folder, cache), path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert weights_digest(folder, cache) != before
