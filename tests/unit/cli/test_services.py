"""The services as processes: an authority, a configuration server, components that join, and clean stops."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from asrcore.model.protection import Site
from asrcore.pki.enrolment import fetch_text
from asrcore.vault import Vault
from asrcore.wire.tls import Identity
from tests.postgres import Cluster

CODE = "from asrcore.cli import main; main()"
PATIENCE = 60


class Host:
    """A directory with a vault, and `asr` as people run it."""

    def __init__(self, folder: Path, vault: str) -> None:
        self.folder = folder
        self.environment = {**os.environ, "ASR_VAULT": vault, "PYTHONUNBUFFERED": "1", "HOME": str(folder)}

    def asr(self, *words: str, given: str = "", code: int = 0) -> Any:
        command = [sys.executable, "-c", CODE, *words, "--json"]
        done = subprocess.run(
            command,
            env=self.environment,
            input=given,
            text=True,
            capture_output=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return json.loads(done.stdout)

    @contextmanager
    def service(self, *words: str, says: str) -> Iterator[tuple[subprocess.Popen[str], re.Match[str]]]:
        """Start one and wait until it prints that it is ready; SIGTERM ends it."""
        command = [sys.executable, "-c", CODE, *words]
        with subprocess.Popen(command, env=self.environment, text=True, stderr=subprocess.PIPE) as process:
            try:
                assert process.stderr is not None
                heard = ""
                while not (found := re.search(says, heard)):
                    line = process.stderr.readline()
                    assert line, f"it exited: {heard}"
                    heard += line
                yield process, found
                process.send_signal(signal.SIGTERM)
                rest = process.stderr.read()
                assert process.wait(PATIENCE) == 0, rest
            finally:
                process.kill()


@pytest.fixture
def host(tmp_path: Path) -> Host:
    made = Host(tmp_path, str(tmp_path / "vault.db"))
    made.asr("init")
    return made


def authority(host: Host) -> list[str]:
    """Options of a configuration server whose authority was just made."""
    own = ["--identity", str(host.folder / "own"), "--ca", str(host.folder / "ca")]
    host.asr("ca", "init", "--url", "https://127.0.0.1:1", *own)
    return own


def test_from_nothing_to_a_component_with_an_identity(host: Host) -> None:
    own = authority(host)
    ca = own[2:]
    assert host.asr("ca", "init", "--url", "https://127.0.0.1:1", *own, code=4)["error"]["code"] == "already-exists"
    with host.service("config-server", "--listen", "127.0.0.1:0", *own, says=r"at (https://\S+);") as (_, found):
        url = found[1]
        (host.folder / "ca" / "url").write_text(url)  # the port was chosen at start
        token = host.asr("ca", "token", "operator", "ann", *ca)["token"]
        ann = str(host.folder / "ann")
        assert host.asr("join", "-", "--identity", ann, given=token)["component"] == "operator ann"
        assert host.asr("join", "-", "--identity", ann, given=token, code=4)["error"]["code"] == "already-exists"
        thief = str(host.folder / "thief")
        assert host.asr("join", "-", "--identity", thief, given=token, code=7)["error"]["code"] == "token-refused"
        assert host.asr("renew", "--identity", ann)["renewed"] is False
        assert host.asr("renew", "--identity", ann, "--now")["renewed"] is True
        assert json.loads(fetch_text(Identity(ann), url, "GET", "/v1/machines")) == []
        roles = [(item["role"], item["grants"]) for item in host.asr("ca", "list")]
        assert roles == [("config-server", None), ("join", "operator"), ("operator", None), ("operator", None)]
        assert len(host.asr("ca", "revoke", "operator", "ann", "--yes", *ca)["revoked"]) == 3
        assert host.asr("renew", "--identity", ann, code=3)["error"]["code"] == "certificate-not-found"


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> Host:
    """A host with an authority, which no test changes."""
    folder = tmp_path_factory.mktemp("settled")
    made = Host(folder, str(folder / "vault.db"))
    made.asr("init")
    authority(made)
    return made


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["ca", "token", "king", "one"], "invalid-value"),
        (["ca", "token", "agent", ""], "invalid-value"),
        (["ca", "token", "agent", "one", "--valid", "1s"], "invalid-value"),
        (["ca", "revoke", "agent", "one"], "certificate-not-found"),
        (["join", "/nonexistent", "--identity", "x"], "invalid-value"),
        (["renew", "--identity", "/nonexistent"], "identity-unusable"),
        (["config-server", "--identity", "/nonexistent", "--listen", "127.0.0.1:0"], "identity-unusable"),
        (["config-server", "--identity", "x", "--listen", "nowhere"], "invalid-value"),
        (["serve", "--identity", "x", "--roles", "king"], "invalid-value"),
        (["serve", "--identity", "x", "--roles", "master-target"], "invalid-value"),
        (["process-server", "--lease", "1s"], "invalid-value"),
        (["process-server"], "invalid-value"),
        (["run", "--log-format", "xml"], "invalid-value"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_refused(words: list[str], code: str, settled: Host) -> None:
    host = settled
    if words[0] in ("ca", "config-server"):
        words = [*words, "--ca", str(host.folder / "ca")]
    command = [sys.executable, "-c", CODE, *words]
    done = subprocess.run(
        command, env=host.environment, cwd=host.folder, text=True, capture_output=True, timeout=PATIENCE, check=False
    )
    assert f"error [{code}]" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_several_roles_in_one_process_with_a_file(host: Host) -> None:
    own = authority(host)
    with (
        host.service("serve", "--listen", "127.0.0.1:0", *own, says="replicating with"),
        Vault.open(host.environment["ASR_VAULT"]) as vault,
    ):
        assert vault.engine_holder() is not None
        assert vault.servers() == []
        (shown,) = host.asr("server", "list")
        assert (shown["role"], shown["up"], shown["where"]) == ("engine", True, vault.engine_holder())


def test_a_process_server_and_its_log(tmp_path: Path, postgres: Cluster) -> None:
    url = postgres.create()
    host = Host(tmp_path, url)
    host.asr("init")
    words = ("process-server", "--name", "ps1", "--site", "a", "--log-format", "json")
    with Vault.open(url) as vault:
        vault.add_site(Site("a", "memory", {}))
    with host.service(*words, says="process server ps1"), Vault.open(url) as vault:
        while not (found := vault.servers()):
            signal.sigtimedwait([], 0.05)
        assert [(item.name, item.sites) for item in found] == [("ps1", frozenset({"a"}))]
        (shown,) = host.asr("server", "list")
        assert (shown["role"], shown["server"], shown["up"], shown["sites"]) == ("process-server", "ps1", True, ["a"])
        assert (shown["version"], shown["machines"]) == (version("asrcore"), 0)
    with Vault.open(url) as vault:
        assert vault.servers() == [], "it has left"
    assert host.asr("server", "list") == []
    postgres.drop(url)
