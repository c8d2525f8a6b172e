"""Commands that plug-ins add to `asr`: hook `asr_register_commands`."""

from __future__ import annotations

from typing import Any

import typer
from typer.main import get_command

from asrcore import plugins
from asrcore.cli import _output
from asrcore.errors import PluginFailed

__all__ = ["command", "lines"]


def command(name: str) -> Any:
    """The commands of the plug-in of that name; None without one. Loads no other plug-in. Raises PluginFailed."""
    loaded = plugins.load_named(name)
    app = loaded.commands().get(name)
    if app is not None:
        return _converted(name, app)
    for item in loaded.broken:
        raise PluginFailed(plugin=name, problem=f"{item.distribution}: {item.error}")
    return None


def lines() -> dict[str, str]:
    """A line of help for each plug-in that has commands."""
    found = {}
    for name, app in plugins.load().commands().items():
        try:
            found[name] = (_converted(name, app).help or "").partition("\n")[0]
        except PluginFailed as problem:
            _output.note(f"{problem}: {problem.cause_text}")
    return found


def _converted(name: str, app: typer.Typer) -> Any:
    host = typer.Typer(add_completion=False)
    host.callback()(lambda: None)
    host.add_typer(app, name=name)
    try:
        return get_command(host).commands[name]  # type: ignore[attr-defined]
    except Exception as problem:  # a parameter that Typer does not know, or a defect of the plug-in
        raise PluginFailed(plugin=name, problem=f"{type(problem).__name__}: {problem}") from problem
