"""Enrolling physical servers by hand: `python -m asr_driver_physical push HOST --identity DIR --server ADDRESS`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from asr_driver_physical.enrol import push as pushing
from asr_driver_physical.enrol.package import mobility_service
from asr_driver_physical.servers.identity import Identity, checked_name
from asr_driver_physical.settings import parse_address
from asrcore.errors import AsrError, InvalidValue
from asrcore.model.finding import Finding
from asrcore.units import parse_rate, parse_size

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)

Host = Annotated[str, typer.Argument(help="Host name or address of the server, reached by SSH.")]
User = Annotated[str, typer.Option(help="root, or a user with passwordless sudo.")]
Port = Annotated[int, typer.Option(help="SSH port.")]
Key = Annotated[Path | None, typer.Option(help="Private SSH key; default: the keys of ssh-agent and ~/.ssh.")]
Hosts = Annotated[Path | None, typer.Option(help="File with the server's host key; by default ~/.ssh/known_hosts.")]
Python = Annotated[str, typer.Option(help="Python on the server, 3.9 or newer.")]
Directory = Annotated[Path, typer.Option("--identity", help="The site's setting `identity`.")]
Name = Annotated[str, typer.Option(help="Name of the server; by default its host name.")]
Servers = Annotated[
    list[str],
    typer.Option(
        "--server",
        help="Address of the process server as the server reaches it: ADDRESS[:PORT]. Several are tried in turn.",
    ),
]
Cpu = Annotated[int, typer.Option(help="CPU limit of the agent, in per cent of one processor.")]
Memory = Annotated[str, typer.Option(help="Memory limit of the agent; default: what its disks need.")]
Bandwidth = Annotated[str, typer.Option(help="Bandwidth limit of the agent, such as 200Mbit; 0: no limit.")]
NicNames = Annotated[bool, typer.Option(help="Keep the names of network cards in a replica.")]


def _limits(cpu: int, memory: str, bandwidth: str) -> pushing.Limits:
    return pushing.Limits(
        cpu=cpu,
        memory=parse_size(memory) if memory else 0,
        bandwidth=0 if bandwidth == "0" else int(parse_rate(bandwidth, "bandwidth")),
    )


def _addresses(servers: list[str]) -> list[str]:
    return ["{}:{}".format(*parse_address("server", server)) for server in servers]


def _tell(findings: list[Finding]) -> None:
    for item in findings:
        typer.echo(f"{item.severity.value}: [{item.code}] {item.what}. {item.cause} {item.action}")


@app.command()
def probe(
    host: Host,
    user: User = "root",
    port: Port = 22,
    key: Key = None,
    known_hosts: Hosts = None,
    python: Python = "python3",
) -> None:
    """Check whether a server can be protected. Leaves nothing on the server."""
    facts, findings = pushing.probe(pushing.Access(host, port, user, key, known_hosts, python))
    typer.echo(f"{facts['machine']['hostname']}: {facts['machine']['os']}, {len(facts['machine']['disks'])} disks")
    _tell(findings)


@app.command()
def push(
    host: Host,
    identity: Directory,
    server: Servers,
    name: Name = "",
    user: User = "root",
    port: Port = 22,
    key: Key = None,
    known_hosts: Hosts = None,
    python: Python = "python3",
    cpu: Cpu = 50,
    memory: Memory = "",
    bandwidth: Bandwidth = "0",
    keep_nic_names: NicNames = True,
    replace_identity: Annotated[
        bool, typer.Option("--replace-identity", help="Replace the identity of a server enrolled with another one.")
    ] = False,
) -> None:
    """Install or upgrade the mobility service on a server, enrol it, and renew its certificate."""
    record, findings = pushing.install(
        pushing.Access(host, port, user, key, known_hosts, python),
        Identity(identity),
        name or host,
        _addresses(server),
        _limits(cpu, memory, bandwidth),
        keep_nic_names=keep_nic_names,
        replace_identity=replace_identity,
    )
    _tell(findings)
    typer.echo(f"server {record.name} is enrolled; its id is {record.facts['machine']['id']}")


@app.command()
def enrol(
    name: Annotated[str, typer.Argument(help="Name of the server.")],
    facts: Annotated[Path, typer.Option(help="Output of `asr-mobility.pyz probe` on the server.")],
    out: Annotated[Path, typer.Option(help="Empty directory for the files to copy to the server.")],
    identity: Directory,
    server: Servers,
    python: Annotated[str, typer.Option(help="Python on the server, by its full path.")] = "/usr/bin/python3",
    cpu: Cpu = 50,
    memory: Memory = "",
    bandwidth: Bandwidth = "0",
    keep_nic_names: NicNames = True,
) -> None:
    """Enrol a server without SSH: write all files that it needs, for manual installation."""
    try:
        told = json.loads(facts.read_text())
    except (OSError, ValueError) as problem:
        raise InvalidValue(what="facts", value=str(facts), wanted=f"output of `probe` ({problem})") from None
    known = Identity(identity)
    limits = _limits(cpu, memory, bandwidth)
    made = pushing.enrolment(
        known, name, _addresses(server), told, limits, python=python, keep_nic_names=keep_nic_names
    )
    try:
        pushing.write_out(made, out)
    except OSError as problem:
        raise InvalidValue(what="out", value=str(out), wanted=f"an empty directory ({problem})") from None
    known.save(made.record)
    _tell(made.findings)
    typer.echo(f"server {name} is enrolled; copy {out}, which holds its private key, to it and install it")


@app.command()
def remove(
    host: Host,
    identity: Directory,
    name: Name = "",
    user: User = "root",
    port: Port = 22,
    key: Key = None,
    known_hosts: Hosts = None,
    python: Python = "python3",
) -> None:
    """Delete the mobility service and all its files from a server, and revoke its enrolment."""
    pushing.remove(pushing.Access(host, port, user, key, known_hosts, python), Identity(identity), name or host)
    typer.echo(f"server {name or host} is no longer enrolled; the mobility service was deleted from it")


@app.command()
def forget(name: Annotated[str, typer.Argument(help="Name of the server.")], identity: Directory) -> None:
    """Revoke the enrolment of an unreachable server: its certificate is refused from now on."""
    Identity(identity).forget(checked_name(name))
    typer.echo(f"server {name} is no longer enrolled; `asr-mobility.pyz remove` on it deletes the service")


@app.command()
def servers(identity: Directory) -> None:
    """List the enrolled servers, as JSON."""
    found = Identity(identity).servers()
    typer.echo(json.dumps([{"name": item.name, "id": item.facts["machine"]["id"]} for item in found], indent=1))


@app.command()
def package(path: Annotated[Path, typer.Argument(help="File to write.")]) -> None:
    """Write the mobility service as a single file, for manual installation."""
    path.write_bytes(mobility_service())


def main() -> int:
    """Exit status by the class of the error, as for `asr`."""
    try:
        app(standalone_mode=False)
    except AsrError as problem:
        typer.echo(f"{problem}\n  cause: {problem.cause_text}\n  next: {problem.action_text}", err=True)
        return problem.category.value
    except typer.Exit as done:
        return done.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
