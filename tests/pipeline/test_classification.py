"""Classifiers: examples, soft labels, and a family of them."""

import json
import sys

import pytest
import torch
from conftest import ROOT, distill_with
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)

from cascade.data.blocks import IGNORE_INDEX
from cascade.data.examples import (
    Examples,
    LabelledData,
    Raw,
    class_names,
    image_examples,
    load_training,
    read_examples,
    save_examples,
    text_examples,
)
from cascade.data.images import open_image
from cascade.data.sources import TextData
from cascade.distillation.losses.class_losses import class_losses
from cascade.distillation.options import Objective
from cascade.evaluation.classification import class_metrics
from cascade.evaluation.heldout import HELDOUT
from cascade.evaluation.long_tail import calibration_error
from cascade.pipeline.run import run_recipe
from cascade.planning.preview import preview
from cascade.recipe.load import load_recipe
from cascade.runtime.errors import UserError

WORDS = "good bad fine poor film plot very not a the is was".split()


def write_reviews(path, count, *, seed=0, labels=True):
    """Texts whose class is that of the first of four words that they have."""
    import random

    draw, kinds = random.Random(seed), {"good": "positive", "fine": "positive", "bad": "negative", "poor": "negative"}
    with path.open("w") as file:
        for _ in range(count):
            words = [draw.choice(WORDS) for _ in range(8)] + [draw.choice(list(kinds))]
            kind = next(kinds[word] for word in words if word in kinds)
            file.write(json.dumps({"text": " ".join(words)} | ({"label": kind} if labels else {})) + "\n")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A random BERT of four layers without a head, with a tokenizer of the reviews' words."""
    folder = tmp_path_factory.mktemp("encoder")
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=32).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokens), hidden_size=32, intermediate_size=48, num_hidden_layers=4,
                        num_attention_heads=4, max_position_embeddings=32)  # fmt: skip
    BertForSequenceClassification(config).bert.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reviews(tmp_path_factory, encoder):
    """A recipe for a family of classifiers, its examples beside it."""
    folder = tmp_path_factory.mktemp("reviews")
    for seed, (name, count) in enumerate({"train": 200, "selection": 60, "heldout": 80}.items()):
        write_reviews(folder / f"{name}.jsonl", count, seed=seed)
    write_reviews(folder / "more.jsonl", 100, seed=9, labels=False)
    (folder / "reviews.yaml").write_text(
        f"""\
name: reviews
task: text_classification
parent:
  model: {encoder}
  fit: {{examples: 6400, learning_rate: 2e-3}}
data: {{source: files, train: train.jsonl, selection: selection.jsonl, heldout: heldout.jsonl,
       unlabelled: more.jsonl, max_length: 16}}
members:
  - name: half
    target: {{dims: {{num_hidden_layers: 2}}}}
    init: layers
  - name: cut
    target: {{dims: {{intermediate_size: 32}}}}
    seed: parent
  - name: other
    config: {{model_type: distilbert, dim: 16, hidden_dim: 32, n_layers: 1, n_heads: 2}}
distill: {{examples: 512, learning_rate: 2e-3, temperature: 2, cross_entropy_weight: 0.3, batch_size: 16}}
calibration: {{num_blocks: 8}}
baselines: [cut, ce]
evaluate: {{at_least: {{heldout/accuracy: 0.5}}}}
finish: [{{quantise: int4, examples: 256, members: half, learning_rate: 1e-3}}]
"""
    )
    return folder / "reviews.yaml"


@pytest.fixture(scope="module")
def family(reviews, tmp_path_factory):
    return run_recipe(load_recipe(reviews), output=tmp_path_factory.mktemp("family") / "run")


def test_a_family_of_text_classifiers_is_fitted_cut_recovered_and_evaluated(family):
    rows = {row["name"]: row for row in json.loads((family / "family.json").read_text())["rows"]}
    names = {"parent", "half", "cut", "other", "half-cut", "half-ce", "cut-cut", "cut-ce", "other-ce"}
    assert set(rows) == names | {"half-int4qat"} and rows["half-int4qat"]["tokens"]["hop"] == 256
    metrics = {name: {metric["metric"]: metric for metric in row["metrics"]} for name, row in rows.items()}
    assert metrics["parent"]["accuracy"]["value"] > 0.9
    # Which of two KLs on 80 texts is smaller is the rounding's to say; what the member can do is not.
    assert metrics["half"]["accuracy"]["value"] > metrics["parent"]["accuracy"]["value"] - 0.1
    assert 0 < metrics["half"]["kl_to_teacher"]["value"] < 0.5 and metrics["half-cut"]["kl_to_teacher"]["value"] > 0
    assert metrics["half"]["accuracy"]["retention"] is not None and metrics["half"]["accuracy"]["n"] == 80
    assert rows["half"]["seed"] == "cut" and rows["other"]["tokens"]["hop"] == 512
    member = AutoModelForSequenceClassification.from_pretrained(family / "members" / "half")
    assert member.config.num_hidden_layers == 2 and set(member.config.label2id) == {"negative", "positive"}
    assert "Good enough" in (family / "report.html").read_text()
    assert "text-classification" in (family / "members" / "half" / "README.md").read_text()
    assert "AutoModelForSequenceClassification" in (family / "members" / "half" / "README.md").read_text()


def test_the_plan_of_a_family_of_classifiers_loads_no_weights_and_checks_its_examples(reviews, tmp_path):
    planned = preview(load_recipe(reviews), tmp_path / "run")
    assert [row["num_tokens"] for row in planned["members"]] == [512, 512, 512]
    with pytest.raises(UserError, match="no field 'stars'; it has: text, label"):
        preview(load_recipe(reviews, ["data.label_field=stars"]), tmp_path / "run")


def test_a_parent_of_other_classes_and_a_student_of_others_are_refused(reviews, family, tmp_path):
    three = tmp_path / "three"
    config = BertConfig(vocab_size=17, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                        num_attention_heads=4, max_position_embeddings=32, num_labels=3)  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(three)
    with pytest.raises(UserError, match=r"parent: 3 classes \(LABEL_0, LABEL_1, LABEL_2\), the data 2"):
        preview(load_recipe(reviews, [f"parent={three}", "members=[]", "finish=[]"]), tmp_path / "run")
    members = f"members=[{{name: three, student: {three}}}]"
    with pytest.raises(UserError, match="members: three: the student has 3 classes, the teacher 2"):
        preview(load_recipe(reviews, [members, "finish=[]"]), tmp_path / "run")
    with pytest.raises(UserError, match=r"parent: .* is no classifier; with parent.fit it learns the classes first"):
        encoder = load_recipe(reviews).parent.model
        preview(load_recipe(reviews, [f"parent={encoder}", "members=[]", "finish=[]"]), tmp_path / "run")


def test_images_of_another_size_than_the_models_are_refused(tmp_path):
    recipe = ROOT / "recipes" / "digits.yaml"
    with pytest.raises(UserError, match="images of 1 channels, 8 x 8; the parent takes 1 channels, 16 x 16"):
        run_recipe(load_recipe(recipe, ["parent.fit.config.image_size=16"]), output=tmp_path / "run")
    members = "members=[{name: s, config: {model_type: vit, image_size: 16, patch_size: 2}}]"
    with pytest.raises(UserError, match="members: s: the student's image_size is 16, the teacher's 8"):
        preview(load_recipe(recipe, [members]), tmp_path / "run")


def test_a_recipe_of_the_digits_makes_a_stock_image_classifier(tmp_path):
    small = ["parent.fit.examples=640", "distill.examples=320", "baselines=[]", "parent.fit.config.num_hidden_layers=1"]
    folder = run_recipe(load_recipe(ROOT / "recipes" / "digits.yaml", small), output=tmp_path / "run")
    member = AutoModelForImageClassification.from_pretrained(folder / "members" / "small")
    assert member.config.num_labels == 10 and member.config.id2label[7] == "7"
    data = load_training(next((folder / "stages").glob("parent.data-*")) / "train.safetensors")
    assert (
        int((data.labels >= 0).sum()) == 150
        and len(data) == 1075
        and data.tensors["pixel_values"].shape[1:] == (1, 8, 8)
    )
    assert -1 <= data.tensors["pixel_values"].min() and data.tensors["pixel_values"].max() <= 1


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@given(
    st.lists(st.booleans(), min_size=1, max_size=6).filter(any),
    st.sampled_from([1.0, 2.0, 4.0]),
    st.floats(0, 1),
)
def test_the_loss_of_classes_is_hintons_and_examples_without_labels_have_no_cross_entropy(
    divergence, labelled, temperature, weight
):
    generator = torch.Generator().manual_seed(len(labelled))
    ours = torch.randn(len(labelled), 5, generator=generator).requires_grad_()
    theirs = 3 * torch.randn(len(labelled), 5, generator=generator)
    labels = torch.where(torch.tensor(labelled), torch.arange(len(labelled)) % 5, IGNORE_INDEX)
    losses = class_losses(ours, theirs, labels, Objective(divergence, temperature, "tsq", weight))
    (gradient,) = torch.autograd.grad(losses.loss, ours)

    exact = ours.detach().double().requires_grad_()
    p = (theirs.double() / temperature).log_softmax(1)
    q = (exact / temperature).log_softmax(1)
    mix = ((p.exp() + q.exp()) / 2).log()
    kl = {
        "forward_kl": (p.exp() * (p - q)).sum(1),
        "reverse_kl": (q.exp() * (q - p)).sum(1),
        "jsd": ((p.exp() * (p - mix)).sum(1) + (q.exp() * (q - mix)).sum(1)) / 2,
    }[divergence]
    hard = torch.nn.functional.cross_entropy(exact, labels, ignore_index=IGNORE_INDEX, reduction="none")
    total = ((1 - weight) * temperature**2 * kl + weight * hard).sum()
    (expected,) = torch.autograd.grad(total, exact)
    assert losses.loss.item() == pytest.approx(total.item(), rel=1e-4, abs=1e-5)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-5)


def tiny_vit(seed=0):
    torch.manual_seed(seed)
    return ViTForImageClassification(
        ViTConfig(image_size=4, patch_size=2, num_channels=1, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                  num_attention_heads=2, num_labels=3, hidden_dropout_prob=0.1)
    )  # fmt: skip


def test_classifiers_train_the_same_however_a_step_is_split_and_go_on_to_the_same_bits(tmp_path):
    generator = torch.Generator().manual_seed(0)
    data = Examples({"pixel_values": torch.randn(40, 1, 4, 4, generator=generator)}, torch.arange(40) % 3)
    teacher = tiny_vit(1).eval().requires_grad_(False)
    options = {"num_tokens": 96, "batch_size": 8, "learning_rate": 1e-2, "selection": data.take(8)}
    still = tiny_vit(2)
    still.config.hidden_dropout_prob = 0.0
    for module in still.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    import copy

    split = copy.deepcopy(still)
    whole = distill_with(still, teacher, data, microbatch_size=8, **options)
    parts = distill_with(split, teacher, data, microbatch_size=3, **options)
    assert [e["loss"] for e in whole.curve] == pytest.approx([e["loss"] for e in parts.curve], rel=1e-4, abs=1e-6)
    assert whole.num_tokens == 96 and whole.num_steps == 12

    class Killed(Exception):
        pass

    def dies(step, _):
        if step == 7:
            raise Killed

    options |= {"microbatch_size": 8, "save_every_minutes": 0.0}
    unbroken, broken = tiny_vit(2), tiny_vit(2)
    distill_with(unbroken, teacher, data, **options)
    with pytest.raises(Killed):
        distill_with(broken, teacher, data, state_folder=tmp_path / "state", on_step=dies, **options)
    resumed = tiny_vit(3)
    distill_with(resumed, teacher, data, state_folder=tmp_path / "state", **options)
    for name, value in unbroken.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_metrics_of_a_classifier_are_those_of_its_probabilities():
    class Fixed(torch.nn.Module):
        def __init__(self, logits):
            super().__init__()
            self.logits = torch.nn.Parameter(logits)

        def forward(self, index):
            from types import SimpleNamespace

            return SimpleNamespace(logits=self.logits[index])

    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.5, 0.0]])
    examples = Examples({"index": torch.arange(4)}, torch.tensor([0, 1, 1, 0]))
    metrics, items, _ = class_metrics(Fixed(logits), Fixed(logits.flip(1)), examples, batch_size=3)
    by_name = {metric.metric: metric for metric in metrics}
    assert by_name["accuracy"].value == 0.75 and items["heldout/accuracy/None"] == [1, 1, 0, 1]
    assert by_name["accuracy"].chance == 0.5 and by_name["top1_agreement"].value == 0.0
    expected = torch.nn.functional.cross_entropy(logits, examples.labels)
    assert by_name["loss"].value == pytest.approx(expected.item(), rel=1e-6)


@given(st.integers(1, 40), st.integers(0, 5))
def test_calibration_error_is_the_gap_between_confidence_and_accuracy_bin_by_bin(count, seed):
    generator = torch.Generator().manual_seed(seed)
    logits, labels = 2 * torch.randn(count, 4, generator=generator), torch.randint(0, 4, (count,), generator=generator)
    confidence, predicted = torch.softmax(logits.double(), 1).max(1)
    gap = 0.0
    for number in range(15):
        inside = (confidence > number / 15) & (confidence <= (number + 1) / 15)
        if inside.any():
            gap += abs(float(confidence[inside].mean()) - float((predicted == labels)[inside].double().mean())) * int(
                inside.sum()
            )
    assert calibration_error(confidence, (predicted == labels).double()) == pytest.approx(gap / count, abs=1e-9)


def test_examples_are_read_split_and_kept(tmp_path, encoder):
    write_reviews(tmp_path / "train.jsonl", 400)
    write_reviews(tmp_path / "more.jsonl", 30, seed=5, labels=False)
    data = LabelledData(TextData("files", {"train": (str(tmp_path / "train.jsonl"),)}), False,
                        unlabelled=(str(tmp_path / "more.jsonl"),), train_examples=50)  # fmt: skip
    train, heldout = read_examples(data, "train"), read_examples(data, HELDOUT)
    assert len(train) == 80 and sum(example.label is None for example in train) == 30
    assert not {example.content for example in train if example.label} & {example.content for example in heldout}
    assert class_names(data) == ["negative", "positive"]
    tokenizer = BertTokenizerFast.from_pretrained(encoder)
    examples = text_examples(train, ["negative", "positive"], tokenizer, 8)
    assert examples.tensors["input_ids"].shape == (80, 8) and (examples.labels[50:] == IGNORE_INDEX).all()
    save_examples(examples, tmp_path / "e.safetensors")
    again = load_training(tmp_path / "e.safetensors")
    assert torch.equal(again.labels, examples.labels) and again.tensors.keys() == examples.tensors.keys()
    short = Examples(
        {"input_ids": torch.tensor([[2, 5, 3, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}, torch.tensor([0])
    )
    assert short.take(1).rows(torch.tensor([0])).tensors["input_ids"].shape == (1, 3)
    with pytest.raises(UserError, match="the label 'positive' is none of the 1 classes negative"):
        text_examples(train, ["negative"], tokenizer, 8)


def test_the_classes_are_the_numbers_that_occur_in_their_order(tmp_path):
    with (tmp_path / "t.jsonl").open("w") as file:
        for number in range(300):
            file.write(json.dumps({"text": f"text {number}", "label": [0, 2, 10][number % 3]}) + "\n")
    data = LabelledData(TextData("files", {"train": (str(tmp_path / "t.jsonl"),)}), False)
    assert class_names(data) == ["0", "2", "10"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([[0, 1], [1]], "rows of pixels of different length"),
        ([[[[1]]]], r"expected pixels as \[height\]\[width\]"),
        ([[0, 300]], "pixels from 0 to 300"),
        ([[0.0, 2.0]], "pixels from 0 to 2"),
        ("missing.png", "no picture that can be read"),
        (7, "neither rows of pixels nor a picture"),
    ],
)
def test_what_is_no_image_is_named(tmp_path, content, message):
    with pytest.raises(UserError, match=f"row 3: .*{message}"):
        open_image(content, "row 3", tmp_path)


def test_pictures_and_numbers_give_the_same_pixels(tmp_path):
    from PIL import Image

    values = torch.arange(12).view(3, 4) * 20
    Image.fromarray(values.to(torch.uint8).numpy()).save(tmp_path / "a.png")
    torch.testing.assert_close(open_image("a.png", "x", tmp_path), open_image(values.tolist(), "x", tmp_path))
    assert open_image("a.png", "x", tmp_path).shape == (1, 3, 4)
    two = [Raw(torch.zeros(1, 2, 2), "a"), Raw(torch.zeros(1, 3, 2), "a")]
    with pytest.raises(UserError, match=r"images of \(1, 2, 2\) and of \(1, 3, 2\)"):
        image_examples(two, ["a"])


def image_files(folder, count=60):
    """A recipe of images in files, which come in two classes."""
    rows = []
    for number in range(count):
        name = f"{number}.pgm"  # a portable graymap: a header and the pixels
        (folder / name).write_bytes(b"P5 8 8 255\n" + bytes([number * 4 % 256] * 32 + [number % 2 * 255] * 32))
        rows.append({"image": name, "label": "odd" if number % 2 else "even"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = (
        (ROOT / "recipes" / "digits.yaml").read_text().replace("source: digits", "source: files\n  train: rows.jsonl")
    )
    (folder / "images.yaml").write_text(text.replace("train_examples: 150", "train_examples: 20"))
    return load_recipe(folder / "images.yaml")


def test_a_recipe_of_image_files_is_planned_where_pillow_is_there(tmp_path):
    assert [member["name"] for member in preview(image_files(tmp_path), tmp_path / "run")["members"]] == ["small"]


def test_without_pillow_a_recipe_of_image_files_stops_before_anything_is_made(tmp_path, monkeypatch):
    recipe = image_files(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "PIL"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "PIL", None)
    for make in (preview, run_recipe):
        with pytest.raises(UserError, match=r"rows.jsonl.*pip install 'cascade-distill\[images\]'"):
            make(recipe, output=tmp_path / "run")
    assert not (tmp_path / "run" / "stages").exists()
    assert open_image([[0, 255]], "x", tmp_path).tolist() == [[[0.0, 1.0]]]
    with pytest.raises(UserError, match="neither rows of pixels nor a picture: 7"):
        open_image(7, "x", tmp_path)


def test_without_pillow_the_pictures_of_a_hub_dataset_say_what_to_install(tmp_path, monkeypatch):
    import datasets

    image_files(tmp_path, count=20)
    columns = {"image": [str(tmp_path / f"{n}.pgm") for n in range(20)], "label": ["even", "odd"] * 10}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    table = datasets.Dataset.from_dict(columns, features=features)
    monkeypatch.setattr("datasets.load_dataset", lambda *arguments, **options: table)
    text = TextData("hub", {}, dataset="org/pictures", revision="0" * 40, hub_splits={"train": "train"})
    data = LabelledData(text, images=True)
    assert {example.content.shape for example in read_examples(data, "train")} == {(1, 8, 8)}
    monkeypatch.setattr(datasets.config, "PIL_AVAILABLE", False)
    with pytest.raises(UserError, match=r"data.train: pictures are read .*pip install 'cascade-distill\[images\]'"):
        read_examples(data, "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("distill.tokens=100", "distill.tokens: task text_classification counts examples; give `examples`"),
        ("distill.examples=null", "distill.examples is missing"),
        ("evaluate.tasks=[hellaswag]", "evaluate.tasks does not go with task: text_classification"),
        ("task=language", "distill.examples: task language counts tokens; give `tokens`"),
        (
            "parent={fit: {examples: 9, config: {model_type: bert}}}",
            "a text classifier made from nothing has no tokenizer",
        ),
        ("prune.neurons=taylor", "prune.neurons: taylor does not go with task: text_classification"),
        ("task=image_classification", "members: half: image models are not cut"),
    ],
)
def test_keys_that_do_not_go_with_the_task_are_refused(reviews, change, message):
    with pytest.raises(UserError, match=message):
        load_recipe(reviews, [change])


def test_the_notebook_of_dark_knowledge_runs(tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    for name, value in {"SEEDS": "1", "EXAMPLES": "64", "TEACHER_EXAMPLES": "640"}.items():
        monkeypatch.setenv(f"CASCADE_{name}", value)
    notebook = nbformat.read(ROOT / "notebooks" / "dark_knowledge.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/svg+xml" in output.get("data", {}) for output in outputs) == 1
    tables = [output["data"]["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    assert len(tables) == 2 and tables[1].count("<tr>") == 8
