"""What a freeze by the guest's agent obtained."""

from __future__ import annotations

from typing import Any

import pytest

from asr_driver_libvirt.source.guest_agent import GuestFreeze
from asrcore.model.point import Consistency


class Agent:
    """A domain whose agent answers `guest-fsfreeze-freeze` with a number of file systems, as libvirt passes it on."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.calls: list[str] = []

    def agentSetResponseTimeout(self, seconds: int, flags: int) -> int:  # noqa: N802 - libvirt's name
        return 0

    def fsFreeze(self) -> int:  # noqa: N802 - libvirt's name
        self.calls.append("freeze")
        return self.count

    def fsThaw(self) -> int:  # noqa: N802 - libvirt's name
        self.calls.append("thaw")
        return self.count


@pytest.mark.parametrize(("count", "obtained"), [(2, Consistency.FILESYSTEM), (0, Consistency.CRASH)])
def test_a_freeze_of_no_file_system_is_crash_consistency(count: int, obtained: Consistency) -> None:
    domain: Any = Agent(count)
    with GuestFreeze(domain, Consistency.FILESYSTEM, 10.0, agent=True) as freeze:
        assert freeze.expected() is obtained
    assert domain.calls == ["freeze", "thaw"]
    assert ("no file system" in freeze.problem) is (obtained is Consistency.CRASH)
