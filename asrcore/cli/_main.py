"""The application: the table of verbs, global options, errors and exit codes."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Annotated, Any

import attrs
import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from asrcore.cli import _output, _session
from asrcore.errors import AsrError, InvalidValue

__all__ = ["VERBS", "Verb", "application", "main"]

_SET_UP, _PROTECT, _FAIL_OVER = "Set up", "Protect", "Fail over"
_OBSERVE, _SERVICES, _CERTIFICATES, _PLUGINS = "Observe", "Services", "Certificates", "Plug-ins"


@attrs.frozen
class Verb:
    """Where a verb, or a noun with its verbs, is: a module of this package whose `register` adds it. `panel` and `help`
    are its place and its line in `asr --help`; the line is the first one of its own help.
    """

    module: str
    panel: str
    help: str


VERBS = {
    "demo": Verb(
        "_demo",
        _SET_UP,
        "Try everything in seconds, without root: protect, test, lose a site, fail over, fail back. Touches no vault.",
    ),
    "init": Verb("_setup", _SET_UP, "Create the vault that --vault names. Keep it at the recovery site."),
    "doctor": Verb("_drivers", _SET_UP, "Check what this host lacks, and show the commands that install it."),
    "driver": Verb("_drivers", _SET_UP, "Drivers: list them, or test one at a real site."),
    "site": Verb("_sites", _SET_UP, "Sites: where machines run, and where replicas are kept."),
    "policy": Verb("_policies", _SET_UP, "Policies: how often, how consistent, what is kept."),
    "vault": Verb("_setup", _SET_UP, "The vault: move it to the other site."),
    "protect": Verb("_protect", _PROTECT, "Protect a machine: readiness checks, replica, initial copy."),
    "machine": Verb(
        "_machines", _PROTECT, "Protected machines: change policy and networks, or record what the target holds."
    ),
    "replicate": Verb("_protect", _PROTECT, "Run one replication cycle now, or resume an interrupted copy."),
    "verify": Verb("_protect", _PROTECT, "Prove, byte by byte, that the replica equals the frozen source."),
    "resync": Verb("_protect", _PROTECT, "Compare source and replica, and send what differs."),
    "unprotect": Verb("_protect", _PROTECT, "End protection: deletes the replica and all its recovery points."),
    "failover": Verb("_failover", _FAIL_OVER, "Run a machine from its recovery points at the target site."),
    "reprotect": Verb("_protect", _FAIL_OVER, "After a committed failover: replicate in the opposite direction."),
    "status": Verb(
        "_status", _OBSERVE, "Show every protected machine: state, health with reasons, RPO, recovery points."
    ),
    "point": Verb("_history", _OBSERVE, "Recovery points of a machine."),
    "job": Verb("_history", _OBSERVE, "Jobs: list them, show one, or cancel one."),
    "event": Verb("_history", _OBSERVE, "Events: failovers, quarantines, verifications, repairs."),
    "server": Verb("_servers", _OBSERVE, "Servers: process servers and master targets."),
    "clock": Verb("_clock", _OBSERVE, "The clock of the engine's host: show whether it is trusted, or accept it."),
    "run": Verb("_services", _SERVICES, "Run the replication service in the foreground until Ctrl-C or SIGTERM."),
    "process-server": Verb("_services", _SERVICES, "Run a process server: one of several that share a vault."),
    "master-target": Verb(
        "_master_target", _SERVICES, "Run a master target: serve this host's site to engines elsewhere."
    ),
    "config-server": Verb("_config_server", _SERVICES, "Run the configuration server in the foreground."),
    "serve": Verb("_config_server", _SERVICES, "Run several roles in one process, as a single management server."),
    "ca": Verb("_certificates", _CERTIFICATES, "The certificate authority of the configuration server."),
    "join": Verb("_certificates", _CERTIFICATES, "Enrol this component with the configuration server."),
    "renew": Verb("_certificates", _CERTIFICATES, "Fetch the revocation list, and a new certificate when it is due."),
}
"""The help and the shell's completion show the verbs from here; only the module of the verb that is run is imported.
All modules together, with what they import, cost a second of CPU, and Typer reads the signature of every verb it has.
"""


class _Verbs(TyperGroup):
    """Has the line of each verb, and loads the verb itself when it is called.

    A name that is no verb may be a plug-in's. Plug-ins are loaded for such a name and for the help.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, verb in VERBS.items():
            self.add_command(TyperCommand(name=name, help=verb.help, rich_help_panel=verb.panel))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return super().get_command(ctx, cmd_name) or _plugins().command(cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, _loaded(name) if name in VERBS else command, rest

    def format_help(self, ctx: Any, formatter: Any) -> None:
        for name, line in _plugins().lines().items():
            self.commands.setdefault(name, TyperCommand(name=name, help=line, rich_help_panel=_PLUGINS))
        super().format_help(ctx, formatter)


def _loaded(name: str) -> Any:
    """The verb with its options."""
    app = typer.Typer(add_completion=False)
    app.callback()(lambda: None)  # else Typer takes the only verb of a module for the application
    import_module(f"asrcore.cli.{VERBS[name].module}").register(app)
    return get_command(app).commands[name]  # type: ignore[attr-defined]


def _plugins() -> Any:
    return import_module("asrcore.cli._plugins")  # pluggy and the driver contract: 90 ms


def _options(
    context: typer.Context,
    vault: Annotated[
        str,
        typer.Option(
            envvar="ASR_VAULT",
            show_default=False,
            help="Path or database URL of the vault (default: /var/lib/asrcore/vault.db for root, "
            "else in the user's data directory).",
        ),
    ] = "",
) -> None:
    context.obj = vault


def application() -> typer.Typer:
    """The command with all its verbs."""
    app = typer.Typer(
        name="asr",
        cls=_Verbs,
        help="Protect running machines, fail them over, and fail them back.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    return app


def _hoisted(arguments: list[str]) -> tuple[list[str], list[str]]:
    """`--vault X` may stand anywhere: apart from the rest, in front of which Typer expects it."""
    front: list[str] = []
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "--":
            rest += [word, *words]
        elif word == "--vault":
            front += [word, *[value for value in [next(words, None)] if value is not None]]
        elif word.startswith("--vault="):
            front.append(word)
        else:
            rest.append(word)
    return front, rest


def main() -> None:
    """Run `asr`; the exit code is that of the error's category (see docs/reference/errors)."""
    vault, arguments = _hoisted(sys.argv[1:])
    try:
        for word in (*vault, *arguments):
            if not word.isprintable() and any("\udc80" <= letter <= "\udcff" for letter in word):  # bytes, no letters
                raise InvalidValue(what="argument", value=ascii(word), wanted="text in UTF-8")
        application()(args=vault + arguments, standalone_mode=True)
    except AsrError as error:
        sys.exit(_output.fail(error, as_json="--json" in arguments))
    except KeyboardInterrupt:
        sys.exit(_session.INTERRUPTED)
    except BrokenPipeError:  # `asr point list web1 | head`
        sys.stderr.close()
        sys.exit(0)
