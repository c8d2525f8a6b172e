"""Setting up: `init`, `site`, `policy`, `drivers`, `doctor`, `vault`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from asrcore.cli import _output, _session
from asrcore.cli._output import Json
from asrcore.errors import InvalidValue
from asrcore.model.finding import Severity
from asrcore.model.machine import Machine
from asrcore.model.point import Consistency
from asrcore.model.policy import Bandwidth, Policy, Window
from asrcore.units import format_duration, format_size, parse_duration

__all__ = ["Settings", "parsed", "register"]

_site = typer.Typer(help="Sites: where machines run, and where replicas are kept.", no_args_is_help=True)
_policy = typer.Typer(help="Policies: how often, how consistent, what is kept.", no_args_is_help=True)
_driver = typer.Typer(help="Drivers: trying one at a real site.", no_args_is_help=True)
_vault = typer.Typer(help="The vault itself.", no_args_is_help=True)

Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="A setting of the driver: name=value, or name=@FILE for a secret; repeatable."),
]


def register(app: typer.Typer) -> None:
    """Add the verbs to the application."""
    app.command("init")(init)
    app.add_typer(_site, name="site")
    app.add_typer(_policy, name="policy")
    app.add_typer(_driver, name="driver")
    app.add_typer(_vault, name="vault")
    app.command("drivers")(drivers)
    app.command("doctor")(doctor)


def init(context: typer.Context, as_json: Json = False) -> None:
    """Create the vault that --vault names. It belongs at the recovery site."""
    from asrcore.engine import Engine  # noqa: PLC0415

    url = _session.vault_url(context)
    if url == _session.default_vault():
        Path(url).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with Engine.create(url) as opened:
        _output.show({"vault": opened.vault.url}, f"vault created: {opened.vault.url}", as_json=as_json)


# -- sites ---------------------------------------------------------------------------------------------------------


def parsed(settings: list[str] | None) -> dict[str, str]:
    """Settings as they were typed: NAME=VALUE. NAME=@FILE takes the first line of a file, so that a password is neither
    in the list of processes nor in the shell's history; a value that begins with @ is typed @@."""
    result = {}
    for item in settings or []:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise InvalidValue(what="setting", value=name, wanted="name=value")
        result[name] = value[1:] if value.startswith("@@") else _of_file(value[1:]) if value.startswith("@") else value
    return result


def _of_file(path: str) -> str:
    try:
        return Path(path).read_text("utf-8").partition("\n")[0]
    except (OSError, UnicodeDecodeError) as problem:
        raise InvalidValue(what="file of a setting", value=path, wanted="a text file that can be read") from problem


@_site.command("add")
def site_add(
    context: typer.Context,
    name: str,
    driver: Annotated[str, typer.Option(help="The driver that serves the site (see `asr drivers`).")],
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Add a site; a connection proves the settings first."""
    with _session.engine(context) as opened:
        site = opened.add_site(name, driver, parsed(settings))
        status = opened.site_status(name)
        details = ", ".join(f"{key}: {value}" for key, value in status.details.items())
        _output.show(
            {"site": _without_secrets(opened, site.driver, site.settings) | {"name": name}, "status": status},
            f"site {name} added ({status.version}{'; ' if details else ''}{details})",
            as_json=as_json,
        )


@_site.command("update")
def site_update(context: typer.Context, name: str, settings: Settings = None, as_json: Json = False) -> None:
    """Change settings of a site (an empty value removes one); a connection proves them first."""
    with _session.engine(context) as opened:
        site = opened.update_site(name, parsed(settings))
        shown = _without_secrets(opened, site.driver, site.settings)
        _output.show({"site": shown | {"name": name}}, f"site {name} updated", as_json=as_json)


@_site.command("list")
def site_list(context: typer.Context, as_json: Json = False) -> None:
    """List the sites; asks none of them."""
    with _session.engine(context) as opened:
        sites = opened.vault.sites()
        if as_json:
            shown = [_without_secrets(opened, site.driver, site.settings) | {"name": site.name} for site in sites]
            _output.show(shown, "", as_json=True)
            return
        rows = [(site.name, site.driver, ", ".join(sorted(site.settings))) for site in sites]
        _output.table(("SITE", "DRIVER", "SETTINGS"), rows, empty="no sites; add one with `asr site add`")


@_site.command("show")
def site_show(context: typer.Context, name: str, as_json: Json = False) -> None:
    """Show a site's settings and what it says of itself now."""
    with _session.engine(context) as opened:
        site = opened.vault.site(name)
        shown = _without_secrets(opened, site.driver, site.settings)
        status = opened.site_status(name)
        lines = [f"{name}: driver {site.driver}, {status.version}"]
        lines += [f"  {key} = {value}" for key, value in sorted(shown["settings"].items())]
        lines += [f"  {key}: {value}" for key, value in status.details.items()]
        lines.append("  can: " + ", ".join(sorted(item.value for item in status.capabilities)))
        _output.show({"site": shown | {"name": name}, "status": status}, "\n".join(lines), as_json=as_json)


@_site.command("machines")
def site_machines(context: typer.Context, name: str, as_json: Json = False) -> None:
    """List the machines of a site."""
    with _session.engine(context) as opened:
        machines = opened.machines(name)
        if as_json:
            _output.show(machines, "", as_json=True)
            return
        columns = ("MACHINE", "POWER", "CPUS", "MEMORY", "FIRMWARE", "DISKS", "ID")
        _output.table(columns, [_machine_row(item) for item in machines], empty=f"no machines at {name}")


def _machine_row(machine: Machine) -> tuple[str, ...]:
    disks = ", ".join(f"{disk.id} {format_size(disk.size)} {disk.format}" for disk in machine.disks)
    memory = format_size(machine.memory)
    return (machine.name, machine.power.value, str(machine.cpus), memory, machine.firmware.value, disks, machine.id)


@_site.command("sweep")
def site_sweep(context: typer.Context, name: str, as_json: Json = False) -> None:
    """Remove what runs that never came back have left at a site."""
    with _session.engine(context) as opened:
        removed = opened.sweep_site(name)
        text = "\n".join(f"removed {item}" for item in removed) or "nothing was left over"
        _output.show({"removed": removed}, text, as_json=as_json)


@_site.command("remove")
def site_remove(context: typer.Context, name: str, as_json: Json = False) -> None:
    """Forget a site that no protected machine uses."""
    with _session.engine(context) as opened:
        opened.vault.remove_site(name)
        _output.show({"removed": name}, f"site {name} removed", as_json=as_json)


def _without_secrets(opened: object, driver: str, settings: Mapping[str, str]) -> dict[str, dict[str, str]]:
    drivers = getattr(opened, "plugins").drivers  # noqa: B009
    secret = (
        {item.name for item in drivers[driver].info.settings if item.secret} if driver in drivers else set(settings)
    )
    return {"settings": {key: "(secret)" if key in secret else value for key, value in settings.items()}}


# -- policies ------------------------------------------------------------------------------------------------------


@_policy.command("create")
def policy_create(
    context: typer.Context,
    name: str,
    interval: Annotated[str, typer.Option(help="Between cycles: 5s to 1d.")] = "5min",
    keep: Annotated[str, typer.Option(help="Age at which recovery points go.")] = "24h",
    point_every: Annotated[
        str, typer.Option(help="Between kept points; between them only the latest state exists.", show_default="5min")
    ] = "",
    consistency: Annotated[str, typer.Option(help="crash, filesystem or application.")] = "crash",
    freeze_limit: Annotated[str, typer.Option(help="Longest freeze of a guest.")] = "10s",
    resync_window: Annotated[
        str, typer.Option(help="When a comparison may start by itself: HH:MM-HH:MM local time, or always.")
    ] = "18:30-06:00",
    resync_threshold: Annotated[
        float, typer.Option(help="Share of a disk whose change log makes a comparison due.")
    ] = 0.5,
    bandwidth: Annotated[
        list[str] | None,
        typer.Option(
            help="Most that all its machines together send, such as 20Mbit or 20Mbit@08:00-18:00 (local time); "
            "repeatable, the lowest that is open holds."
        ),
    ] = None,
    verify_every: Annotated[
        str, typer.Option(help="Compare and mend replicas by themselves after so long, in the resync window, or never.")
    ] = "7d",
    as_json: Json = False,
) -> None:
    """Create a policy."""
    every = parse_duration(interval, "interval")
    age = parse_duration(keep, "keep")
    try:
        asked = Consistency(consistency)
    except ValueError:
        wanted = "crash, filesystem or application"
        raise InvalidValue(what="consistency", value=consistency, wanted=wanted) from None
    policy = Policy(
        name=name,
        interval=every,
        point_interval=parse_duration(point_every, "point interval") if point_every else max(every, min(300.0, age)),
        keep=age,
        consistency=asked,
        freeze_limit=parse_duration(freeze_limit, "freeze limit"),
        resync_window=Window.parse(resync_window),
        resync_threshold=resync_threshold,
        bandwidth=tuple(Bandwidth.parse(rule) for rule in bandwidth or []),
        verify_every=0.0 if verify_every == "never" else parse_duration(verify_every, "verification interval"),
    )
    with _session.engine(context) as opened:
        opened.vault.add_policy(policy)
        _output.show(policy, f"policy {name} created: {_described(policy)}", as_json=as_json)


def _described(policy: Policy) -> str:
    return (
        f"a cycle every {format_duration(policy.interval)}, a point kept every "
        f"{format_duration(policy.point_interval)} for {format_duration(policy.keep)}, "
        f"{policy.consistency.value}-consistent, resync {policy.resync_window}, bandwidth {_bandwidth(policy)}, "
        f"verified {_verified(policy)}"
    )


def _verified(policy: Policy) -> str:
    return f"every {format_duration(policy.verify_every)}" if policy.verify_every else "never by itself"


def _bandwidth(policy: Policy) -> str:
    return ", ".join(map(str, policy.bandwidth)) or "unlimited"


@_policy.command("list")
def policy_list(context: typer.Context, as_json: Json = False) -> None:
    """List the policies."""
    with _session.engine(context) as opened:
        policies = opened.vault.policies()
        if as_json:
            _output.show(policies, "", as_json=True)
            return
        rows = [
            (
                item.name,
                format_duration(item.interval),
                format_duration(item.point_interval),
                format_duration(item.keep),
                item.consistency.value,
                str(item.resync_window),
                _bandwidth(item),
                _verified(item),
            )
            for item in policies
        ]
        columns = ("POLICY", "INTERVAL", "POINT EVERY", "KEEP", "CONSISTENCY", "RESYNC", "BANDWIDTH", "VERIFIED")
        _output.table(columns, rows, empty="no policies; create one with `asr policy create`")


@_policy.command("show")
def policy_show(context: typer.Context, name: str, as_json: Json = False) -> None:
    """Show a policy with its retention ladder."""
    with _session.engine(context) as opened:
        policy = opened.vault.policy(name)
        lines = [f"{name}: {_described(policy)}", "  thinning:"]
        lines += [
            f"    older than {format_duration(rung.after)}: one every {format_duration(rung.every)}"
            for rung in policy.ladder
            if rung.after < policy.keep
        ]
        _output.show(policy, "\n".join(lines), as_json=as_json)


# -- vault, drivers, doctor ----------------------------------------------------------------------------------------


@_vault.command("move")
def vault_move(context: typer.Context, destination: str, as_json: Json = False) -> None:
    """Move the vault to a file, to be carried to the other site: after a failover that is the recovery site.

    The vault that stays behind is marked as moved and refuses work, so that there is never a second one.
    """
    from asrcore import vault  # noqa: PLC0415

    moved = str(vault.move(_session.vault_url(context), destination, "asr vault move"))
    text = f"vault moved to {moved}; carry it to the recovery site and use it there with --vault"
    _output.show({"moved_to": moved}, text, as_json=as_json)


def drivers(as_json: Json = False) -> None:
    """List the drivers, their settings, and plug-ins that failed to load."""
    from asrcore import plugins  # noqa: PLC0415

    loaded = plugins.load()
    if as_json:
        infos = [driver.info for driver in loaded.drivers.values()]
        _output.show({"drivers": infos, "broken": loaded.broken}, "", as_json=True)
        return
    if not loaded.drivers:
        typer.echo("no drivers; install one beside asrcore, such as asr-driver-libvirt")
    for driver in loaded.drivers.values():
        info = driver.info
        typer.echo(f"{info.name} {info.version}: {info.title}")
        typer.echo("  can: " + ", ".join(sorted(item.value for item in info.capabilities)))
        for setting in info.settings:
            need = "required" if setting.required else f"default {setting.default!r}"
            typer.echo(f"  --set {setting.name}=...  {setting.help} ({need})")
    for item in loaded.broken:
        typer.echo(f"broken: {item.name} ({item.distribution}): {item.error}")


@_driver.command("check")
def driver_check(
    name: str,
    settings: Settings = None,
    record: Annotated[Path | None, typer.Option(help="file for what the platform answers, without secrets")] = None,
    as_json: Json = False,
) -> None:
    """Try a driver's work at a real site, on little data, and take it away again. Exit code 1 if something failed."""
    from asrcore import plugins  # noqa: PLC0415

    found = plugins.load().driver(name)
    checks = []
    with closing(found.check(parsed(settings), record)) as going:  # interrupted, it takes away what it has made
        for item in going:
            checks.append(item)
            if not as_json:
                mark = "ok    " if item.passed else "FAILED"
                typer.echo(f"{mark} {item.name} ({format_duration(item.seconds)}): {item.told}")
    if as_json:
        _output.show({"driver": name, "checks": checks}, "", as_json=True)
    if not all(item.passed for item in checks):
        raise typer.Exit(1)


def doctor(as_json: Json = False) -> None:
    """Check what this host lacks, and name the command that installs it."""
    from asrcore import plugins  # noqa: PLC0415

    loaded = plugins.load()
    findings = [item for driver in loaded.drivers.values() for item in driver.check_host()]
    text = _output.show_findings(findings) or "nothing is missing"
    for item in loaded.broken:
        text += f"\nbroken plug-in {item.name} ({item.distribution}): {item.error}"
    _output.show({"findings": findings, "broken": loaded.broken}, text, as_json=as_json)
    if loaded.broken or any(item.severity is Severity.ERROR for item in findings):
        raise typer.Exit(1)
