"""Connecting, and libvirt's errors as catalogued errors."""

from __future__ import annotations

import threading
from pathlib import Path

import libvirt
import pytest

from asr_driver_libvirt import doctor
from asr_driver_libvirt.driver import LibvirtDriver
from asr_driver_libvirt.host.errors import translated
from asr_driver_libvirt.host.lifecycle import Lifecycle
from asr_driver_libvirt.site import LibvirtSite
from asrcore.driver import API, Capability
from asrcore.errors import (
    AccessDenied,
    AsrError,
    DriverFailed,
    InvalidSetting,
    MachineNotFound,
    SiteUnreachable,
    TimedOut,
    UnsupportedOperation,
)
from tests.lab import Lab


def error(code: int, text: str) -> libvirt.libvirtError:
    made = libvirt.libvirtError(text)
    made.err = (code, 0, text, 0, "", "", "", 0, 0)
    return made


@pytest.mark.parametrize(
    ("code", "text", "dead", "kind"),
    [
        (libvirt.VIR_ERR_NO_DOMAIN, "no domain", False, MachineNotFound),
        (libvirt.VIR_ERR_AUTH_FAILED, "authentication failed", False, AccessDenied),
        (libvirt.VIR_ERR_AUTH_CANCELLED, "cancelled", True, AccessDenied),
        (libvirt.VIR_ERR_OPERATION_DENIED, "read only access prevents", False, AccessDenied),
        (libvirt.VIR_ERR_SYSTEM_ERROR, "unable to connect to server: Connection refused", True, SiteUnreachable),
        (libvirt.VIR_ERR_SYSTEM_ERROR, "Cannot recv data: root@h: Permission denied (publickey).", True, AccessDenied),
        (libvirt.VIR_ERR_SYSTEM_ERROR, "The certificate is not trusted", True, AccessDenied),
        (libvirt.VIR_ERR_INTERNAL_ERROR, "connection closed due to keepalive timeout", True, SiteUnreachable),
        (libvirt.VIR_ERR_RPC, "broken pipe", False, SiteUnreachable),
        (libvirt.VIR_ERR_OPERATION_TIMEOUT, "cannot acquire state change lock", False, TimedOut),
        (libvirt.VIR_ERR_INTERNAL_ERROR, "QEMU said no: Permission denied", False, DriverFailed),
    ],
)
def test_each_error_is_told_by_its_class(code: int, text: str, dead: bool, kind: type[AsrError]) -> None:
    found = translated(error(code, text), site="s", operation="doing", machine="m", dead=dead)
    assert type(found) is kind


@pytest.mark.parametrize(
    ("uri", "kind"),
    [
        ("qemu+unix:///system?socket=/nowhere/libvirt-sock", SiteUnreachable),
        ("qemu+tcp://127.0.0.1:1/system", SiteUnreachable),
        ("qemu+tcp://no-such-host.invalid/system", SiteUnreachable),
        ("qemu+tls://127.0.0.1:1/system?pkipath=/nowhere", AsrError),
    ],
)
def test_a_host_that_cannot_be_reached(uri: str, kind: type[AsrError]) -> None:
    with pytest.raises(kind) as caught:
        LibvirtDriver().connect("gone", {"uri": uri})
    assert caught.value.attributes["site"] == "gone"


def test_bad_settings_connect_to_nothing() -> None:
    with pytest.raises(InvalidSetting):
        LibvirtDriver().connect("bad", {"uri": "http://x/"})


def test_who_the_driver_is() -> None:
    info = LibvirtDriver.info
    assert (info.name, info.api[0]) == ("libvirt", API[0])
    assert {setting.name for setting in info.settings if setting.required} == {"uri"}
    assert {setting.name for setting in info.settings if setting.secret} == {"password"}


def test_the_doctor_names_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert LibvirtDriver().check_host() == []
    monkeypatch.setenv("PATH", str(tmp_path))
    assert {item.code: item.action for item in doctor.findings()} == {
        "qemu-img-missing": "apt-get install qemu-utils",
        "qemu-nbd-missing": "apt-get install qemu-utils",
    }


def test_waiting_ends_at_the_event_and_at_the_limit() -> None:
    lifecycle = Lifecycle()
    done = threading.Event()

    def later() -> None:
        done.set()
        lifecycle._job_ended()

    threading.Timer(0.05, later).start()
    assert lifecycle.wait(done.is_set, 20)
    assert not lifecycle.wait(lambda: False, 0.05)


def test_stamps_of_another_connection_are_never_equal() -> None:
    assert Lifecycle().stamp("m") != Lifecycle().stamp("m")


@pytest.mark.system
def test_a_site_without_a_replica_directory_is_no_target(site: LibvirtSite) -> None:
    for role in ("target", "failover"):
        with pytest.raises(UnsupportedOperation, match="replica_dir"):
            getattr(site, role)
    assert Capability.TARGET not in site.status().capabilities
    assert Capability.TRACKING in site.status().capabilities


@pytest.mark.system
def test_a_connection_is_made_anew_and_a_closed_site_stays_closed(lab: Lab) -> None:
    def listed() -> list[str]:
        return lab.run_in("a", ["virt-admin", "-q", "srv-clients-list", "libvirtd"]).stdout.split("\n")

    def clients() -> int:
        return len([line for line in listed() if line.strip()])

    def newest() -> str:
        return max((line.split()[0] for line in listed() if line.strip()[:1].isdigit()), key=int)

    before = clients()
    site = LibvirtDriver().connect("a", {"uri": lab.uri("a")})
    assert clients() == before + 1
    site.close()
    assert clients() == before, "although its events were subscribed"
    site = LibvirtDriver().connect("a", {"uri": lab.uri("a")})
    lab.run_in("a", ["virt-admin", "client-disconnect", "libvirtd", newest()])
    assert site.status().version.startswith("libvirt ")
    site.close()
    site.close()
    assert clients() == before
    with pytest.raises(SiteUnreachable):
        site.status()
