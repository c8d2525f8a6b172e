"""The process server's identity and the enrolled servers: a directory with certificates and a record per server.

The authority exists only in this directory: it signs the process server and its servers; no other component trusts it.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import re
import ssl
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from asr_driver_physical.settings import DRIVER
from asrcore.errors import InvalidSetting, InvalidValue
from asrcore.sealkey import authority_key, open_private_key, seal_private_key

__all__ = ["Identity", "Issued", "ServerRecord", "checked_name"]

_YEARS = datetime.timedelta(days=3650)
_AGENT_LIFE = datetime.timedelta(days=825)


@attrs.frozen
class Issued:
    """A certificate and its key, as PEM."""

    certificate: bytes
    key: bytes = attrs.field(repr=False)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate, in hex."""
        return x509.load_pem_x509_certificate(self.certificate).fingerprint(hashes.SHA256()).hex()

    @property
    def ends(self) -> float:
        """When it expires, in seconds of the epoch."""
        return x509.load_pem_x509_certificate(self.certificate).not_valid_after_utc.timestamp()

    @property
    def pem(self) -> bytes:
        """Both, as the agent keeps them."""
        return self.certificate + self.key


@attrs.frozen
class ServerRecord:
    """An enrolled server. `identity`: of its hardware; `facts`: what readiness found when it was enrolled; `ends`: of
    its certificate; `renewals`: fingerprints, with their ends, of certificates that were sent to it and not used
    yet."""

    name: str
    fingerprint: str
    identity: str
    facts: Mapping[str, Any]
    fence: Mapping[str, Any] | None = None
    ends: float = 0.0
    renewals: Mapping[str, float] = attrs.field(factory=dict)


def checked_name(name: str) -> str:
    """A server's name, valid as a file name. Raises InvalidValue."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", name):
        raise InvalidValue(what="server name", value=name, wanted="up to 63 letters, digits, '.', '_' and '-'")
    return name


class Identity:
    """The directory, created at first use."""

    def __init__(self, directory: Path) -> None:
        """Raises InvalidSetting where it cannot be written, SecretKeyUnusable, HostIncomplete."""
        self.path = directory
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            (directory / "servers").mkdir(mode=0o700, exist_ok=True)
            with self._lock():
                if not (directory / "certificate.pem").exists():
                    self._make()
        except OSError as problem:
            raise InvalidSetting(setting="identity", driver=DRIVER, problem=str(problem)) from problem

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        with (self.path / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _make(self) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "asrcore physical servers")])
        now = datetime.datetime.now(datetime.UTC)
        authority = (
            x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + _YEARS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(key, hashes.SHA256())
        )
        self._write("ca-key.pem", seal_private_key(key, authority_key(self.path)))
        self._write("ca.pem", authority.public_bytes(serialization.Encoding.PEM))
        mine = self._sign("process-server", os.uname().nodename, _YEARS)
        self._write("key.pem", mine.key)
        self._write("certificate.pem", mine.certificate)  # last: it marks the directory as complete

    def _write(self, name: str, content: bytes) -> None:
        path = self.path / name
        fresh = path.with_name(f".{path.name}.new")
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)

    def _sign(self, role: str, name: str, life: datetime.timedelta) -> Issued:
        authority = x509.load_pem_x509_certificate((self.path / "ca.pem").read_bytes())
        signer = open_private_key((self.path / "ca-key.pem").read_bytes(), authority_key(self.path))
        assert isinstance(signer, ec.EllipticCurvePrivateKey)
        key = ec.generate_private_key(ec.SECP256R1())
        usage = ExtendedKeyUsageOID.CLIENT_AUTH if role == "agent" else ExtendedKeyUsageOID.SERVER_AUTH
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])]))
            .issuer_name(authority.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=24))  # a server's clock may be slow
            .not_valid_after(min(now + life, authority.not_valid_after_utc))
            .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"asr://{role}/{name}")]), False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .sign(signer, hashes.SHA256())
        )
        return Issued(certificate.public_bytes(serialization.Encoding.PEM), _private(key))

    # -- certificates

    @property
    def authority(self) -> bytes:
        """The authority's certificate, as PEM."""
        return (self.path / "ca.pem").read_bytes()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the authority's certificate, in hex."""
        return x509.load_pem_x509_certificate(self.authority).fingerprint(hashes.SHA256()).hex()

    def issue(self, name: str) -> Issued:
        """A certificate for a server's agent; it is accepted once the server is enrolled with it. Raises
        SecretKeyUnusable, HostIncomplete."""
        return self._sign("agent", checked_name(name), _AGENT_LIFE)

    def context(self) -> ssl.SSLContext:
        """For the listener: TLS 1.3, and only clients with a certificate of this authority."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(self.path / "ca.pem")
        context.load_cert_chain(self.path / "certificate.pem", self.path / "key.pem")
        return context

    # -- servers

    def servers(self) -> list[ServerRecord]:
        """All enrolled servers, by name."""
        names = (path.stem for path in sorted((self.path / "servers").glob("*.json")))
        return [record for record in map(self.server, names) if record is not None]

    def server(self, name: str) -> ServerRecord | None:
        """The record of one, or None."""
        try:
            return ServerRecord(**json.loads((self.path / "servers" / f"{name}.json").read_bytes()))
        except FileNotFoundError:
            return None

    def change(self, name: str, work: Callable[[ServerRecord], ServerRecord]) -> ServerRecord | None:
        """Change a record in one step; None if the server is not enrolled, or no longer."""
        with self._lock():
            record = self.server(name)
            if record is None:
                return None
            changed = work(record)
            if changed != record:
                self.save(changed)
            return changed

    def save(self, record: ServerRecord) -> None:
        """Enrol a server, or change its record; durable when it returns."""
        self._write(f"servers/{checked_name(record.name)}.json", json.dumps(attrs.asdict(record), indent=1).encode())

    def forget(self, name: str) -> None:
        """Delete its record: its certificate is refused from now on."""
        with self._lock():
            (self.path / "servers" / f"{name}.json").unlink(missing_ok=True)


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
