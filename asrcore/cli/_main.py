"""The application: global options, errors and exit codes."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from asrcore.cli import _failover, _look, _master_target, _output, _protect, _session, _setup
from asrcore.errors import AsrError

__all__ = ["app", "main"]

app = typer.Typer(
    name="asr",
    help="Protect running machines, fail them over, bring them home.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
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


_setup.register(app)
_protect.register(app)
_look.register(app)
_master_target.register(app)
app.add_typer(_failover.app, name="failover")


def _hoisted(arguments: list[str]) -> list[str]:
    """`--vault X` may stand anywhere: it is moved to the front, where Typer expects it."""
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
    return front + rest


def main() -> None:
    """Run `asr`; the exit code says the class of an error (see docs/reference/errors)."""
    arguments = sys.argv[1:]
    try:
        app(args=_hoisted(arguments), standalone_mode=True)
    except AsrError as error:
        sys.exit(_output.fail(error, as_json="--json" in arguments))
    except KeyboardInterrupt:
        sys.exit(_session.INTERRUPTED)
    except BrokenPipeError:  # `asr points web1 | head`
        sys.stderr.close()
        sys.exit(0)
