"""Drivers and what they need on this host: `driver`, `doctor`."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from asrcore import plugins
from asrcore.cli import _output
from asrcore.cli._options import Settings, parsed
from asrcore.cli._output import Json
from asrcore.model.finding import Severity
from asrcore.units import format_duration

__all__ = ["register"]

_driver = typer.Typer(help="Drivers: list them, or test one at a real site.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the verbs to the application."""
    app.add_typer(_driver, name="driver")
    app.command("doctor")(doctor)


@_driver.command("list")
def driver_list(as_json: Json = False) -> None:
    """List the drivers, their settings, and the plug-ins that failed to load."""
    loaded = plugins.load()
    if as_json:
        infos = [driver.info for driver in loaded.drivers.values()]
        _output.show({"drivers": infos, "broken": loaded.broken}, "", as_json=True)
        return
    if not loaded.drivers:
        typer.echo("no drivers; install one, such as asr-driver-libvirt")
    for driver in loaded.drivers.values():
        info = driver.info
        typer.echo(f"{info.name} {info.version}: {info.title}")
        typer.echo("  can: " + ", ".join(sorted(item.value for item in info.capabilities)))
        for setting in info.settings:
            need = "required" if setting.required else f"default {setting.default}" if setting.default else "optional"
            typer.echo(f"  --set {setting.name}=...  {setting.help} ({need})")
    for item in loaded.broken:
        typer.echo(f"broken: {item.name} ({item.distribution}): {item.error}")


@_driver.command("check")
def driver_check(
    name: Annotated[str, typer.Argument(help="Name of the driver (see `asr driver list`).")],
    settings: Settings = None,
    record: Annotated[Path | None, typer.Option(help="Save the platform's answers here, without secrets.")] = None,
    as_json: Json = False,
) -> None:
    """Test a driver at a real site with little data. Exits with status 1 if a check fails.

    What the test creates is deleted afterwards.
    """
    loaded = plugins.load()
    checks = []
    with closing(
        loaded.check(name, parsed(settings), record)
    ) as going:  # if interrupted, it deletes what it has created
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
    """Check what this host lacks, and show the commands that install it.

    Exits with status 1 if something is missing.
    """
    loaded = plugins.load()
    findings = [item for driver in loaded.drivers.values() for item in driver.check_host()]
    text = _output.show_findings(findings) or "nothing is missing"
    for item in loaded.broken:
        text += f"\nbroken plug-in {item.name} ({item.distribution}): {item.error}"
    _output.show({"findings": findings, "broken": loaded.broken}, text, as_json=as_json)
    if loaded.broken or any(item.severity is Severity.ERROR for item in findings):
        raise typer.Exit(1)
