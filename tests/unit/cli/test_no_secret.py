"""A secret setting of a site cannot be read anywhere: output, logs, errors, process lists, files of the vault."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from asrcore import engine
from asrcore.testing.memory import MemoryWorld
from asrcore.units import MiB
from asrcore.vault import Vault

SECRET = "S3cr3t-key-of-home"
WRONG = "Wr0ng-key-of-home"
ROOT = Path(__file__).parents[3]
CODE = """
import asrcore.testing.memory
from asrcore import plugins
def load():
    loaded = plugins.Plugins()
    loaded.register("memory", asrcore.testing.memory)
    return loaded
plugins.load = load
from asrcore.cli import main
main()
"""


class Host:
    """`asr` with the memory driver, and all its output."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.said: list[str] = []
        self.environment = {**os.environ, "ASR_VAULT": str(folder / "vault" / "vault.db"), "PYTHONPATH": str(ROOT)}

    def asr(self, *words: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-c", CODE, *words],
            env=self.environment,
            text=True,
            capture_output=True,
            timeout=60,
            check=False,
        )
        self.said.append(done.stdout + done.stderr)
        assert done.returncode == code, self.said[-1]
        return done.stdout + done.stderr

    def files_with(self, secret: str) -> list[str]:
        """Files of the vault's directory that contain it."""
        folder = Path(self.environment["ASR_VAULT"]).parent
        return [item.name for item in folder.iterdir() if secret.encode() in item.read_bytes()]

    def run_until(self, text: str) -> None:
        """Run the service with full logging until it has logged a text."""
        command = [sys.executable, "-c", CODE, "run", "-v", "--log-format", "json"]
        with subprocess.Popen(command, env=self.environment, text=True, stderr=subprocess.PIPE) as service:
            assert service.stderr is not None
            try:
                for line in service.stderr:
                    self.said.append(line)
                    if text in line:
                        break
                else:
                    pytest.fail(f"{text!r} was never logged")
                for name in ("cmdline", "environ"):
                    self.said.append(Path(f"/proc/{service.pid}/{name}").read_text("utf-8"))
                service.send_signal(signal.SIGTERM)
                self.said.append(service.stderr.read())
                assert service.wait(60) == 0
            finally:
                service.kill()


@pytest.mark.once
def test_a_secret_setting_is_nowhere(tmp_path: Path) -> None:
    home, _ = (MemoryWorld(name, path=tmp_path / name) for name in ("home", "away"))
    home.configure(key=SECRET)
    machine = home.add_machine("web", {"vda": 1 * MiB})
    (tmp_path / "key").write_text(SECRET + "\n")
    (tmp_path / "wrong").write_text(WRONG)
    host = Host(tmp_path)
    host.asr("init")
    site = ["--driver", "memory", "--set", "world=home", "--set", f"path={tmp_path / 'home'}"]
    assert "access-denied" in host.asr("site", "add", "a", *site, "--set", f"key=@{tmp_path / 'wrong'}", code=7)
    host.asr("site", "add", "a", *site, "--set", f"key=@{tmp_path / 'key'}")
    assert not host.files_with(SECRET)
    host.asr("site", "add", "b", "--driver", "memory", "--set", "world=away", "--set", f"path={tmp_path / 'away'}")
    for words in (["site", "show", "a"], ["site", "show", "a", "--json"], ["site", "list", "--json"]):
        assert "(secret)" in host.asr(*words)
    host.asr("policy", "create", "gold", "--interval", "5s", "--resync-window", "always")
    host.asr("protect", "web", "--from", "a", "--to", "b", "--policy", "gold")
    machine.write("vda", 0, b"x" * 4096)
    with Vault.open(host.environment["ASR_VAULT"]) as vault:
        cycles = len(vault.cycles(vault.protection("web").id))
        protection = vault.protection("web")
    home.configure(key="another")  # the service detects the change and logs it
    host.run_until("refused access")
    home.configure(key=SECRET)
    host.asr("replicate", "web")
    for verb in ("status --json", "job list --json", "event list --json", "failover test web"):
        host.asr(*verb.split())
    with Vault.open(host.environment["ASR_VAULT"]) as vault:
        assert len(vault.cycles(protection.id)) > cycles
    with closing(sqlite3.connect(host.environment["ASR_VAULT"])) as database:
        host.said += database.iterdump()
    everything = "\n".join(host.said)
    for secret in (SECRET, WRONG):
        assert secret not in everything
        assert not host.files_with(secret)
    key = (tmp_path / "vault" / "vault.db.key").read_text().strip()
    assert key not in everything
    assert host.files_with(key) == ["vault.db.key"]


def test_who_works_on_a_vault_is_shown_without_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["/usr/bin/asr", "--vault", "postgresql://me:pw1@host/asr", "--vault=postgresql://me:pw2@host/asr", "run"]
    monkeypatch.setattr(sys, "argv", [*words, "--set", "password=pw3", "--set=password=pw4", "-v"])
    reported = engine._holder()
    assert not [secret for secret in ("pw1", "pw2", "pw3", "pw4") if secret in reported]
    assert reported.endswith("asr --vault ... ... run --set ... ... -v")


def test_a_file_of_a_setting_that_cannot_be_read_is_reported(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.asr("init")
    said = host.asr("site", "add", "a", "--driver", "memory", "--set", f"key=@{tmp_path / 'none'}", code=2)
    assert "invalid-value" in said
    said = host.asr("site", "add", "a", "--driver", "memory", "--set", "key=@/dev/zero", code=2)
    assert "at most 65536 letters" in said


def test_an_older_vault_is_sealed_by_the_first_engine(tmp_path: Path) -> None:
    MemoryWorld("home", path=tmp_path / "home").configure(key=SECRET)
    host = Host(tmp_path)
    host.asr("init")
    from asrcore.model.protection import Site

    settings = {"world": "home", "path": str(tmp_path / "home"), "key": SECRET}
    with Vault.open(host.environment["ASR_VAULT"]) as vault:
        vault.add_site(Site("a", "memory", settings))  # as an earlier version did
    assert host.files_with(SECRET)
    host.run_until("are encrypted from now on")
    assert not host.files_with(SECRET)
    assert "(secret)" in host.asr("site", "show", "a")
