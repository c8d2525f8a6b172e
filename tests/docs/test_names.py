"""Files, tests and modules that the documentation names are there."""

from __future__ import annotations

import importlib
import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest

from tests.docs import _markdown

PAGES = {str(path.relative_to(_markdown.PROJECT)): path for path in _markdown.pages()}
ROOTS = ("asrcore/", "deploy/", "docs/", "drivers/", "examples/", "tests/")
BUILT = {"asr_driver_folder", "asr_webhook"}  # packages of the examples, which are not installed here


@cache
def sources() -> list[Path]:
    """Every Python file of the project."""
    return [path for root in ROOTS for path in (_markdown.PROJECT / root).rglob("*.py")]


def spans(text: str) -> list[str]:
    """The code spans of a page, outside its fenced blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```[ \t]*$", "", text, flags=re.MULTILINE | re.DOTALL))


def missing_files(text: str, folder: Path = _markdown.PROJECT) -> list[str]:
    """Paths and tests in code spans that are not there.

    A path begins at the project, at the page's folder, or further down: `servers/hub.py` names one of its files.
    """
    missing = []
    for span in spans(text):
        path, _, test = span.partition("::")
        if not re.fullmatch(r"[\w./-]+", path):
            continue
        if path.startswith(ROOTS):
            matches = [place for place in (_markdown.PROJECT / path, folder / path) if place.exists()]
        elif path.endswith(".py"):
            matches = [place for place in sources() if place.as_posix().endswith(f"/{path}")]
        else:
            continue
        if test:
            matches = [place for place in matches if f"def {test}(" in place.read_text("utf-8")]
        if not matches:
            missing.append(span)
    return missing


def is_there(dotted: str) -> bool:
    """Whether that module exists, or that name of a module."""
    module, *rest = dotted.split(".")
    while rest:
        try:
            spec = importlib.util.find_spec(f"{module}.{rest[0]}")
        except ModuleNotFoundError:  # `module` is a module, not a package
            spec = None
        if spec is None:
            break
        module = f"{module}.{rest.pop(0)}"
    value: object = importlib.import_module(module)
    for name in rest:
        if not hasattr(value, name):
            return False
        value = getattr(value, name)
    return True


def modules(text: str) -> set[str]:
    """The dotted names of the project's packages on a page."""
    found = re.findall(r"(?<![\w./-])((?:asrcore|asr_[a-z_]+)(?:\.[A-Za-z_]\w*)+)", text)
    return {name for name in found if name.partition(".")[0] not in BUILT and not name.endswith(".py")}


def test_reader_of_names_knows_what_is_missing() -> None:
    text = (
        "`asrcore/engine.py`, `vault/_move.py`, `asrcore/gone.py`, `gone.py`, `_move.py::move`, `_move.py::gone`, "
        "`tests/unit/`, `docs/gone/`, asrcore.errors.AsrError, `asrcore.errors.Gone`, `asrcore.gone`"
    )
    assert missing_files(text) == ["asrcore/gone.py", "gone.py", "_move.py::gone", "docs/gone/"]
    assert [name for name in sorted(modules(text)) if not is_there(name)] == ["asrcore.errors.Gone", "asrcore.gone"]


@pytest.mark.parametrize("name", PAGES)
def test_files_and_tests_are_there(name: str) -> None:
    assert missing_files(PAGES[name].read_text("utf-8"), PAGES[name].parent) == []


@pytest.mark.parametrize("name", PAGES)
def test_modules_are_there(name: str) -> None:
    assert [item for item in sorted(modules(PAGES[name].read_text("utf-8"))) if not is_there(item)] == []
