"""Identities: those that asrcore 0.1 has made are used as they are, and creation that was interrupted is resumed."""

from __future__ import annotations

import datetime
import json
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import attrs
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from asr_driver_physical.driver import PhysicalDriver
from asr_driver_physical.servers.hub import Gateway
from asr_driver_physical.servers.identity import Identity
from asr_driver_physical.servers.servers import Servers
from asr_driver_physical.settings import SiteSettings
from asr_driver_physical.site import PhysicalSite
from asr_mobility import __main__ as agent
from asr_mobility.channel import Channel
from asr_mobility.service import Service
from asrcore.errors import InvalidSetting
from asrcore.pki import issuer
from asrcore.sealkey import authority_key
from asrcore.wire import Component, Role
from drivers.physical.tests.rig import wait_until
from drivers.physical.tests.test_parts import FACTS

DAY = datetime.timedelta(days=1)
PEM = serialization.Encoding.PEM
PKCS8 = serialization.PrivateFormat.PKCS8


class Earlier:
    """A directory as the driver made it before it shared the issuer of the configuration server: certificates with
    other extensions, and subjects. `sealed`: the still earlier versions did not encrypt the authority's key."""

    def __init__(self, path: Path, *, sealed: bool = True) -> None:
        self.path = path
        (path / "servers").mkdir(mode=0o700, parents=True)
        path.chmod(0o700)
        self.key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "asrcore physical servers")])
        now = datetime.datetime.now(datetime.UTC)
        self.certificate = (
            x509.CertificateBuilder(name, name, self.key.public_key(), x509.random_serial_number())
            .not_valid_before(now - DAY / 24)
            .not_valid_after(now + 3650 * DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self.key, hashes.SHA256())
        )
        encryption: Any = serialization.NoEncryption()
        if sealed:
            encryption = serialization.BestAvailableEncryption(authority_key(path).password(make=True))
        self.write("ca-key.pem", self.key.private_bytes(PEM, PKCS8, encryption))
        self.write("ca.pem", self.certificate.public_bytes(PEM))
        certificate, key = self.sign("process-server", "host", 3650 * DAY)
        self.write("key.pem", key)
        self.write("certificate.pem", certificate)
        (path / ".lock").touch()

    def write(self, name: str, content: bytes) -> None:
        (self.path / name).write_bytes(content)
        (self.path / name).chmod(0o600)

    def sign(self, role: str, name: str, life: datetime.timedelta) -> tuple[bytes, bytes]:
        key = ec.generate_private_key(ec.SECP256R1())
        usage = ExtendedKeyUsageOID.CLIENT_AUTH if role == "agent" else ExtendedKeyUsageOID.SERVER_AUTH
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])]))
            .issuer_name(self.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - DAY)
            .not_valid_after(min(now + life, self.certificate.not_valid_after_utc))
            .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"asr://{role}/{name}")]), False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        return certificate.public_bytes(PEM), key.private_bytes(PEM, PKCS8, serialization.NoEncryption())

    def enrol(self, name: str, home: Path, life: datetime.timedelta = 825 * DAY) -> None:
        """A server with its files in `home`, and its record."""
        home.mkdir()
        certificate, key = self.sign("agent", name, life)
        (home / "agent.pem").write_bytes(certificate + key)
        (home / "ca.pem").write_bytes(self.certificate.public_bytes(PEM))
        parsed = x509.load_pem_x509_certificate(certificate)
        record = {
            "name": name,
            "fingerprint": parsed.fingerprint(hashes.SHA256()).hex(),
            "identity": "aa" * 16,
            "facts": FACTS,
            "fence": None,
            "ends": parsed.not_valid_after_utc.timestamp(),
            "renewals": {},
        }
        self.write(f"servers/{name}.json", json.dumps(record, indent=1).encode())


def connect(place: SiteSettings, home: Path) -> Channel:
    """As the agent does."""
    carrier = agent._dial(f"{place.host}:{place.port}", agent._context(home))
    return Channel(carrier, dialled=True, me={"name": "box", "identity": "aa" * 16}, serve=Service(home).serve)


def content(path: Path) -> dict[str, bytes]:
    return {str(item.relative_to(path)): item.read_bytes() for item in path.rglob("*") if item.is_file()}


@pytest.mark.parametrize("sealed", [True, False], ids=["encrypted", "in-clear"])
def test_an_earlier_identity_is_used_as_it_is(sealed: bool, place: SiteSettings, tmp_path: Path) -> None:
    earlier = Earlier(place.identity, sealed=sealed)
    earlier.enrol("box", tmp_path / "home")
    (place.spool / "authority").write_text(earlier.certificate.fingerprint(hashes.SHA256()).hex())  # as it was noted
    before = content(place.identity)
    with closing(PhysicalSite("dc", place)) as site:
        assert [record.name for record in site.servers.identity.servers()] == ["box"]
        with closing(connect(place, tmp_path / "home")):
            assert site.servers.gateway.call("box", "status", {})[0]
    assert content(place.identity) == before


def test_an_earlier_authority_issues_what_its_servers_accept(place: SiteSettings, tmp_path: Path) -> None:
    """A certificate that ends soon is renewed, and a new process server's is signed, by the same authority."""
    earlier, home = Earlier(place.identity), tmp_path / "home"
    earlier.enrol("box", home, 20 * DAY)
    former = (home / "agent.pem").read_bytes()
    identity = Identity(place.identity)
    with closing(Gateway("dc", place, identity)):
        with closing(connect(place, home)):
            wait_until(lambda: (home / "agent.pem").read_bytes() != former, "the renewal")
        with closing(connect(place, home)) as again:
            assert again.peer
    renewed = identity.server("box")
    assert renewed is not None
    assert renewed.ends - time.time() > 800 * 24 * 3600
    mine = identity._sign(Component(Role.PROCESS_SERVER, "host"), 24 * 3600)
    (place.identity / "key.pem").write_bytes(mine.key)
    (place.identity / "certificate.pem").write_bytes(mine.certificate)
    with closing(Gateway("dc", place, identity)) as gateway, closing(connect(place, home)):
        assert gateway.call("box", "status", {})[0]


def test_a_creation_that_was_interrupted_is_resumed(tmp_path: Path) -> None:
    first = Identity(tmp_path / "identity")
    authority = first.authority
    for name in ("certificate.pem", "key.pem"):
        (first.path / name).unlink()
    again = Identity(first.path)
    assert again.authority == authority
    own = x509.load_pem_x509_certificate((again.path / "certificate.pem").read_bytes())
    own.verify_directly_issued_by(x509.load_pem_x509_certificate(authority))
    assert again.tls.component().role is Role.PROCESS_SERVER


def test_certificates_are_for_servers_whose_clock_is_slow(tmp_path: Path) -> None:
    identity, yesterday = Identity(tmp_path / "identity"), time.time() - 23 * 3600
    issued = identity.issue("box").certificate
    for pem in (issued, identity.authority, (identity.path / "certificate.pem").read_bytes()):
        assert x509.load_pem_x509_certificate(pem).not_valid_before_utc.timestamp() < yesterday


@pytest.mark.parametrize("wrong", ["open", "missing", "other"])
def test_an_authority_that_cannot_be_used_is_named(wrong: str, tmp_path: Path) -> None:
    identity = Identity(tmp_path / "identity")
    key = identity.path / "ca-key.pem"
    if wrong == "open":
        key.chmod(0o644)
    elif wrong == "missing":
        key.unlink()
    else:
        key.write_text(issuer.pem(issuer.new_key()))
    with pytest.raises(InvalidSetting, match="certificate authority in"):
        identity.issue("box")


def test_a_record_keeps_its_format(tmp_path: Path) -> None:
    """Processes of several versions may share the directory."""
    earlier = Earlier(tmp_path / "identity")
    earlier.enrol("box", tmp_path / "home")
    before = content(earlier.path)["servers/box.json"]
    identity = Identity(earlier.path)
    identity.change("box", lambda record: attrs.evolve(record, ends=record.ends + 1))
    identity.change("box", lambda record: attrs.evolve(record, ends=record.ends - 1))
    assert content(earlier.path)["servers/box.json"] == before


def entered(place: SiteSettings) -> dict[str, str]:
    return {"listen": f"{place.host}:{place.port}", "identity": str(place.identity), "spool": str(place.spool)}


def test_two_vaults_do_not_share_the_servers_of_one_directory(place: SiteSettings) -> None:
    """Each would end the other's tracking."""
    settings = entered(place)
    first = PhysicalDriver().adopt("dc", settings)
    assert PhysicalDriver().adopt("dc", {**settings, **first}) == {}
    Servers("dc", SiteSettings.parse({**settings, **first})).close()
    with pytest.raises(InvalidSetting, match=f"another vault .tag {first['owner']}"):
        Servers("dc", SiteSettings.parse({**settings, "owner": "bbbb2222"}))
    with pytest.raises(InvalidSetting, match="another vault"):
        PhysicalDriver().adopt("dc", settings)
    (place.identity / "vault").unlink()
    Servers("dc", SiteSettings.parse({**settings, "owner": "bbbb2222"})).close()
    with pytest.raises(InvalidSetting, match="bbbb2222"):
        Servers("dc", SiteSettings.parse({**settings, **first}))


def test_a_site_of_an_earlier_version_works_and_claims_nothing(place: SiteSettings) -> None:
    settings = entered(place)
    Servers("dc", SiteSettings.parse(settings)).close()
    assert not (place.identity / "vault").exists()
