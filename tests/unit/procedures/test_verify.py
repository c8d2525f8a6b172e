"""Verification: what it proves, what it finds, how it resumes after an interruption, and how it repairs."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from asrcore.errors import Cancelled, VerifyFailed
from asrcore.model.extent import Extent, total, union
from asrcore.model.watch import Watch
from asrcore.procedures import verify
from asrcore.procedures.procedure import Arguments, Work
from asrcore.replication import pair, proof
from asrcore.replication.cycle import run_cycle
from asrcore.units import KiB, MiB
from tests.unit.rig import Rig

BLOCK = 64 * KiB
REGION = 256 * KiB


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    monkeypatch.setattr(proof, "REGION", REGION)
    monkeypatch.setattr(pair, "NEAR_WORKERS", 1)  # so that an interruption leaves the regions before it
    monkeypatch.setattr(pair, "NEAR_PIECE", 128 * KiB)
    monkeypatch.setattr(verify, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(verify, "SLICE", 1000.0)
    rig = Rig(tmp_path)
    rig.machine.write("vda", 0, random.Random(7).randbytes(2 * MiB))
    rig.machine.write("vdb", 300 * KiB, b"an island")
    rig.protect()
    yield rig
    rig.engine.close()


class Interrupted(Watch):
    """Cancels itself after this many bytes of verification."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def advance(self, units_done: int) -> None:
        super().advance(units_done)
        if self.work == "verifying" and self.done >= self.after:
            self.cancel()


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[Extent]:
    """Pieces of vda whose content was compared, to be cleared by the test."""
    seen: list[Extent] = []
    honest = pair.Pair.digests

    def digests(self: pair.Pair, piece: Extent) -> tuple[bytes, bytes]:
        if self._view.disk.id == "vda":
            seen.append(piece)
        return honest(self, piece)

    monkeypatch.setattr(pair.Pair, "digests", digests)
    return seen


def run(
    rig: Rig,
    *,
    repair: bool = False,
    sha256: bool = False,
    watch: Watch | None = None,
    facts: dict[str, Any] | None = None,
) -> Work:
    """The step of a job, once; `facts` are those that an interrupted one saved."""
    given = dict(facts or {})
    arguments = Arguments(repair=repair, sha256=sha256)
    work = Work(rig.engine.context, "j1", rig.protection.id, arguments, watch or Watch(), given)
    work.save = lambda: saved.append(json.dumps(result(work)))
    saved: list[str] = []
    work.facts["saved"] = saved
    try:
        verify.VERIFY.steps[0].run(work)
    except (Cancelled, VerifyFailed) as problem:
        work.facts["error"] = problem.code
    return work


def result(work: Work) -> dict[str, Any]:
    return {key: value for key, value in work.facts.items() if key != "saved"}


def damage(rig: Rig, offset: int, data: bytes, disk: str = "vda") -> None:
    """Change the replica's newest content outside the engine."""
    with rig.away.change() as state:
        state.replicas[rig.protection.replica_id].head[disk].write(offset, data)


def digest_of_disk(content: bytes) -> str:
    """The digest as described in docs/reference/cli.md."""
    regions = b""
    for start in range(0, len(content), REGION):
        region = content[start : start + REGION]
        blocks = (region[at : at + BLOCK] for at in range(0, len(region), BLOCK))
        regions += blake3(b"".join(blake3(block).digest(16) for block in blocks)).digest(16)
    return blake3(regions).hexdigest()


def test_digests_are_those_of_the_whole_disks(rig: Rig) -> None:
    rig.machine.grow_disk("vdb", MiB + 5 * KiB + 512)
    found = result(run(rig))
    assert (found["equal"], found["different_bytes"]) == (True, 0)
    for disk in ("vda", "vdb"):
        content = rig.machine.read(disk)
        reported = found["disks"][disk]
        assert reported["source_digest"] == reported["replica_digest"] == digest_of_disk(content)
        assert reported["size"] == len(content)
    assert "proved" not in found


def test_sha256_is_that_of_the_whole_disks(rig: Rig) -> None:
    before = hashlib.sha256(rig.machine.read("vda")).hexdigest()
    found = result(run(rig, sha256=True))["disks"]["vda"]
    assert found["source_sha256"] == found["replica_sha256"] == before
    damage(rig, 5, bytes([rig.machine.read("vda", 5, 1)[0] ^ 1]))
    found = result(run(rig, sha256=True))["disks"]["vda"]
    assert found["source_sha256"] == before != found["replica_sha256"]


def test_holes_at_both_sides_are_not_read(rig: Rig, compared: list[Extent]) -> None:
    rig.machine.discard("vda", 512 * KiB, MiB)
    assert result(run(rig))["equal"]
    assert total(union(compared)) == MiB


@pytest.mark.parametrize("offset", [0, 700 * KiB, 2 * MiB - 1])
def test_one_byte_is_found_and_only_its_block_is_sent_again(rig: Rig, offset: int) -> None:
    before = rig.truth()
    damage(rig, offset, b"\x01" if rig.machine.read("vda", offset, 1) != b"\x01" else b"\x02")
    found = result(run(rig))
    assert found["error"] == "verify-failed"
    assert (found["different_bytes"], found["disks"]["vda"]["different_bytes"]) == (BLOCK, BLOCK)
    assert found["disks"]["vda"]["source_digest"] == digest_of_disk(rig.machine.read("vda"))
    assert found["disks"]["vda"]["source_digest"] != found["disks"]["vda"]["replica_digest"]
    assert found["disks"]["vdb"]["equal"]
    repaired = result(run(rig, repair=True))
    assert repaired["repaired_bytes"] == BLOCK
    assert rig.content(repaired["repaired_point"]) == before
    assert result(run(rig))["equal"]


def test_data_where_the_source_has_a_hole_is_found(rig: Rig) -> None:
    damage(rig, 900 * KiB, b"rubbish", "vdb")
    repaired = result(run(rig, repair=True))
    assert (repaired["different_bytes"], repaired["repaired_bytes"]) == (BLOCK, BLOCK)
    assert rig.content() == rig.truth()


def test_an_interrupted_verification_goes_on(rig: Rig, compared: list[Extent]) -> None:
    first = result(run(rig, watch=Interrupted(MiB)))
    assert first["error"] == "cancelled"
    compared.clear()
    second = result(run(rig, facts=first))
    assert second["equal"]
    assert len(second["points"]) == 2
    assert min(piece.offset for piece in compared) >= MiB - REGION
    assert second["disks"]["vda"]["source_digest"] == digest_of_disk(rig.machine.read("vda"))


def test_what_a_killed_one_saved_is_enough_to_go_on(rig: Rig, compared: list[Extent]) -> None:
    saved = run(rig, watch=Interrupted(MiB)).facts["saved"]
    assert isinstance(saved, list)
    assert len(saved) > 3
    compared.clear()
    assert result(run(rig, facts=json.loads(saved[-1])))["equal"]
    assert total(compared) < 2 * MiB


def test_what_changed_since_is_compared_again(rig: Rig, compared: list[Extent]) -> None:
    """Damage next to a change by the guest, in a verified region: its proof is no longer valid."""
    first = result(run(rig, watch=Interrupted(MiB)))
    rig.machine.write("vda", REGION, b"written by the guest")
    damage(rig, REGION + 2 * BLOCK, b"bad sector")
    compared.clear()
    second = result(run(rig, facts=first))
    assert second["different_bytes"] == BLOCK
    assert Extent(REGION, 128 * KiB) in compared
    assert Extent(0, 128 * KiB) not in compared


def test_a_cycle_in_between_makes_it_start_over(rig: Rig, compared: list[Extent]) -> None:
    first = result(run(rig, watch=Interrupted(MiB)))
    rig.machine.write("vda", 0, b"written by the guest")
    rig.engine.replicate("web")
    compared.clear()
    second = result(run(rig, facts=first))
    assert len(second["points"]) == 1
    assert total(union(compared)) == 2 * MiB


def test_a_disk_that_grew_keeps_what_is_proved_of_it(rig: Rig, compared: list[Extent]) -> None:
    first = result(run(rig, watch=Interrupted(MiB)))
    rig.machine.grow_disk("vda", 2 * MiB + 96 * KiB)
    compared.clear()
    second = result(run(rig, facts=first))
    assert second["equal"]
    assert second["disks"]["vda"]["replica_digest"] == digest_of_disk(rig.machine.read("vda"))
    assert min(piece.offset for piece in compared) >= MiB - REGION


@pytest.fixture
def sliced(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice is one region."""
    assert rig
    monkeypatch.setattr(verify, "SLICE", 0.0)


@pytest.mark.usefixtures("sliced")
def test_recovery_points_go_on_while_a_disk_is_compared(rig: Rig, compared: list[Extent]) -> None:
    found = result(run(rig))
    assert found["equal"]
    assert len(set(found["points"])) == 2 * MiB // REGION, "a region a slice"
    assert total(compared) == 2 * MiB, "a slice compares nothing again"
    assert found["disks"]["vda"]["replica_digest"] == digest_of_disk(rig.machine.read("vda"))


@pytest.mark.usefixtures("sliced")
def test_what_the_guest_writes_between_slices_is_compared_again(
    rig: Rig, compared: list[Extent], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damage in a region that an earlier slice verified is found if the region changes."""
    honest = run_cycle
    cycles = 0

    def then_write(*given: Any, **options: Any) -> Any:
        nonlocal cycles
        done, cycles = honest(*given, **options), cycles + 1
        if cycles == 3:
            rig.machine.write("vda", 0, b"written by the guest")
            damage(rig, BLOCK, b"bad sector")
        return done

    monkeypatch.setattr(verify, "run_cycle", then_write)
    found = result(run(rig))
    assert found["different_bytes"] == BLOCK
    assert total(compared) == 2 * MiB + REGION
    assert found["disks"]["vda"]["source_digest"] == digest_of_disk(rig.machine.read("vda"))


@pytest.mark.usefixtures("sliced")
def test_a_guest_that_writes_everywhere_is_compared_in_one_view_at_last(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = run_cycle

    def then_write(*given: Any, **options: Any) -> Any:
        done = honest(*given, **options)
        for region in range(2 * MiB // REGION):
            rig.machine.write("vda", region * REGION, random.Random(region).randbytes(512))
        return done

    monkeypatch.setattr(verify, "run_cycle", then_write)
    found = result(run(rig))
    assert found["equal"]
    assert len(found["points"]) == 3, "two slices show that it does not end"
