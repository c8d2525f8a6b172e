"""Secrets of a deployment with services cannot be read anywhere: settings of a driver, join tokens, private keys, the
key of the secrets, the database's password. Checked: all output and logs, errors, process lists, the database.
"""

from __future__ import annotations

import base64
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from asrcore.pki import enrolment
from asrcore.pki.enrolment import fetch_text
from asrcore.wire.tls import Identity
from tests.postgres import Cluster
from tests.unit.cli.cli_runner import CliRunner

OF_HOME, OF_AWAY, WRONG = "S3cr3t-key-of-home", "S3cr3t-key-of-away", "Wr0ng-key-of-home"
PASSWORD = "Pa55word-of-the-vault"
PATHS = ("/v1/health", "/v1/machines", "/v1/machines/web/points", "/v1/jobs", "/v1/events", "/v1/servers", "/metrics")


def command_lines() -> str:
    """Command lines and environments of all processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found.append(path.read_text("utf-8", "replace"))
    return "\n".join(found)


def shapes(pem: str, opener: str) -> list[str]:
    """The forms in which a private key could appear in a text: lines of its PEM, its number. `opener`: key of an
    encrypted one."""
    key = load_pem_private_key(pem.encode(), opener.encode() if "ENCRYPTED" in pem else None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    number = key.private_numbers().private_value
    lines = [line for line in pem.splitlines() if line and not line.startswith("-")]
    return [*lines[:-1], f"{number:x}", str(number), base64.b64encode(number.to_bytes(32, "big")).decode()]


class Deployment:
    """A vault on PostgreSQL with a password, worlds with keys, and the joined components."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url
        self.desk = CliRunner(folder, url.replace("postgres@", f"postgres:{PASSWORD}@"))
        self.desk.home.configure(key=OF_HOME)
        self.desk.away.configure(key=OF_AWAY)
        self.tokens: list[str] = []
        self.keys: list[str] = []
        self.process_server = ("process-server", "-v", "--log-format", "json")

    def file(self, secret: str) -> str:
        """An option that passes a secret by file."""
        path = self.folder / f"{(OF_HOME, OF_AWAY, WRONG).index(secret)}.secret"
        path.write_text(secret + "\n")
        return f"key=@{path}"

    def join(self, role: str) -> Path:
        """Join with a token that is passed only by file and standard input; also attempts that fail."""
        desk = self.desk
        token = desk.asr("ca", "token", role, role, "--address", "127.0.0.1")
        desk.said.pop()  # the token is the requested output
        self.tokens.append(token.strip())
        self.keys.append(enrolment.unpack(token)[0].key)
        file = self.folder / f"{role}.token"
        file.write_text(token)
        desk.asr("join", str(file), "--identity", str(self.folder / role), "--json")
        desk.asr("join", "-", "--identity", str(self.folder / "thief"), "--json", given=token, code=7)
        desk.asr("join", "-", "--identity", str(self.folder / "other"), given=token[:-9], code=2)
        return self.folder / role

    def dump(self) -> None:
        """The content of a backup of the vault."""
        command = ["pg_dump", "--dbname", self.url]
        dump = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        assert "COPY public.certificates" in dump
        self.desk.said.append(dump)

    def replicate(self, served: str) -> None:
        """A machine is protected by a process server, the next server is refused by its site, the next one
        continues."""
        desk = self.desk
        home = [*desk.site(desk.home), "--set"]
        assert "access-denied" in desk.asr("site", "add", "a", *home, self.file(WRONG), code=7)
        desk.asr("site", "add", "a", *home, self.file(OF_HOME), "--json")
        self.dump()
        settings = ["--set", f"address={served}", "--set", f"identity={self.folder / 'process-server'}"]
        desk.asr("site", "add", "b", "--driver", "remote", *settings)
        desk.asr("policy", "create", "gold", "--interval", "5s", "--resync-window", "always")
        with desk.service(*self.process_server, says="process server"):
            desk.asr("protect", "web", "--from", "a", "--to", "b", "--policy", "gold", "--json")
            desk.said.append(command_lines())
        desk.home.configure(key="another")
        with desk.service(*self.process_server, says="process server") as (server, _):
            server.wait_for("refused access")
            desk.home.configure(key=OF_HOME)
            desk.asr("replicate", "web", "--json")

    def look(self, url: str, operator: Path) -> None:
        """All verbs that print records."""
        for verb in ("status", "job list", "event list", "point list web", "server list", "ca list", "site list"):
            self.desk.asr(*verb.split(), "--json")
        assert "(secret)" in self.desk.asr("site", "show", "a", "--json")
        self.desk.said += [fetch_text(Identity(operator), url, "GET", path) for path in PATHS]

    def fail(self) -> None:
        """A database that does not exist."""
        vault = self.desk.environment["ASR_VAULT"].replace("?host=", "-none?host=")
        assert "error [vault-" in self.desk.asr("status", code=10, ASR_VAULT=vault)


@pytest.mark.once
def test_no_secret_of_a_deployment_is_anywhere(tmp_path: Path, postgres: Cluster) -> None:
    url = postgres.create()
    made = Deployment(tmp_path, url)
    desk = made.desk
    desk.asr("init", "--json")
    config = ["config-server", "-v", "--log-format", "json", "--listen", "127.0.0.1:0"]
    with desk.service(*config, "--identity", str(desk.authority()), says=r"(https://[^\s;]+);") as (_, office):
        (tmp_path / "ca" / "url").write_text(office[1])
        target, _, operator = (made.join(role) for role in ("master-target", "process-server", "operator"))
        serve = ["master-target", *desk.site(desk.away, "--set", made.file(OF_AWAY)), "--listen", "127.0.0.1:0"]
        desk.asr(*serve, "--identity", "/nonexistent", code=7)
        with desk.service(*serve, "--identity", str(target), says=r"serves memory .* at (\S+);") as (_, served):
            made.replicate(served[1])
            made.look(office[1], operator)
    made.fail()
    made.dump()
    postgres.drop(url)

    everything = "\n".join(desk.said)
    assert "process-server\0-v" in everything, "process lists were checked"
    made.keys += [path.read_text() for path in tmp_path.rglob("*key.pem")]
    assert len(made.keys) >= 3 + 5, "tokens, authority, components"
    opener = (tmp_path / "ca.key").read_text().strip()
    assert ["ENCRYPTED" in key for key in made.keys].count(True) == 1, "the authority's"
    for key in made.keys:
        assert not [shape for shape in shapes(key, opener) if shape in everything]
    secrets = [opener, OF_HOME, OF_AWAY, WRONG, PASSWORD, *made.tokens, (tmp_path / "vault.key").read_text().strip()]
    secrets += [token[at : at + 80] for token in made.tokens for at in range(0, len(token) - 80, 80)]
    assert not [secret for secret in secrets if secret in everything]
