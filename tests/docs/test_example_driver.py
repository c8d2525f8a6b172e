"""The driver in `examples/` passes the whole conformance kit. Its own file: it takes as long as all others together."""

from __future__ import annotations

import re

from tests.docs import _markdown
from tests.docs.example_process import run

# Tests of the conformance kit that the folder driver skips, and why (it keeps no digests that would show damage). Any
# other one is a gap in the example.
SKIPPED = ["does not claim groups", "cannot make a guest ignore a shutdown", "cannot damage a recovery point"]


def test_the_folder_driver_passes_the_whole_kit() -> None:
    shown = run("-m", "pytest", "-p", "no:cacheprovider", "tests", cwd=_markdown.PROJECT / "examples" / "folder_driver")
    reasons = re.findall(r"^SKIPPED \[1\] \S+ (.+)$", shown, re.MULTILINE)
    assert len(reasons) == len(SKIPPED), shown
    assert all(any(known in reason for known in SKIPPED) for reason in reasons), reasons
    passed = re.search(r"(\d+) passed", shown)
    assert passed is not None
    assert int(passed[1]) > 120, "the kit has that many tests for what the driver claims"
