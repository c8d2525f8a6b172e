"""Pages of the reference match the code."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

from asr_mobility.service import Service
from asrcore import hookspecs
from asrcore.config_server import api, metrics
from asrcore.errors import Category
from asrcore.pki.authority import Authority
from asrcore.remote import calls, server
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


def section(page: str, heading: str) -> str:
    """The text after a heading, up to the next one."""
    text = (generate.REFERENCE / page).read_text(encoding="utf-8")
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def test_every_call_of_a_site_is_on_the_page_of_the_protocol() -> None:
    text = section("wire-protocol.md", "Calls")
    rows = re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE)
    documented = set(re.findall(r"`(\w+\.\w+)`", " ".join(rows)))
    short = text.partition("Calls that need nothing else:")[2].partition("Their result")[0]
    documented |= set(re.findall(r"`(\w+\.\w+)`", short))
    for role, methods in re.findall(r"`(\w+\.)`((?:\s`\w+`)+)", short):
        documented |= {role + method for method in re.findall(r"\w+", methods)}
    site_server = server.SiteServer(None)  # type: ignore[arg-type]
    known = {*calls.PLAIN, *site_server._calls, "target.create_replica", "cycle.data"}
    assert "target.create_replica" in inspect.getsource(server.SiteServer.call)
    assert "cycle.data" in inspect.getsource(server.SiteServer.stream)
    assert documented == known


def test_every_call_of_an_agent_is_on_the_page_with_its_arguments(tmp_path: Path) -> None:
    rows = re.findall(r"^\| `([\w-]+)` \|([^|]*)\|", section("wire-protocol.md", "Calls of an agent"), re.MULTILINE)
    documented = {name: re.findall(r"`(\w+)`", arguments) for name, arguments in rows}
    known = {name: list(inspect.signature(call).parameters) for name, call in Service(tmp_path)._calls.items()}
    assert documented == known
