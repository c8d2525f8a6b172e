"""Certificates of components: `ca` on the configuration server, `join` and `renew` where a component runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

from asrcore.cli import _output, _session
from asrcore.cli._confirm import DryRun, Yes, agreed
from asrcore.cli._output import Json
from asrcore.errors import AlreadyExists, InvalidValue
from asrcore.files import write_private
from asrcore.pki import enrolment
from asrcore.pki.authority import Authority
from asrcore.pki.request import make_request
from asrcore.procedures.impact import of_revocation
from asrcore.units import format_time, parse_duration
from asrcore.vault import Certificate, Vault
from asrcore.wire.tls import Component, Role

__all__ = ["Ca", "default_ca", "register"]

_ca = typer.Typer(help="The certificate authority of the configuration server.", no_args_is_help=True)

Ca = Annotated[
    Path | None,
    typer.Option(
        "--ca",
        envvar="ASR_CA",
        show_envvar=False,
        help="Directory of the authority (default: ASR_CA, else `ca` beside the default vault).",
    ),
]
Directory = Annotated[Path, typer.Option("--identity", help="Directory of the component's certificate and key.")]
Addresses = Annotated[
    list[str] | None,
    typer.Option("--address", help="DNS name or IP address of the component; repeatable."),
]
RoleName = Annotated[str, typer.Argument(help="process-server, master-target, agent, operator or config-server.")]
ComponentName = Annotated[str, typer.Argument(help="Name of the component, unique in its role.")]
_URL = "url"


def register(app: typer.Typer) -> None:
    """Add the verbs to the application."""
    app.add_typer(_ca, name="ca")
    app.command("join")(join)
    app.command("renew")(renew)


def default_ca(given: Path | None) -> Path:
    """Where the authority is."""
    return given or Path(_session.default_vault()).parent / "ca"


def _component(role: str, name: str) -> Component:
    roles = [item.value for item in Role if item is not Role.JOIN]
    if role not in roles:
        raise InvalidValue(what="role", value=role, wanted=", ".join(roles))
    if not (name and name.isprintable() and len(name) <= 64):
        raise InvalidValue(what="name", value=name, wanted="1 to 64 printable characters")
    return Component(Role(role), name)


def _vault(context: typer.Context) -> Vault:
    return Vault.open(_session.vault_url(context))


@_ca.command("init")
def ca_init(
    context: typer.Context,
    url: Annotated[str, typer.Option(help="URL at which components reach this server: https://HOST[:PORT].")],
    identity: Directory,
    name: Annotated[str, typer.Option(help="Name of this configuration server.")] = "main",
    address: Addresses = None,
    ca: Ca = None,
    as_json: Json = False,
) -> None:
    """Create the authority, and the configuration server's own certificate."""

    host = urlsplit(url).hostname
    if not url.startswith("https://") or not host:
        raise InvalidValue(what="url", value=url, wanted="https://HOST[:PORT]")
    component = _component("config-server", name)
    directory = default_ca(ca)
    with _vault(context) as vault:
        if (directory / _URL).exists():  # written last
            raise AlreadyExists(kind="certificate authority", name=str(directory))
        make = Authority if (directory / "ca.pem").exists() else Authority.create
        authority = make(directory, vault)
        issued = authority.issue(component, make_request(enrolment.key_in(identity)), [host, *(address or [])])
        enrolment.install(identity, issued, url)
        write_private(directory / _URL, url + "\n")
    text = f"authority created in {directory}; certificate and key of {component} in {identity}"
    _output.show({"ca": str(directory), "identity": str(identity), "component": str(component)}, text, as_json=as_json)


@_ca.command("token")
def ca_token(
    context: typer.Context,
    role: RoleName,
    name: ComponentName,
    address: Addresses = None,
    valid: Annotated[str, typer.Option(help="How long the token is valid: 1min to 7d.")] = "1h",
    ca: Ca = None,
    as_json: Json = False,
) -> None:
    """Print a token with which one component can join, once. It is secret: transfer it securely."""
    seconds = parse_duration(valid, "valid")
    if not 60 <= seconds <= 7 * 86400:
        raise InvalidValue(what="valid", value=valid, wanted="1min to 7d")
    component = _component(role, name)
    with _vault(context) as vault:
        directory = default_ca(ca)
        token = Authority(directory, vault).token(component, address or (), seconds)
        packed = enrolment.pack(token, (directory / _URL).read_text("utf-8").strip())
    _output.show({"token": packed, "component": str(component)}, packed, as_json=as_json)


@_ca.command("list")
def ca_list(context: typer.Context, as_json: Json = False) -> None:
    """List the certificates and tokens that were issued, oldest first."""
    with _vault(context) as vault:
        found = vault.certificates()
    if as_json:
        _output.show(found, "", as_json=True)
        return
    columns = ("SERIAL", "ROLE", "NAME", "EXPIRES", "STATE")
    _output.table(columns, [_row(item) for item in found], empty="no certificates yet")


def _row(item: Certificate) -> tuple[str, ...]:
    role = f"token for {item.grants}" if item.grants else item.role
    state = "revoked" if item.revoked_at is not None else "spent" if item.used_by else "valid"
    return (item.serial[:16], role, item.name, format_time(item.expires_at), state)


@_ca.command("revoke")
def ca_revoke(
    context: typer.Context,
    role: RoleName,
    name: ComponentName,
    ca: Ca = None,
    yes: Yes = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Revoke all certificates and unused tokens of a component."""
    component = _component(role, name)
    with _vault(context) as vault:
        authority = Authority(default_ca(ca), vault)
        plan = of_revocation(role, name, authority.revocable(component))
        if not agreed(plan, yes=yes, dry_run=dry_run, as_json=as_json):
            return
        serials = authority.revoke(component)
    text = (
        f"{len(serials)} revoked; the configuration server refuses them from now on, other components once they have "
        "fetched the revocation list (`asr renew`, run by a timer unit)"
    )
    _output.show({"revoked": serials}, text, as_json=as_json)


def join(
    token: Annotated[str, typer.Argument(help="File with the token from `asr ca token`; - for standard input.")],
    identity: Directory,
    as_json: Json = False,
) -> None:
    """Enrol this component with the configuration server.

    Creates a key here; the configuration server issues a certificate for it.
    """
    try:
        text = sys.stdin.read() if token == "-" else Path(token).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise InvalidValue(what="token file", value=token, wanted="a readable file") from problem
    component = enrolment.join(*enrolment.unpack(text), identity)
    _output.show({"component": str(component), "identity": str(identity)}, f"joined as {component}", as_json=as_json)


def renew(
    identity: Directory,
    now: Annotated[
        bool, typer.Option("--now", help="Renew even if more than a third of the lifetime is left.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Fetch the revocation list, and a new certificate when it is due.

    A timer unit runs this every hour.
    """
    done = enrolment.renew(identity, force=now)
    until = f"the certificate of {done.component} is valid until {format_time(done.expires_at)}"
    document = {"component": str(done.component), "renewed": done.certificate, "expires_at": done.expires_at}
    _output.show(document, f"renewed: {until}" if done.certificate else until, as_json=as_json)
