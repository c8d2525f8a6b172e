"""Examples of the documentation run, and the targets of its links exist.

A block that starts with ```python test is run; the blocks of one page share their names and run in order, in an empty
directory. Other blocks are only shown.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.docs import _markdown

PAGES = {str(path.relative_to(_markdown.PROJECT)): path for path in _markdown.pages()}


def runnable(path: Path) -> list[_markdown.Block]:
    found = _markdown.blocks(path.read_text(encoding="utf-8"))
    return [block for block in found if block.info == "python test"]


@pytest.mark.parametrize("name", [name for name, path in PAGES.items() if runnable(path)])
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ASR_VAULT", raising=False)
    names: dict[str, object] = {"__name__": "__example__"}
    for block in runnable(PAGES[name]):
        code = compile("\n" * (block.line - 1) + block.text, PAGES[name], "exec")
        exec(code, names)  # the project's own documentation


@pytest.mark.parametrize("name", PAGES)
def test_python_is_well_formed(name: str) -> None:
    for block in _markdown.blocks(PAGES[name].read_text(encoding="utf-8")):
        if block.info.split()[:1] == ["python"]:
            ast.parse("\n" * (block.line - 1) + block.text, filename=name)


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    page = PAGES[name]
    for link in _markdown.links(page.read_text(encoding="utf-8")):
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), f"{name} links to {link}"
        assert target.is_relative_to(_markdown.PROJECT), f"{name} links out of the project: {link}"
        if anchor and target.suffix == ".md":
            assert anchor in _markdown.anchors(target.read_text(encoding="utf-8")), f"{name} links to {link}"


def test_readme_shows_the_library_in_an_example_that_runs() -> None:
    assert any("asrcore" in block.text for block in runnable(PAGES["README.md"]))


def test_reader_of_markdown_knows_blocks_links_and_anchors() -> None:
    text = "# A `b` & c\n\n```python test\nx = 1\n```\nsee [this](a.md#b), not `[that](c.md)` nor [web](https://x.y)\n"
    assert list(_markdown.blocks(text)) == [_markdown.Block("python test", "x = 1\n", 4)]
    assert _markdown.links(text) == ["a.md#b"]
    assert _markdown.anchors(text) == {"a-b--c"}
