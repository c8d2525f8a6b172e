"""What starting `asr` loads: a verb pays only for what it uses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from asrcore.cli._main import PARTS, application
from asrcore.vault import Vault

# Each takes 20 ms to 0.5 s of CPU to import.
HEAVY = {
    "alembic",
    "asr_driver_libvirt",
    "asyncpg",
    "blake3",
    "cryptography",
    "dbos",
    "fastapi",
    "keyring",
    "libvirt",
    "pluggy",
    "prometheus_client",
    "pydantic",
    "rich",
    "starlette",
    "uvicorn",
}


def loaded_by(*words: str) -> set[str]:
    """Top-level modules that the process has loaded when the verb has ended."""
    code = (
        "import sys\nfrom asrcore.cli import main\n"
        "try:\n    main()\nexcept SystemExit as ended:\n    assert not ended.code, ended.code\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout
    names = done.stderr.split()
    return {name.partition(".")[0] for name in names} | {name for name in names if name.startswith("asrcore.cli.")}


@pytest.mark.parametrize("words", [["--help"], ["failover", "--help"], ["status", "--help"]], ids=" ".join)
def test_help_needs_no_database(words: list[str]) -> None:
    assert loaded_by(*words) & (HEAVY - {"rich"} | {"sqlalchemy", "sqlite3"}) == set()


def test_looking_at_a_vault_needs_no_driver_no_migrations_and_no_job_engine(tmp_path: Path) -> None:
    vault = tmp_path / "vault.db"
    Vault.create(vault).close()
    for words in (["status"], ["status", "--json"], ["jobs"], ["events"], ["policy", "list"]):
        loaded = loaded_by("--vault", str(vault), *words)
        assert loaded & HEAVY == set(), words
        assert ("sqlalchemy" in loaded) is (words[0] != "status"), words


@pytest.mark.parametrize("part", PARTS)
def test_a_verb_comes_with_those_of_its_own_module(part: str) -> None:
    for verb in PARTS[part]:
        assert verbs_of(verb) == set(PARTS[part])


def test_the_others_are_not_even_loaded() -> None:
    for words in (["points", "--help"], ["--vault", "x", "points", "--help"], ["points", "--help", "--vault=x"]):
        loaded = {name.rpartition(".")[2] for name in loaded_by(*words) if name.startswith("asrcore.cli.")}
        assert loaded & set(PARTS) == {"_look"}, words


@pytest.mark.parametrize("word", ["", "--help", "statsu"])
def test_who_names_no_verb_sees_all(word: str) -> None:
    assert verbs_of(word) == {verb for verbs in PARTS.values() for verb in verbs}


def verbs_of(word: str) -> set[str]:
    command = get_command(application(word))
    return set(command.commands)  # type: ignore[attr-defined]
