"""The application: global options, errors and exit codes."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Annotated

import typer

from asrcore.cli import _output, _session
from asrcore.errors import AsrError

__all__ = ["application", "main"]

PARTS = {
    "_setup": ("init", "vault"),
    "_sites": ("site",),
    "_policies": ("policy",),
    "_drivers": ("driver", "drivers", "doctor"),
    "_protect": ("protect", "unprotect", "replicate", "resync", "verify", "reprotect"),
    "_services": ("run", "process-server", "config-server", "serve"),
    "_certificates": ("ca", "join", "renew"),
    "_look": ("status", "points", "jobs", "events", "server"),
    "_master_target": ("master-target",),
    "_failover": ("failover",),
}
"""Which module has which verbs. Typer reads the signature of every verb it has before it runs one: all of them cost
0.06 of the 0.3 seconds that `asr status` may take, so that a verb comes with those of its own module alone.
"""


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


def application(verb: str = "") -> typer.Typer:
    """The command with this verb and those of its module; with all verbs if it has no such verb."""
    app = typer.Typer(
        name="asr",
        help="Protect running machines, fail them over, bring them home.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    for name in [part for part, verbs in PARTS.items() if verb in verbs] or PARTS:
        import_module(f"asrcore.cli.{name}").register(app)
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
    """Run `asr`; the exit code says the class of an error (see docs/reference/errors)."""
    vault, arguments = _hoisted(sys.argv[1:])
    try:
        application(*arguments[:1])(args=vault + arguments, standalone_mode=True)
    except AsrError as error:
        sys.exit(_output.fail(error, as_json="--json" in arguments))
    except KeyboardInterrupt:
        sys.exit(_session.INTERRUPTED)
    except BrokenPipeError:  # `asr points web1 | head`
        sys.stderr.close()
        sys.exit(0)
