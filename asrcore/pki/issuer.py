"""Makes certificates and revocation lists with an authority's key, which is encrypted in a directory.

It keeps no register. Its caller records each certificate before it hands it out, so that every valid one can be listed
and revoked. Times are seconds since the epoch.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Collection, Iterable
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from asrcore.errors import AlreadyExists, AuthorityUnusable, InvalidValue
from asrcore.files import write_private
from asrcore.pki.request import Key
from asrcore.sealkey import authority_key, open_private_key, seal_private_key
from asrcore.units import DAY, MINUTE
from asrcore.wire.tls import Component

__all__ = ["Issuer", "checked_addresses", "new_key", "pem"]

LIST_LIFETIME = 7 * DAY
"""Lifetime of a revocation list: a component whose list is older accepts no connection."""
_EARLIER = 5 * MINUTE  # valid since a little before it is issued: hosts' clocks differ
_OWN_LIFETIME = 3650 * DAY


class Issuer:
    """The authority whose `ca.pem` and `ca-key.pem` are in a directory. Safe to use from several threads."""

    def __init__(self, directory: Path) -> None:
        """Open one that exists. Raises AuthorityUnusable, SecretKeyUnusable, HostIncomplete."""
        self._directory = directory
        try:
            if (directory / "ca-key.pem").stat().st_mode & 0o077:
                raise _unusable(directory, "ca-key.pem can be read by users other than its owner")
            key = open_private_key((directory / "ca-key.pem").read_bytes(), authority_key(directory))
            self.certificate = x509.load_pem_x509_certificate((directory / "ca.pem").read_bytes())
            """The authority's own, which all components trust."""
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as problem:
            detail = problem.strerror if isinstance(problem, OSError) and problem.strerror else str(problem)
            raise _unusable(directory, detail) from problem
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != self.certificate.public_key():
            raise _unusable(directory, "ca-key.pem and ca.pem do not belong together")
        self._key = key

    @classmethod
    def create(cls, directory: Path, now: float, *, earlier: float = _EARLIER) -> Issuer:
        """Make one in a directory that has none. It is valid for ten years, from `earlier` seconds before `now` on.

        Raises AlreadyExists, AuthorityUnusable, SecretKeyUnusable, HostIncomplete.
        """
        if (directory / "ca.pem").exists():  # written after the key
            raise AlreadyExists(kind="certificate authority", name=str(directory))
        key = new_key()
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"asrcore authority {os.urandom(4).hex()}")])
        certificate = (
            _builder(name, key.public_key(), now - earlier, now + _OWN_LIFETIME)
            .subject_name(name)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_private(directory / "ca-key.pem", seal_private_key(key, authority_key(directory)).decode())
            write_private(directory / "ca.pem", pem(certificate), mode=0o644)
        except OSError as problem:
            raise _unusable(directory, problem.strerror or str(problem)) from problem
        return cls(directory)

    @property
    def ends(self) -> float:
        """When the authority's own certificate expires."""
        return self.certificate.not_valid_after_utc.timestamp()

    def issue(
        self,
        component: Component,
        key: ec.EllipticCurvePublicKey,
        now: float,
        expires: float,
        *,
        addresses: Collection[str] = (),
        earlier: float = _EARLIER,
    ) -> x509.Certificate:
        """A certificate for a component's key, valid from `earlier` seconds before `now` on. It expires with the
        authority at the latest. `addresses`: its DNS names and IP addresses. Raises AuthorityUnusable, InvalidValue."""
        if now >= self.ends:
            raise _unusable(self._directory, "its own certificate has expired")
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(component.uri)]
        names += [_general_name(address) for address in addresses]
        builder = (
            _builder(self.certificate.subject, key, now - earlier, min(expires, self.ends))
            .subject_name(x509.Name([]))  # the component's name is in the URI, which may have any length
            .add_extension(x509.SubjectAlternativeName(names), critical=True)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]),
                critical=False,
            )
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        return builder.sign(self._key, hashes.SHA256())

    def revocation_list(self, revoked: Iterable[tuple[int, float]], now: float) -> str:
        """The list of these serial numbers with the times of their revocation, PEM."""
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(_at(now - _EARLIER))
            .next_update(_at(now + LIST_LIFETIME))
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .add_extension(x509.CRLNumber(int(now * 1000)), critical=False)
        )
        for serial, at in revoked:
            builder = builder.add_revoked_certificate(
                x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(_at(at)).build()
            )
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def new_key() -> Key:
    """A new private key, as all certificates here have it."""
    return ec.generate_private_key(ec.SECP256R1())


def pem(item: x509.Certificate | Key) -> str:
    """A certificate, or an unencrypted private key, as PEM."""
    if isinstance(item, x509.Certificate):
        return item.public_bytes(serialization.Encoding.PEM).decode()
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return item.private_bytes(*form).decode()


def checked_addresses(addresses: Collection[str]) -> tuple[str, ...]:
    """The same, if a certificate can have them. Raises InvalidValue."""
    for address in addresses:
        _general_name(address)
    return tuple(addresses)


def _unusable(directory: Path, problem: str) -> AuthorityUnusable:
    return AuthorityUnusable(directory=str(directory), problem=problem)


def _builder(issuer: x509.Name, key: ec.EllipticCurvePublicKey, begins: float, ends: float) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_at(begins))
        .not_valid_after(_at(ends))
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(address: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(address))
    except ValueError:
        pass
    labels = address.split(".")
    if len(address) > 253 or not all(label.replace("-", "a").isalnum() and label.isascii() for label in labels):
        raise InvalidValue(what="address", value=address, wanted="a DNS name or an IP address")
    return x509.DNSName(address)


def _at(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(int(seconds), datetime.UTC)
