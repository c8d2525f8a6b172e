"""Identities, and TLS between components: both sides present a certificate, and each checks the other's role.

An identity is a directory with `certificate.pem`, `key.pem`, `ca.pem` and optionally `crl.pem`. The files are read
again when they change, so a renewed certificate or a new revocation list applies from the next connection on. A
certificate names its component in one SAN URI, `asr://ROLE/NAME`.
"""

from __future__ import annotations

import ssl
import threading
from collections.abc import Collection, Mapping
from enum import Enum
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import attrs

from asrcore.errors import (
    AsrError,
    CertificateExpired,
    CertificateMissing,
    CertificateRevoked,
    CertificateRole,
    CertificateUnknown,
    FrameRefused,
    IdentityUnusable,
)

__all__ = ["Component", "Identity", "Role", "check_role", "component_of", "refusal"]


class Role(Enum):
    """What a component may be."""

    CONFIG_SERVER = "config-server"
    PROCESS_SERVER = "process-server"
    MASTER_TARGET = "master-target"
    AGENT = "agent"
    OPERATOR = "operator"
    """A person or a program at the configuration server."""
    JOIN = "join"
    """A join token: valid for joining and nothing else."""


@attrs.frozen
class Component:
    """Who a certificate belongs to."""

    role: Role
    name: str

    @property
    def uri(self) -> str:
        """As it stands in the certificate."""
        return f"asr://{self.role.value}/{quote(self.name, safe='')}"

    @classmethod
    def parse(cls, uri: str) -> Component:
        """Raises ValueError for another URI."""
        parts = urlsplit(uri)
        name = unquote(parts.path.removeprefix("/"))
        if parts.scheme != "asr" or not name or parts.query or parts.fragment:
            raise ValueError(f"{uri!r} does not name a component")
        return cls(Role(parts.netloc), name)

    def __str__(self) -> str:
        return f"{self.role.value} {self.name}"


class Identity:
    """The identity in a directory. Thread-safe."""

    _FILES = ("certificate.pem", "key.pem", "ca.pem", "crl.pem")

    def __init__(self, directory: str | Path) -> None:
        """Reads nothing yet."""
        self.directory = Path(directory)
        self._lock = threading.Lock()
        self._contexts: dict[tuple[bool, bool], ssl.SSLContext] = {}
        self._read: object = None

    def version(self) -> object:
        """Another value after each change of the files. Raises IdentityUnusable."""
        return tuple(self._stamp(name) for name in self._FILES)

    def _stamp(self, name: str) -> tuple[int, ...] | None:
        path = self.directory / name
        try:
            found = path.stat()
        except FileNotFoundError as problem:
            if name == "crl.pem":
                return None
            raise self._unusable(f"there is no {name}") from problem
        except OSError as problem:
            raise self._unusable(str(problem)) from problem
        if name == "key.pem" and found.st_mode & 0o077:
            raise self._unusable("key.pem can be read by users other than its owner")
        return (found.st_ino, found.st_size, found.st_mtime_ns)

    def context(self, *, server: bool, check_host: bool = False) -> ssl.SSLContext:
        """TLS 1.3, with a certificate required from the other side. Raises IdentityUnusable."""
        version = self.version()
        with self._lock:
            if version != self._read:
                self._contexts.clear()
                self._read = version
            key = (server, check_host)
            if key not in self._contexts:
                self._contexts[key] = self._make(server=server, check_host=check_host)
            return self._contexts[key]

    def _make(self, *, server: bool, check_host: bool) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = check_host
        context.verify_mode = ssl.CERT_REQUIRED
        if server:
            context.num_tickets = 0  # no session is resumed: that would skip the check of the certificate
        name = ""
        try:
            name = "certificate.pem or key.pem"
            context.load_cert_chain(self.directory / "certificate.pem", self.directory / "key.pem", _no_password)
            name = "ca.pem"
            context.load_verify_locations(self.directory / "ca.pem")
            if (self.directory / "crl.pem").exists():
                name = "crl.pem"
                context.load_verify_locations(self.directory / "crl.pem")
                context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        except (OSError, ValueError) as problem:  # ssl.SSLError is an OSError
            raise self._unusable(f"{name}: {problem}") from problem
        return context

    def component(self) -> Component:
        """Who this is, by its own certificate. Raises IdentityUnusable."""
        from cryptography import x509  # noqa: PLC0415 - 60 ms that only components need

        try:
            certificate = x509.load_pem_x509_certificate((self.directory / "certificate.pem").read_bytes())
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            return _one(names.get_values_for_type(x509.UniformResourceIdentifier))
        except (OSError, ValueError, x509.ExtensionNotFound) as problem:
            raise self._unusable(f"certificate.pem: {problem}") from problem

    def _unusable(self, problem: str) -> IdentityUnusable:
        return IdentityUnusable(directory=str(self.directory), problem=problem)


def _no_password() -> str:
    raise ValueError("the key is encrypted with a password")


def component_of(certificate: Mapping[str, Any] | None) -> Component:
    """Of the other side, by what `getpeercert` gave. Raises ValueError if it names none."""
    names = (certificate or {}).get("subjectAltName", ())
    return _one([value for kind, value in names if kind == "URI"])


def _one(uris: Collection[str]) -> Component:
    ours = [uri for uri in uris if uri.startswith("asr:")]
    if len(ours) != 1:
        raise ValueError(f"it names {len(ours)} components")
    return Component.parse(ours[0])


def check_role(certificate: Mapping[str, Any] | None, peer: str, roles: Collection[Role], name: str = "") -> Component:
    """The component at the other side. Raises CertificateRole unless it is of one of the roles, and of that name."""
    wanted = " or ".join(sorted(role.value for role in roles)) + (f" {name}" if name else "")
    try:
        component = component_of(certificate)
    except ValueError as problem:
        raise CertificateRole(peer=peer, whose="its", found="no component", wanted=wanted) from problem
    if component.role not in roles or (name and component.name != name):
        raise CertificateRole(peer=peer, whose="its", found=str(component), wanted=wanted)
    return component


# X509_V_ERR_*: what OpenSSL found wrong with the other side's certificate
_NOT_NOW = {9, 10, 11, 12}  # not yet valid, expired; the same of a revocation list
_REVOKED = 23


def refusal(problem: ssl.SSLError, peer: str) -> AsrError:
    """A failed handshake as an error of the catalogue: what this side refused, or what the other one did."""
    detail = str(problem)
    if isinstance(problem, ssl.SSLCertVerificationError):
        if problem.verify_code == _REVOKED:
            return CertificateRevoked(peer=peer, whose="its")
        if problem.verify_code in _NOT_NOW:
            return CertificateExpired(peer=peer, whose="its", detail=problem.verify_message)
        return CertificateUnknown(peer=peer, whose="its", detail=problem.verify_message)
    reason = problem.reason or ""
    if "PEER_DID_NOT_RETURN_A_CERTIFICATE" in reason:
        return CertificateMissing(peer=peer, whose="its")
    if "CERTIFICATE_REQUIRED" in reason:
        return CertificateMissing(peer=peer, whose="our")
    if "CERTIFICATE_REVOKED" in reason:
        return CertificateRevoked(peer=peer, whose="our")
    if "CERTIFICATE_EXPIRED" in reason:
        return CertificateExpired(peer=peer, whose="our", detail=detail)
    if "UNKNOWN_CA" in reason or "BAD_CERTIFICATE" in reason or "CERTIFICATE_UNKNOWN" in reason:
        return CertificateUnknown(peer=peer, whose="our", detail=detail)
    return FrameRefused(peer=peer, detail=f"TLS: {detail}")
