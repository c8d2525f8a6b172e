"""Options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from asrcore.errors import InvalidValue
from asrcore.units import KiB

__all__ = ["MachineName", "PolicyName", "Settings", "SiteName", "networks_of", "parsed"]

MachineName = Annotated[str, typer.Argument(help="Name or id of the protected machine.")]
PolicyName = Annotated[str, typer.Argument(help="Name of the policy.")]
SiteName = Annotated[str, typer.Argument(help="Name of the site.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Setting of the driver: NAME=VALUE, or NAME=@FILE for a secret; repeatable."),
]
_LONGEST = 64 * KiB  # letters in the value of a setting; a device such as /dev/zero has no end


def parsed(settings: list[str] | None) -> dict[str, str]:
    """Settings as typed: NAME=VALUE. NAME=@FILE takes the first line of a file, so that a password is neither in the
    process list nor in the shell's history; a value that begins with @ is typed @@."""
    result = {}
    for item in settings or []:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise InvalidValue(what="setting", value=name, wanted="name=value")
        result[name] = value[1:] if value.startswith("@@") else _of_file(value[1:]) if value.startswith("@") else value
    return result


def networks_of(pairs: list[str] | None, *, may_be_empty: bool = False) -> dict[str, str]:
    """Network mapping as typed: SOURCE=TARGET."""
    result = {}
    for item in pairs or []:
        source, equals, target = item.partition("=")
        if not equals or not source or not (target or may_be_empty):
            raise InvalidValue(what="network mapping", value=item, wanted="SOURCE=TARGET")
        result[source] = target
    return result


def _of_file(path: str) -> str:
    try:
        with Path(path).open(encoding="utf-8") as file:
            line = file.readline(_LONGEST + 1)
    except (OSError, UnicodeDecodeError) as problem:
        raise InvalidValue(what="file of a setting", value=path, wanted="a text file that can be read") from problem
    if len(line) > _LONGEST:
        raise InvalidValue(what="file of a setting", value=path, wanted=f"a first line of at most {_LONGEST} letters")
    return line.removesuffix("\n")
