"""The list of faults: each has a test named after it."""

import ast
import re

from conftest import ROOT

EVERY_TIME = (
    "01 03 05 06 07 08 09 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39 40"
)
NIGHTLY = "01 02 04 10 11 24 42"


def named():
    """(name, whether it is nightly) of every test."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                yield node.name, any(ast.unparse(mark).endswith(".nightly") for mark in node.decorator_list)


def test_every_fault_of_the_list_has_a_test_named_after_it():
    always, at_night = set(), set()
    for name, nightly in named():
        (at_night if nightly else always).update(re.findall(r"(?<=_F)\d\d(?=_)", name))
    assert set(EVERY_TIME.split()) <= always
    assert set(NIGHTLY.split()) <= at_night
