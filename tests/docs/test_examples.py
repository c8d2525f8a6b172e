"""The examples in `examples/` run, each as its reader would run it: in a separate process."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from asrcore import plugins
from tests.docs import _markdown
from tests.docs.example_process import run

EXAMPLES = _markdown.PROJECT / "examples"
PACKAGES = sorted(path.parent for path in EXAMPLES.glob("*/pyproject.toml"))


def test_the_library_example(tmp_path: Path) -> None:
    shown = run(EXAMPLES / "library.py", cwd=tmp_path).splitlines()
    assert shown[0] == "replica equals source: True"
    assert shown[-1] == "runs at beta with: good order"


def test_the_library_example_is_short() -> None:
    assert len((EXAMPLES / "library.py").read_text(encoding="utf-8").splitlines()) <= 50


def test_the_driver_in_the_how_to_passes_the_kit(tmp_path: Path) -> None:
    page = (_markdown.PROJECT / "docs" / "how-to" / "write-a-driver.md").read_text(encoding="utf-8")
    for block in _markdown.blocks(page):
        named = re.match(r"# (\w+\.py)\n", block.text)
        if named:
            (tmp_path / named[1]).write_text(block.text, encoding="utf-8")
    shown = run("-m", "pytest", "-p", "no:cacheprovider", "-W", "error", "test_folder_driver.py", cwd=tmp_path)
    passed = re.search(r"(\d+) passed", shown)
    assert passed is not None
    assert int(passed[1]) > 20, shown


def test_the_webhook_plugin() -> None:
    run("-m", "pytest", "-p", "no:cacheprovider", "tests", cwd=EXAMPLES / "webhook_plugin")


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_an_entry_point_is_a_plug_in(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    monkeypatch.syspath_prepend(package / "src")
    monkeypatch.delenv("ASR_WEBHOOK_URL", raising=False)
    for name, value in project["entry-points"]["asrcore"].items():
        loaded = plugins.Plugins()
        module, _, attribute = value.partition(":")
        plugin = __import__(module, fromlist=["_"])
        assert loaded.register(name, getattr(plugin, attribute) if attribute else plugin), loaded.broken


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_an_example_imports_public_names_only(package: Path) -> None:
    public = r"asrcore(\.(crashpoint|driver|errors|hookspecs|model\.\w+|testing(\.conformance)?|units))?"
    for file in package.rglob("*.py"):
        for module in re.findall(r"^\s*(?:from|import) (asrcore\S*)", file.read_text(encoding="utf-8"), re.MULTILINE):
            assert re.fullmatch(public, module), f"{file.name} imports {module}"
