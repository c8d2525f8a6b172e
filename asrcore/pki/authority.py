"""The certificate authority: an encrypted key in a directory of the configuration server, and a register in the vault.

A component makes its own key and sends a signed request; the authority never sees a private key but its own, and that
of a token until it is handed over. A token is a certificate of role `join` that is valid for an hour: only the call
that joins accepts it, and the vault lets it be used once.

Each certificate is recorded before it is issued, so that every valid one can be listed and revoked.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import attrs
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from asrcore.errors import AlreadyExists, AuthorityUnusable, CertificateNotFound, InvalidValue, RequestRefused
from asrcore.files import write_private
from asrcore.pki.enrolment import install, installed, key_in, write_public
from asrcore.pki.request import LIFETIME, Issued, Key, Token, make_request
from asrcore.sealkey import authority_key, open_private_key, seal_private_key
from asrcore.units import DAY, HOUR, MINUTE
from asrcore.vault import Certificate, Vault
from asrcore.wire.tls import Component, Role

__all__ = ["Authority", "keep_own"]

TOKEN_LIFETIME = 1 * HOUR
LIST_LIFETIME = 7 * DAY
"""Lifetime of a revocation list: a component whose list is older accepts no connection."""
_OWN_LIFETIME = 3650 * DAY
_EARLIER = 5 * MINUTE  # valid since a little before it is issued: hosts' clocks differ


class Authority:
    """`clock` gives seconds since the epoch. Safe to use from several threads and processes."""

    def __init__(self, directory: str | Path, vault: Vault, clock: Callable[[], float] = time.time) -> None:
        """Open one that is there. Raises AuthorityUnusable, SecretKeyUnusable, HostIncomplete."""
        self._directory = Path(directory)
        self._vault = vault
        self._clock = clock
        try:
            mode = (self._directory / "ca-key.pem").stat().st_mode
            if mode & 0o077:
                raise AuthorityUnusable(
                    directory=str(directory), problem="ca-key.pem can be read by users other than its owner"
                )
            key = open_private_key((self._directory / "ca-key.pem").read_bytes(), authority_key(self._directory))
            self._certificate = x509.load_pem_x509_certificate((self._directory / "ca.pem").read_bytes())
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as problem:
            detail = problem.strerror if isinstance(problem, OSError) and problem.strerror else str(problem)
            raise AuthorityUnusable(directory=str(directory), problem=detail) from problem
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != self._certificate.public_key():
            raise AuthorityUnusable(directory=str(directory), problem="ca-key.pem and ca.pem do not belong together")
        self._key = key

    @classmethod
    def create(cls, directory: str | Path, vault: Vault, clock: Callable[[], float] = time.time) -> Authority:
        """Make one in a directory that has none. Raises AlreadyExists, AuthorityUnusable, SecretKeyUnusable,
        HostIncomplete."""
        directory = Path(directory)
        if (directory / "ca.pem").exists():  # written after the key
            raise AlreadyExists(kind="certificate authority", name=str(directory))
        key = ec.generate_private_key(ec.SECP256R1())
        now = clock()
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"asrcore authority {os.urandom(4).hex()}")])
        builder = (
            _builder(name, key.public_key(), x509.random_serial_number(), now, now + _OWN_LIFETIME)
            .subject_name(name)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )
        certificate = builder.sign(key, hashes.SHA256())
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_private(directory / "ca-key.pem", seal_private_key(key, authority_key(directory)).decode())
            write_private(directory / "ca.pem", _pem(certificate), mode=0o644)
        except OSError as problem:
            raise AuthorityUnusable(directory=str(directory), problem=problem.strerror or str(problem)) from problem
        return cls(directory, vault, clock)

    @property
    def now(self) -> float:
        """Seconds since the epoch, by its clock."""
        return self._clock()

    @property
    def pem(self) -> str:
        """The authority's own certificate: what all components trust."""
        return _pem(self._certificate)

    # -- joining -----------------------------------------------------------------------------------------------------

    def token(self, component: Component, addresses: Collection[str] = (), lifetime: float = TOKEN_LIFETIME) -> Token:
        """A token for one component, once, within `lifetime` seconds. `addresses`: the DNS names and IP addresses of
        its certificate. Raises InvalidValue."""
        if component.role is Role.JOIN:
            raise InvalidValue(what="role", value=component.role.value, wanted="a component's role")
        key = ec.generate_private_key(ec.SECP256R1())
        record, certificate = self._make(
            Component(Role.JOIN, component.name), key.public_key(), (), lifetime, grants=component.role.value
        )
        self._vault.add_certificate(attrs.evolve(record, addresses=_checked(addresses)))
        return Token(_pem(certificate), _pem_of_key(key), self.pem)

    def join(self, serial: str, request: str) -> Issued:
        """Exchange the token with that serial number for a certificate. The same request may be repeated.

        Raises TokenRefused, RequestRefused.
        """
        key = _key_of(request)
        token = self._vault.use_token(serial, _digest(key), self._clock())
        return self._issue(Component(Role(token.grants), token.name), key, token.addresses)

    def renew(self, serial: str, request: str) -> Issued:
        """Another certificate for the component that has the one with that serial number.

        Raises CertificateNotFound when it was revoked or has expired, RequestRefused.
        """
        former = self.valid(serial)
        return self._issue(Component(Role(former.role), former.name), _key_of(request), former.addresses)

    def issue(self, component: Component, request: str, addresses: Collection[str] = ()) -> Issued:
        """A certificate without a token: for the configuration server itself. Raises RequestRefused, InvalidValue."""
        return self._issue(component, _key_of(request), _checked(addresses))

    def valid(self, serial: str) -> Certificate:
        """The certificate, if it is valid now. Raises CertificateNotFound."""
        found = self._vault.certificate(serial)
        if found.revoked_at is not None or found.expires_at <= self._clock():
            raise CertificateNotFound(what=f"{found.role} {found.name!r} with serial number {serial}")
        return found

    def _issue(self, component: Component, key: ec.EllipticCurvePublicKey, addresses: Sequence[str]) -> Issued:
        record, certificate = self._make(component, key, addresses, LIFETIME)
        self._vault.add_certificate(record)
        return Issued(_pem(certificate), self.pem, self.revoked())

    def _make(
        self,
        component: Component,
        key: ec.EllipticCurvePublicKey,
        addresses: Sequence[str],
        lifetime: float,
        grants: str | None = None,
    ) -> tuple[Certificate, x509.Certificate]:
        now = self._clock()
        serial = x509.random_serial_number()
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(component.uri)]
        names += [_general_name(address) for address in addresses]
        builder = (
            _builder(self._certificate.subject, key, serial, now, now + lifetime)
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
        certificate = builder.sign(self._key, hashes.SHA256())
        record = Certificate(
            serial=f"{serial:x}",
            role=component.role.value,
            name=component.name,
            addresses=tuple(addresses),
            issued_at=now,
            expires_at=now + lifetime,
            grants=grants,
        )
        return record, certificate

    # -- revoking ----------------------------------------------------------------------------------------------------

    def revoke(self, component: Component) -> list[str]:
        """Revoke all certificates and unused tokens of a component; returns their serial numbers.

        Raises CertificateNotFound.
        """
        return self._vault.revoke_certificates(component.role.value, component.name, self._clock())

    def revoked(self) -> str:
        """The revocation list as of now, PEM."""
        now = self._clock()
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._certificate.subject)
            .last_update(_at(now - _EARLIER))
            .next_update(_at(now + LIST_LIFETIME))
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .add_extension(x509.CRLNumber(int(now * 1000)), critical=False)
        )
        for item in self._vault.certificates():
            if item.revoked_at is not None and item.expires_at > now:
                builder = builder.add_revoked_certificate(
                    x509.RevokedCertificateBuilder()
                    .serial_number(int(item.serial, 16))
                    .revocation_date(_at(item.revoked_at))
                    .build()
                )
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def keep_own(directory: str | Path, authority: Authority) -> None:
    """The same as `renew` for the configuration server itself, which has the authority: it must not need its own
    listener, which accepts no connection once its revocation list is too old.

    Raises IdentityUnusable, CertificateNotFound.
    """
    directory = Path(directory)
    certificate, url = installed(directory)
    if certificate.not_valid_after_utc.timestamp() - authority.now < LIFETIME / 3:
        request = make_request(key_in(directory))
        install(directory, authority.renew(f"{certificate.serial_number:x}", request), url)
    else:
        write_public(directory / "crl.pem", authority.revoked())


def _key_of(request: str) -> ec.EllipticCurvePublicKey:
    try:
        parsed = x509.load_pem_x509_csr(request.encode())
        key = parsed.public_key()
        signed = parsed.is_signature_valid
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm) as problem:
        raise RequestRefused(reason=f"it cannot be read: {problem}") from problem
    if not signed:
        raise RequestRefused(reason="its signature is wrong")
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise RequestRefused(reason="its key is not on the curve P-256")
    return key


def _digest(key: ec.EllipticCurvePublicKey) -> str:
    form = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    digest = hashes.Hash(hashes.SHA256())
    digest.update(form)
    return digest.finalize().hex()


def _builder(
    issuer: x509.Name, key: ec.EllipticCurvePublicKey, serial: int, now: float, expires: float
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(serial)
        .not_valid_before(_at(now - _EARLIER))
        .not_valid_after(_at(expires))
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


def _checked(addresses: Collection[str]) -> tuple[str, ...]:
    for address in addresses:
        _general_name(address)
    return tuple(addresses)


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


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _pem_of_key(key: Key) -> str:
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return key.private_bytes(*form).decode()
