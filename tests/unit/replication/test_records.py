"""A resync is answered from what was recorded of the replica; a verification reads it."""

from __future__ import annotations

import pytest

from asrcore.driver import Digest, Replica, digest_of
from asrcore.model.extent import Extent
from asrcore.testing.memory._target import MemoryReplica
from asrcore.units import KiB
from tests.unit.rig import Rig, facts


class Recorded(MemoryReplica):
    """Answers from what was sealed as the head, whatever is there now."""

    hashes_at_target = True
    asked = 0

    def digests(self, disk_id: str, extent: Extent, digest: Digest = Digest.BLAKE3) -> bytes:
        Recorded.asked += 1
        head = self.info().head
        sealed = self._look(lambda replica: replica.point(str(head)).sealed[disk_id])
        return b"".join(
            digest_of(sealed.read(at, 64 * KiB), digest) for at in range(extent.offset, extent.end, 64 * KiB)
        )


@pytest.fixture
def recorded(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Rig:
    """With `web` protected, and a byte of the replica's head that changed since it was written."""
    rig.protect()

    def from_records(self: MemoryReplica) -> Replica:
        return Recorded(self._session, self._id)

    monkeypatch.setattr(MemoryReplica, "from_records", from_records)
    monkeypatch.setattr(Recorded, "asked", 0)
    with rig.away.change() as state:
        state.replicas[rig.protection.replica_id].head["vda"].write(300 * KiB, b"?")
    return rig


def test_a_resync_sends_what_the_source_changed_and_reads_no_replica(
    recorded: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded.machine.write("vda", 5, b"changed")
    recorded.machine.lose_tracking()

    def refused(*_: object) -> None:
        raise AssertionError("the replica was read")

    monkeypatch.setattr(MemoryReplica, "reader", refused)
    result = facts(recorded.engine.resync("web", now=True))
    assert Recorded.asked
    assert result["bytes_sent"] == 64 * KiB
    monkeypatch.undo()
    assert recorded.content() != recorded.truth()  # it is not what finds damage


def test_a_verification_reads_the_replica_and_repairs_it(recorded: Rig) -> None:
    result = facts(recorded.engine.verify("web", repair=True))
    assert not Recorded.asked
    assert result["different_bytes"] == 64 * KiB
    assert recorded.content() == recorded.truth()


def test_a_last_delta_without_tracking_uses_them_too(recorded: Rig) -> None:
    recorded.machine.lose_tracking()
    recorded.engine.failover_planned("web", force_off=True)
    assert Recorded.asked
