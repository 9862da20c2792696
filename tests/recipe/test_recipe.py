"""Recipes are read strictly: every problem at once, with its place and a way out."""

import json

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from cascade.models.architecture.model_class import model_from_config
from cascade.recipe.load import load_recipe
from cascade.recipe.schema import Recipe
from cascade.runtime.errors import RecipeError, UserError
from cascade.store.strict_yaml import parse_yaml, write_yaml

GOOD = """\
name: family
parent: builtin:pico-python
data: {source: stdlib}
members:
  - name: half
    target: {params: 0.5}
distill:
  tokens: 10_000
  learning_rate: 1e-3
"""


def load(tmp_path, text, overrides=()):
    (tmp_path / "r.yaml").write_text(text)
    return load_recipe(tmp_path / "r.yaml", overrides)


def problems(tmp_path, text, overrides=()):
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, text, overrides)
    return str(caught.value)


def test_exponents_and_underscored_numbers_are_numbers(tmp_path):
    recipe = load(tmp_path, GOOD.replace("1e-3", "1e-5"))
    assert recipe.distill.learning_rate == 1e-5 and recipe.distill.tokens == 10_000


def test_all_problems_are_told_at_once_each_with_its_place(tmp_path):
    text = (
        GOOD.replace("  tokens:", "  tokns:")
        .replace("params: 0.5", "params: 3")
        .replace("source: stdlib", "source: web")
    )
    message = problems(tmp_path, text + "bogus: 1\n")
    assert "r.yaml:8:3: unknown key 'tokns'; did you mean 'tokens'?" in message
    assert "r.yaml:6:14: members.0.target.params: 3 is neither a fraction" in message
    assert (
        "r.yaml:3:8: data.source: Input should be 'stdlib', 'files', 'hub', 'generated' or 'digits' (got 'web')"
        in message
    )
    assert "r.yaml:10:1: unknown key 'bogus'" in message


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "name: family\n",
            "name: family\nname: other\n",
            "r.yaml:2:1: key 'name' stands twice; first in line 1",
        ),
        (
            "name: family",
            "name: !!python/object:os.system x",
            "r.yaml:1:7: tag tag:yaml.org,2002:python/object",
        ),
        ("name: family", "name: ../escape", "cannot be a folder's name"),
        ("name: family", "name: [", "not valid YAML"),
        ("  tokens: 10_000", "  tokens: 010", "has a leading zero"),
        ("  tokens: 10_000", "  tokens: 0", "greater than 0 (got 0)"),
        ("  tokens: 10_000", "  tokens: many", "valid integer (got 'many')"),
        ("  tokens: 10_000", "  tokens: 1.5", "valid integer"),
        (
            "{params: 0.5}",
            "{params: 0.5}\n  - name: half\n    target: {params: 0.4}",
            "the name half stands twice",
        ),
        ("{params: 0.5}", "{params: 0.5}\n    seed: nobody", "unknown seed 'nobody'"),
        ("{params: 0.5}", "{}", "give `params`, another bound, or `dims`"),
        ("  tokens: 10_000\n", "", "distill.tokens is missing"),
        ("    target: {params: 0.5}\n", "", "give one of `target`, `student` and `config`"),
        ("target: {params: 0.5}", "config: {model_type: llama}\n    student: x", "give one of `target`, `student` and"),
        (
            "target: {params: 0.5}",
            "config: {model_type: llama}\n    init: layers",
            "does not go with `config`; use random",
        ),
        (
            "target: {params: 0.5}",
            "config: {model_type: llama}\n    seed: parent",
            "not cut, so it has no `seed`; remove",
        ),
        ("{params: 0.5}", "{params: 0.5}\n    init: checkpoint", "with `target`; use prune or layers or random"),
        ("{source: stdlib}", "{source: files}", "source files needs `train`"),
        ("{source: stdlib}", "{source: hub, dataset: a/b, train: train}", "pinned `revision`"),
        (
            "distill:\n  tokens: 10_000\n  learning_rate: 1e-3\n",
            "finish: [instruct]\n",
            "finish",
        ),
        ("learning_rate: 1e-3", "learning_rate: .nan", "learning_rate"),
        ("learning_rate: 1e-3", "learning_rate: 1e400", "learning_rate"),
    ],
)
def test_a_bad_value_is_named_with_what_is_accepted(tmp_path, old, new, message):
    assert old in GOOD
    assert message in problems(tmp_path, GOOD.replace(old, new))


def test_no_is_a_word_and_not_false(tmp_path):
    assert parse_yaml("a: no\nb: 012x\nc: 12:30\nd: true", source="x").data == {
        "a": "no",
        "b": "012x",
        "c": "12:30",
        "d": True,
    }


def test_F28_an_alias_bomb_is_refused_quickly(tmp_path):
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    assert "aliases are counted" in problems(tmp_path, bomb)


@pytest.mark.parametrize("content", [b"", b"- a\n", b"\xff\xfe", b"a: \x00", b"{" * 10_000])
def test_F28_files_that_are_no_recipe_are_refused_without_a_traceback(tmp_path, content):
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(RecipeError):
        load_recipe(tmp_path / "r.yaml")


@given(st.text(max_size=200))
def test_F28_no_text_makes_the_reader_fail_otherwise_than_with_its_own_error(text):
    try:
        parse_yaml(text, source="x")
    except RecipeError:
        return


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(10**9), 10**9)
        | st.floats(-1e6, 1e6)
        | st.text("abc:#-'\" \n01e", max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text("abcxyz", min_size=1, max_size=4), inner, max_size=3)
        ),
        max_leaves=8,
    )
)
def test_written_yaml_reads_back_as_the_same_data(data):
    assert parse_yaml(write_yaml(data), source="x").data == data


def test_overrides_are_applied_and_checked_like_the_file(tmp_path):
    recipe = load(tmp_path, GOOD, ["distill.tokens=100_000", "members.0.target.params=0.25", "evaluate.tasks=[a, b]"])
    assert recipe.distill.tokens == 100_000 and recipe.members[0].target.params == 0.25
    assert recipe.evaluate.tasks == ["a", "b"]
    assert "--set distill.tokens: " in problems(tmp_path, GOOD, ["distill.tokens=none"])
    assert "unknown key 'tokns'" in problems(tmp_path, GOOD, ["distill.tokns=1"])
    assert "members has 1 items" in problems(tmp_path, GOOD, ["members.3.name=x"])
    assert "not of the form KEY=VALUE" in problems(tmp_path, GOOD, ["distill"])


def test_relative_paths_count_from_the_recipes_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    text = GOOD.replace("{source: stdlib}", "{source: files, train: ../a.jsonl}")
    (tmp_path / "sub" / "r.yaml").write_text(text)
    assert load_recipe(tmp_path / "sub" / "r.yaml").data.train == [str(tmp_path / "a.jsonl")]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_recipe_is_valid_and_says_how_to_run_it(path):
    recipe = load_recipe(path)
    assert f"cascade run recipes/{path.name}" in path.read_text().splitlines()[0]
    assert Recipe.model_validate(recipe.model_dump()) == recipe


def test_a_rotation_is_automatic_where_it_is_legal_and_its_own_head_is_cheap():
    import transformers

    from cascade.planning.family import hidden_score

    small = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4}
    cases = {
        "pca": [
            transformers.LlamaConfig(**small, vocab_size=9000, tie_word_embeddings=False),
            transformers.LlamaConfig(**small, vocab_size=500, tie_word_embeddings=True),
        ],
        "activation_norm": [
            transformers.LlamaConfig(**small, vocab_size=9000, tie_word_embeddings=True),  # embeddings too large
            transformers.Gemma2Config(),  # a norm between branch and stream
            transformers.GPT2Config(),  # norms that subtract the mean
        ],
    }
    for expected, configs in cases.items():
        for config in configs:
            assert hidden_score("auto", config) == expected, config.model_type


def _family(tmp_path, parent, members, **sections):
    from cascade.planning.checks import check_family
    from cascade.planning.family import resolve_family
    from cascade.planning.parent import parent_config

    path = tmp_path / "recipe.json"
    text = {"name": "x", "parent": str(parent), "data": {"source": "stdlib", "block_size": 16}}
    path.write_text(json.dumps(text | {"members": members, "distill": {"tokens": 512}} | sections))
    recipe = load_recipe(str(path))
    config = parent_config(recipe)
    members = resolve_family(recipe, config)
    check_family(recipe, config, members)
    return members


def _saved_config(config, folder):
    folder.mkdir()
    model_from_config(config).save_pretrained(folder)  # the plan compares weights with config
    return folder


def test_members_are_ordered_by_the_size_that_all_their_bounds_allow(tmp_path):
    import transformers

    parent = _saved_config(
        transformers.LlamaConfig(
            vocab_size=2048, hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_attention_heads=12,
            num_key_value_heads=4, architectures=["LlamaForCausalLM"],
        ),
        tmp_path / "parent",
    )  # fmt: skip
    members = _family(
        tmp_path, parent,
        [{"name": "a", "target": {"params": 0.9, "flops_per_token": 0.3}}, {"name": "b", "target": {"params": 0.6}}],
    )  # fmt: skip
    assert [member.name for member in members] == ["b", "a"]


def test_a_family_of_encoders_is_refused_before_anything_is_made(tmp_path):
    import transformers

    parent = _saved_config(
        transformers.BertConfig(
            vocab_size=512, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            architectures=["BertForMaskedLM"],
        ),
        tmp_path / "parent",
    )  # fmt: skip
    with pytest.raises(UserError, match="BertForMaskedLM is no causal language model"):
        _family(tmp_path, parent, [{"name": "a", "target": {"params": 0.9}}])


def test_where_a_head_of_its_own_is_too_large_only_the_cut_without_rotation_is_tried(tmp_path):
    import transformers

    from cascade.models.checkpoint.load import resolve_model
    from cascade.pipeline.stage_output import Checkpoint, Made
    from cascade.pipeline.stages.cut import Base
    from cascade.pipeline.stages.shape_search import search_shape

    parent = _saved_config(
        transformers.LlamaConfig(
            vocab_size=32000, hidden_size=64, intermediate_size=172, num_hidden_layers=5, num_attention_heads=8,
            num_key_value_heads=4, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
        ),
        tmp_path / "parent",
    )  # fmt: skip
    (member,) = _family(tmp_path, parent, [{"name": "a", "target": {"params": 0.3}}])
    assert member.hidden_choices == ("activation_norm", "pca")

    class Run:
        recipe, parent, data = load_recipe(str(tmp_path / "recipe.json")), "p", "d"

        def target_settings(self):
            return {}

        @property
        def runner(self):
            return self

        def make(self, stage, owner, *, settings, inputs, write):
            folder = tmp_path / settings["hidden"]
            folder.mkdir(exist_ok=True)
            (folder / "losses.json").write_text('{"repaired": {"kl_to_teacher": 1.0}, "recovered": null}')
            return Made(folder, "")

    base = Base(model=Checkpoint(resolve_model(str(parent)), ""), lineage=[], statistics=Made(tmp_path, ""))
    candidates = search_shape(Run(), member, base)
    assert [candidate.shape.hidden for candidate in candidates] == ["activation_norm"]
