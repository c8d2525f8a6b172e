"""Pages of the reference say what the code says."""

from __future__ import annotations

import ast
import inspect
import re

import pytest

from asrcore import hookspecs
from asrcore.errors import Category
from tests.docs import generate

HOOKS = [name for name in hookspecs.__all__ if name.startswith("asr_")]


@pytest.mark.parametrize("name", generate.PAGES)
def test_generated_page_is_fresh(name: str) -> None:
    path = generate.REFERENCE / name
    assert path.is_file(), "run `make docs`"
    assert path.read_text(encoding="utf-8") == generate.PAGES[name](), "run `make docs`"


def test_every_category_is_explained() -> None:
    assert set(generate.CATEGORIES) == set(Category)


@pytest.mark.parametrize("name", HOOKS)
def test_hook_is_documented_with_its_signature(name: str) -> None:
    tree = ast.parse(inspect.getsource(hookspecs))
    (function,) = (item for item in tree.body if isinstance(item, ast.FunctionDef) and item.name == name)
    assert function.returns is not None
    signature = f"def {name}({ast.unparse(function.args)}) -> {ast.unparse(function.returns)}"
    page = (generate.REFERENCE / "hooks.md").read_text(encoding="utf-8")
    assert signature in page


def test_no_hook_is_documented_that_is_not_there() -> None:
    page = (generate.REFERENCE / "hooks.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\basr_\w+", page)) <= {*HOOKS, "asr_driver_libvirt"}
