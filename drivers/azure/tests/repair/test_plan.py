"""Repair plans: the changes to the files that are found."""

from __future__ import annotations

import pytest

from asr_driver_azure.repair.plan import Guest, plan

ROOT, SWAP = "11111111-2222-3333-4444-555555555555", "99999999-2222-3333-4444-555555555555"
MENU = """\
menuentry 'Debian' {
\tinsmod ext2
\tlinux\t/boot/vmlinuz-6.1 root=/dev/sda1 ro quiet
\tinitrd\t/boot/initrd.img-6.1
}
"""


def made(files: dict[str, str], root: int = 1) -> tuple[dict[str, str], tuple[str, ...]]:
    """The changed files, and what was left. A second plan changes nothing."""
    given = {"/etc/fstab": f"UUID={ROOT} / ext4 defaults 0 1\n"} | files
    guest = Guest(given, root, {1: ROOT, 2: SWAP})
    first = plan(guest)
    changed = {item.path: item.text for item in first.changes}
    assert plan(Guest(given | changed, root, guest.uuids)).changes == ()
    return changed, first.left


@pytest.mark.parametrize("disk", ["/dev/sda", "/dev/vda", "/dev/xvda", "/dev/hda", "/dev/nvme0n1p", "/dev/mmcblk0p"])
def test_fstab_by_uuid(disk: str) -> None:
    before = f"# {disk}1 was here\n{disk}1\t/\text4 defaults 0 1\n{disk}2 none swap sw 0 0\nproc /proc proc\n"
    changed, _ = made({"/etc/fstab": before})
    after = f"# {disk}1 was here\nUUID={ROOT}\t/\text4 defaults 0 1\nUUID={SWAP} none swap sw 0 0\nproc /proc proc\n"
    assert changed["/etc/fstab"] == after


def test_another_disk_is_left() -> None:
    changed, left = made({"/etc/fstab": "/dev/sda1 / ext4\n/dev/sdb1 /srv ext4\n/dev/sda7 /opt ext4\n"})
    assert changed["/etc/fstab"] == f"UUID={ROOT} / ext4\n/dev/sdb1 /srv ext4\n/dev/sda7 /opt ext4\n"
    assert [item for item in left if "sdb1" in item]
    assert [item for item in left if "sda7" in item]


def test_a_root_that_is_elsewhere_tells_nothing() -> None:
    """The partition with this fstab is not the one that the fstab names as root."""
    changed, left = made({"/etc/fstab": "/dev/sda2 / ext4\n/dev/sda1 /boot ext4\n"})
    assert "/etc/fstab" not in changed
    assert len(left) == 3


def test_the_boot_menu() -> None:
    changed, left = made({"/etc/fstab": "/dev/sda1 / ext4\n", "/boot/grub/grub.cfg": MENU})
    wanted = f"root=UUID={ROOT} ro quiet console=tty0 console=ttyS0,115200n8\n"
    assert changed["/boot/grub/grub.cfg"] == MENU.replace("root=/dev/sda1 ro quiet\n", wanted)
    assert left == ()


def test_fstab_by_uuid_and_a_menu_by_name() -> None:
    """The root in the menu identifies the disk."""
    files = {"/boot/grub2/grub.cfg": MENU, "/etc/fstab": f"UUID={ROOT} / ext4\n/dev/sda2 none swap\n"}
    changed, _ = made(files)
    assert f"root=UUID={ROOT} ro" in changed["/boot/grub2/grub.cfg"]
    assert changed["/etc/fstab"] == f"UUID={ROOT} / ext4\nUUID={SWAP} none swap\n"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("root=UUID=x ro console=ttyS0", None),
        ("root=UUID=x ro console=ttyS0,9600", None),
        ("root=/dev/mapper/vg-root ro console=tty1", "root=/dev/mapper/vg-root ro console=tty1 console=ttyS0,115200n8"),
        ("root=LABEL=r ro", "root=LABEL=r ro console=tty0 console=ttyS0,115200n8"),
    ],
)
def test_a_console_is_added_once(before: str, after: str | None) -> None:
    changed, _ = made({"/boot/grub/grub.cfg": f"linux /vmlinuz {before}\n"})
    assert changed.get("/boot/grub/grub.cfg") == (f"linux /vmlinuz {after}\n" if after else None)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('GRUB_CMDLINE_LINUX=""\n', 'GRUB_CMDLINE_LINUX="console=tty0 console=ttyS0,115200n8"\n'),
        ("GRUB_CMDLINE_LINUX='a b'\n", 'GRUB_CMDLINE_LINUX="a b console=tty0 console=ttyS0,115200n8"\n'),
        (
            'GRUB_CMDLINE_LINUX_DEFAULT="quiet"\n',
            'GRUB_CMDLINE_LINUX_DEFAULT="quiet"\nGRUB_CMDLINE_LINUX="console=tty0 console=ttyS0,115200n8"\n',
        ),
        ('GRUB_CMDLINE_LINUX_DEFAULT="console=ttyS0"\nGRUB_CMDLINE_LINUX=""\n', None),
        (
            'GRUB_CMDLINE_LINUX="console=ttyS0"\nGRUB_DISABLE_LINUX_UUID=true\n',
            'GRUB_CMDLINE_LINUX="console=ttyS0"\n# by UUID, for Azure: GRUB_DISABLE_LINUX_UUID=true\n',
        ),
    ],
)
def test_menus_to_come(before: str, after: str | None) -> None:
    changed, _ = made({"/etc/default/grub": before, "/boot/grub/grub.cfg": "linux /v console=ttyS0\n"})
    assert changed.get("/etc/default/grub") == after


def test_no_menu_is_told() -> None:
    _, left = made({})
    assert "no GRUB menu" in left[0]


@pytest.mark.parametrize(
    "files",
    [
        {"/etc/systemd/network/50-lan.network": "[Match]\nName=ens3\n[Network]\nAddress=10.0.0.2/24\n"},
        {"/etc/netplan/01.yaml": "network: {version: 2, renderer: networkd}\n"},
    ],
)
def test_dhcp_for_networkd(files: dict[str, str]) -> None:
    changed, _ = made(files)
    assert list(changed) == ["/etc/systemd/network/00-asrcore-azure.network"]
    text = changed["/etc/systemd/network/00-asrcore-azure.network"]
    assert "Driver=hv_netvsc" in text, "it must not apply at the first site"
    assert "DHCP=yes" in text


def test_network_manager_needs_nothing() -> None:
    assert made({"/etc/netplan/01.yaml": "network: {renderer: NetworkManager}\n"})[0] == {}


def test_dhcp_for_ifupdown() -> None:
    before = "auto lo\niface lo inet loopback\nauto ens3\niface ens3 inet static\n  address 10.0.0.2/24\n"
    changed, _ = made({"/etc/network/interfaces": before})
    after = changed["/etc/network/interfaces"]
    assert after.startswith(before)
    assert "iface eth0 inet dhcp" in after
    assert made({"/etc/network/interfaces": "auto lo\niface lo inet loopback\n"})[0] == {}


def test_an_address_of_its_own_is_left() -> None:
    changed, left = made({"/etc/network/interfaces": "iface eth0 inet static\n  address 10.0.0.2/24\n"})
    assert changed == {}
    assert any("eth0" in item for item in left)
