"""What is ended of a machine that may have been started to be held, without a hypervisor."""

from __future__ import annotations

from typing import Any, cast

import libvirt
import pytest

from asr_driver_libvirt.host.connection import LibvirtHost
from asr_driver_libvirt.settings import SiteSettings
from asr_driver_libvirt.source import left_over

PAUSED = libvirt.VIR_DOMAIN_PAUSED
BY_USER = libvirt.VIR_DOMAIN_PAUSED_USER
MS = 1_000_000


def failure(code: int) -> libvirt.libvirtError:
    error = libvirt.libvirtError("no")
    error.err = (code, 0, "no", 0, "", "", "", 0, 0)
    return error


class Domain:
    """A machine without a backup job and without a mark."""

    def __init__(self, state: int, reason: int, *times: int) -> None:
        self._state = [state, reason]
        self._times = times
        self.active = True

    def isActive(self) -> bool:  # noqa: N802 - libvirt's
        return self.active

    def backupGetXMLDesc(self, _: int) -> str:  # noqa: N802
        raise failure(libvirt.VIR_ERR_NO_DOMAIN_BACKUP)

    def metadata(self, *_: object) -> str:
        raise failure(libvirt.VIR_ERR_NO_DOMAIN_METADATA)

    def state(self) -> list[int]:
        return self._state

    def vcpus(self) -> tuple[list[tuple[int, int, int, int]], list[Any]]:
        return [(number, 1, time, 0) for number, time in enumerate(self._times)], []

    def destroy(self) -> None:
        self.active = False


def end(domain: Domain) -> str:
    host = LibvirtHost("a", SiteSettings.parse({"uri": "qemu:///system"}))
    return left_over.end(host, cast(libvirt.virDomain, domain), "", held=True, starting=True)


@pytest.mark.parametrize(
    "domain",
    [Domain(PAUSED, libvirt.VIR_DOMAIN_PAUSED_STARTING_UP), Domain(PAUSED, BY_USER, 0, 10 * MS)],
    ids=["starts", "started"],
)
def test_a_machine_that_was_started_and_has_not_run_is_stopped(domain: Domain) -> None:
    assert end(domain) == "stopped the machine"
    assert not domain.active


@pytest.mark.parametrize(
    "domain",
    [
        Domain(PAUSED, BY_USER, 0, 200 * MS),
        Domain(PAUSED, libvirt.VIR_DOMAIN_PAUSED_MIGRATION, 0),
        Domain(PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR, 0),
        Domain(libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_RUNNING_BOOTED, 0),
    ],
    ids=["paused", "migrates", "failed", "runs"],
)
def test_a_machine_that_its_user_started_meanwhile_is_left_alone(domain: Domain) -> None:
    assert end(domain) == ""
    assert domain.active
