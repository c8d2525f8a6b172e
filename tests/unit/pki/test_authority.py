"""The certificate authority: what it issues, to whom, only once, and what it revokes."""

from __future__ import annotations

import base64
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import NameOID

from asrcore.errors import (
    AlreadyExists,
    AuthorityUnusable,
    CertificateNotFound,
    InvalidValue,
    RequestRefused,
    SecretKeyUnusable,
    TokenRefused,
)
from asrcore.pki.authority import Authority
from asrcore.pki.request import LIFETIME, make_request
from asrcore.units import HOUR
from asrcore.vault import Vault
from asrcore.wire.tls import Component, Role
from tests.unit.rig import Clock

ONE = Component(Role.PROCESS_SERVER, "one")


class Desk:
    """An authority with a vault in a file, and its clock."""

    def __init__(self, folder: Path) -> None:
        self.clock = Clock()
        self.folder = folder
        self.vault = Vault.create(folder / "vault.db")
        self.authority = Authority.create(folder / "ca", self.vault, self.clock)

    def token_serial(self, component: Component = ONE, *addresses: str) -> str:
        return serial(self.authority.token(component, addresses).certificate)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    yield made
    made.vault.close()


def request() -> str:
    return make_request(ec.generate_private_key(ec.SECP256R1()))


def parsed(pem: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem.encode())


def serial(pem: str) -> str:
    return f"{parsed(pem).serial_number:x}"


def names(pem: str) -> list[str]:
    found = parsed(pem).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(item.value) for item in found]


def test_a_component_joins_with_its_own_key(desk: Desk) -> None:
    mine = request()
    issued = desk.authority.join(desk.token_serial(ONE, "ps1.example", "10.0.0.2"), mine)
    certificate = parsed(issued.certificate)
    certificate.verify_directly_issued_by(parsed(issued.authority))
    assert names(issued.certificate) == ["asr://process-server/one", "ps1.example", "10.0.0.2"]
    assert certificate.public_key() == x509.load_pem_x509_csr(mine.encode()).public_key()
    assert certificate.not_valid_after_utc.timestamp() == pytest.approx(desk.clock() + LIFETIME, abs=5)
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_keys_are_for_their_owner_only(desk: Desk) -> None:
    assert stat.S_IMODE((desk.folder / "ca" / "ca-key.pem").stat().st_mode) == 0o600
    assert stat.S_IMODE((desk.folder / "ca").stat().st_mode) == 0o700
    (desk.folder / "ca" / "ca-key.pem").chmod(0o640)
    with pytest.raises(AuthorityUnusable, match="read by users other than its owner"):
        Authority(desk.folder / "ca", desk.vault)


def test_the_authority_s_key_is_opened_by_another_that_is_not_beside_it(desk: Desk, tmp_path: Path) -> None:
    directory, opener = desk.folder / "ca", desk.folder / "ca.key"
    assert stat.S_IMODE(opener.stat().st_mode) == 0o600
    sealed = (directory / "ca-key.pem").read_bytes()
    with pytest.raises(TypeError, match="encrypted"):
        load_pem_private_key(sealed, None)
    assert load_pem_private_key(sealed, opener.read_bytes().strip())
    copy = tmp_path / "backup"
    shutil.copytree(directory, copy)
    with pytest.raises(SecretKeyUnusable, match="No such file") as caught:
        Authority(copy, desk.vault)
    assert "ASR_CA_KEY" in caught.value.action_text


@pytest.mark.parametrize("what", ["another", "damaged", "readable"])
def test_a_key_that_does_not_open_the_authority_s_is_reported(what: str, desk: Desk) -> None:
    opener = desk.folder / "ca.key"
    if what == "another":
        opener.write_text(base64.b64encode(bytes(32)).decode())
    elif what == "damaged":
        opener.write_text("short")
    else:
        opener.chmod(0o644)
    with pytest.raises(
        SecretKeyUnusable,
        match={"another": "another key", "damaged": "32", "readable": "users other than its owner"}[what],
    ):
        Authority(desk.folder / "ca", desk.vault)


def test_that_key_may_be_elsewhere(desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASR_CA_KEY", str(tmp_path / "stick" / "authority"))
    made = Authority.create(tmp_path / "second", desk.vault)
    assert not (tmp_path / "second.key").exists()
    assert Authority(tmp_path / "second", desk.vault).pem == made.pem


def test_a_key_in_clear_is_taken(desk: Desk) -> None:
    path, opener = desk.folder / "ca" / "ca-key.pem", desk.folder / "ca.key"
    key = load_pem_private_key(path.read_bytes(), opener.read_bytes().strip())
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    opener.unlink()
    assert Authority(desk.folder / "ca", desk.vault).pem == desk.authority.pem


def test_there_is_one_authority_in_a_directory(desk: Desk, tmp_path: Path) -> None:
    with pytest.raises(AlreadyExists):
        Authority.create(desk.folder / "ca", desk.vault)
    Authority.create(tmp_path / "other", desk.vault)
    (desk.folder / "ca" / "ca.pem").write_text((tmp_path / "other" / "ca.pem").read_text())
    with pytest.raises(AuthorityUnusable, match="do not belong together"):
        Authority(desk.folder / "ca", desk.vault)
    with pytest.raises(AuthorityUnusable, match="No such file"):
        Authority(tmp_path / "nothing", desk.vault)


def test_a_token_is_spent_once(desk: Desk) -> None:
    token, mine = desk.token_serial(), request()
    desk.authority.join(token, mine)
    desk.authority.join(token, mine)  # the answer was lost
    with pytest.raises(TokenRefused, match="already used"):
        desk.authority.join(token, request())


def test_a_token_has_its_time(desk: Desk) -> None:
    token = desk.token_serial()
    desk.clock.now += HOUR
    with pytest.raises(TokenRefused, match="it has expired"):
        desk.authority.join(token, request())


def test_a_token_can_be_taken_back(desk: Desk) -> None:
    token = desk.token_serial()
    desk.authority.revoke(ONE)
    with pytest.raises(TokenRefused, match="revoked"):
        desk.authority.join(token, request())


def test_a_certificate_is_no_token_and_a_token_no_certificate(desk: Desk) -> None:
    token = desk.token_serial()
    issued = desk.authority.join(token, request())
    for other in (serial(issued.certificate), "17", ""):
        with pytest.raises(TokenRefused, match="did not issue"):
            desk.authority.join(other, request())
    with pytest.raises(InvalidValue):
        desk.authority.token(Component(Role.JOIN, "one"))


def test_renewal_keeps_who_it_is(desk: Desk) -> None:
    former = desk.authority.join(desk.token_serial(ONE, "ps1.example"), request()).certificate
    desk.clock.now += LIFETIME - 10
    renewed = desk.authority.renew(serial(former), request()).certificate
    assert names(renewed) == names(former)
    assert parsed(renewed).not_valid_after_utc > parsed(former).not_valid_after_utc
    desk.clock.now += 20
    with pytest.raises(CertificateNotFound):
        desk.authority.renew(serial(former), request())


def test_what_is_revoked_is_in_the_list_until_it_has_expired(desk: Desk) -> None:
    certificate = desk.authority.join(desk.token_serial(), request()).certificate
    other = desk.authority.issue(Component(Role.AGENT, "one"), request()).certificate
    assert set(desk.authority.revoke(ONE)) >= {serial(certificate)}
    revoked = x509.load_pem_x509_crl(desk.authority.revoked().encode())
    assert revoked.is_signature_valid(parsed(desk.authority.pem).public_key())  # type: ignore[arg-type]
    listed = {f"{item.serial_number:x}" for item in revoked}
    assert serial(certificate) in listed
    assert serial(other) not in listed
    desk.authority.valid(serial(other))
    for call in (desk.authority.valid, lambda found: desk.authority.renew(found, request())):
        with pytest.raises(CertificateNotFound):
            call(serial(certificate))
    with pytest.raises(CertificateNotFound):
        desk.authority.revoke(ONE)
    desk.clock.now += LIFETIME
    assert list(x509.load_pem_x509_crl(desk.authority.revoked().encode())) == []


def _rsa() -> str:
    key = rsa.generate_private_key(65537, 2048)
    built = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return built.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def _forged() -> str:
    lines = request().splitlines()
    body = "".join(lines[1:-1])
    middle = len(body) - 12
    body = body[:middle] + ("A" if body[middle] != "A" else "B") + body[middle + 1 :]
    return "\n".join([lines[0], body, lines[-1]])


@pytest.mark.parametrize(
    "make", [lambda: "", lambda: "x" * 10_000, _rsa, _forged], ids=["empty", "long", "rsa", "forged"]
)
def test_bad_requests_are_refused_and_spend_nothing(make: Callable[[], str], desk: Desk) -> None:
    token = desk.token_serial()
    with pytest.raises(RequestRefused):
        desk.authority.join(token, make())
    desk.authority.join(token, request())


def test_what_a_request_claims_to_be_is_not_believed(desk: Desk) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    claims = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "config-server")])
    )
    claims = claims.add_extension(
        x509.SubjectAlternativeName([x509.UniformResourceIdentifier("asr://operator/root")]), critical=False
    ).add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    text = claims.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()
    issued = desk.authority.join(desk.token_serial(), text).certificate
    assert names(issued) == ["asr://process-server/one"]
    assert list(parsed(issued).subject) == []


@pytest.mark.parametrize("address", ["", "a b", "https://x", "x" * 300, "ümlaut", "a..b"])
def test_addresses_are_checked(address: str, desk: Desk) -> None:
    with pytest.raises(InvalidValue):
        desk.authority.token(ONE, [address])


def test_no_private_key_is_in_the_vault(desk: Desk) -> None:
    token = desk.authority.token(ONE)
    desk.authority.join(serial(token.certificate), request())
    desk.vault.fold()
    content = (desk.folder / "vault.db").read_bytes()
    for secret in (token.key, (desk.folder / "ca" / "ca-key.pem").read_text()):
        for line in secret.splitlines()[1:-1]:
            assert line.encode() not in content
    assert token.key not in repr(token)
