"""Verbs that may lose data or service show what they would do, and do it only when a person has agreed."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from asrcore.cli import _confirm
from asrcore.model.protection import Site
from asrcore.procedures.impact import Impact
from asrcore.testing.memory import MemoryWorld
from asrcore.vault import Vault
from tests.unit.cli.cli_runner import CODE
from tests.unit.cli.conftest import Asr


@pytest.fixture
def protected(asr: Asr, sites: MemoryWorld) -> MemoryWorld:
    """`web` is protected and has two recovery points; the second one brought some data."""
    assert asr("protect", "web", "--from", "a", "--to", "b", "--policy", "gold")[0] == 0
    sites.machine("web").write("vda", 0, b"y" * 200_000)
    assert asr("replicate", "web", "--keep")[0] == 0
    return sites


HARMFUL = ["failover planned web", "failover unplanned web", "unprotect web", "site remove c", "ca revoke operator ann"]


def records(folder: Path) -> list[object]:
    with Vault.open(folder / "vault.db") as vault:
        return [
            vault.protections(),
            [vault.points(item.id) for item in vault.protections()],
            vault.sites(),
            vault.policies(),
            vault.jobs(),
            vault.events(),
            vault.certificates(),
        ]


@pytest.fixture
def everything(asr: Asr, protected: MemoryWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A site that no machine uses, and an operator's token, too."""
    monkeypatch.setenv("ASR_CA", str(tmp_path / "ca"))
    monkeypatch.setenv("ASR_KEY", str(tmp_path / "vault.key"))
    MemoryWorld("spare")
    assert asr("site", "add", "c", "--driver", "memory", "--set", "world=spare")[0] == 0
    assert asr("ca", "init", "--url", "https://127.0.0.1:1", "--identity", str(tmp_path / "own"))[0] == 0
    assert asr("ca", "token", "operator", "ann")[0] == 0


@pytest.mark.parametrize("verb", HARMFUL)
def test_without_a_terminal_nothing_happens_without_yes(asr: Asr, everything: None, tmp_path: Path, verb: str) -> None:
    before = records(tmp_path)
    code, document = asr(*verb.split())
    assert (code, document["error"]["code"]) == (2, "confirmation-needed")
    assert verb in document["error"]["happened"]
    assert "--yes" in document["error"]["action"]
    code, document = asr(*verb.split(), "--dry-run")
    assert code == 0
    assert set(document) == {"plan"}
    code, said = asr(*verb.split(), "--dry-run", "--yes", as_json=False)
    assert code == 0
    assert said.splitlines()[0] == f"asr {verb}:"
    assert said.splitlines()[-1] == "Nothing was changed: --dry-run."
    assert records(tmp_path) == before
    assert asr(*verb.split(), "--yes")[0] == 0
    assert records(tmp_path) != before


def test_the_plan_of_an_unplanned_failover_says_what_is_lost(asr: Asr, protected: MemoryWorld) -> None:
    points = asr("point", "list", "web")[1]
    plan = asr("failover", "unplanned", "web", "--point", points[0]["id"], "--dry-run")[1]["plan"]
    assert (plan["subject"], plan["from"], plan["to"]) == ("web", "a", "b")
    assert plan["point"] == {"id": points[0]["id"], "time": points[0]["time"]}
    assert 0 < plan["age_seconds"] < 60
    assert plan["newer_points"] == 1
    assert plan["newer_bytes"] == points[1]["bytes_sent"] > 0
    assert plan["deleted_points"] == {}
    _, said = asr("failover", "unplanned", "web", "--point", points[0]["id"], "--dry-run", as_json=False)
    assert "  from:     a\n  to:       b\n" in said
    assert "s old" in said
    assert "1 newer recovery point holds" in said


def test_commit_undo_and_unprotect_say_what_they_delete(asr: Asr, protected: MemoryWorld) -> None:
    ids = [point["id"] for point in asr("point", "list", "web")[1]]
    assert asr("unprotect", "web", "--dry-run")[1]["plan"]["deleted_points"] == {"web": ids}
    assert asr("failover", "unplanned", "web", "--yes")[0] == 0
    for verb in ("undo", "commit"):
        assert asr("failover", verb, "web")[1]["error"]["code"] == "confirmation-needed"
    undo = asr("failover", "undo", "web", "--dry-run", as_json=False)[1]
    assert "web at b is deleted with everything that it wrote since the failover (" in undo
    assert asr("failover", "commit", "web", "--dry-run")[1]["plan"]["deleted_points"] == {"web": ids}
    assert (
        f"deletes:  {len(ids)} recovery points of web"
        in asr("failover", "commit", "web", "--dry-run", as_json=False)[1]
    )
    assert asr("failover", "commit", "web", "--yes")[0] == 0


def test_what_the_verb_would_refuse_is_refused_before_the_question(asr: Asr, protected: MemoryWorld) -> None:
    assert asr("failover", "commit", "web")[1]["error"]["code"] == "wrong-state"
    assert asr("failover", "commit", "web", "--dry-run")[1]["error"]["code"] == "wrong-state"
    assert asr("site", "remove", "a")[1]["error"]["code"] == "still-in-use"
    assert asr("site", "remove", "none")[1]["error"]["code"] == "not-found"
    assert asr("failover", "unplanned", "web", "--point", "none", "--dry-run")[1]["error"]["code"] == "point-not-found"


def test_a_clock_in_doubt_is_accepted_only_by_a_person(asr: Asr, protected: MemoryWorld, tmp_path: Path) -> None:
    assert asr("clock", "accept")[1] == {"accepted": False}, "there is nothing to lose"
    with Vault.open(tmp_path / "vault.db") as vault:
        vault.doubt_clock(1.0, "two days passed in a minute", boot="b", elapsed=1.0, anchors={}, gaps={})
        assert asr("clock", "accept")[1]["error"]["code"] == "confirmation-needed"
        assert "two days passed in a minute" in asr("clock", "accept", "--dry-run", as_json=False)[1]
        assert vault.clock_state().held
        assert asr("clock", "accept", "--yes")[1] == {"accepted": True}
        assert not vault.clock_state().held


def test_at_a_terminal_the_name_is_asked_for(
    asr: Asr, protected: MemoryWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    answers = iter(["yes", "web"])

    def prompt(text: str, **_: object) -> str:
        asked.append(text)
        return next(answers)

    monkeypatch.setattr(_confirm, "_at_terminal", lambda: True)
    monkeypatch.setattr(typer, "prompt", prompt)
    before = records(tmp_path)
    code, said = asr("failover", "planned", "web", as_json=False)
    assert code == 2
    assert "web is shut down at a" in said
    assert "The answer was not 'web'" in said
    assert records(tmp_path) == before
    assert asr("failover", "planned", "web")[0] == 0
    assert asked == ["Type web to do it"] * 2


def test_where_the_harm_is_small_yes_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_confirm, "_at_terminal", lambda: True)
    monkeypatch.setattr(typer, "prompt", lambda text, **_: "yes" if text == "Type yes to do it" else "")
    assert _confirm.agreed(Impact("site remove", "c", (), severe=False), yes=False, dry_run=False, as_json=False)
    assert _confirm.agreed(Impact("policy set", "c", (), harmful=False), yes=False, dry_run=False, as_json=True)


def test_on_a_real_terminal(tmp_path: Path, script: Callable[..., tuple[int, str]]) -> None:
    code, said = script("site", "remove", "a", typed="no\n")
    assert code == 2
    assert "The site is unchanged." in said
    assert "Type yes to do it:" in said
    with Vault.open(tmp_path / "v.db") as vault:
        assert [site.name for site in vault.sites()] == ["a"]
    code, said = script("site", "remove", "a", typed="yes\n")
    assert code == 0, said
    with Vault.open(tmp_path / "v.db") as vault:
        assert vault.sites() == []


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Runs `asr` on a terminal of its own, where something is typed."""
    with Vault.create(tmp_path / "v.db") as vault:
        vault.add_site(Site("a", "memory", {"world": "x"}))

    def run(*words: str, typed: str) -> tuple[int, str]:
        ours, theirs = pty.openpty()
        command = [sys.executable, "-c", CODE, "--vault", str(tmp_path / "v.db"), *words]
        with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as process:
            os.close(theirs)
            os.write(ours, typed.encode())
            said = b""
            try:
                while piece := os.read(ours, 65536):
                    said += piece
            except OSError:  # Linux reports a closed other end like this
                pass
            os.close(ours)
        return process.returncode, said.decode().replace("\r\n", "\n")

    return run
