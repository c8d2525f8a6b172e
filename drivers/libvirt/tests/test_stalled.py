"""Which machines that QEMU paused are resumed; without a hypervisor."""

from __future__ import annotations

from typing import Any, cast

import libvirt
import pytest

from asr_driver_libvirt.host import stalled

STOPPED = [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR]
OFF = [libvirt.VIR_DOMAIN_SHUTOFF, 0]
RUNNING = [libvirt.VIR_DOMAIN_RUNNING, 0]


class Domain:
    """A machine at libvirt: its state and its metadata."""

    def __init__(self) -> None:
        self.now, self.text = STOPPED, ""

    def name(self) -> str:
        return "web"

    def state(self) -> list[int]:
        return self.now

    def diskErrors(self, _flags: int) -> dict[str, int]:  # noqa: N802 - libvirt's name
        return {"vda": libvirt.VIR_DOMAIN_DISK_ERROR_NO_SPACE}

    def resume(self) -> None:
        self.now = RUNNING

    def metadata(self, *_: Any) -> str:
        if self.now == OFF:
            raise libvirt.libvirtError("Requested operation is not valid: domain is not running")
        if not self.text:
            error = libvirt.libvirtError("no metadata")
            error.err = (libvirt.VIR_ERR_NO_DOMAIN_METADATA, 0, "no metadata", 0, "", None, None, 0, 0)
            raise error
        return self.text

    def setMetadata(self, _kind: int, text: str | None, *_: Any) -> None:  # noqa: N802 - libvirt's name
        self.text = text or ""


def as_libvirt(domain: Domain) -> libvirt.virDomain:
    return cast("libvirt.virDomain", domain)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stalled, "_HOLDS_SECONDS", 0.0)


def test_a_machine_that_a_view_of_this_vault_stopped_is_resumed() -> None:
    domain = Domain()
    assert stalled.claim(as_libvirt(domain), "asr-v.1c.aaaa")
    assert stalled.resume(as_libvirt(domain), "aaaa")
    assert domain.now == RUNNING
    assert domain.text == ""


def test_a_machine_that_another_vault_stopped_is_left_to_that_vault() -> None:
    domain = Domain()
    assert stalled.claim(as_libvirt(domain), "asr-v.1c.bbbb")
    assert not stalled.resume(as_libvirt(domain), "aaaa")
    stalled.note(as_libvirt(domain), "asr-w.1c.aaaa")
    assert not stalled.claim(as_libvirt(domain), "asr-w.1c.aaaa"), "it was paused before this view"
    assert domain.now == STOPPED


def test_a_machine_that_a_person_resumed_is_not_resumed_after_a_later_error() -> None:
    domain = Domain()
    assert stalled.claim(as_libvirt(domain), "asr-v.1c.aaaa")
    domain.now = RUNNING  # `virsh resume`
    assert not stalled.resume(as_libvirt(domain), "aaaa")
    domain.now = STOPPED  # an error of its own storage
    assert not stalled.resume(as_libvirt(domain), "aaaa")
    assert domain.now == STOPPED


def test_a_machine_that_is_off_by_now_is_no_error() -> None:
    domain = Domain()
    domain.now = OFF
    assert not stalled.resume(as_libvirt(domain), "aaaa")
