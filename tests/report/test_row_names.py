"""Every row of a family has a name of its own."""

import pytest

from cascade.pipeline.publish import _earlier_rows
from cascade.recipe.load import load_recipe
from cascade.recipe.names import owner_of
from cascade.report.records import Row, family_json
from cascade.runtime.errors import RecipeError


def read(recipe_folder, members, *changes):
    named = ", ".join(f"{{name: {name}, target: {target}}}" for name, target in members.items())
    return load_recipe(recipe_folder / "tiny.yaml", [f"members=[{named}]", *changes])


HALF, WHOLE = "{params: 0.5}", "{dims: {num_hidden_layers: 1}}"


@pytest.mark.parametrize(
    ("members", "changes", "message"),
    [
        ({"m": HALF, "m-ce": HALF}, ["baselines=[ce]"], r"m-ce: m has a baseline \(ce\)"),
        ({"m": HALF, "m-cut": HALF}, ["baselines=[cut]"], r"m-cut: m has a baseline \(cut\)"),
        ({"m": HALF, "M-CE": HALF}, ["baselines=[{ce: {}}]"], r"M-CE: m has a baseline \(ce\)"),
        ({"m": HALF, "m-shape1": HALF}, ["baselines=[]"], "m-shape1: m has shapes that are tried"),
        ({"m": HALF, "m-shape12_pca": HALF}, ["baselines=[]"], "m-shape12_pca: m has shapes that are tried"),
        ({"m": HALF, "m-int8": HALF}, ["finish=[{quantise: int8}]"], r"m-int8: m has a copy \(`finish`\)"),
        ({"m": HALF, "m-int4qat": HALF}, ["finish=[{quantise: int4, tokens: 8, members: m}]"], r"m-int4qat: m has a copy"),
        ({"parent-int8": HALF}, ["finish=[{quantise: int8, members: parent}]"], "parent-int8: parent has a copy"),
        ({"Parent": HALF}, [], "'Parent' stands for something else here"),
    ],
)  # fmt: skip
def test_a_member_with_the_name_of_another_row_is_refused_with_both(recipe_folder, members, changes, message):
    with pytest.raises(RecipeError, match=message):
        read(recipe_folder, members, *changes)


def test_names_that_only_look_so_are_not_refused(recipe_folder):
    for members, changes in (
        ({"m": HALF, "m-ce": HALF}, ["baselines=[cut]"]),
        ({"m": WHOLE, "m-shape1": HALF}, ["baselines=[cut]"]),
        ({"m": HALF, "m-int8": HALF}, ["finish=[{quantise: int8, members: m-int8}]"]),
        ({"m": HALF, "m-cetera": HALF, "mm": HALF}, []),
    ):
        assert read(recipe_folder, members, *changes).members


def test_a_row_is_its_members_whatever_other_names_begin_alike():
    names = ["a", "a-b", "a-ce"]
    assert (
        owner_of("a-b-ce", names) == "a-b" and owner_of("a-ce", names) == "a" and owner_of("a-ce-cut", names) == "a-ce"
    )
    assert owner_of("a-shape2_activation_norm", names) == "a" and owner_of("a-b-int4qat", names) == "a-b"
    assert owner_of("a-c", names) == "" and owner_of("b-ce", names) == ""


def test_rows_of_members_that_are_not_made_now_are_kept_with_their_owners(tmp_path):
    roles = {"a": "member", "a-ce": "member", "a-ce-cut": "baseline", "a-shape1": "candidate", "gone-cut": "baseline"}
    rows = [
        Row(name=name, role=role, status="done", dims={}, num_parameters=1, num_parameters_non_embedding=1)
        for name, role in roles.items()
    ]
    (tmp_path / "family.json").write_text(family_json("f", rows))
    rows = _earlier_rows(tmp_path, {"a", "a-ce"}, ())
    assert {name: [row.name for row in member_rows] for name, member_rows in rows.items()} == {
        "a": ["a", "a-shape1"], "a-ce": ["a-ce", "a-ce-cut"]}  # fmt: skip


def test_what_a_try_left_is_removed_for_its_own_stage_alone(tmp_path):
    from cascade.store.commits import drop_partials

    for name in (
        ".partial-m.evaluate-aa",
        ".partial-m.evaluate-bb",
        ".partial-m.evaluate-quantised-aa",
        ".partial-mm.evaluate-aa",
    ):
        (tmp_path / name).mkdir()
    drop_partials(tmp_path / "m.evaluate-aa", any_key=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".partial-m.evaluate-quantised-aa",
        ".partial-mm.evaluate-aa",
    ]
