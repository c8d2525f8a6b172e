"""Certificates of asrcore's authority at a listener of another component; `test_tls` uses its own certificates."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from asrcore.errors import AsrError
from asrcore.files import write_private
from asrcore.pki import enrolment
from asrcore.pki.authority import Authority
from asrcore.pki.request import make_request
from asrcore.remote import RemoteDriver
from asrcore.remote.master_target import MasterTarget
from asrcore.testing.memory import MemoryDriver, MemoryWorld
from asrcore.vault import Vault
from asrcore.wire.carrier import Address
from asrcore.wire.tls import Component, Identity, Role


class Desk:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.vault = Vault.create(folder / "vault.db")
        self.authority = Authority.create(folder / "ca", self.vault)

    def identity(self, role: Role, name: str = "one") -> Identity:
        directory = self.folder / f"{role.value}-{name}"
        issued = self.authority.issue(Component(role, name), make_request(enrolment.key_in(directory)), ["127.0.0.1"])
        enrolment.install(directory, issued, "https://127.0.0.1")
        return Identity(directory)

    def token(self) -> Identity:
        token = self.authority.token(Component(Role.PROCESS_SERVER, "one"))
        directory = self.folder / "token"
        directory.mkdir()
        for name, text in (("certificate.pem", token.certificate), ("key.pem", token.key), ("ca.pem", token.authority)):
            write_private(directory / name, text)
        return Identity(directory)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    yield made
    made.vault.close()


@pytest.fixture
def target(desk: Desk) -> Iterator[MasterTarget]:
    MemoryWorld("away")
    with (
        MemoryDriver().connect("away", {"world": "away"}) as site,
        MasterTarget(site, Address("127.0.0.1", 0), desk.identity(Role.MASTER_TARGET)) as served,
    ):
        yield served


def connect(target: MasterTarget, identity: Identity) -> str:
    settings = {"address": str(target.address), "identity": str(identity.directory)}
    with RemoteDriver().connect("far", settings) as site:
        return site.status().version


def refused(target: MasterTarget, identity: Identity) -> str:
    """Why the certificate is refused."""
    with pytest.raises(AsrError) as caught:
        connect(target, identity)
    return caught.value.code


def test_a_process_server_is_let_in(desk: Desk, target: MasterTarget) -> None:
    assert connect(target, desk.identity(Role.PROCESS_SERVER))


@pytest.mark.parametrize("role", [Role.AGENT, Role.OPERATOR, Role.MASTER_TARGET], ids=lambda role: role.value)
def test_other_components_are_not(role: Role, desk: Desk, target: MasterTarget) -> None:
    assert refused(target, desk.identity(role, "other")) == "certificate-role"


def test_a_join_token_is_not(desk: Desk, target: MasterTarget) -> None:
    assert refused(target, desk.token()) == "certificate-role"


def test_a_revoked_one_is_not_once_the_list_has_been_fetched(desk: Desk, target: MasterTarget) -> None:
    identity = desk.identity(Role.PROCESS_SERVER)
    assert connect(target, identity)
    desk.authority.revoke(Component(Role.PROCESS_SERVER, "one"))
    write_private(desk.folder / "master-target-one" / "crl.pem", desk.authority.revoked(), 0o644)
    assert refused(target, identity) == "certificate-revoked"


def test_keys_of_components_are_their_own(desk: Desk) -> None:
    first, second = enrolment.key_in(desk.folder / "a"), enrolment.key_in(desk.folder / "b")
    assert isinstance(first, ec.EllipticCurvePrivateKey)
    assert first.public_key() != second.public_key()
    assert enrolment.key_in(desk.folder / "a").public_key() == first.public_key()
