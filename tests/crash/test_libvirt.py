"""`asr` is killed at its own and the driver's crash points, on real guests, for both kinds of replica.

One scenario per kind, in one test: each chapter starts where the previous one has ended. The two run at the same time,
each in a separate lab, because most of the time is spent waiting.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import attrs
import pytest

from asrcore.model.policy import Rung
from tests.crash._cluster import TARGETS, Asr, Cluster
from tests.lab import Lab

# A guard against hangs: a scenario has 45 kills and a dozen boots, which take 1000 s on a slow processor.
pytestmark = [pytest.mark.system, pytest.mark.crash, pytest.mark.timeout(1800)]

CHAIN = {
    "failover.commit.disk-flattened",
    "target.chain.overlay",
    "target.drop.merge-recorded",
    "target.drop.merged",
    "target.drop.rebased",
}
REFLINK = {"target.keep.cloned"}

ENABLE = [
    "target.created",
    "libvirt.begin",
    "libvirt.begun",
    "cycle.begun",
    "target.flush",
    "target.seal.commit",
    "target.seal.disk-applied",
    "vault.record-point.committed",
]
DELTA = [
    "libvirt.begun",
    "target.flush",
    "target.seal.commit",
    "target.seal.disk-applied:2",
    "target.keep.cloned:2",
    "target.seal.swept",
    "target.chain.overlay",
    "cycle.sealed",
    "libvirt.release",
]
RETENTION = [
    "retention.marked",
    "target.drop.recorded",
    "target.drop.merged",
    "target.drop.rebased",
    "target.drop.merge-recorded",
    "target.drop.done",
]
RESYNC = ["resync.begun", "cycle.disk-copied", "target.seal.commit"]
TEST = ["failover.test.recorded", "failover.test.images", "failover.test.defined", "test.started"]
CLEANUP = ["failover.test.undefined", "failover.test.released"]
PLANNED = [
    "failover.source-stopped",
    "libvirt.held",
    "target.seal.commit",
    "libvirt.fence",
    "failover.promote.held",
    "failover.promote.images",
    "failover.promote.defined",
    "failover.started",
]
UNDO = ["undo.begun", "failover.undo.undefined", "failover.undo.removed", "undo.released"]
COMMIT = ["failover.commit.begun", "failover.commit.disk-flattened", "failover.commit.flattened", "commit.done"]


@pytest.fixture(scope="module")
def stories(request: pytest.FixtureRequest) -> Iterator[Mapping[str, Future[list[str]]]]:
    """Results of the selected kinds."""
    wanted = [
        str(item.callspec.params["kind"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.path == Path(__file__) and hasattr(item, "callspec")
    ]
    with ThreadPoolExecutor(2) as pool:
        yield {kind: pool.submit(tell, kind) for kind in wanted}


def tell(kind: str) -> list[str]:
    """The whole scenario; returns where it was killed, and how long the chapters took."""
    said: list[str] = []
    with Lab(f"test-crash-{kind}") as lab, Asr(lab) as asr:
        assert asr.wait(asr.start("init")) == 0, asr.said()
        asr("site", "add", "a", "--driver", "libvirt", f"--set=uri={lab.sites['a'].remote_uri}")
        place = f"--set=replica_dir={TARGETS[kind]}"
        asr("site", "add", "b", "--driver", "libvirt", "--set=uri=qemu:///system", place)
        # The service only resumes what was interrupted; it starts nothing else automatically.
        asr("policy", "create", "gold", "--interval", "1h", "--point-every", "1h", "--keep", "24h")
        field = Cluster(lab, asr, kind)
        for chapter in (enable, delta, retention, resync, failover_test, failover_planned_and_undone, commit):
            begun = time.monotonic()
            chapter(field)
            said.append(f"{kind}: {chapter.__name__} took {time.monotonic() - begun:.1f} s")
    return [*said, *field.killed_at]


def places(field: Cluster, names: list[str]) -> list[str]:
    other = CHAIN if field.target == "xfs" else REFLINK
    return [name for name in names if name.partition(":")[0] not in other]


def enable(field: Cluster) -> None:
    command = ["protect", "--from", "a", "--to", "b", "--policy", "gold", field.name]
    field.chain(command, places(field, ENABLE))


def delta(field: Cluster) -> None:
    field.live()
    field.chain(["replicate", "--keep", field.name], places(field, DELTA))
    field.verify()


def retention(field: Cluster) -> None:
    """Change the policy to one whose retention immediately keeps only the oldest point of a day."""
    with field.library() as engine:
        policy = engine.vault.policy("gold")
        engine.vault.update_policy(attrs.evolve(policy, ladder=(Rung(0.001, 86400.0),)))
        before = len(engine.points(field.name))
    field.chain(["replicate", "--keep", field.name], places(field, RETENTION))
    with field.library() as engine:
        assert len(engine.points(field.name)) <= 2 < before
        engine.vault.update_policy(policy)


def resync(field: Cluster) -> None:
    field.live()
    field.chain(["resync", "--now", field.name], RESYNC)


def failover_test(field: Cluster) -> None:
    field.chain(["failover", "test", field.name], TEST)
    field.audited("b", boots=1, test=True)
    assert field.lab.state("a", field.name) == "running"
    field.chain(["failover", "cleanup", field.name], CLEANUP)


def failover_planned_and_undone(field: Cluster) -> None:
    field.live()
    boots = len(field.lab.console("a", field.name).ready)
    field.chain(["failover", "planned", field.name, "--yes"], PLANNED)
    down = field.lab.console("a", field.name).down[-1]
    assert field.audited("b", boots=1).last == down.last, "a planned failover loses no data"
    field.chain(["failover", "undo", field.name, "--yes"], UNDO)
    assert field.audited("a", boots=boots + 1).last == down.last
    field.asr("replicate", field.name)
    field.verify()


def commit(field: Cluster) -> None:
    field.asr("failover", "planned", field.name, "--yes")
    down = field.lab.console("a", field.name).down[-1]
    assert field.audited("b", boots=2).last == down.last
    field.chain(["failover", "commit", field.name, "--yes"], places(field, COMMIT))
    last = field.lab.console("b", field.name).last_ack
    assert last is not None
    field.lab.wait_row("b", field.name, last.row + 5)
    field.lab.shutdown("b", field.name)
    field.lab.start("b", field.name)
    assert field.audited("b", boots=3).last >= last.row


@pytest.mark.long
@pytest.mark.parametrize("kind", list(TARGETS))
def test_story(kind: str, stories: Mapping[str, Future[list[str]]]) -> None:
    print("\n".join(stories[kind].result()))


def test_enough_places() -> None:
    """At least twelve that the memory driver does not reach."""
    ours = {*ENABLE, *DELTA, *RETENTION, *TEST, *CLEANUP, *PLANNED, *UNDO, *COMMIT}
    assert (
        len([name for name in ours if not name.startswith(("cycle.", "test.", "undo.", "commit.", "retention."))]) >= 12
    )
