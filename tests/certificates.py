"""A certificate authority for tests: valid and invalid identities of components."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

import attrs
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

__all__ = ["Authority"]

_DAY = datetime.timedelta(days=1)


@attrs.define
class Authority:
    """Issues identities, revokes them, and writes its revocation list to given identities."""

    name: str = "test authority"
    key: ec.EllipticCurvePrivateKey = attrs.field(factory=lambda: ec.generate_private_key(ec.SECP256R1()), repr=False)
    certificate: x509.Certificate = attrs.field(init=False, repr=False)
    revoked: list[int] = attrs.field(factory=list)

    def __attrs_post_init__(self) -> None:
        now = datetime.datetime.now(datetime.UTC)
        self.certificate = (
            self._builder(self.name, self.key.public_key(), now - _DAY, now + 30 * _DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(ca=True), critical=True)
            .sign(self.key, hashes.SHA256())
        )

    def _builder(
        self, name: str, key: ec.EllipticCurvePublicKey, begins: datetime.datetime, ends: datetime.datetime
    ) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.name)]))
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(begins)
            .not_valid_after(ends)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()),
                critical=False,
            )
        )

    def issue(
        self,
        directory: Path,
        role: str,
        name: str = "one",
        *,
        addresses: tuple[str, ...] = ("127.0.0.1",),
        uris: tuple[str, ...] | None = None,
        days: tuple[int, int] = (-1, 30),
        crl: bool = False,
    ) -> Path:
        """An identity in a directory. `days`: start and end of its validity, counted from now."""
        directory.mkdir(parents=True, exist_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.datetime.now(datetime.UTC)
        names: list[x509.GeneralName] = [
            x509.UniformResourceIdentifier(uri) for uri in (uris if uris is not None else (f"asr://{role}/{name}",))
        ]
        names += [x509.IPAddress(ipaddress.ip_address(item)) for item in addresses]
        builder = self._builder(name, key.public_key(), now + days[0] * _DAY, now + days[1] * _DAY)
        certificate = (
            builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names or [x509.DNSName("nobody")]), critical=False)
            .add_extension(_usage(ca=False), critical=True)
            .sign(self.key, hashes.SHA256())
        )
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        (directory / "key.pem").touch(0o600)
        (directory / "key.pem").write_bytes(private)
        (directory / "certificate.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        (directory / "ca.pem").write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))
        if crl:
            self.write_crl(directory)
        return directory

    def revoke(self, directory: Path) -> None:
        """Revoke the identity in a directory; write the revocation list wherever it must take effect."""
        text = (directory / "certificate.pem").read_bytes()
        self.revoked.append(x509.load_pem_x509_certificate(text).serial_number)

    def write_crl(self, directory: Path, *, days: tuple[int, int] = (-1, 7)) -> None:
        """Put the revocation list into an identity."""
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(now + days[0] * _DAY)
            .next_update(now + days[1] * _DAY)
            .add_extension(x509.CRLNumber(len(self.revoked) + 1), critical=False)
        )
        for serial in self.revoked:
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now - _DAY).build()
            builder = builder.add_revoked_certificate(entry)
        text = builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        new = directory / "crl.new"
        new.write_bytes(text)
        new.replace(directory / "crl.pem")


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )
