"""Settings of a libvirt site: text by name as the vault keeps them, made into typed values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import SplitResult, parse_qs, urlsplit

import attrs

from asrcore.driver import Setting
from asrcore.errors import InvalidSetting, InvalidValue
from asrcore.units import parse_size

__all__ = ["DRIVER", "SETTINGS", "NbdPlace", "SiteSettings"]

DRIVER = "libvirt"

# libvirt 9 requires the port of a TCP backup server ("must specify TCP port for now"). 10809 is NBD's own
# port and often taken, so the default range begins behind it; one port is in use per machine while it is read.
DEFAULT_PORTS = (10810, 10909)

SETTINGS = (
    Setting("uri", "libvirt URI of the host, such as qemu:///system or qemu+tls://host/system", required=True),
    Setting("replica_dir", "directory on the engine's host for replicas; required for a target"),
    Setting(
        "replica_mark",
        "identity of the replica directory, recorded when the site is added: a directory without it is not used",
    ),
    Setting(
        "owner",
        "tag of this vault in the names of what it leaves at machines, recorded when the site is added: what has "
        "another tag is left alone",
    ),
    Setting(
        "nbd",
        "how disks are read: `unix[:DIRECTORY]`, or `tcp:HOST[:LOW-HIGH]` with the host's address and ports to use; "
        "by default `unix` for a local URI and TCP to the URI's host for a remote one",
    ),
    Setting(
        "nbd_tls",
        "directory with ca-cert.pem, client-cert.pem and client-key.pem: disks are read over TLS (TCP only; "
        "the host needs `backup_tls_x509_cert_dir` in qemu.conf)",
    ),
    Setting("user", "user name, where the URI's authentication asks for one"),
    Setting("password", "password, where the URI's authentication asks for one", secret=True),
    Setting("scratch_dir", "directory at the host for the backup's scratch files; by default beside each disk"),
    Setting(
        "scratch_reserve",
        "free space there below which no view is opened, such as 10GiB; open ones end at half of it; "
        "default: 1 GiB, or a twentieth of a file system of less than 20 GiB",
    ),
    Setting(
        "domain_type",
        "`kvm` or `qemu` (emulated): how machines of other platforms run here; default: kvm where the host has it",
    ),
)

_OWNER = re.compile(r"[a-z0-9]{1,16}")  # as xml.mark reads it in the names of checkpoints
_NBD_TCP = re.compile(r"tcp:(?P<host>\[[0-9A-Fa-f:.]+\]|[^\[\]:/\s]+)(?::(?P<low>\d{1,5})(?:-(?P<high>\d{1,5}))?)?")


@attrs.frozen
class NbdPlace:
    """Where QEMU serves frozen disks: a unix socket (in `directory`, or one that the driver chooses), or a TCP address
    with the ports to choose from."""

    host: str = ""
    low: int = 0
    high: int = 0
    directory: str = ""

    @property
    def tcp(self) -> bool:
        """Whether it is served over TCP."""
        return bool(self.host)


@attrs.frozen
class SiteSettings:
    """`local`: the host's files are this process's files, by the same paths."""

    uri: str
    replica_dir: Path | None = None
    replica_mark: str = ""
    owner: str = ""
    nbd: NbdPlace = NbdPlace()
    nbd_tls: Path | None = None
    user: str = ""
    password: str = attrs.field(default="", repr=False)
    scratch_dir: str = ""
    scratch_reserve: int | None = None
    domain_type: str = ""
    local: bool = False

    @classmethod
    def parse(cls, settings: Mapping[str, str]) -> SiteSettings:
        """Raises InvalidSetting for a missing or malformed one; `asrcore.plugins` has refused unknown names."""
        given = {name: value.strip() for name, value in settings.items() if value.strip()}
        url = _url(given.get("uri", ""))
        return cls(
            uri=given["uri"],
            replica_dir=_directory("replica_dir", given.get("replica_dir")),
            replica_mark=given.get("replica_mark", ""),
            owner=_owner(given.get("owner", "")),
            nbd=_nbd(given.get("nbd"), url),
            nbd_tls=_tls_directory(given.get("nbd_tls")),
            user=given.get("user", ""),
            password=given.get("password", ""),
            scratch_dir=str(_directory("scratch_dir", given.get("scratch_dir")) or ""),
            scratch_reserve=_size("scratch_reserve", given.get("scratch_reserve")),
            domain_type=_domain_type(given.get("domain_type", "")),
            local=_is_local(url),
        )

    @property
    def emulates(self) -> bool:
        """Whether machines of other platforms are emulated."""
        return self.domain_type == "qemu" or (not self.domain_type and not Path("/dev/kvm").exists())


def _invalid(setting: str, problem: str) -> InvalidSetting:
    return InvalidSetting(setting=setting, driver=DRIVER, problem=problem)


def _url(uri: str) -> SplitResult:
    if not uri:
        raise _invalid("uri", "is required")
    try:
        url = urlsplit(uri)
        _ = url.port  # raises for a port that is no number
    except ValueError as problem:
        raise _invalid("uri", f"{uri!r} is not a URI ({problem})") from problem
    hypervisor = url.scheme.partition("+")[0]
    if hypervisor != "qemu" or not url.path.strip("/"):
        raise _invalid("uri", f"{uri!r} is not a libvirt URI of a QEMU/KVM host, such as qemu:///system")
    return url


def _is_local(url: SplitResult) -> bool:
    # A named socket may be a forwarded one (`ssh -L`) or that of another mount namespace: its host's paths may differ
    # from this host's, and a file that only has the same path would be the wrong disk.
    return not url.netloc and "socket" not in parse_qs(url.query)


def _nbd(text: str | None, url: SplitResult) -> NbdPlace:
    if text is None:
        host = url.hostname or ""
        return NbdPlace(host, *DEFAULT_PORTS) if host else NbdPlace()
    if text == "unix":
        return NbdPlace()
    if text.startswith("unix:/"):
        return NbdPlace(directory=text.removeprefix("unix:").rstrip("/"))
    match = _NBD_TCP.fullmatch(text)
    if match is None:
        raise _invalid("nbd", f"{text!r} is none of `unix`, `unix:/DIRECTORY`, `tcp:HOST`, `tcp:HOST:LOW-HIGH`")
    low = int(match["low"] or DEFAULT_PORTS[0])
    high = int(match["high"] or (low if match["low"] else DEFAULT_PORTS[1]))
    if not 0 < low <= high < 65536:
        raise _invalid("nbd", f"{text!r} has no range of TCP ports")
    return NbdPlace(match["host"].strip("[]"), low, high)


def _directory(setting: str, text: str | None) -> Path | None:
    if text is None:
        return None
    path = Path(text)
    if not path.is_absolute():
        raise _invalid(setting, f"{text!r} is not an absolute path")
    return path


def _owner(text: str) -> str:
    if text and not _OWNER.fullmatch(text):
        raise _invalid("owner", f"{text!r} is not 1 to 16 small letters and digits")
    if text == "none":
        raise _invalid("owner", "'none' stands for a site without a tag; `--set owner=` records a new one")
    return text


def _size(setting: str, text: str | None) -> int | None:
    try:
        return None if text is None else parse_size(text)
    except InvalidValue as problem:
        raise _invalid(setting, str(problem)) from problem


def _domain_type(text: str) -> str:
    if text not in ("", "kvm", "qemu"):
        raise _invalid("domain_type", f"{text!r} is neither `kvm` nor `qemu`")
    return text


def _tls_directory(text: str | None) -> Path | None:
    path = _directory("nbd_tls", text)
    if path is not None and not (path / "ca-cert.pem").is_file():
        raise _invalid("nbd_tls", f"there is no ca-cert.pem in {text!r}")
    return path
