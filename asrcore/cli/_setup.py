"""The vault: `init`, `vault`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from asrcore import vault
from asrcore.cli import _output, _session
from asrcore.cli._output import Json
from asrcore.engine import Engine

__all__ = ["register"]

_vault = typer.Typer(help="The vault: move it to the other site.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the verbs to the application."""
    app.command("init")(init)
    app.add_typer(_vault, name="vault")


def init(context: typer.Context, as_json: Json = False) -> None:
    """Create the vault that --vault names. Keep it at the recovery site."""
    url = _session.vault_url(context)
    if url == _session.default_vault():
        Path(url).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with Engine.create(url) as opened:
        _output.show({"vault": opened.vault.url}, f"vault created: {opened.vault.url}", as_json=as_json)


@_vault.command("move")
def vault_move(
    context: typer.Context,
    destination: Annotated[str, typer.Argument(help="File to write; it must not exist yet.")],
    as_json: Json = False,
) -> None:
    """Move the vault to a file, which you then copy to the other site.

    After a failover the other site is the recovery site. The old vault is renamed to NAME.moved and refuses work, so
    that there is only one.
    """
    moved = str(vault.move(_session.vault_url(context), destination, "asr vault move"))
    text = f"vault moved to {moved}; copy it to the recovery site and use it there with --vault"
    _output.show({"moved_to": moved}, text, as_json=as_json)
