"""The process server's identity and the enrolled servers: a directory with certificates and a record per server.

The authority exists only in this directory: it signs the process server and its servers; no other component trusts it.
The records are its register: a server's certificate is accepted while its record has the fingerprint of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from asr_driver_physical.errors import OddReport, RecordDamaged
from asr_driver_physical.servers.readiness import AGENT_LIFE
from asr_driver_physical.servers.reports import facts_of
from asr_driver_physical.settings import DRIVER
from asrcore import codec
from asrcore.errors import AuthorityUnusable, InvalidSetting, InvalidValue
from asrcore.pki.issuer import Issuer, new_key, pem
from asrcore.units import DAY
from asrcore.wire import Component, Role
from asrcore.wire import Identity as TlsIdentity

__all__ = ["FenceRecord", "Identity", "Issued", "ServerRecord", "checked_name"]

_log = logging.getLogger(__name__)

_OWN_LIFE = 3650 * DAY  # as long as the authority's own
_EARLIER = 1 * DAY  # a server's clock may be slow


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
class FenceRecord:
    """The server is to be off: it was failed over."""

    epoch: int
    reason: str


@attrs.frozen
class ServerRecord:
    """An enrolled server. `identity`: of its hardware; `facts`: what readiness found when it was last asked; `ends`: of
    its certificate; `renewals`: fingerprints, with their ends, of certificates that were sent to it and not used
    yet. `machine_id` is the site's id of it: fixed when it is enrolled, and no other server's. `reported_id`: what its
    agent called itself then, which boards with a placeholder for a UUID, and copies of a system, share."""

    name: str
    fingerprint: str
    identity: str
    facts: dict[str, Any]
    fence: FenceRecord | None = None
    ends: float = 0.0
    renewals: dict[str, float] = attrs.field(factory=dict)
    machine_id: str = ""
    reported_id: str = ""


@attrs.frozen
class _Ids:
    """The ids of a server that calls itself what another one is."""

    machine_id: str
    reported_id: str


@attrs.frozen
class _Fenced:
    """As much of a record as says whether the server is to be off."""

    fence: FenceRecord | None


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
        self.tls = TlsIdentity(directory)
        """The process server's own, for the listener."""
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
        if not (self.path / "ca.pem").exists():  # else an earlier attempt was interrupted
            with self._usable():
                Issuer.create(self.path, time.time(), earlier=_EARLIER)
        mine = self._sign(Component(Role.PROCESS_SERVER, os.uname().nodename), _OWN_LIFE)
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

    def _sign(self, component: Component, life: float) -> Issued:
        key, now = new_key(), time.time()
        with self._usable():
            issuer = Issuer(self.path)
            made = issuer.issue(component, key.public_key(), now, now + life, earlier=_EARLIER)
        return Issued(pem(made).encode(), pem(key).encode())

    @staticmethod
    @contextlib.contextmanager
    def _usable() -> Iterator[None]:
        try:
            yield
        except AuthorityUnusable as problem:
            raise InvalidSetting(setting="identity", driver=DRIVER, problem=str(problem)) from problem

    def claim(self, owner: str) -> None:
        """Use it for the vault with the tag `owner`; "", for a site of an earlier version, is not checked. Two vaults
        that used one directory would share its agents, and each end the other's tracking. Raises InvalidSetting if it
        is another vault's."""
        if not owner:
            return
        file = self.path / "vault"
        with self._lock():
            try:
                found = file.read_text().strip()
            except FileNotFoundError:
                self._write(file.name, f"{owner}\n".encode())  # also in a further process server's copy
                return
        if found != owner:
            problem = (
                f"{self.path} is used by another vault (tag {found}). Give this site a directory of its own and enrol "
                f"its servers there; a server can be enrolled in one only. If the other vault is gone for good, delete "
                f"{file}"
            )
            raise InvalidSetting(setting="identity", driver=DRIVER, problem=problem)

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
        InvalidSetting, SecretKeyUnusable, HostIncomplete."""
        return self._sign(Component(Role.AGENT, checked_name(name)), AGENT_LIFE)

    # -- servers

    def servers(self) -> list[ServerRecord]:
        """All enrolled servers, by name."""
        found, damaged = self.records()
        for problem in damaged:  # of that one: the others work
            _log.warning("%s", problem)
        return found

    def records(self) -> tuple[list[ServerRecord], list[RecordDamaged]]:
        """All that can be read, by name, and why the others cannot."""
        found, damaged = [], []
        for path in sorted((self.path / "servers").glob("*.json")):
            try:
                record = self.server(path.stem)
            except RecordDamaged as problem:
                damaged.append(problem)
            else:
                found += [record] if record is not None else []
        return found, damaged

    def server(self, name: str) -> ServerRecord | None:
        """The record of one, or None. Facts that do not fit are left out. Raises RecordDamaged."""
        path = self.path / "servers" / f"{name}.json"
        try:
            record = codec.load(ServerRecord, path.read_bytes())
            ids = path.with_suffix(".ids")
            known = codec.load(_Ids, ids.read_bytes()) if ids.exists() else None
            reported = known.reported_id if known else record.facts["machine"]["id"]
            if not isinstance(reported, str):
                raise TypeError("its id is no text")
            if record.name != name:
                raise ValueError(f"it is of server {record.name!r}")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise RecordDamaged(server=name, detail=str(problem), path=str(path)) from problem
        facts = record.facts
        try:
            facts_of(name, facts)
        except OddReport as problem:  # of an earlier version, which stored what it was sent
            _log.warning("%s", problem)
            facts = {}
        machine_id = known.machine_id if known else reported
        return attrs.evolve(record, facts=facts, machine_id=machine_id, reported_id=reported)

    def former(self, name: str) -> tuple[ServerRecord | None, FenceRecord | None, bool]:
        """What is known of a server that is being enrolled again: its record, its fence, and whether the fence is
        certain. A record that is damaged is replaced."""
        try:
            record = self.server(name)
        except RecordDamaged:
            with contextlib.suppress(OSError, ValueError, RecursionError):
                found = codec.load(_Fenced, (self.path / "servers" / f"{name}.json").read_bytes())
                return None, found.fence, True
            return None, None, False
        return record, record.fence if record else None, True

    def machine_id(self, name: str, reported: str, hardware: str) -> str:
        """The id of a server that is being enrolled: what it calls itself, unless another server has that. A server
        that is enrolled again on the same hardware keeps its id."""
        former, _, _ = self.former(name)
        if former is not None and (former.reported_id == reported or former.identity == hardware):
            return former.machine_id
        taken = {record.machine_id for record in self.servers() if record.name != name}
        return reported if reported not in taken else str(uuid.uuid5(uuid.UUID(reported), name))

    def change(self, name: str, work: Callable[[ServerRecord], ServerRecord]) -> ServerRecord | None:
        """Change a record in one step; None if the server is not enrolled, or no longer."""
        with self._lock():
            record = self.server(name)
            if record is None:
                return None
            changed = work(record)
            if changed != record:
                self._save(changed)
            return changed

    def save(self, record: ServerRecord) -> ServerRecord:
        """Enrol a server, or replace its record; durable when it returns. The record with its id."""
        with self._lock():
            if not record.machine_id:
                reported = record.reported_id or str(record.facts["machine"]["id"])
                machine_id = self.machine_id(record.name, reported, record.identity)
                record = attrs.evolve(record, machine_id=machine_id, reported_id=reported)
            self._save(record)
            return record

    def _save(self, record: ServerRecord) -> None:
        place = f"servers/{checked_name(record.name)}"
        # In a file of their own, where they differ: earlier versions, which may share the directory, refuse records
        # with other keys.
        if record.machine_id != record.reported_id:
            self._write(f"{place}.ids", codec.dump(_Ids(record.machine_id, record.reported_id)))
        else:
            (self.path / f"{place}.ids").unlink(missing_ok=True)
        content = attrs.asdict(record)
        del content["machine_id"], content["reported_id"]
        self._write(f"{place}.json", json.dumps(content, indent=1).encode())

    def forget(self, name: str) -> None:
        """Delete its record: its certificate is refused from now on."""
        with self._lock():
            for ending in ("json", "ids"):
                (self.path / "servers" / f"{name}.{ending}").unlink(missing_ok=True)
