"""`tests/README.md` names tests that are there."""

from __future__ import annotations

import re

import pytest

from tests.docs._markdown import PROJECT

NAMED = sorted(
    set(re.findall(r"`((?:tests|drivers|asrcore)/[^`\s]+)`", (PROJECT / "tests/README.md").read_text("utf-8")))
)


@pytest.mark.parametrize("named", NAMED)
def test_what_the_page_names_is_there(named: str) -> None:
    path, _, name = named.partition("::")
    assert (PROJECT / path).exists()
    assert not name or f"def {name}(" in (PROJECT / path).read_text("utf-8")
