"""What a Linux system needs to boot in Azure, as changes of its files: read and planned, nothing is written here.

Each change also works on the source's platform, since the disk may fail back: file systems are named by UUID, consoles
are added, and network settings apply to cards of Azure's hypervisor only. The plan for a repaired system is empty.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import attrs

__all__ = ["DIRECTORIES", "FILES", "FSTAB", "Change", "Guest", "Plan", "plan"]

FSTAB = "/etc/fstab"
MENUS = ("/boot/grub/grub.cfg", "/boot/grub2/grub.cfg")
GRUB_DEFAULTS = "/etc/default/grub"
INTERFACES = "/etc/network/interfaces"
NETWORKD, NETPLAN = "/etc/systemd/network", "/etc/netplan"
FILES = (FSTAB, *MENUS, GRUB_DEFAULTS, INTERFACES)
"""Files that are read."""
DIRECTORIES = (NETWORKD, NETPLAN)
"""Directories whose files are read."""

_NETWORKD_FILE = f"{NETWORKD}/00-asrcore-azure.network"  # the first file that matches a card counts
_NETWORKD_TEXT = (
    "# A card of Azure's hypervisor gets its address from Azure.\n[Match]\nDriver=hv_netvsc\n\n[Network]\nDHCP=yes\n"
)
_IFUPDOWN_TEXT = (
    "\n# In Azure the card is eth0 and gets its address from there.\nallow-hotplug eth0\niface eth0 inet dhcp\n"
)
_CONSOLE = "console=ttyS0,115200n8"
_NAMED = re.compile(r"(/dev/(?:[shv]d[a-z]+|xvd[a-z]+|nvme\d+n\d+p|mmcblk\d+p))(\d+)")
"""Partitions by names that differ under another hypervisor."""
_ENTRY = re.compile(r"^[ \t]*linux(?:16|efi)?[ \t].*$", re.MULTILINE)
_ROOT = re.compile(r"(?<=\sroot=)\S+")
_DEFAULT = re.compile(r'^(GRUB_CMDLINE_LINUX=)(["\']?)(.*?)\2[ \t]*$', re.MULTILINE)
_BY_NAME = re.compile(r"^GRUB_DISABLE_LINUX_UUID=[\"']?true", re.MULTILINE)


@attrs.frozen
class Guest:
    """What was found. `files`: text by path. `root`: number of the root's partition on the first disk. `uuids`: of what
    lies on each partition of that disk, by number."""

    files: Mapping[str, str]
    root: int
    uuids: Mapping[int, str]


@attrs.frozen
class Change:
    """A file's new text, and what changed in it, for people."""

    path: str
    text: str
    what: str


@attrs.frozen
class Plan:
    """`left`: what was not understood and is not changed."""

    changes: tuple[Change, ...]
    left: tuple[str, ...]


def plan(guest: Guest) -> Plan:
    """What to change."""
    changes: list[Change] = []
    left: list[str] = []
    for part in (_fstab, _menu, _defaults, _network):
        part(guest, changes, left)
    return Plan(tuple(changes), tuple(left))


def _prefix(guest: Guest) -> str:
    """The first disk's name at the source, if the root's own entry says it; else empty."""
    fields = [line.split() for line in guest.files[FSTAB].splitlines()]
    names = [line[0] for line in fields if len(line) > 1 and line[1] == "/" and not line[0].startswith("#")]
    names += [found[0] for path in MENUS for entry in _ENTRY.findall(guest.files.get(path, ""))
              if (found := _ROOT.search(entry))]  # fmt: skip
    for name in names:
        found = _NAMED.fullmatch(name)
        if found and int(found[2]) == guest.root:
            return found[1]
    return ""


def _uuid(guest: Guest, name: str) -> str | None:
    """UUID of the partition that has this name at the source, if it is known to be one of the first disk."""
    found = _NAMED.fullmatch(name)
    return guest.uuids.get(int(found[2])) if found and found[1] == _prefix(guest) else None


def _fstab(guest: Guest, changes: list[Change], left: list[str]) -> None:
    lines, named = [], []
    for line in guest.files[FSTAB].splitlines(keepends=True):
        device = line.split(maxsplit=1)[0] if line.strip() else ""
        uuid = _uuid(guest, device)
        lines.append(line.replace(device, f"UUID={uuid}", 1) if uuid else line)
        if uuid:
            named.append(device)
        elif _NAMED.fullmatch(device):
            left.append(f"{FSTAB} names {device}, which may have another name in Azure")
    if named:
        changes.append(Change(FSTAB, "".join(lines), f"{', '.join(named)} by UUID"))


def _menu(guest: Guest, changes: list[Change], left: list[str]) -> None:
    entries = 0
    for path in MENUS:
        done: set[str] = set()

        def repaired(found: re.Match[str], done: set[str] = done) -> str:
            entry = found[0]
            root = _ROOT.search(entry)
            uuid = _uuid(guest, root[0]) if root else None
            if root and uuid:
                entry = entry[: root.start()] + f"UUID={uuid}" + entry[root.end() :]
                done.add("root by UUID")
            if _with_console(entry) != entry:
                entry = _with_console(entry)
                done.add("kernel console on the serial port")
            return entry

        text = guest.files.get(path, "")
        entries += len(_ENTRY.findall(text))
        changed = _ENTRY.sub(repaired, text)
        if done:
            changes.append(Change(path, changed, ", ".join(sorted(done, reverse=True))))
    if not entries:
        left.append("no GRUB menu with kernels on the root file system: root= and console= were not changed")


def _with_console(words: str) -> str:
    """A kernel's command line with a console on the serial port; a screen that was the console stays one."""
    if re.search(r"\bconsole=ttyS0\b", words):
        return words
    consoles = _CONSOLE if re.search(r"\bconsole=", words) else f"console=tty0 {_CONSOLE}"
    return f"{words.rstrip()} {consoles}" if words.strip() else consoles


def _defaults(guest: Guest, changes: list[Change], left: list[str]) -> None:
    """Keeps the changes in the menus that the guest generates later."""
    before = guest.files.get(GRUB_DEFAULTS)
    if before is None:
        return
    found = _DEFAULT.search(before)
    everywhere = " ".join(match[0] for match in re.finditer(r"^GRUB_CMDLINE_LINUX\w*=.*$", before, re.MULTILINE))
    text = before
    if _with_console(everywhere) != everywhere:
        words = found[3] if found else ""
        line = f'GRUB_CMDLINE_LINUX="{_with_console(words)}"'
        text = text[: found.start()] + line + text[found.end() :] if found else f"{text.rstrip()}\n{line}\n"
    text = _BY_NAME.sub(lambda match: f"# by UUID, for Azure: {match[0]}", text)
    if text != before:
        changes.append(Change(GRUB_DEFAULTS, text, "the same for future menus"))


def _network(guest: Guest, changes: list[Change], left: list[str]) -> None:
    files = guest.files
    plans = [text for path, text in files.items() if path.startswith(f"{NETPLAN}/")]
    networkd = any(path.startswith(f"{NETWORKD}/") and path.endswith(".network") for path in files)
    networkd = networkd or (bool(plans) and not any("NetworkManager" in text for text in plans))
    if networkd and files.get(_NETWORKD_FILE) != _NETWORKD_TEXT:
        changes.append(Change(_NETWORKD_FILE, _NETWORKD_TEXT, "DHCP on cards of Azure's hypervisor"))
    interfaces = files.get(INTERFACES)
    if interfaces is None or not re.search(r"^\s*iface\s+(?!lo\b)", interfaces, re.MULTILINE):
        return
    stanza = re.search(r"^\s*iface\s+eth0\s+inet\s+(\w+)", interfaces, re.MULTILINE)
    if stanza is None:
        changes.append(Change(INTERFACES, interfaces.rstrip() + "\n" + _IFUPDOWN_TEXT, "DHCP on eth0"))
    elif stanza[1] != "dhcp":
        left.append(f"{INTERFACES} gives eth0 a fixed address ({stanza[1]})")
