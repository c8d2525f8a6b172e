"""`asr physical`: enrols servers with a site, by SSH or by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from asr_driver_physical.enrol import push as pushing
from asr_driver_physical.enrol.package import mobility_service
from asr_driver_physical.servers.identity import Identity, checked_name
from asr_driver_physical.settings import parse_address
from asrcore.errors import InvalidValue
from asrcore.model.finding import Finding
from asrcore.model.plain import plain
from asrcore.units import parse_rate, parse_size

__all__ = ["app"]

app = typer.Typer(help="Physical servers: enrol them with a site, by SSH or by hand.", no_args_is_help=True)

Host = Annotated[str, typer.Argument(help="Host name or address of the server, reached by SSH.")]
User = Annotated[str, typer.Option(help="root, or a user that may run sudo without a password.")]
Port = Annotated[int, typer.Option(help="SSH port.")]
Key = Annotated[Path | None, typer.Option(help="Private SSH key (default: the keys of the SSH agent and of ~/.ssh).")]
Hosts = Annotated[Path | None, typer.Option(help="File with the server's SSH host key (default: ~/.ssh/known_hosts).")]
Python = Annotated[str, typer.Option(help="Python on the server, 3.9 or newer.")]
Directory = Annotated[Path, typer.Option("--identity", help="Directory that the site's setting `identity` names.")]
Name = Annotated[str, typer.Option(help="Name of the server (default: HOST).")]
Servers = Annotated[
    list[str],
    typer.Option(
        "--server",
        help="ADDRESS[:PORT] at which the server reaches the process server; repeatable: they are tried in order.",
    ),
]
Cpu = Annotated[int, typer.Option(help="CPU limit of the agent, in percent of one processor.")]
Memory = Annotated[str, typer.Option(help="Memory limit of the agent (default: computed from its disks).")]
Bandwidth = Annotated[str, typer.Option(help="Bandwidth limit of the agent, such as 200Mbit; 0: no limit.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
NicNames = Annotated[bool, typer.Option(help="Keep the names of network interfaces in a replica.")]


def _limits(cpu: int, memory: str, bandwidth: str) -> pushing.Limits:
    return pushing.Limits(
        cpu=cpu,
        memory=parse_size(memory) if memory else 0,
        bandwidth=0 if bandwidth == "0" else int(parse_rate(bandwidth, "bandwidth")),
    )


def _addresses(servers: list[str]) -> list[str]:
    return ["{}:{}".format(*parse_address("server", server)) for server in servers]


def _show(document: object, lines: list[str], *, as_json: bool) -> None:
    typer.echo(json.dumps(plain(document), indent=2) if as_json else "\n".join(lines))


def _lines(findings: list[Finding]) -> list[str]:
    return [f"{item.severity.value}: [{item.code}] {item.what}. {item.cause} {item.action}" for item in findings]


@app.command()
def probe(
    host: Host,
    user: User = "root",
    port: Port = 22,
    key: Key = None,
    known_hosts: Hosts = None,
    python: Python = "python3",
    as_json: Json = False,
) -> None:
    """Check whether a server can be protected. Nothing stays on the server."""
    facts, findings = pushing.probe(pushing.Access(host, port, user, key, known_hosts, python))
    machine = facts["machine"]
    text = f"{machine['hostname']}: {machine['os']}, {len(machine['disks'])} disks"
    _show({"facts": facts, "findings": findings}, [text, *_lines(findings)], as_json=as_json)


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
        bool, typer.Option("--replace-identity", help="Replace the identity of a server that is enrolled with another.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Install or upgrade the mobility service on a server, enrol the server, and renew its certificate."""
    record, findings = pushing.install(
        pushing.Access(host, port, user, key, known_hosts, python),
        Identity(identity),
        name or host,
        _addresses(server),
        _limits(cpu, memory, bandwidth),
        keep_nic_names=keep_nic_names,
        replace_identity=replace_identity,
    )
    machine_id = record.machine_id
    document = {"server": record.name, "id": machine_id, "findings": findings}
    text = f"server {record.name} is enrolled; its id is {machine_id}"
    _show(document, [*_lines(findings), text], as_json=as_json)


@app.command()
def enrol(
    name: Annotated[str, typer.Argument(help="Name of the server.")],
    facts: Annotated[Path, typer.Option(help="File with the output of `asr-mobility.pyz probe` on the server.")],
    out: Annotated[Path, typer.Option(help="Empty directory for the files to copy to the server.")],
    identity: Directory,
    server: Servers,
    python: Annotated[str, typer.Option(help="Full path of Python on the server.")] = "/usr/bin/python3",
    cpu: Cpu = 50,
    memory: Memory = "",
    bandwidth: Bandwidth = "0",
    keep_nic_names: NicNames = True,
    as_json: Json = False,
) -> None:
    """Enrol a server without SSH: write the files to install on it by hand."""
    try:
        probed = json.loads(facts.read_text())
    except (OSError, ValueError, RecursionError) as problem:
        raise InvalidValue(
            what="facts", value=str(facts), wanted=f"a file with the output of `probe` ({problem})"
        ) from None
    known = Identity(identity)
    limits = _limits(cpu, memory, bandwidth)
    made = pushing.enrolment(
        known, name, _addresses(server), probed, limits, python=python, keep_nic_names=keep_nic_names
    )
    try:
        pushing.write_out(made, out)
    except OSError as problem:
        raise InvalidValue(what="out", value=str(out), wanted=f"an empty directory ({problem})") from None
    record = known.save(made.record)
    document = {"server": name, "id": record.machine_id, "out": str(out), "findings": made.findings}
    text = f"server {name} is enrolled; copy {out} to it and install it there: it contains the server's private key"
    _show(document, [*_lines(made.findings), text], as_json=as_json)


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
    as_json: Json = False,
) -> None:
    """Uninstall the mobility service from a server, delete its files there, and revoke its enrolment."""
    pushing.remove(pushing.Access(host, port, user, key, known_hosts, python), Identity(identity), name or host)
    text = f"server {name or host} is no longer enrolled; its mobility service is uninstalled"
    _show({"removed": name or host}, [text], as_json=as_json)


@app.command()
def forget(
    name: Annotated[str, typer.Argument(help="Name of the server.")], identity: Directory, as_json: Json = False
) -> None:
    """Revoke the enrolment of a server that cannot be reached. Its certificate is refused from now on."""
    Identity(identity).forget(checked_name(name))
    text = f"server {name} is no longer enrolled; `asr-mobility.pyz remove` on it uninstalls the service"
    _show({"removed": name}, [text], as_json=as_json)


@app.command()
def servers(identity: Directory, as_json: Json = False) -> None:
    """List the enrolled servers."""
    found = [{"name": item.name, "id": item.machine_id} for item in Identity(identity).servers()]
    lines = [f"{item['name']}  {item['id']}" for item in found] or ["no servers are enrolled"]
    _show(found, lines, as_json=as_json)


@app.command()
def package(path: Annotated[Path, typer.Argument(help="File to write.")], as_json: Json = False) -> None:
    """Write the mobility service as one file, to install it by hand."""
    try:
        path.write_bytes(mobility_service())
    except OSError as problem:
        raise InvalidValue(what="path", value=str(path), wanted=f"a file that can be written ({problem})") from None
    _show({"package": str(path)}, [f"wrote {path}"], as_json=as_json)
