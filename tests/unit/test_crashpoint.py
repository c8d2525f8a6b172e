"""Crash points kill at the configured place and count, and do nothing otherwise."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from asrcore.crashpoint import reach

CODE = """
import sys
from asrcore.crashpoint import reach
for name in ("a", "b", "b", "b.c", "end"):
    reach(name)
    print(name, flush=True)
"""


def run(**environment: str) -> tuple[int, list[str]]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("ASRCORE_")} | environment
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, timeout=60, env=env, check=False
    )
    assert done.stderr == ""
    return done.returncode, done.stdout.split()


@pytest.mark.parametrize(
    ("at", "survived"),
    [
        ("a", []),
        ("b", ["a"]),
        ("b:2", ["a", "b"]),
        ("b.c", ["a", "b", "b"]),
    ],
)
def test_kills_at_the_named_place(at: str, survived: list[str]) -> None:
    assert run(ASRCORE_CRASH_AT=at) == (-signal.SIGKILL, survived)


@pytest.mark.parametrize("at", ["", "b:3", "nowhere", "B"])
def test_goes_on_elsewhere(at: str) -> None:
    assert run(ASRCORE_CRASH_AT=at) == (0, ["a", "b", "b", "b.c", "end"])


def test_logs_every_place_also_the_one_it_dies_at(tmp_path: Path) -> None:
    log = tmp_path / "places"
    run(ASRCORE_CRASH_AT="b:2", ASRCORE_CRASH_LOG=str(log))
    assert log.read_text().split() == ["a", "b", "b"]


def test_is_nothing_without_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASRCORE_CRASH_AT", raising=False)
    monkeypatch.delenv("ASRCORE_CRASH_LOG", raising=False)
    reach("a")
