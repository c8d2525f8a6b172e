"""Pages of the reference say what the code says."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

from asrcore import hookspecs
from asrcore.errors import Category
from asrcore.service import api, metrics
from asrcore.service.authority import Authority
from asrcore.vault import Vault
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


def test_the_page_of_the_configuration_server_has_all_calls_verbs_and_metrics(tmp_path: Path) -> None:
    page = (generate.REFERENCE / "config-server.md").read_text(encoding="utf-8")
    with Vault.create(tmp_path / "vault.db") as vault:
        app = api.make_app(vault, Authority.create(tmp_path / "ca", vault))
        text = metrics.exposition(vault, 0.0).decode()
    calls = {f"{sorted(route.methods - {'HEAD'})[0]} {route.path}" for route in app.routes}  # type: ignore[attr-defined]
    assert calls == set(re.findall(r"^\| `((?:GET|POST) [^`]*)`", page, re.MULTILINE))
    for word in [*api.VERBS, *re.findall(r"^# TYPE (\w+)", text, re.MULTILINE)]:
        assert f"`{word.removesuffix('_total')}" in page, word
