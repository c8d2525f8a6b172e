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
User = Annotated[str, typer.Option(help="root, or one that may use sudo without a password.")]
Port = Annotated[int, typer.Option(help="SSH port.")]
Key = Annotated[Path | None, typer.Option(help="Private SSH key; by default what your agent and ~/.ssh offer.")]
Hosts = Annotated[Path | None, typer.Option(help="File with the server's host key; by default ~/.ssh/known_hosts.")]
Python = Annotated[str, typer.Option(help="Python on the server, 3.9 or newer.")]
Directory = Annotated[Path, typer.Option("--identity", help="The site's setting `identity`.")]
Name = Annotated[str, typer.Option(help="Name of the server; by default its host name.")]
Servers = Annotated[
    list[str],
    typer.Option(
        "--server",
        help="Where the server reaches the process server: ADDRESS[:PORT]. Of several it tries each in turn.",
    ),
]
Cpu = Annotated[int, typer.Option(help="Most that the agent uses, in per cent of one processor.")]
Memory = Annotated[str, typer.Option(help="Most memory that the agent uses; by default what its disks need.")]
Bandwidth = Annotated[str, typer.Option(help="Most that the agent reads and sends, such as 200Mbit; 0: all.")]
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
    """Look whether a server can be protected; nothing stays on it."""
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
        bool, typer.Option("--replace-identity", help="Also take a server that is enrolled with another identity.")
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
    facts: Annotated[Path, typer.Option(help="What `asr-mobility.pyz probe` printed on the server.")],
    out: Annotated[Path, typer.Option(help="An empty directory for what is carried to the server.")],
    identity: Directory,
    server: Servers,
    python: Annotated[str, typer.Option(help="Python on the server, by its full path.")] = "/usr/bin/python3",
    cpu: Cpu = 50,
    memory: Memory = "",
    bandwidth: Bandwidth = "0",
    keep_nic_names: NicNames = True,
) -> None:
    """Enrol a server that cannot be reached by SSH: write all that it needs, to be installed there by hand."""
    try:
        told = json.loads(facts.read_text())
    except (OSError, ValueError) as problem:
        raise InvalidValue(what="facts", value=str(facts), wanted=f"a file that `probe` has made ({problem})") from None
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
    typer.echo(f"server {name} is enrolled; carry {out}, which holds its key, and install it there")


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
    """Take the mobility service off a server, leaving nothing, and forget the server."""
    pushing.remove(pushing.Access(host, port, user, key, known_hosts, python), Identity(identity), name or host)
    typer.echo(f"server {name or host} is enrolled no longer; nothing of ours is on it")


@app.command()
def forget(name: Annotated[str, typer.Argument(help="Name of the server.")], identity: Directory) -> None:
    """Forget a server that cannot be reached: its certificate is worth nothing from now on."""
    Identity(identity).forget(checked_name(name))
    typer.echo(f"server {name} is enrolled no longer; `asr-mobility.pyz remove` there takes the service off it")


@app.command()
def servers(identity: Directory) -> None:
    """List the enrolled servers, as JSON."""
    found = Identity(identity).servers()
    typer.echo(json.dumps([{"name": item.name, "id": item.facts["machine"]["id"]} for item in found], indent=1))


@app.command()
def package(path: Annotated[Path, typer.Argument(help="Where to write it.")]) -> None:
    """Write the mobility service's one file, to be installed by hand."""
    path.write_bytes(mobility_service())


def main() -> int:
    """Exit status by the class of the error, as `asr` has it."""
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
