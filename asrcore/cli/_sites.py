"""`asr site`: where machines run, and where replicas are kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from asrcore.cli import _output, _session
from asrcore.cli._confirm import DryRun, Yes, agreed
from asrcore.cli._options import Settings, SiteName, parsed
from asrcore.cli._output import Json
from asrcore.model.health import clock_findings
from asrcore.model.machine import Machine
from asrcore.units import format_duration, format_size

if TYPE_CHECKING:
    from asrcore.engine import Engine

__all__ = ["register"]

_site = typer.Typer(help="Sites: where machines run, and where replicas are kept.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the verbs to the application."""
    app.add_typer(_site, name="site")


@_site.command("add")
def site_add(
    context: typer.Context,
    name: SiteName,
    driver: Annotated[str, typer.Option(help="Driver of the site (see `asr driver list`).")],
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Add a site. The settings are tested with a connection first."""
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
def site_update(context: typer.Context, name: SiteName, settings: Settings = None, as_json: Json = False) -> None:
    """Change settings of a site; an empty value removes a setting. They are tested with a connection first."""
    with _session.engine(context) as opened:
        site = opened.update_site(name, parsed(settings))
        shown = _without_secrets(opened, site.driver, site.settings)
        _output.show({"site": shown | {"name": name}}, f"site {name} updated", as_json=as_json)


@_site.command("list")
def site_list(context: typer.Context, as_json: Json = False) -> None:
    """List the sites, without connecting to them."""
    with _session.engine(context) as opened:
        sites = opened.vault.sites()
        if as_json:
            shown = [_without_secrets(opened, site.driver, site.settings) | {"name": site.name} for site in sites]
            _output.show(shown, "", as_json=True)
            return
        rows = [(site.name, site.driver, ", ".join(sorted(site.settings))) for site in sites]
        _output.table(("SITE", "DRIVER", "SETTINGS"), rows, empty="no sites; add one with `asr site add`")


@_site.command("show")
def site_show(context: typer.Context, name: SiteName, as_json: Json = False) -> None:
    """Show a site's settings and its present status."""
    with _session.engine(context) as opened:
        site = opened.vault.site(name)
        shown = _without_secrets(opened, site.driver, site.settings)
        status = opened.site_status(name)
        lines = [f"{name}: driver {site.driver}, {status.version}"]
        lines += [f"  {key} = {value}" for key, value in sorted(shown["settings"].items())]
        lines += [f"  {key}: {value}" for key, value in status.details.items()]
        lines.append("  can: " + ", ".join(sorted(item.value for item in status.capabilities)))
        if status.skew is not None:
            way = "ahead of" if status.skew > 0 else "behind"
            lines.append(f"  clock: {format_duration(abs(status.skew))} {way} this host's")
        findings = clock_findings(name, status.skew)
        if findings:
            lines.append(_output.show_findings(findings))
        document = {"site": shown | {"name": name}, "status": status, "findings": findings}
        _output.show(document, "\n".join(lines), as_json=as_json)


@_site.command("machines")
def site_machines(context: typer.Context, name: SiteName, as_json: Json = False) -> None:
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
def site_sweep(context: typer.Context, name: SiteName, as_json: Json = False) -> None:
    """Delete the resources at a site that interrupted runs left behind."""
    with _session.engine(context) as opened:
        removed = opened.sweep_site(name)
        text = "\n".join(f"deleted {item}" for item in removed) or "nothing to delete"
        _output.show({"removed": removed}, text, as_json=as_json)


@_site.command("remove")
def site_remove(
    context: typer.Context, name: SiteName, yes: Yes = False, dry_run: DryRun = False, as_json: Json = False
) -> None:
    """Remove a site that no protected machine uses. Nothing at the site is changed."""
    with _session.engine(context) as opened:
        if not agreed(opened.impact("site-remove", name), yes=yes, dry_run=dry_run, as_json=as_json):
            return
        opened.vault.remove_site(name)
        _output.show({"removed": name}, f"site {name} removed", as_json=as_json)


def _without_secrets(opened: Engine, driver: str, settings: Mapping[str, str]) -> dict[str, dict[str, str]]:
    drivers = opened.plugins.drivers
    secret = (
        {item.name for item in drivers[driver].info.settings if item.secret} if driver in drivers else set(settings)
    )
    return {"settings": {key: "(secret)" if key in secret else value for key, value in settings.items()}}
