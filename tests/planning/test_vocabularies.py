"""Models that share a tokenizer, but not the size of their embeddings, are compared over the ids that they share."""

import json
import shutil
from dataclasses import replace

import numpy
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from conftest import SHARED, make_blocks, make_model, needs_shared
from safetensors.numpy import load_file, save_file

from cascade.data.masking import masked_blocks
from cascade.data.token_targets import ListedTargets
from cascade.distillation.losses.batch import batch_losses, selection_losses
from cascade.distillation.losses.divergences import Options
from cascade.distillation.losses.fused import fused_loss
from cascade.distillation.on_policy import Rollouts, common_ids, generate
from cascade.distillation.options import Objective, OnPolicy
from cascade.evaluation.heldout import block_metrics
from cascade.models.architecture.head import Head, head_of
from cascade.models.architecture.vocabulary import common_vocabulary, require_embedded, require_ids
from cascade.models.checkpoint.load import load_config, load_tokenizer, resolve_model
from cascade.runtime.errors import UserError
from cascade.teacher.targets.keys import open_windows
from cascade.teacher.targets.label import label
from cascade.teacher.targets.reader import CachedTargets
from cascade.teacher.targets.record import Layout

ROWS, OTHER_ROWS, COMMON = 12, 17, 9


def heads(seed=0):
    """(student, its head, teacher, its head, targets) in float64, of embeddings that are padded differently."""
    draw = torch.Generator().manual_seed(seed)
    hidden, theirs = (torch.randn(6, width, generator=draw, dtype=torch.float64) for width in (5, 7))
    ours = Head(torch.randn(ROWS, 5, generator=draw, dtype=torch.float64), torch.randn(ROWS, generator=draw).double())
    other = Head(torch.randn(OTHER_ROWS, 7, generator=draw, dtype=torch.float64), None, 1.3, 8.0)
    return hidden, ours, theirs, other, torch.randint(COMMON, (6,), generator=draw)


def narrow_logits(hidden, head, count):
    logits = hidden @ head.weight[:count].T + (0 if head.bias is None else head.bias[:count])
    logits = logits * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("vocab_size", [None, COMMON])
def test_the_loss_over_the_common_ids_is_that_of_both_distributions_given_one_of_these_ids(divergence, vocab_size):
    hidden, ours, theirs, other, targets = heads()
    count, share, temperature = vocab_size or ROWS, 0.3, 1.5
    state = hidden.clone().requires_grad_()
    weight = ours.weight.clone().requires_grad_()
    bias = ours.bias.clone().requires_grad_()
    z, u = narrow_logits(state, Head(weight, bias), count), narrow_logits(theirs, other, count)
    log_q, log_p = F.log_softmax(z / temperature, -1), F.log_softmax(u / temperature, -1)
    if divergence == "forward_kl":
        value = (log_p.exp() * (log_p - log_q)).sum(-1)
    elif divergence == "reverse_kl":
        value = (log_q.exp() * (log_q - log_p)).sum(-1)
    else:
        log_m = torch.logaddexp(log_p, log_q) - torch.tensor(2.0).log()
        value = 0.5 * (log_p.exp() * (log_p - log_m)).sum(-1) + 0.5 * (log_q.exp() * (log_q - log_m)).sum(-1)
    text = F.cross_entropy(z, targets, reduction="none")
    expected = ((1 - share) * temperature**2 * value + share * text).sum()
    expected.backward()

    leaves = [one.detach().float().requires_grad_() for one in (hidden, ours.weight, ours.bias)]
    objective = Objective(divergence, temperature, "tsq", share, Options(), vocab_size)
    found = fused_loss(
        leaves[0], Head(leaves[1], leaves[2]), targets, objective,
        teacher_hidden=theirs.float(), teacher_head=Head(other.weight.float(), None, other.scale, other.softcap),
    )  # fmt: skip
    found.loss.backward()
    assert found.loss.item() == pytest.approx(expected.item(), rel=2e-5)
    for leaf, reference in zip(leaves, (state, weight, bias), strict=True):
        torch.testing.assert_close(leaf.grad.double(), reference.grad, rtol=2e-4, atol=2e-5)
    assert not leaves[1].grad[count:].any() and not leaves[2].grad[count:].any()
    torch.testing.assert_close(found.teacher_entropy.double(), -(log_p.exp() * log_p).sum(-1), rtol=1e-5, atol=1e-5)
    assert torch.equal(found.agrees.bool(), z.argmax(-1) == u.argmax(-1))


def test_what_a_teacher_lists_of_ids_that_are_not_common_is_left_out_and_the_rest_is_given_one_of_the_others():
    hidden, ours, _, _, targets = heads()
    whole = torch.tensor([0.5, 0.2, 0.1], dtype=torch.float64)  # ids 3, 10 and 1; 0.2 are not listed
    listed = ListedTargets(torch.tensor([[3, 10, 1]]).expand(6, -1), whole.log().float().expand(6, -1))
    state = hidden.clone().requires_grad_()
    log_q = F.log_softmax(narrow_logits(state, ours, COMMON), -1)
    p = whole[[0, 2]] / (1 - whole[1])
    rest = 1 - p.sum()
    q_rest = 1 - log_q[:, [3, 1]].exp().sum(-1)
    expected = ((p * (p.log() - log_q[:, [3, 1]])).sum(-1) + rest * (rest.log() - q_rest.log())).sum()
    expected.backward()
    leaf = hidden.float().requires_grad_()
    head = Head(ours.weight.float(), ours.bias.float())
    found = fused_loss(leaf, head, targets, Objective(vocab_size=COMMON), known=listed)
    found.loss.backward()
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(leaf.grad.double(), state.grad, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def padded():
    """(student of 72 rows, teacher of 64): one vocabulary, padded differently."""
    return make_model(seed=1, vocab_size=72, tied=True), make_model(seed=2)


LAYOUTS = {
    "sampled": Layout("sampled", 60, draws=4096),
    "top_k": Layout("top_k", 60, top_k=60),
    "hidden": Layout("hidden", 60, hidden_size=48, dtype="bfloat16"),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_each_kind_of_kept_targets_gives_the_loss_of_the_live_teacher_over_the_common_ids(kind, padded, tmp_path):
    student, teacher = padded
    blocks, layout, objective = make_blocks(2, vocabulary=60), LAYOUTS[kind], Objective(vocab_size=60)
    windows = open_windows(tmp_path, teacher, None, layout)
    label(windows, layout, teacher, blocks)
    targets = CachedTargets(windows, layout, blocks, head_of(teacher) if kind == "hidden" else None)
    kept = replace(blocks, known=targets.of(torch.arange(2)))
    live, found = (batch_losses(student, teacher, one, objective).fused for one in (blocks, kept))
    # A sample of 4,096 draws is off by its noise, bfloat16 by its rounding; top_k lists all ids, in steps of 1/2048 nat.
    tolerance = {"sampled": 2e-2, "top_k": 2e-3, "hidden": 2e-2}[kind]
    assert found.divergence.mean().item() == pytest.approx(live.divergence.mean().item(), rel=tolerance)
    gradients = [torch.autograd.grad(one.loss, head_of(student).weight)[0] for one in (live, found)]
    difference = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    assert difference < 5 * tolerance


def test_a_student_writes_no_id_that_its_teacher_cannot_read(padded):
    student, teacher = padded
    with torch.no_grad():
        student.get_output_embeddings().weight[64:] += 3.0  # padding that it would write often
    prompts, settings = make_blocks(4, vocabulary=60), OnPolicy(1.0, prompt_tokens=4, max_new_tokens=24)
    assert (
        common_ids(student, teacher, Objective()) == 64 and common_ids(student, teacher, Objective(vocab_size=60)) == 60
    )
    torch.manual_seed(0)
    assert int(generate(student, prompts, settings).input_ids.max()) >= 64
    own = Rollouts(settings, 0, {}, [70, 2], 60)
    written = own.batch(student, prompts, 0)
    assert int(written.input_ids.max()) < 60
    losses = batch_losses(student, teacher, written, Objective("reverse_kl", vocab_size=60))
    assert losses.fused.loss.isfinite()


def test_held_out_loss_is_the_models_own_over_all_its_rows_and_kl_is_over_the_common_ids(padded):
    student, teacher = padded
    blocks = make_blocks(3, vocabulary=60)
    found = {metric.metric: metric.value for metric in block_metrics(student, teacher, blocks, vocab_size=60)[0]}
    with torch.no_grad():
        ours, theirs = (model(input_ids=blocks.input_ids).logits[:, :-1].double() for model in (student, teacher))
    loss = F.cross_entropy(ours.flatten(0, 1), blocks.input_ids[:, 1:].flatten())
    log_p, log_q = theirs[..., :60].log_softmax(-1), ours[..., :60].log_softmax(-1)
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert found["kl_to_teacher"] == pytest.approx(((log_p.exp() * (log_p - log_q)).sum(-1)).mean().item(), rel=1e-5)
    agreement = (log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item()
    assert found["top1_agreement"] == pytest.approx(agreement)
    alone = {metric.metric: metric.value for metric in block_metrics(student, None, blocks)[0]}
    assert alone["loss"] == pytest.approx(loss.item(), rel=1e-5)
    selection = selection_losses(student, teacher, blocks, 2, vocab_size=60)
    assert selection["selection_kl"] == pytest.approx(found["kl_to_teacher"], rel=1e-5)


def tokenizer_of(folder):
    return load_tokenizer(resolve_model(str(folder)))


def test_a_token_that_one_tokenizer_has_beyond_the_others_is_not_common_and_one_that_differs_is_refused(tiny_parent):
    teacher, other, third = (tokenizer_of(tiny_parent) for _ in range(3))
    assert common_vocabulary(teacher, other, 2048, 2048, "s") == 2048
    assert common_vocabulary(teacher, other, 2304, 2112, "s") == 2112  # rows of padding that both have
    other.add_tokens(["<extra>"])
    assert common_vocabulary(teacher, other, 2304, 2112, "s") == 2048
    assert common_vocabulary(other, teacher, 2304, 2112, "s") == 2048
    assert common_vocabulary(other, other, 2048, 2112, "s") == 2048
    third.add_tokens(["<other>"])
    with pytest.raises(UserError, match=r"s: its tokenizer is not.*1 ids differ.*2048: '<extra>' / '<other>'"):
        common_vocabulary(other, third, 2304, 2304, "s")


def test_an_added_token_beyond_the_embedding_is_accepted_and_an_end_token_there_is_not(tiny_parent):
    tokenizer = tokenizer_of(tiny_parent)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    require_embedded(tokenizer, 2048, "model")
    require_ids(torch.tensor([2047]), 2048, tokenizer, "data.train")
    with pytest.raises(UserError, match=r"data.train: it has the token '<image>' \(id 2048\)"):
        require_ids(torch.tensor([3, 2048]), 2048, tokenizer, "data.train")
    with pytest.raises(UserError, match="2049 tokens, the model's vocabulary 100"):
        require_embedded(tokenizer, 100, "model")
    tokenizer.eos_token = "<image>"
    with pytest.raises(UserError, match="eos_token '<image>' has id 2048"):
        require_embedded(tokenizer, 2048, "model")


def test_a_hidden_token_is_replaced_by_no_id_that_the_model_has_no_row_for(tiny_parent):
    tokenizer = tokenizer_of(tiny_parent)
    tokenizer.add_special_tokens({"mask_token": "!"})
    blocks = make_blocks(64, 32, vocabulary=8)
    free, bound = (masked_blocks(blocks, tokenizer, seed=0, vocab_size=size).input_ids for size in (None, 100))
    assert int(free.max()) >= 100 and int(bound.max()) < 100


RECIPE = """\
name: trial
parent: ./{parent}
data: {{source: files, train: text.jsonl, block_size: 32, max_tokens: 4_000}}
members: [{member}]
calibration: {{num_blocks: 4}}
prune: {{hidden: activation_norm, repair: {{method: none}}}}
distill: {{tokens: 256, batch_size: 4, microbatch_size: 4, learning_rate: 1e-3, selection_blocks: 4, cache: {cache}}}
evaluate: {{heldout_blocks: 4}}
baselines: [ce]
"""


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """A folder with the stories model as it is, padded to 520 rows, and that with a tool token; text without it."""
    import gzip

    folder = tmp_path_factory.mktemp("stories")
    for name, rows, tokens in (("model", 512, []), ("plain", 520, []), ("chatty", 520, ["<|tool|>"]),
                               ("image", 512, ["<image>"])):  # fmt: skip
        shutil.copytree(SHARED / "models/stories260K", folder / name)
        for path in (folder / name).iterdir():
            path.chmod(0o644)
        tensors = load_file(folder / name / "model.safetensors")
        table = tensors["model.embed_tokens.weight"]
        padding = numpy.zeros((rows - len(table), table.shape[1]), table.dtype)
        tensors["model.embed_tokens.weight"] = numpy.concatenate([table, padding])
        save_file(tensors, folder / name / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / name / "config.json").read_text()) | {"vocab_size": rows}
        (folder / name / "config.json").write_text(json.dumps(config))
        tokenizer = json.loads((folder / name / "tokenizer.json").read_text())
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tokenizer["added_tokens"] += [
            {"id": 512 + number, "content": token, "special": True} | flags for number, token in enumerate(tokens)
        ]
        (folder / name / "tokenizer.json").write_text(json.dumps(tokenizer))
    with gzip.open(SHARED / "text/tinystories/train.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for _, line in zip(range(150), file, strict=False)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    texts[0] = "A tool <|tool|> and a picture <image> and so on. " + texts[0]
    (folder / "other.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def recipe_of(folder, parent, member, cache="none", name="recipe"):
    (folder / f"{name}.yaml").write_text(RECIPE.format(parent=parent, member=member, cache=cache))
    return folder / f"{name}.yaml"


def invoke(*arguments):
    from cascade.cli.main import main

    return CliRunner().invoke(main, [str(one) for one in arguments])


STUDENT = "{name: s, student: ./%s}"


@needs_shared
@pytest.mark.parametrize(
    ("parent", "student", "common"),
    [("model", "plain", 512), ("plain", "model", 512), ("chatty", "plain", 512), ("plain", "plain", None)],
)
def test_the_plan_finds_what_a_student_and_its_teacher_have_in_common(stories, parent, student, common):
    from cascade.planning.family import resolve_family
    from cascade.recipe.load import load_recipe

    recipe = load_recipe(recipe_of(stories, parent, STUDENT % student, name=f"{parent}-{student}"))
    members = resolve_family(recipe, load_config(resolve_model(str(stories / parent))))
    assert members[0].vocab_size == common


@needs_shared
def test_a_student_config_of_fewer_rows_than_the_tokenizer_has_tokens_is_refused(stories):
    size = "hidden_size: 8, intermediate_size: 8, num_hidden_layers: 1, num_attention_heads: 2"
    path = recipe_of(
        stories, "model", f"{{name: s, config: {{model_type: llama, vocab_size: 300, {size}}}}}", name="few"
    )
    refused = invoke("plan", path)
    assert refused.exit_code == 2 and "config.vocab_size: 300 is less than the 512 tokens" in refused.output


@needs_shared
def test_text_with_a_token_that_a_model_cannot_read_is_refused_by_the_plan_with_the_token_and_the_document(stories):
    half = "{name: half, target: {params: 0.6}}"
    for parent, member, token in (("image", half, "<image>"), ("chatty", STUDENT % "plain", "<|tool|>")):
        path = recipe_of(stories, parent, member, name=f"text-{parent}")
        accepted = invoke("plan", path)
        assert accepted.exit_code == 0, accepted.output
        refused = invoke("plan", path, "--set", "data.train=other.jsonl")
        assert refused.exit_code == 2
        assert "document " in refused.output and f"'{token}' (id 512)" in refused.output


@needs_shared
def test_a_family_over_common_ids_is_made_from_targets_that_are_kept_over_these_ids(stories, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    members = f"{STUDENT % 'chatty'}, {{name: half, seed: parent, target: {{params: 0.6}}}}"
    path = recipe_of(stories, "plain", members, "{kind: sampled, draws: 16}", name="family")
    wanted = ["--output", tmp_path / "out", "--set", "distill.features.hidden=none"]
    wanted += ["--set", "finish=[{quantise: int8, members: [s]}]"]
    made = invoke(
        "run", path, *wanted, "--set", "distill.on_policy={fraction: 0.5, prompt_tokens: 4, max_new_tokens: 4}"
    )
    assert made.exit_code == 0, made.output
    rows = {row["name"]: row for row in json.loads((tmp_path / "out/family.json").read_text())["rows"]}
    assert {"s", "half", "s-ce", "half-ce", "s-int8"} <= rows.keys()
    roots = list((tmp_path / "cache/cascade/teacher").glob("*/root.json"))
    sizes = sorted(json.loads(root.read_text())["targets"]["vocab_size"] for root in roots)
    assert sizes == [512, 520]  # the cut member shares all rows with its teacher
    checked = invoke("cache", "verify", "--run", tmp_path / "out", "--json")
    assert checked.exit_code == 0, checked.output


@needs_shared
def test_cascade_evaluate_and_distill_compare_over_the_common_ids_and_say_when_a_block_is_too_long(stories, tmp_path):
    measured = invoke(
        "evaluate", stories / "plain", "--teacher", stories / "model", "--data", stories / "text.jsonl",
        "--block-size", 32, "--heldout-blocks", 2, "--json",
    )  # fmt: skip
    found = {one["metric"]: one["value"] for one in json.loads(measured.output)["metrics"]}
    assert found["kl_to_teacher"] == pytest.approx(0, abs=1e-6) and found["top1_agreement"] == 1
    for command in (["evaluate", stories / "plain", "--block-size", 513], ["distill", stories / "plain", "--teacher",
                     stories / "model", "--tokens", 64, "--output", tmp_path / "d", "--block-size", 513]):  # fmt: skip
        refused = invoke(*command, "--data", stories / "text.jsonl")
        assert refused.exit_code == 2 and "513 is longer than the model's context of 512" in refused.output
    (tmp_path / "pictures.jsonl").write_text(
        "".join(json.dumps({"text": f"<image> {number} a picture " * 20}) + "\n" for number in range(300))
    )
    refused = invoke("evaluate", stories / "image", "--data", tmp_path / "pictures.jsonl", "--block-size", 32)
    assert refused.exit_code == 2 and "--data (selection): it has the token '<image>' (id 512)" in refused.output
