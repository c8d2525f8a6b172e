"""`asr` in this process, on memory sites."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import asrcore.testing.memory
from asrcore import plugins
from asrcore.cli import main
from asrcore.testing.memory import MemoryWorld
from asrcore.units import MiB

Asr = Callable[..., tuple[int, Any]]


@pytest.fixture
def asr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Asr:
    """Runs a verb with --json; returns (exit code, document)."""

    def load() -> plugins.Plugins:
        loaded = plugins.Plugins()
        loaded.register("memory", asrcore.testing.memory)
        return loaded

    monkeypatch.setattr(plugins, "load", load)
    monkeypatch.setenv("ASR_VAULT", str(tmp_path / "vault.db"))

    def run(*words: str, as_json: bool = True) -> tuple[int, Any]:
        monkeypatch.setattr(sys, "argv", ["asr", *words, *(["--json"] if as_json else [])])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        code = int(ended.value.code or 0)
        if not as_json:
            return code, said.out + said.err
        return code, json.loads(said.out) if said.out else None

    return run


@pytest.fixture
def sites(asr: Asr) -> MemoryWorld:
    """A vault with two sites, a policy, and a running machine `web` at `a`."""
    home = MemoryWorld("home")
    MemoryWorld("away")
    machine = home.add_machine("web", {"vda": 1 * MiB})
    machine.start()
    machine.write("vda", 0, b"x" * 100_000)
    assert asr("init")[0] == 0
    for name, world in (("a", "home"), ("b", "away")):
        assert asr("site", "add", name, "--driver", "memory", "--set", f"world={world}")[0] == 0
    assert asr("policy", "create", "gold", "--interval", "5s", "--keep", "24h", "--resync-window", "always")[0] == 0
    return home
