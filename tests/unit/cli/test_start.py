"""The modules that starting `asr` loads: a verb loads only what it uses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

from asrcore.cli._main import VERBS, application
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
MODULES = {item.module for item in VERBS.values()}


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


DATABASE = {"sqlalchemy", "sqlite3"}
# With the contract, and the commands of `asr physical`; a driver imports what its sites need when it connects to one.
PLUGINS = {"asr_driver_libvirt", "blake3", "cryptography", "pluggy"}


@pytest.mark.parametrize("words", [["failover", "--help"], ["status", "--help"]], ids=" ".join)
def test_help_of_a_verb_needs_no_database_and_no_plugin(words: list[str]) -> None:
    assert loaded_by(*words) & (HEAVY - {"rich"} | DATABASE) == set()


def test_help_loads_plugins_for_their_commands_and_no_database() -> None:
    loaded = loaded_by("--help")
    assert loaded & (HEAVY - {"rich"} - PLUGINS | DATABASE) == set()
    assert loaded & {"azure", "lxml", "paramiko"} == set()


def test_commands_of_a_plugin_load_no_other_plugin() -> None:
    loaded = loaded_by("physical", "--help")
    assert "asr_driver_physical" in loaded
    assert loaded & {"asr_driver_azure", "asr_driver_libvirt", "libvirt", "paramiko", *DATABASE} == set()


def test_looking_at_a_vault_needs_no_driver_no_migrations_and_no_job_engine(tmp_path: Path) -> None:
    vault = tmp_path / "vault.db"
    Vault.create(vault).close()
    for words in (["status"], ["status", "--json"], ["job", "list"], ["event", "list"], ["policy", "list"]):
        loaded = loaded_by("--vault", str(vault), *words)
        assert loaded & HEAVY == set(), words
        assert ("sqlalchemy" in loaded) is (words[0] != "status"), words


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_is_where_the_table_says_and_begins_its_help_with_the_line_of_the_table(name: str) -> None:
    command = verb(name)
    assert command.name == name
    assert command.help.split("\n")[0] == VERBS[name].help
    assert name in {found for found, item in VERBS.items() if item.module == VERBS[name].module}


@pytest.mark.parametrize("module", sorted({item.module for item in VERBS.values()}))
def test_a_module_has_no_verb_that_the_table_lacks(module: str) -> None:
    app = typer.Typer()
    app.callback()(lambda: None)
    import_module(f"asrcore.cli.{module}").register(app)
    found = set(get_command(app).commands)  # type: ignore[attr-defined]
    assert found == {name for name, item in VERBS.items() if item.module == module}


def test_only_the_module_of_the_verb_is_loaded() -> None:
    for words in (["point", "--help"], ["--vault", "x", "point", "--help"], ["point", "--help", "--vault=x"]):
        loaded = {name.rpartition(".")[2] for name in loaded_by(*words) if name.startswith("asrcore.cli.")}
        assert loaded & MODULES == {"_history"}, words


def test_help_shows_all_verbs_by_panel_and_loads_none() -> None:
    command = [sys.executable, "-c", "from asrcore.cli import main; main()", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    for name, item in VERBS.items():
        assert re.search(rf"^│ {re.escape(name)} ", done.stdout, re.MULTILINE), name
        assert f" {item.panel} ─" in done.stdout
    loaded = {name.rpartition(".")[2] for name in loaded_by("--help") if name.startswith("asrcore.cli.")}
    assert loaded & MODULES == set()


def test_a_misspelt_verb_is_refused_with_the_right_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        application()(args=["statsu"])
    assert ended.value.code == 2
    assert "'status'" in capsys.readouterr().err


def test_the_shell_completes_verbs_and_their_options() -> None:
    def completed(line: str) -> str:
        environment = {**os.environ, "_ASR_COMPLETE": "complete_bash", "COMP_WORDS": line}
        words = str(len(line.split()) - (not line.endswith(" ")))
        code = "import sys; sys.argv[0] = 'asr'; from asrcore.cli import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**environment, "COMP_CWORD": words},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.stdout

    assert completed("asr st").split() == ["status"]
    assert "--watch" in completed("asr status --w")
    assert "planned" in completed("asr failover ")


def verb(name: str) -> Any:
    command: Any = get_command(application())
    return command.resolve_command(command.make_context("asr", [name]), [name])[1]
