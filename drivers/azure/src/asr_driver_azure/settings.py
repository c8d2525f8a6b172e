"""Settings of an Azure site: text by name as the vault keeps them, made into typed values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import attrs

from asrcore.driver import Setting
from asrcore.errors import InvalidSetting

__all__ = ["DRIVER", "PROBES", "SETTINGS", "Network", "SiteSettings", "SizeRule"]

DRIVER = "azure"
PROBES = "asr-check-"
"""Prefix of the names of probes' containers: they are deleted when they are old."""
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9]|-(?=[a-z0-9])){1,61}[a-z0-9]")
_OWNER = re.compile(r"[a-z0-9]{1,16}")
_MANAGEMENT = "https://management.azure.com"

SETTINGS = (
    Setting("account_url", "blob endpoint of the storage account: https://NAME.blob.core.windows.net", required=True),
    Setting("container", "container for replicas; created if it does not exist", default="asr-replicas"),
    Setting("account_key", "key of the storage account; by default the identity below is used", secret=True),
    Setting("subscription", "subscription for machines; without it the site keeps replicas but runs none"),
    Setting("resource_group", "resource group for disks, machines and network cards; it must exist"),
    Setting("location", "region of the machines, such as westeurope"),
    Setting("tenant", "tenant of the application below; without it the environment's identity is used"),
    Setting("client_id", "client ID of the application that the engine signs in as"),
    Setting("client_secret", "client secret of the application", secret=True),
    Setting(
        "networks",
        "subnet for each network name: NAME=VNET/SUBNET or NAME=GROUP/VNET/SUBNET; append `+public` for a public "
        "address, `+nsg:NAME` for your own security group; separate several by `;`",
    ),
    Setting("sizes", "machine sizes to choose from, separated by `,`; default: general-purpose sizes (D and B series)"),
    Setting("size_rules", "fixed sizes by machine name: MACHINE=SIZE, separated by `;`"),
    Setting(
        "owner",
        "tag of this vault on the snapshots that it takes, recorded when the site is added: those with another tag are "
        "left alone",
    ),
    Setting("disk_sku", "kind of managed disk: Standard_LRS, StandardSSD_LRS, Premium_LRS", default="StandardSSD_LRS"),
    Setting(
        "repair",
        "`on`: prepare Linux systems to boot in Azure, on the disk of the new machine, never in "
        "a recovery point; `off`: the new disks are byte-for-byte copies of the recovery point",
        default="on",
    ),
    Setting("management_url", "management endpoint, for clouds other than the public one", default=_MANAGEMENT),
    Setting("authority", "sign-in endpoint, for clouds other than the public one"),
    Setting("ca_file", "CA certificates for the endpoints above, where they are not publicly trusted"),
)


@attrs.frozen
class Network:
    """A subnet, and what a card in it gets. `group`: its resource group, empty for the site's own."""

    name: str
    group: str
    vnet: str
    subnet: str
    public: bool = False
    security_group: str = ""


@attrs.frozen
class SizeRule:
    """The size of one machine, by its name."""

    machine: str
    size: str


@attrs.frozen
class SiteSettings:
    """`subscription` empty: a site that keeps replicas and runs no machine."""

    account_url: str
    container: str
    account_key: str = attrs.field(default="", repr=False)
    subscription: str = ""
    resource_group: str = ""
    location: str = ""
    tenant: str = ""
    client_id: str = ""
    client_secret: str = attrs.field(default="", repr=False)
    networks: tuple[Network, ...] = ()
    sizes: tuple[str, ...] = ()
    size_rules: tuple[SizeRule, ...] = ()
    owner: str = ""
    disk_sku: str = "StandardSSD_LRS"
    repair: bool = True
    management_url: str = _MANAGEMENT
    authority: str = ""
    ca_file: str = ""

    @property
    def runs_machines(self) -> bool:
        """Whether the site can be failed over to."""
        return bool(self.subscription)

    def network(self, name: str) -> Network | None:
        """The network of that name, or None."""
        return next((item for item in self.networks if item.name == name), None)

    @classmethod
    def parse(cls, settings: Mapping[str, str]) -> SiteSettings:
        """Raises InvalidSetting for a missing or malformed one; `asrcore.plugins` has refused unknown names."""
        given = {setting.name: setting.default for setting in SETTINGS}
        given |= {name: value.strip() for name, value in settings.items() if value.strip()}
        _endpoint("account_url", given["account_url"])
        _endpoint("management_url", given["management_url"])
        if given["authority"]:
            _endpoint("authority", given["authority"])
        _container(given["container"])
        if given["owner"] and not _OWNER.fullmatch(given["owner"]):
            raise _invalid("owner", f"{given['owner']!r} is not 1 to 16 small letters and digits")
        if given["subscription"]:
            for name in ("resource_group", "location"):
                if not given[name]:
                    raise _invalid(name, "is required where `subscription` is set")
        if given["repair"] not in ("on", "off"):
            raise _invalid("repair", f"{given['repair']!r} is neither `on` nor `off`")
        if any(given[name] for name in ("tenant", "client_id", "client_secret")):
            for name in ("tenant", "client_id", "client_secret"):
                if not given[name]:
                    raise _invalid(name, "`tenant`, `client_id` and `client_secret` are given together or not at all")
        if given["ca_file"] and not Path(given["ca_file"]).is_file():
            raise _invalid("ca_file", f"there is no file {given['ca_file']!r}")
        return cls(
            account_url=given["account_url"].rstrip("/"),
            container=given["container"],
            account_key=given["account_key"],
            subscription=given["subscription"],
            resource_group=given["resource_group"],
            location=given["location"].lower().replace(" ", ""),
            tenant=given["tenant"],
            client_id=given["client_id"],
            client_secret=given["client_secret"],
            networks=tuple(_network(item) for item in _items(given["networks"], ";")),
            sizes=tuple(_items(given["sizes"], ",")),
            size_rules=tuple(_rule(item) for item in _items(given["size_rules"], ";")),
            owner=given["owner"],
            disk_sku=given["disk_sku"],
            repair=given["repair"] == "on",
            management_url=given["management_url"].rstrip("/"),
            authority=given["authority"].rstrip("/"),
            ca_file=given["ca_file"],
        )


def _invalid(setting: str, problem: str) -> InvalidSetting:
    return InvalidSetting(driver=DRIVER, setting=setting, problem=problem)


def _items(text: str, separator: str) -> list[str]:
    return [item.strip() for item in text.split(separator) if item.strip()]


def _endpoint(setting: str, text: str) -> None:
    if not text:
        raise _invalid(setting, "is required")
    url = urlsplit(text)
    local = url.hostname in ("127.0.0.1", "::1", "localhost")
    if not url.hostname or url.query or url.fragment or not (url.scheme == "https" or (url.scheme == "http" and local)):
        raise _invalid(setting, f"{text!r} is not an https URL (http is accepted for this host only)")


def _container(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise _invalid("container", f"{name!r} is not 3 to 63 lower-case letters, digits and `-`")
    if name.startswith(PROBES):
        raise _invalid("container", f"names that begin with {PROBES!r} are reserved for probes")


def _network(text: str) -> Network:
    name, _, rest = text.partition("=")
    path, *options = _items(rest, "+") or [""]
    parts = path.split("/")
    if not name.strip() or len(parts) not in (2, 3) or not all(parts):
        raise _invalid("networks", f"{text!r} is not NAME=VNET/SUBNET or NAME=GROUP/VNET/SUBNET")
    public, group = False, ""
    for option in options:
        if option == "public":
            public = True
        elif option.startswith("nsg:") and len(option) > len("nsg:"):
            group = option.removeprefix("nsg:")
        else:
            raise _invalid("networks", f"{option!r} in {text!r} is neither `public` nor `nsg:NAME`")
    return Network(name.strip(), parts[0] if len(parts) == 3 else "", parts[-2], parts[-1], public, group)


def _rule(text: str) -> SizeRule:
    machine, _, size = text.partition("=")
    if not machine.strip() or not size.strip():
        raise _invalid("size_rules", f"{text!r} is not MACHINE=SIZE")
    return SizeRule(machine.strip(), size.strip())
