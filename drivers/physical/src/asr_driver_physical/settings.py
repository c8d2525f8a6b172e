"""Settings of a physical site: text by name as the vault keeps them, made into typed values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import attrs

from asrcore.driver import Capability, Setting
from asrcore.errors import AsrError, InvalidSetting
from asrcore.units import GiB, parse_size

__all__ = ["CAPABILITIES", "DRIVER", "PORT", "SETTINGS", "SiteSettings", "parse_address"]

DRIVER = "physical"
PORT = 9443
CAPABILITIES = frozenset({Capability.FENCE, Capability.SOURCE, Capability.TRACKING})

SETTINGS = (
    Setting("listen", f"address to accept servers' connections: `ADDRESS[:PORT]`, default port {PORT}", required=True),
    Setting(
        "identity", "directory of the process server's certificate and the records of enrolled servers", required=True
    ),
    Setting(
        "owner",
        "tag of this vault in the identity directory, recorded when the site is added: a directory with another tag is "
        "not used",
    ),
    Setting("spool", "directory for changes captured at a freeze, until they are sent", required=True),
    Setting("spool_limit", "maximum size of the spool, such as 4GiB", default="4GiB"),
)


@attrs.frozen
class SiteSettings:
    """`host` and `port`: the listener's address; `spool_limit` in bytes."""

    host: str
    port: int
    identity: Path
    spool: Path
    spool_limit: int = 4 * GiB
    owner: str = ""

    @classmethod
    def parse(cls, settings: Mapping[str, str]) -> SiteSettings:
        """Raises InvalidSetting for a missing or malformed one; `asrcore.plugins` has refused unknown names."""
        given = {name: value.strip() for name, value in settings.items() if value.strip()}
        for setting in SETTINGS:
            if setting.required and setting.name not in given:
                raise _invalid(setting.name, "is required")
        host, port = parse_address("listen", given["listen"])
        return cls(
            host=host,
            port=port,
            identity=_directory("identity", given["identity"]),
            spool=_directory("spool", given["spool"]),
            spool_limit=_size(given.get("spool_limit", "4GiB")),
            owner=given.get("owner", ""),
        )


def parse_address(setting: str, text: str) -> tuple[str, int]:
    """`ADDRESS[:PORT]`, an IPv6 address in brackets. Raises InvalidSetting."""
    host, colon, port = text.rpartition(":")
    if not colon or host.endswith(":") or (":" in host and not host.startswith("[")):
        host, port = text, str(PORT)
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise _invalid(setting, f"{text!r} is not ADDRESS or ADDRESS:PORT")
    return host.strip("[]"), int(port)


def _invalid(setting: str, problem: str) -> InvalidSetting:
    return InvalidSetting(setting=setting, driver=DRIVER, problem=problem)


def _directory(setting: str, text: str) -> Path:
    path = Path(text)
    if not path.is_absolute():
        raise _invalid(setting, f"{text!r} is not an absolute path")
    return path


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except (AsrError, ValueError) as problem:
        raise _invalid("spool_limit", str(problem)) from problem
