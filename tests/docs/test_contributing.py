"""The diffs of docs/CONTRIBUTING.md fit the code as it is now."""

import re
import subprocess

import pytest
from conftest import ROOT

PAGE = (ROOT / "docs" / "CONTRIBUTING.md").read_text()
DIFFS = dict(re.findall(r"^## (Add .+?)\n.*?^```diff\n(.*?)^```", PAGE, flags=re.S | re.M))


def test_there_is_a_diff_for_each_thing_that_can_be_added():
    assert {"Add a loss", "Add an importance score", "Add a recipe key", "Add an export format", "Add a stage"} == set(
        DIFFS
    )


@pytest.mark.parametrize("title", DIFFS)
def test_a_diff_can_be_applied(title):
    # Line numbers may be off; the lines around a change may not.
    applied = subprocess.run(
        ["git", "apply", "--check", "-"], input=DIFFS[title], text=True, cwd=ROOT, capture_output=True
    )
    assert applied.returncode == 0, applied.stderr
