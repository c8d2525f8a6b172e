"""Enrolling servers over SSH: probe, install, upgrade, remove. Every step may be repeated."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from asr_driver_physical.enrol.package import mobility_service
from asr_driver_physical.errors import NotReadyToEnrol, OddReport, OtherIdentity, PushFailed
from asr_driver_physical.servers import readiness, reports
from asr_driver_physical.servers.identity import Identity, ServerRecord, checked_name
from asr_driver_physical.servers.machine import check_same
from asrcore.errors import AccessDenied, SiteUnreachable
from asrcore.model.finding import Finding, Severity

if TYPE_CHECKING:
    import paramiko

__all__ = [
    "Access",
    "Enrolment",
    "Limits",
    "config",
    "enrolment",
    "install",
    "link_files",
    "probe",
    "remove",
    "unit",
    "write_out",
]

HOME = "/opt/asr-mobility"
PROGRAM = f"{HOME}/asr-mobility.pyz"
AUTHORITY = f"{HOME}/ca.pem"
UNIT = "/etc/systemd/system/asr-mobility.service"
CONNECT_SECONDS = 30.0
COMMAND_SECONDS = 180.0
MIB = 1 << 20
_LEAST_MEMORY = 256 * MIB


@attrs.frozen
class Access:
    """How to reach a server. `known_hosts`: its key must be in there; unknown keys are never accepted."""

    host: str
    port: int = 22
    user: str = "root"
    key: Path | None = None
    known_hosts: Path | None = None
    python: str = "python3"


@attrs.frozen
class Limits:
    """Limits of the agent: CPU in per cent of one processor, memory (0: as its disks need, 256 MiB at least) and what
    is captured at a freeze in bytes, bytes per second that it reads for replication (0: no limit)."""

    cpu: int = 50
    memory: int = 0
    capture: int = 64 * MIB
    bandwidth: int = 0


@attrs.frozen
class Enrolment:
    """What enrols a server: `files` with their modes, by path, and the record, not saved yet."""

    files: Mapping[str, tuple[bytes, int]]
    record: ServerRecord
    findings: list[Finding]


def unit(python: str, limits: Limits, facts: Mapping[str, Any]) -> str:
    """The systemd unit."""
    memory = limits.memory or max(_LEAST_MEMORY, readiness.memory_needed(facts))
    return f"""\
[Unit]
Description=asrcore mobility service
After=network.target local-fs.target

[Service]
ExecStart={python} {PROGRAM} run
# Whatever kills it, no file system stays frozen.
ExecStopPost={python} {PROGRAM} thaw
Restart=always
RestartSec=2
RestartPreventExitStatus=78
Nice=5
IOSchedulingClass=best-effort
IOSchedulingPriority=6
CPUQuota={limits.cpu}%
MemoryMax={memory}
OOMScoreAdjust=-500
LimitMEMLOCK=infinity
UMask=0077

[Install]
WantedBy=multi-user.target
"""


def config(name: str, servers: Sequence[str], identity: str, limits: Limits) -> str:
    """The agent's settings. `servers`: the process servers' `ADDRESS:PORT`, tried in turn; `identity`: of the
    hardware."""
    settings = {
        "name": name,
        "servers": list(servers),
        "identity": identity,
        "capture_memory": limits.capture,
        "bandwidth": limits.bandwidth,
    }
    return json.dumps(settings, indent=1) + "\n"


def link_files(facts: Mapping[str, Any]) -> dict[str, str]:
    """Files that keep the names of network cards by their addresses, by path."""
    return {
        f"/etc/systemd/network/10-asr-{nic['name']}.link": (
            f"# Keeps this name where the card has another place: in a replica of this server.\n"
            f"[Match]\nMACAddress={nic['mac']}\n\n[Link]\nName={nic['name']}\n"
        )
        for nic in readiness.nics_to_name(facts)
    }


class _Shell:
    """Commands and files of a server, as root."""

    def __init__(self, client: paramiko.SSHClient, access: Access) -> None:
        self._client, self._access = client, access
        self._sudo = "" if access.user == "root" else "sudo -n "

    def run(self, command: str, what: str) -> str:
        """Raises PushFailed with its output."""
        try:
            _, out, err = self._client.exec_command(self._sudo + command, timeout=COMMAND_SECONDS)
            said, wrong = out.read().decode(errors="replace"), err.read().decode(errors="replace")
            status = out.channel.recv_exit_status()
        except OSError as problem:
            raise self._failed(what, f"no answer: {problem}") from problem
        if status:
            raise self._failed(what, f"exit status {status}: {(wrong or said).strip()[-500:]}")
        return str(said)

    def put(self, path: str, content: bytes, mode: int, what: str) -> None:
        """Write a file in one step: the former one is kept until the new one is complete."""
        fresh = shlex.quote(path + ".new")
        try:
            command = f"sh -c {shlex.quote(f'umask 077; cat > {fresh}')}"
            stdin, out, err = self._client.exec_command(self._sudo + command, timeout=COMMAND_SECONDS)
            stdin.write(content)
            stdin.channel.shutdown_write()
            status = out.channel.recv_exit_status()
        except OSError as problem:
            raise self._failed(what, f"no answer: {problem}") from problem
        if status:
            raise self._failed(what, err.read().decode(errors="replace").strip()[-500:])
        target = shlex.quote(path)
        done = (
            f"test $(wc -c < {fresh}) = {len(content)} && chmod {mode:o} {fresh} && sync {fresh} && mv {fresh} {target}"
        )
        self.run(f"sh -c {shlex.quote(done)}", what)

    def _failed(self, what: str, detail: str) -> PushFailed:
        return PushFailed(operation=what, server=self._access.host, detail=detail)


@contextlib.contextmanager
def _shell(access: Access) -> Iterator[_Shell]:
    """Raises SiteUnreachable, AccessDenied."""
    import paramiko  # noqa: PLC0415 - 0.2 s that only pushing needs

    client = paramiko.SSHClient()
    client.set_missing_host_key_policy(paramiko.RejectPolicy())
    try:
        if access.known_hosts is None:
            client.load_system_host_keys()
        else:
            client.load_host_keys(str(access.known_hosts))
        client.connect(
            access.host,
            access.port,
            access.user,
            key_filename=str(access.key) if access.key else None,
            look_for_keys=access.key is None,
            allow_agent=access.key is None,
            timeout=CONNECT_SECONDS,
            banner_timeout=CONNECT_SECONDS,
            auth_timeout=CONNECT_SECONDS,
        )
    except (paramiko.AuthenticationException, paramiko.BadHostKeyException) as problem:
        raise AccessDenied(site=access.host, detail=str(problem)) from problem
    except paramiko.SSHException as problem:
        # An unknown host key has no separate exception.
        kind = AccessDenied if "not found in known_hosts" in str(problem) else SiteUnreachable
        raise kind(site=access.host, detail=str(problem)) from problem
    except (OSError, paramiko.ssh_exception.NoValidConnectionsError) as problem:
        raise SiteUnreachable(site=access.host, detail=str(problem)) from problem
    try:
        yield _Shell(client, access)
    finally:
        client.close()


def _facts(shell: _Shell, python: str, program: str, name: str) -> dict[str, Any]:
    said = shell.run(f"{shlex.quote(python)} {program} probe", "probing")
    try:
        return reports.facts_of(name, json.loads(said))
    except (ValueError, RecursionError) as problem:
        raise OddReport(server=name, detail=f"the probe printed no JSON: {said[:200]!r}") from problem


@contextlib.contextmanager
def _brought(shell: _Shell) -> Iterator[str]:
    """The program in a temporary directory, for a probe before anything is installed."""
    directory = shell.run("mktemp -d /tmp/asr-probe.XXXXXX", "making a directory").strip()
    try:
        shell.put(f"{directory}/asr-mobility.pyz", mobility_service(), 0o600, "sending the program")
        yield f"{directory}/asr-mobility.pyz"
    finally:
        with contextlib.suppress(PushFailed):
            shell.run(f"rm -rf {shlex.quote(directory)}", "removing the probe")


def probe(access: Access) -> tuple[dict[str, Any], list[Finding]]:
    """Facts and findings; leaves nothing on the server. Raises SiteUnreachable, AccessDenied, PushFailed."""
    with _shell(access) as shell, _brought(shell) as program:
        facts = _facts(shell, access.python, program, access.host)
    return facts, readiness.findings(facts)


def enrolment(
    identity: Identity,
    name: str,
    servers: Sequence[str],
    facts: Mapping[str, Any],
    limits: Limits,
    *,
    python: str,
    keep_nic_names: bool = True,
) -> Enrolment:
    """The enrolment of a server with these facts from its probe. Raises NotReadyToEnrol, OddReport."""
    checked_name(name)
    facts = reports.facts_of(name, facts)
    found = readiness.findings(facts)
    errors = [item for item in found if item.severity is Severity.ERROR]
    if errors:
        lines = "; ".join(f"[{item.code}] {item.what} ({item.action})" for item in errors)
        raise NotReadyToEnrol(server=name, findings=lines)
    issued = identity.issue(name)
    _, fence, certain = identity.former(name)
    if not certain:
        found.append(readiness.fence_unknown())
    files: dict[str, tuple[bytes, int]] = {
        PROGRAM: (mobility_service(), 0o755),
        f"{HOME}/config.json": (config(name, servers, facts["identity"], limits).encode(), 0o600),
        AUTHORITY: (identity.authority, 0o600),
        f"{HOME}/agent.pem": (issued.pem, 0o600),
        UNIT: (unit(python, limits, facts).encode(), 0o644),
    }
    if keep_nic_names:
        files |= {path: (text.encode(), 0o644) for path, text in link_files(facts).items()}
    reported = facts["machine"]["id"]
    machine_id = identity.machine_id(name, reported, facts["identity"])
    if machine_id != reported:
        found.append(readiness.shared_id(reported, machine_id))
    record = ServerRecord(
        name=name,
        fingerprint=issued.fingerprint,
        identity=facts["identity"],
        facts=facts,
        fence=fence,
        ends=issued.ends,
        reported_id=reported,
    )
    return Enrolment(files, record, found)


def write_out(made: Enrolment, directory: Path) -> None:
    """Write the files as a tree to copy to the server. Raises OSError, also if the directory is not empty."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise FileExistsError(17, "it is not empty", str(directory))
    for path, (content, mode) in made.files.items():
        place = directory / path.lstrip("/")
        if ".." in place.parts:
            raise ValueError(f"{path} leads out of the directory")
        place.parent.mkdir(mode=0o700 if path.startswith(HOME) else 0o755, parents=True, exist_ok=True)
        with os.fdopen(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)


def install(
    access: Access,
    identity: Identity,
    name: str,
    servers: Sequence[str],
    limits: Limits,
    *,
    keep_nic_names: bool = True,
    replace_identity: bool = False,
) -> tuple[ServerRecord, list[Finding]]:
    """Install or upgrade the mobility service, and enrol the server. `servers`: what it dials, `ADDRESS:PORT`, in turn.

    Raises NotReadyToEnrol, OtherIdentity with nothing installed; SiteUnreachable, AccessDenied, PushFailed.
    """
    checked_name(name)
    with _shell(access) as shell:
        known = shell.run(f"sh -c 'cat {AUTHORITY} 2>/dev/null || true'", "looking for an earlier installation")
        if known.strip() not in ("", identity.authority.decode().strip()) and not replace_identity:
            raise OtherIdentity(server=access.host, identity=str(identity.path))
        with _brought(shell) as program:
            facts = _facts(shell, access.python, program, access.host)
            python = shell.run(f"sh -c 'command -v {shlex.quote(access.python)}'", "looking for Python").strip()
        made = enrolment(identity, name, servers, facts, limits, python=python, keep_nic_names=keep_nic_names)
        shell.run(f"sh -c 'mkdir -p /etc/systemd/network && mkdir -p -m 700 {HOME}'", "making directories")
        for path, (content, mode) in made.files.items():
            shell.put(path, content, mode, f"writing {path}")
        # Enrolled before it is started, so its connection is accepted.
        record = identity.save(made.record)
        shell.run(
            "sh -c 'systemctl daemon-reload && systemctl enable -q asr-mobility && systemctl restart asr-mobility'",
            "starting the service",
        )
        facts = _facts(shell, access.python, PROGRAM, name)  # as it is now, .link files included
        check_same(record, facts["machine"])
        record = identity.change(name, lambda record: attrs.evolve(record, facts=facts)) or record
    return record, readiness.findings(facts)


def remove(access: Access, identity: Identity, name: str) -> None:
    """Delete everything from the server, and its record. Raises SiteUnreachable, AccessDenied, PushFailed."""
    identity.forget(checked_name(name))
    with _shell(access) as shell, _brought(shell) as program:
        shell.run(f"{shlex.quote(access.python)} {program} remove", "removing the service")
