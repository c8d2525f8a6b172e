"""Which machines are resumed after an I/O error, without a hypervisor."""

from __future__ import annotations

from typing import cast

import libvirt
import pytest

from asr_driver_libvirt.host import stalled

RUNNING = [libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_RUNNING_UNPAUSED]
FAILED = [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR]
BY_USER = [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_USER]
NO_SPACE = libvirt.VIR_DOMAIN_DISK_ERROR_NO_SPACE
EIO = libvirt.VIR_DOMAIN_DISK_ERROR_UNSPEC


class Domain:
    """As libvirt shows one: its state, what its disks report, and what is in its metadata."""

    def __init__(self, state: list[int], **errors: int) -> None:
        self.now, self.errors = state, errors
        self.marked: str | None = None

    def name(self) -> str:
        return "web1"

    def state(self) -> list[int]:
        return self.now

    def diskErrors(self, _: int) -> dict[str, int]:  # noqa: N802 - libvirt's
        return self.errors

    def metadata(self, *_: object) -> str:
        if self.marked is None:
            error = libvirt.libvirtError("no metadata")
            error.err = (libvirt.VIR_ERR_NO_DOMAIN_METADATA, 0, "no", 0, "", "", "", 0, 0)
            raise error
        return self.marked

    def setMetadata(self, _: int, text: str | None, *__: object) -> None:  # noqa: N802
        self.marked = text

    def resume(self) -> None:
        self.now, self.errors = RUNNING, {}

    def fail(self, **errors: int) -> None:
        self.now, self.errors = FAILED, errors


def given(domain: Domain) -> libvirt.virDomain:
    return cast(libvirt.virDomain, domain)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stalled, "_HOLDS_SECONDS", 0.0)


@pytest.fixture
def claimed() -> Domain:
    made = Domain(FAILED, vda=NO_SPACE)
    assert stalled.claim(given(made), "asr-v1")
    return made


def test_a_machine_that_a_view_stopped_is_resumed(claimed: Domain) -> None:
    assert stalled.resume(given(claimed), "")
    assert claimed.now == RUNNING
    assert claimed.marked is None


def test_the_mark_of_a_machine_that_its_user_resumed_is_deleted(claimed: Domain) -> None:
    claimed.resume()
    assert not stalled.resume(given(claimed), "")
    assert claimed.marked is None
    claimed.fail(vda=NO_SPACE)  # the disk's own file system is full: no view is open
    assert not stalled.resume(given(claimed), "")
    assert claimed.now == FAILED


@pytest.mark.parametrize("errors", [{"vda": EIO}, {"vda": NO_SPACE, "vdb": EIO}, {}])
def test_a_machine_that_another_error_stopped_since_is_left_alone(claimed: Domain, errors: dict[str, int]) -> None:
    claimed.resume()
    claimed.fail(**errors)
    assert not stalled.resume(given(claimed), "")
    assert claimed.now == FAILED
    assert claimed.marked is None
    stalled.note(given(claimed), "asr-v2")
    claimed.errors = {"vda": NO_SPACE}
    assert not stalled.claim(given(claimed), "asr-v2"), "it was paused before that view"


def test_an_error_of_a_failing_disk_is_not_taken_for_the_view() -> None:
    other = Domain(FAILED, vda=NO_SPACE, vdb=EIO)
    assert not stalled.claim(given(other), "asr-v1")
    assert other.marked is None


def test_one_that_its_user_paused_stays_so(claimed: Domain) -> None:
    claimed.now = BY_USER
    assert not stalled.resume(given(claimed), "")
    assert claimed.now == BY_USER
