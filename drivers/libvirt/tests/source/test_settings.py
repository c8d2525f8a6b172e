"""Settings of a site."""

from __future__ import annotations

from pathlib import Path

import pytest

from asr_driver_libvirt.settings import DEFAULT_PORTS, NbdPlace, SiteSettings
from asrcore.errors import InvalidSetting

LOCAL = "qemu:///system"
REMOTE = "qemu+tls://host.example/system"


@pytest.mark.parametrize(
    ("uri", "local"),
    [
        (LOCAL, True),
        ("qemu+unix:///system", True),
        ("qemu+unix:///system?socket=/run/forwarded.sock", False),
        ("qemu+ssh://root@host/system?keyfile=/k", False),
        ("qemu+tcp://127.0.0.1/system", False),
        ("qemu:///session", True),
    ],
)
def test_files_are_ours_only_where_nothing_is_in_between(uri: str, local: bool) -> None:
    assert SiteSettings.parse({"uri": uri}).local is local


@pytest.mark.parametrize(
    ("uri", "text", "place"),
    [
        (LOCAL, "", NbdPlace()),
        (REMOTE, "", NbdPlace("host.example", *DEFAULT_PORTS)),
        ("qemu+tcp://[fd00::1]:16509/system", "", NbdPlace("fd00::1", *DEFAULT_PORTS)),
        (REMOTE, "unix", NbdPlace()),
        (LOCAL, "unix:/run/asr/", NbdPlace(directory="/run/asr")),
        (LOCAL, "tcp:10.0.0.1", NbdPlace("10.0.0.1", *DEFAULT_PORTS)),
        (LOCAL, "tcp:10.0.0.1:11000", NbdPlace("10.0.0.1", 11000, 11000)),
        (LOCAL, "tcp:[fd00::1]:11000-11010", NbdPlace("fd00::1", 11000, 11010)),
    ],
)
def test_where_disks_are_served(uri: str, text: str, place: NbdPlace) -> None:
    assert SiteSettings.parse({"uri": uri, "nbd": text}).nbd == place


@pytest.mark.parametrize(
    ("settings", "setting"),
    [
        ({}, "uri"),
        ({"uri": "  "}, "uri"),
        ({"uri": "vmware://host"}, "uri"),
        ({"uri": "qemu://"}, "uri"),
        ({"uri": "qemu+tcp://host:port/system"}, "uri"),
        ({"uri": "not a uri"}, "uri"),
        ({"uri": "qemu+tcp://[::1/system"}, "uri"),
        ({"uri": LOCAL, "replica_dir": "relative/path"}, "replica_dir"),
        ({"uri": LOCAL, "scratch_dir": "x"}, "scratch_dir"),
        ({"uri": LOCAL, "scratch_reserve": "much"}, "scratch_reserve"),
        ({"uri": LOCAL, "nbd": "udp:host"}, "nbd"),
        ({"uri": LOCAL, "nbd": "tcp:"}, "nbd"),
        ({"uri": LOCAL, "nbd": "tcp:host:0"}, "nbd"),
        ({"uri": LOCAL, "nbd": "tcp:host:70000"}, "nbd"),
        ({"uri": LOCAL, "nbd": "tcp:host:200-100"}, "nbd"),
        ({"uri": LOCAL, "nbd": "unix:relative"}, "nbd"),
        ({"uri": LOCAL, "nbd_tls": "/nowhere"}, "nbd_tls"),
        ({"uri": LOCAL, "owner": "A b"}, "owner"),
        ({"uri": LOCAL, "owner": "none"}, "owner"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(settings: dict[str, str], setting: str) -> None:
    with pytest.raises(InvalidSetting) as caught:
        SiteSettings.parse(settings)
    assert caught.value.attributes["setting"] == setting


def test_a_password_is_not_shown() -> None:
    settings = SiteSettings.parse({"uri": LOCAL, "user": "u", "password": "secret"})
    assert settings.password == "secret"
    assert "secret" not in repr(settings)


def test_a_directory_is_a_path() -> None:
    assert SiteSettings.parse({"uri": LOCAL, "replica_dir": "/srv/x"}).replica_dir == Path("/srv/x")
