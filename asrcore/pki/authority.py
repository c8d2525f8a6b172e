"""The certificate authority: an issuer in a directory of the configuration server, and a register in the vault.

A component makes its own key and sends a signed request; the authority never sees a private key but its own, and that
of a token until it is handed over. A token is a certificate of role `join` that is valid for an hour: only the call
that joins accepts it, and the vault lets it be used once.

Each certificate is recorded before it is issued, so that every valid one can be listed and revoked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import attrs
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from asrcore.errors import CertificateNotFound, InvalidValue, RequestRefused
from asrcore.pki.enrolment import install, installed, key_in, write_public
from asrcore.pki.issuer import Issuer, checked_addresses, new_key, pem
from asrcore.pki.request import LIFETIME, Issued, Token, make_request
from asrcore.units import HOUR
from asrcore.vault import Certificate, Vault
from asrcore.wire.tls import Component, Role

__all__ = ["Authority", "keep_own"]

TOKEN_LIFETIME = 1 * HOUR


class Authority:
    """`clock` gives seconds since the epoch. Safe to use from several threads and processes."""

    def __init__(self, directory: str | Path, vault: Vault, clock: Callable[[], float] = time.time) -> None:
        """Open one that is there. Raises AuthorityUnusable, SecretKeyUnusable, HostIncomplete."""
        self._issuer = Issuer(Path(directory))
        self._vault = vault
        self._clock = clock

    @classmethod
    def create(cls, directory: str | Path, vault: Vault, clock: Callable[[], float] = time.time) -> Authority:
        """Make one in a directory that has none. Raises AlreadyExists, AuthorityUnusable, SecretKeyUnusable,
        HostIncomplete."""
        Issuer.create(Path(directory), clock())
        return cls(directory, vault, clock)

    @property
    def now(self) -> float:
        """Seconds since the epoch, by its clock."""
        return self._clock()

    @property
    def pem(self) -> str:
        """The authority's own certificate: what all components trust."""
        return pem(self._issuer.certificate)

    # -- joining -----------------------------------------------------------------------------------------------------

    def token(self, component: Component, addresses: Collection[str] = (), lifetime: float = TOKEN_LIFETIME) -> Token:
        """A token for one component, once, within `lifetime` seconds. `addresses`: the DNS names and IP addresses of
        its certificate. Raises InvalidValue."""
        if component.role is Role.JOIN:
            raise InvalidValue(what="role", value=component.role.value, wanted="a component's role")
        key = new_key()
        record, certificate = self._make(
            Component(Role.JOIN, component.name), key.public_key(), (), lifetime, grants=component.role.value
        )
        self._vault.add_certificate(attrs.evolve(record, addresses=checked_addresses(addresses)))
        return Token(pem(certificate), pem(key), self.pem)

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
        return self._issue(component, _key_of(request), checked_addresses(addresses))

    def valid(self, serial: str) -> Certificate:
        """The certificate, if it is valid now. Raises CertificateNotFound."""
        found = self._vault.certificate(serial)
        if found.revoked_at is not None or found.expires_at <= self._clock():
            raise CertificateNotFound(what=f"{found.role} {found.name!r} with serial number {serial}")
        return found

    def _issue(self, component: Component, key: ec.EllipticCurvePublicKey, addresses: Sequence[str]) -> Issued:
        record, certificate = self._make(component, key, addresses, LIFETIME)
        self._vault.add_certificate(record)
        return Issued(pem(certificate), self.pem, self.revoked())

    def _make(
        self,
        component: Component,
        key: ec.EllipticCurvePublicKey,
        addresses: Sequence[str],
        lifetime: float,
        grants: str | None = None,
    ) -> tuple[Certificate, x509.Certificate]:
        now = self._clock()
        expires = min(now + lifetime, self._issuer.ends)
        certificate = self._issuer.issue(component, key, now, expires, addresses=addresses)
        record = Certificate(
            serial=f"{certificate.serial_number:x}",
            role=component.role.value,
            name=component.name,
            addresses=tuple(addresses),
            issued_at=now,
            expires_at=expires,
            grants=grants,
        )
        return record, certificate

    # -- revoking ----------------------------------------------------------------------------------------------------

    def revoke(self, component: Component) -> list[str]:
        """Revoke all certificates and unused tokens of a component; returns their serial numbers.

        Raises CertificateNotFound.
        """
        return self._vault.revoke_certificates(component.role.value, component.name, self._clock())

    def revocable(self, component: Component) -> list[str]:
        """What `revoke` would revoke now. Raises CertificateNotFound."""
        found = [
            item.serial
            for item in self._vault.certificates()
            if item.name == component.name
            and component.role.value in (item.role, item.grants)
            and item.revoked_at is None
            and item.expires_at > self._clock()
        ]
        if not found:
            raise CertificateNotFound(what=f"{component.role.value} {component.name!r}")
        return found

    def revoked(self) -> str:
        """The revocation list as of now, PEM."""
        now = self._clock()
        revoked = [
            (int(item.serial, 16), item.revoked_at)
            for item in self._vault.certificates()
            if item.revoked_at is not None and item.expires_at > now
        ]
        return self._issuer.revocation_list(revoked, now)


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
