"""What is kept of a teacher: the same whoever labels it, in few bytes, and never used once it is damaged."""

import dataclasses
import errno
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, distill_with, make_blocks, make_model
from hypothesis import given
from hypothesis import strategies as st

from cascade.data.blocks import IGNORE_INDEX, TokenBlocks
from cascade.distillation.losses.batch import batch_losses
from cascade.distillation.losses.features import FeatureLoss
from cascade.distillation.losses.fused import fused_loss
from cascade.distillation.options import Features, Objective
from cascade.models.architecture.dims import dims_of
from cascade.models.architecture.head import Head, head_of, last_hidden, logits_of
from cascade.models.architecture.origin import even_origin
from cascade.runtime.errors import RunError, UserError
from cascade.teacher.targets import shards
from cascade.teacher.targets.bit_packing import pack_rising, rising_size, unpack_rising
from cascade.teacher.targets.index import index_of
from cascade.teacher.targets.keys import open_windows, root_record, weights_digest, window_keys
from cascade.teacher.targets.label import _GROUP_TOKENS, label, rounding_kl
from cascade.teacher.targets.reader import CachedTargets
from cascade.teacher.targets.record import Layout
from cascade.teacher.targets.shards import damaged_shards, root_folder

SAMPLED = Layout("sampled", 64, draws=12)
TOP_K = Layout("top_k", 64, top_k=6)
HIDDEN = Layout("hidden", 64, hidden_size=48, dtype="bfloat16")
KINDS = {"sampled": SAMPLED, "exact": dataclasses.replace(SAMPLED, exact_ids=(0, 7)), "top_k": TOP_K, "hidden": HIDDEN}


def opened(folder, layout, teacher):
    """A root's windows."""
    return open_windows(folder, teacher, None, layout)


def labelled(folder, layout, teacher, blocks):
    windows = opened(folder, layout, teacher)
    label(windows, layout, teacher, blocks)
    return windows


def records(windows):
    return {key: windows.read(key).tobytes() for key in windows.keys()}


def some_count(blocks):
    """The same blocks with a few prompts that do not count."""
    labels = blocks.input_ids.clone()
    labels[::2, :5] = IGNORE_INDEX
    return dataclasses.replace(blocks, labels=labels)


def probabilities(teacher, blocks):
    """[N, P, V]"""
    with torch.no_grad():
        return teacher(input_ids=blocks.input_ids).logits[:, :-1].softmax(-1)


@given(st.lists(st.integers(0, 500_000), max_size=80), st.integers(500_001, 10**9))
def test_rising_numbers_come_back_as_they_were_packed(values, universe):
    values = np.array(sorted(values), dtype=np.int64)
    packed = pack_rising(values, universe)
    assert len(packed) == rising_size(len(values), universe)
    assert np.array_equal(unpack_rising(np.frombuffer(packed, dtype=np.uint8), len(values), universe), values)


def test_rising_numbers_take_little_more_than_there_is_to_know():
    draw = np.random.default_rng(0)
    values = np.sort(draw.choice(256 * 49_152, size=256 * 15, replace=False))
    bound = (
        math.lgamma(256 * 49_152 + 1) - math.lgamma(256 * 15 + 1) - math.lgamma(256 * (49_152 - 15) + 1)
    ) / math.log(2)
    assert bound / 8 < rising_size(len(values), 256 * 49_152) < 1.06 * bound / 8


@pytest.mark.parametrize("kind", KINDS)
def test_targets_come_back_as_the_teacher_gives_them(tmp_path, kind):
    teacher, blocks, layout = make_model(), some_count(make_blocks(6)), KINDS[kind]
    found = CachedTargets(labelled(tmp_path, layout, teacher, blocks), layout, blocks, head_of(teacher)).read(
        torch.arange(6)
    )
    p, counts = probabilities(teacher, blocks), blocks.targets() != IGNORE_INDEX
    if kind == "hidden":
        with torch.no_grad():
            hidden = last_hidden(teacher, input_ids=blocks.input_ids)[:, :-1]
        assert torch.equal(found.hidden[counts], hidden.bfloat16()[counts])
        assert not found.hidden[~counts].any()
    elif kind == "top_k":
        ids, log_p = found.ids[:, 1:][counts].long(), found.log_p[:, 1:][counts]
        assert torch.equal(ids.sort(-1).values, p[counts].topk(6).indices.sort(-1).values)
        assert torch.allclose(log_p, p[counts].log().gather(-1, ids), atol=3e-4)
        assert (found.ids[:, 1:][~counts] == -1).all()
    else:
        ids, shares = found.ids[counts].long(), found.shares[counts]
        dense = torch.zeros(len(ids), 64).scatter_add_(-1, ids.clamp_min(0), shares)
        assert torch.allclose(shares.sum(-1), torch.ones(len(ids)), atol=1e-6)
        rest = torch.ones(len(ids)) if kind == "sampled" else 1 - p[counts][:, [0, 7]].sum(-1)
        assert ((dense - p[counts]).abs() <= rest[:, None] / 12 + 1e-6).all()
        if kind == "exact":
            assert torch.allclose(dense[:, [0, 7]], p[counts][:, [0, 7]], rtol=1e-5)
        entropy = -(p * p.log()).sum(-1)[counts]
        assert torch.allclose(found.entropy[counts], entropy, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_records_do_not_depend_on_order_company_or_who_labels(tmp_path, kind, monkeypatch):
    monkeypatch.setitem(_GROUP_TOKENS, "cpu", 80)  # groups of five: full ones and one of two
    teacher, blocks, layout = make_model(), some_count(make_blocks(12)), KINDS[kind]
    whole = records(labelled(tmp_path / "whole", layout, teacher, blocks))
    backwards = records(labelled(tmp_path / "backwards", layout, teacher, blocks.rows(torch.arange(12).flip(0))))
    apart = tmp_path / "apart"
    for row in range(12):
        labelled(apart, layout, teacher, blocks.rows(torch.tensor([row])))
    assert whole == backwards == records(opened(apart, layout, teacher)) and len(whole) == 12


def test_what_is_there_is_not_labelled_again_and_twice_the_same_window_once(tmp_path):
    teacher, blocks = make_model(), make_blocks(8)
    windows = opened(tmp_path, SAMPLED, teacher)
    first = label(windows, SAMPLED, teacher, blocks.rows(torch.tensor([0, 1, 2, 1, 0])))
    again = label(windows, SAMPLED, teacher, blocks)
    assert (first.windows, first.made) == (3, 3) and (again.windows, again.made) == (8, 5)
    assert label(opened(tmp_path, SAMPLED, teacher), SAMPLED, teacher, blocks).made == 0


def test_windows_differ_by_ids_documents_and_what_counts():
    blocks = make_blocks(2)
    keys = {window_keys(blocks)[0], window_keys(some_count(blocks))[0]}
    positions = torch.arange(16).expand(2, -1)
    keys |= {window_keys(dataclasses.replace(blocks, position_ids=positions))[0]}
    keys |= {window_keys(dataclasses.replace(blocks, position_ids=positions % 8))[0]}
    keys |= {window_keys(dataclasses.replace(blocks, masked=True))[0], window_keys(blocks)[1]}
    assert len(keys) == 6
    assert window_keys(blocks.rows(torch.tensor([1])))[0] == window_keys(blocks)[1]


def test_another_teacher_tokenizer_kind_or_count_is_another_root(tmp_path):
    teacher = make_model()

    def root(layout=SAMPLED, weights="w", tokenizer=None, dtype="float32", attention="sdpa", model=teacher):
        record = root_record(weights, model.config, tokenizer, layout, dtype=dtype, attn_implementation=attention)
        return root_folder(tmp_path, record)[1]

    class Words:
        def get_vocab(self):
            return {"a": 0}

    others = [root(dataclasses.replace(SAMPLED, draws=13)), root(HIDDEN), root(weights="v"), root(tokenizer=Words())]
    others += [
        root(dtype="bfloat16"),
        root(attention="eager"),
        root(KINDS["exact"]),
        root(model=make_model(num_hidden_layers=2)),
    ]
    assert len({root(), *others}) == 9
    assert root() == root()


def test_weights_are_known_by_content_whatever_files_they_are_in(tmp_path, monkeypatch):
    model = make_model()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "several", max_shard_size="30KB")
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 1
    first = weights_digest(tmp_path / "one", tmp_path)
    assert first == weights_digest(tmp_path / "several", tmp_path)
    file = tmp_path / "one" / "model.safetensors"
    before, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    changed = weights_digest(tmp_path / "one", tmp_path)
    assert changed != first  # no program can set the time of change
    time.sleep(0.2)  # what has just been written could change again unseen, and is not remembered
    assert weights_digest(tmp_path / "one", tmp_path) == changed
    monkeypatch.setattr("cascade.teacher.targets.keys.tensors_digest", lambda tensors: "read")
    assert weights_digest(tmp_path / "one", tmp_path) == changed  # remembered
    assert weights_digest(tmp_path / "one", tmp_path, again=True) == "read"


@pytest.mark.parametrize("damage", ["cut", "flipped", "header", "emptied"])
def test_F17_a_damaged_shard_is_labelled_again_and_never_used(tmp_path, damage):
    teacher, blocks = make_model(), make_blocks(6)
    whole = records(labelled(tmp_path, SAMPLED, teacher, blocks))
    shard = next(iter(opened(tmp_path, SAMPLED, teacher).folder.glob("*.safetensors")))
    content = bytearray(shard.read_bytes())
    draw = random.Random(0)
    for _ in range(12 if damage in ("cut", "flipped") else 1):
        changed = bytearray(content)
        if damage == "cut":
            changed = changed[: draw.randrange(len(content))]
        elif damage == "flipped":
            changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        elif damage == "header":
            changed[:8] = (1 << 60).to_bytes(8, "little")
        else:
            changed = bytearray()
        for other in shard.parent.glob("*.safetensors"):
            other.unlink()
        shard.write_bytes(changed)
        windows = opened(tmp_path, SAMPLED, teacher)
        found = {key: record.tobytes() for key in windows.keys() if (record := windows.read(key)) is not None}
        assert all(whole.get(key) == record for key, record in found.items())
        assert shard in damaged_shards(shard.parent)
        label(windows, SAMPLED, teacher, blocks)
        assert {key: windows.read(key).tobytes() for key in window_keys(blocks)} == whole
        fresh = opened(tmp_path, SAMPLED, teacher)
        assert {key: fresh.read(key).tobytes() for key in window_keys(blocks)} == whole
        assert label(fresh, SAMPLED, teacher, blocks).made == 0


def test_F17_shards_of_another_root_and_swapped_records_are_not_used(tmp_path):
    teacher, other, blocks = make_model(), make_model(seed=1), make_blocks(4)
    mine, theirs = (labelled(tmp_path, SAMPLED, one, blocks) for one in (teacher, other))
    for shard in theirs.folder.glob("*.safetensors"):
        shutil.copy(shard, mine.folder)
    for shard in list(mine.folder.glob("*.safetensors")):
        if index_of(shard).root == mine.root:
            shard.unlink()
    assert len(opened(tmp_path, SAMPLED, teacher)) == 0
    # Even one that claims to be of this root: a record's checksum says whose it is.
    key, record = next(iter(records(theirs).items()))
    content = shards._shard_bytes(theirs.root, {key: record}).replace(theirs.root.encode(), mine.root.encode())
    (mine.folder / "forged.safetensors").write_bytes(content)
    forged = opened(tmp_path, SAMPLED, teacher)
    assert key in forged and forged.read(key) is None and key not in forged


def test_F12_a_full_disk_leaves_what_was_written_and_says_what_to_do(tmp_path, monkeypatch):
    teacher, blocks = make_model(), make_blocks(6)
    monkeypatch.setattr(shards, "MAX_SHARD_BYTES", 1)
    windows, written = opened(tmp_path, SAMPLED, teacher), []

    def full(place):
        if place == "shard.synced":
            written.append(place)
            if len(written) == 5:
                raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(shards, "failpoint", full)
        with pytest.raises(RunError, match=r"disk is full.*cascade cache prune"):
            label(windows, SAMPLED, teacher, blocks)
    again = opened(tmp_path, SAMPLED, teacher)
    assert len(again) == 4 and not list(again.folder.glob(".*"))
    assert label(again, SAMPLED, teacher, blocks).made == 2


LABELLING = """
import sys, time
sys.path[:0] = ["tests", "tests/teacher"]
from conftest import make_blocks, make_model
from test_cache import SAMPLED, opened
from pathlib import Path
from cascade.teacher.targets import shards
from cascade.teacher.targets.label import label
shards.MAX_SHARD_BYTES = 1
teacher, blocks = make_model(), make_blocks(400)
import cascade.teacher.targets.label as own
own._GROUP_TOKENS["cpu"] = 16
label(opened(Path(sys.argv[1]), SAMPLED, teacher), SAMPLED, teacher, blocks)
"""


def test_F18_killed_labelling_goes_on_where_it_was_to_the_same_bytes(tmp_path):
    teacher, blocks = make_model(), make_blocks(400)
    command = [sys.executable, "-c", LABELLING, str(tmp_path)]
    folder = opened(tmp_path, SAMPLED, teacher).folder
    process = subprocess.Popen(command, cwd=ROOT)
    while len(list(folder.glob("*.safetensors"))) < 20 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    there = len(opened(tmp_path, SAMPLED, teacher))
    assert 20 <= there < 400
    assert label(opened(tmp_path, SAMPLED, teacher), SAMPLED, teacher, blocks).made == 400 - there
    whole = records(labelled(tmp_path / "unbroken", SAMPLED, teacher, blocks))
    assert records(opened(tmp_path, SAMPLED, teacher)) == whole


def test_two_that_label_into_one_directory_do_not_harm_each_other(tmp_path):
    teacher, blocks = make_model(), make_blocks(400)
    command = [sys.executable, "-c", LABELLING, str(tmp_path)]
    # One thread each: two processes of two threads on two cores wait for each other most of the time.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    both = [subprocess.Popen(command, cwd=ROOT, env=environment) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    windows = opened(tmp_path, SAMPLED, teacher)
    assert records(windows) == records(labelled(tmp_path / "alone", SAMPLED, teacher, blocks))
    assert not damaged_shards(windows.folder) and not list(windows.folder.glob(".*"))


@given(
    seed=st.integers(0, 10_000),
    share=st.sampled_from([0.0, 0.3]),
    softcap=st.sampled_from([None, 5.0]),
    bias=st.booleans(),
)
def test_loss_and_gradients_from_draws_equal_the_float64_reference(seed, share, softcap, bias):
    from cascade.data.token_targets import DrawnTargets

    draw = torch.Generator().manual_seed(seed)
    vocabulary, count = 17, 9
    t = torch.rand(count, vocabulary, generator=draw) * (torch.rand(count, vocabulary, generator=draw) < 0.4)
    t[:, 3] += 0.1
    t /= t.sum(-1, keepdim=True)
    order = t.topk(vocabulary).indices
    shares = t.gather(-1, order)
    entropy = torch.rand(count, generator=draw)
    known = DrawnTargets(order.masked_fill(shares == 0, -1), shares, entropy)
    hidden = torch.randn(count, 6, generator=draw)
    weight, offset = torch.randn(vocabulary, 6, generator=draw), torch.randn(vocabulary, generator=draw)
    targets = torch.randint(0, vocabulary, (count,), generator=draw)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()] + ([offset.requires_grad_()] if bias else [])
    head = Head(weight, offset if bias else None, 1.0, softcap)
    found = fused_loss(hidden, head, targets, Objective(cross_entropy_weight=share), known=known, chunk_size=4)
    gradients = torch.autograd.grad(found.loss, leaves)

    double = [one.detach().double().requires_grad_() for one in leaves]
    logits = double[0] @ double[1].T + (double[2] if bias else 0)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    log_q = logits.log_softmax(-1)
    drawn = -(t.double() * log_q).sum(-1) - entropy.double()
    wanted = ((1 - share) * drawn - share * log_q.gather(-1, targets[:, None])[:, 0]).sum()
    assert found.loss.item() == pytest.approx(wanted.item(), rel=1e-5, abs=1e-5)
    for ours, theirs in zip(gradients, torch.autograd.grad(wanted, double), strict=True):
        assert (ours - theirs).norm() <= 2e-5 * theirs.norm()
    assert torch.equal(found.agrees, (log_q.argmax(-1) == t.argmax(-1)).float())


def test_what_needs_all_probabilities_is_refused_from_some_of_them(tmp_path):
    teacher, blocks = make_model(), make_blocks(2)
    targets = CachedTargets(labelled(tmp_path, SAMPLED, teacher, blocks), SAMPLED, blocks)
    batch = dataclasses.replace(blocks, known=targets.of(torch.arange(2)))
    for objective in (Objective("reverse_kl"), Objective(temperature=2.0)):
        with pytest.raises(UserError, match=r"forward_kl at temperature 1.*hidden states"):
            batch_losses(make_model(seed=1), None, batch, objective)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_hidden_states_give_every_loss_without_the_teacher(tmp_path, dtype, divergence):
    teacher, student, blocks = make_model(), make_model(seed=1), some_count(make_blocks(4))
    layout = dataclasses.replace(HIDDEN, dtype=dtype, points=(1, 2, 3))
    targets = CachedTargets(labelled(tmp_path, layout, teacher, blocks), layout, blocks, head_of(teacher))
    objective = Objective(divergence, temperature=2.0, cross_entropy_weight=0.2)
    features = FeatureLoss(
        Features(hidden="cosine"), even_origin(dims_of(student.config), dims_of(teacher.config)), student, teacher
    )
    live = batch_losses(student, teacher, blocks, objective, features)
    kept = batch_losses(
        student, None, dataclasses.replace(blocks, known=targets.of(torch.arange(4))), objective, features
    )
    # Rounding to bfloat16 or int8 is all that differs.
    assert kept.fused.loss.item() == pytest.approx(live.fused.loss.item(), rel=5e-3)
    assert kept.features["hidden"].item() == pytest.approx(live.features["hidden"].item(), rel=5e-3)
    assert torch.equal(kept.fused.cross_entropy, live.fused.cross_entropy)
    gradients = [torch.autograd.grad(one.fused.loss, student.lm_head.weight)[0] for one in (live, kept)]
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[0].norm()


def test_rounding_of_hidden_states_is_told_as_kl(tmp_path):
    teacher, block = make_model(), make_blocks(1)
    kl = {
        dtype: rounding_kl(dataclasses.replace(HIDDEN, dtype=dtype), teacher, block) for dtype in ("bfloat16", "int8")
    }
    with torch.no_grad():
        hidden = last_hidden(teacher, input_ids=block.input_ids)[0, :-1]
        live, rounded = (
            logits_of(one, head_of(teacher)).log_softmax(-1) for one in (hidden, hidden.bfloat16().float())
        )
    assert kl["bfloat16"] == pytest.approx((live.exp() * (live - rounded)).sum(-1).mean().item(), rel=1e-3)
    assert 0 < kl["bfloat16"] < 1e-4 and 0 < kl["int8"] < 1e-3


def test_training_from_draws_is_on_average_training_from_the_teacher(tmp_path):
    teacher, student, blocks = make_model(), make_model(seed=1), make_blocks(4)
    exact = batch_losses(student, teacher, blocks, Objective())
    wanted = torch.autograd.grad(exact.fused.loss, student.lm_head.weight)[0]
    losses, mean, single, count = [], 0.0, [], 60
    for number in range(count):
        layout = dataclasses.replace(SAMPLED, draws=4, exact_ids=(number,))  # another root, so other draws
        targets = CachedTargets(labelled(tmp_path, layout, teacher, blocks), layout, blocks)
        found = batch_losses(student, None, dataclasses.replace(blocks, known=targets.of(torch.arange(4))), Objective())
        gradient = torch.autograd.grad(found.fused.loss, student.lm_head.weight)[0]
        mean = mean + gradient / count
        single.append((gradient - wanted).norm() ** 2)
        losses.append(found.fused.loss.item())
    noise = (sum(single) / count).sqrt() / math.sqrt(count)
    assert (mean - wanted).norm() < 1.5 * noise  # what is left over is the noise of a mean, and no bias
    spread = torch.tensor(losses).std().item() / math.sqrt(count)
    assert sum(losses) / count == pytest.approx(exact.fused.loss.item(), abs=4 * spread)


def test_reading_ahead_changes_nothing(tmp_path):
    teacher, blocks = make_model(), make_blocks(6)
    targets = CachedTargets(labelled(tmp_path, SAMPLED, teacher, blocks), SAMPLED, blocks)
    plain = targets.read(torch.tensor([4, 1]))
    targets.ahead(torch.tensor([4, 1]), torch.tensor([5, 2]))
    for future in targets._ahead.values():
        future.result()
    targets.windows = None  # all that is needed was read
    ahead = targets.read(torch.tensor([4, 1]))
    assert len(targets.read(torch.tensor([5, 2])).ids) == 2
    assert torch.equal(plain.ids, ahead.ids) and torch.equal(plain.shares, ahead.shares)


def test_a_window_that_is_lost_while_training_stops_it_with_what_to_do(tmp_path):
    teacher, blocks = make_model(), make_blocks(4)
    targets = CachedTargets(labelled(tmp_path, SAMPLED, teacher, blocks.rows(torch.arange(3))), SAMPLED, blocks)
    with pytest.raises(RunError, match=r"block 3 is missing.*same command again"):
        distill_with(make_model(seed=1), None, blocks, num_tokens=64, batch_size=4, targets=targets)


def test_a_good_copy_serves_where_another_shard_is_damaged(tmp_path):
    teacher, blocks = make_model(), make_blocks(6)
    windows = labelled(tmp_path, SAMPLED, teacher, blocks)
    (first,) = windows.folder.glob("*.safetensors")
    for name in ("0" * 64, "f" * 64):  # whichever of them comes first
        content = bytearray(first.read_bytes())
        content[-1] ^= 1
        (first.parent / f"{name}.safetensors").write_bytes(content)
        fresh = opened(tmp_path, SAMPLED, teacher)
        assert label(fresh, SAMPLED, teacher, blocks).made == 0
        (first.parent / f"{name}.safetensors").unlink()


def test_each_window_of_a_training_is_read_once_and_beside_the_step(tmp_path, monkeypatch):
    import threading

    from cascade.teacher.targets import reader

    teacher, blocks = make_model(), make_blocks(24)
    targets = CachedTargets(labelled(tmp_path, SAMPLED, teacher, blocks), SAMPLED, blocks)
    read, unpack = [], reader.unpack_sample

    def noted(*arguments):
        read.append(threading.current_thread() is threading.main_thread())
        return unpack(*arguments)

    monkeypatch.setattr(reader, "unpack_sample", noted)
    distill_with(make_model(seed=1), None, blocks, num_tokens=16 * 24, batch_size=4, microbatch_size=2, targets=targets)
    assert not any(read) and 24 <= len(read) <= 28  # and the step after the last, which does not come about


def test_a_layout_that_is_not_the_roots_is_refused(tmp_path):
    teacher, blocks = make_model(), make_blocks(2)
    windows = opened(tmp_path, SAMPLED, teacher)
    other = dataclasses.replace(SAMPLED, draws=13)
    with pytest.raises(UserError, match=r"keeps .*'draws': 12.*, not .*'draws': 13"):
        label(windows, other, teacher, blocks)
    with pytest.raises(UserError, match="open the root of this layout"):
        CachedTargets(windows, other, blocks)


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_in_which_nothing_counts_is_kept_as_nothing(tmp_path, kind):
    teacher, blocks, layout = make_model(), make_blocks(2), KINDS[kind]
    labels = blocks.labels.clone()
    labels[0] = IGNORE_INDEX
    blocks = dataclasses.replace(blocks, labels=labels)
    targets = CachedTargets(labelled(tmp_path, layout, teacher, blocks), layout, blocks, head_of(teacher))
    known = dataclasses.replace(blocks, known=targets.of(torch.arange(2)))
    assert len(batch_losses(make_model(seed=1), None, known, Objective()).fused.divergence) == 15


@pytest.mark.parametrize("kind", ["sampled", "hidden"])
def test_training_from_the_cache_needs_no_teacher_and_follows_it(tmp_path, kind):
    teacher, blocks = make_model(), make_blocks(400)
    # A random teacher's probabilities are nearly even: more draws than a real one's 64 ids would need.
    layout = dataclasses.replace(SAMPLED, draws=100) if kind == "sampled" else HIDDEN
    targets = CachedTargets(labelled(tmp_path, layout, teacher, blocks), layout, blocks, head_of(teacher))
    other, first, last = make_blocks(16, seed=1), [], []
    for own in (teacher, None):
        student = make_model()
        with torch.no_grad():
            for number, weight in enumerate(student.parameters()):
                weight.add_(
                    0.3 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
                )
        first.append(batch_losses(student, teacher, other, Objective()).fused.loss.item())
        how = {"teacher": own} if own is not None else {"teacher": None, "targets": targets}
        distill_with(student, blocks=blocks, num_tokens=16 * 400, batch_size=8, microbatch_size=3, **how)
        last.append(batch_losses(student, teacher, other, Objective()).fused.loss.item())
    assert last[1] == pytest.approx(last[0], rel=0.1)
    assert last[0] < 0.5 * first[0]


def test_masked_blocks_keep_the_hidden_tokens_alone(tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    teacher = BertForMaskedLM(config).eval()
    ids = make_blocks(4).input_ids
    labels = torch.where(torch.rand(4, 16, generator=torch.Generator().manual_seed(0)) < 0.2, ids, IGNORE_INDEX)
    labels[:, 3] = ids[:, 3]
    blocks = TokenBlocks(ids.masked_fill(labels >= 0, 1), labels, 0.0, masked=True)
    targets = CachedTargets(labelled(tmp_path, SAMPLED, teacher, blocks), SAMPLED, blocks)
    student = BertForMaskedLM(config).eval()
    known = dataclasses.replace(blocks, known=targets.of(torch.arange(4)))
    live, kept = (
        batch_losses(student, own, batch, Objective()).fused for own, batch in ((teacher, blocks), (None, known))
    )
    assert len(kept.divergence) == len(live.divergence) == int((labels >= 0).sum())
    assert torch.allclose(kept.cross_entropy, live.cross_entropy, rtol=1e-5)
    assert torch.allclose(kept.teacher_entropy, live.teacher_entropy, rtol=1e-3)


def test_a_vocabulary_or_exact_id_beyond_the_teachers_is_refused(tmp_path):
    teacher, blocks = make_model(), make_blocks(1)
    with pytest.raises(UserError, match="vocabulary of 65 is more"):
        labelled(tmp_path, dataclasses.replace(SAMPLED, vocab_size=65), teacher, blocks)
    with pytest.raises(UserError, match="exact_ids: 64 is beyond"):
        labelled(tmp_path, dataclasses.replace(SAMPLED, exact_ids=(64,)), teacher, blocks)


def test_a_killed_training_from_the_cache_goes_on_to_the_same_bits(tmp_path):
    teacher, blocks = make_model(), make_blocks(24)
    targets = CachedTargets(labelled(tmp_path, SAMPLED, teacher, blocks), SAMPLED, blocks)
    options = {"num_tokens": 8 * 16 * 6, "batch_size": 8, "targets": targets, "state_folder": tmp_path / "state"}

    class Killed(BaseException):
        """Stands for a death that no handler sees."""

    def dies(step, total):
        if step == 4:
            raise Killed

    whole, broken = make_model(seed=1), make_model(seed=1)
    distill_with(whole, None, blocks, **options | {"state_folder": None})
    with pytest.raises(Killed):
        distill_with(broken, None, blocks, **options, save_every_minutes=0, on_step=dies)
    resumed = make_model(seed=1)
    steps = []
    distill_with(resumed, None, blocks, **options, on_step=lambda step, total: steps.append(step))
    assert steps[0] > 1
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])
