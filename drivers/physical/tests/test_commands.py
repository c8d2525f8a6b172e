"""`asr physical`, as people and scripts call it; the system tests cover what needs SSH."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asr_driver_physical.enrol.package import mobility_service
from asrcore.cli import main
from drivers.physical.tests.test_parts import FACTS

Asr = Callable[..., tuple[int, Any]]


@pytest.fixture
def asr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Asr:
    """Runs `asr physical`; returns the exit code, and the document with `--json`, otherwise the output."""

    def run(*words: str) -> tuple[int, Any]:
        monkeypatch.setattr(sys, "argv", ["asr", "physical", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        code = int(ended.value.code or 0)
        return code, json.loads(said.out) if "--json" in words else said.out + said.err

    return run


def test_a_server_is_enrolled_by_hand_listed_and_forgotten(asr: Asr, tmp_path: Path) -> None:
    facts, out, identity = tmp_path / "facts.json", tmp_path / "out", ["--identity", str(tmp_path / "dc")]
    facts.write_text(json.dumps(FACTS))
    words = ["enrol", "web1", "--facts", str(facts), "--out", str(out), "--server", "10.0.0.5", *identity]
    code, document = asr(*words, "--json")
    assert code == 0
    assert document == {"server": "web1", "id": FACTS["machine"]["id"], "out": str(out), "findings": []}
    assert (out / "opt/asr-mobility/asr-mobility.pyz").is_file()
    assert asr("servers", *identity, "--json") == (0, [{"name": "web1", "id": FACTS["machine"]["id"]}])
    assert asr("servers", *identity) == (0, f"web1  {FACTS['machine']['id']}\n")
    assert asr("forget", "web1", *identity, "--json") == (0, {"removed": "web1"})
    assert asr("servers", *identity) == (0, "no servers are enrolled\n")


def test_the_package_is_written(asr: Asr, tmp_path: Path) -> None:
    path = tmp_path / "asr-mobility.pyz"
    assert asr("package", str(path), "--json") == (0, {"package": str(path)})
    assert path.read_bytes() == mobility_service()


@pytest.mark.parametrize(
    "words",
    [
        ["package", "/nowhere/x"],
        ["enrol", "web1", "--facts", "/nowhere", "--out", "/nowhere", "--server", "x"],
        ["push", "web1", "--server", "x", "--memory", "much"],
    ],
    ids=" ".join,
)
def test_a_bad_value_is_refused_with_its_document_and_exit_code(asr: Asr, tmp_path: Path, words: list[str]) -> None:
    more = [] if words[0] == "package" else ["--identity", str(tmp_path / "dc")]
    code, document = asr(*words, *more, "--json")
    assert (code, document["error"]["code"]) == (2, "invalid-value")
