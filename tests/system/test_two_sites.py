"""Each site has a process: an engine at the guests' site, a master target at the replicas' site."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab import Lab
from tests.lab._console import parse_console
from tests.lab._lab import ADDRESSES
from tests.system.engine_process import content_of
from tests.system.rig import MIB, EngineError, EngineProcess, Rig, wait_for
from tests.system.two_sites import MasterTargetProcess, copied_with_cuts, master_target, paired, sent_bytes

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]


@pytest.fixture
def target(lab: Lab) -> Iterator[MasterTargetProcess]:
    with master_target(lab, silence="5s") as made:
        yield made


@pytest.fixture
def engine(lab: Lab, target: MasterTargetProcess) -> Iterator[EngineProcess]:
    with paired(lab, target, nbd=f"tcp:{ADDRESSES['a']}") as made:  # `frozen_cycle` also reads there
        yield made


def test_a_guest_by_way_of_a_master_target(rig: Rig, engine: EngineProcess, target: MasterTargetProcess) -> None:
    """Initial copy with the link cut in the middle of it, a delta, equality, and a test failover that boots."""
    lab, name = rig.lab, rig.guest("apart", rate=2)
    lab.command("a", name, "fill /mnt/lab-scratch/big 0 48")
    lab.slow(40)
    try:
        before = sent_bytes(lab)
        job = engine("protect", name, source="a", target="there", policy="still")
        wait_for(lambda: sent_bytes(lab) > before + 24 * MIB, "half of it is copied")
        lab.cut()
        begun = time.monotonic()
        with pytest.raises(EngineError) as failed:
            engine("wait", job["id"], 60)
        assert failed.value.exit_code == 6
        assert time.monotonic() - begun < 40
        assert engine("points", name) == []
    finally:
        lab.restore()
    before = sent_bytes(lab)
    wait_for(lambda: replicated(engine, name), "the link is restored", timeout=60)
    assert sent_bytes(lab) - before < 40 * MIB, "data that had arrived was sent again"
    lab.command("a", name, "fill /mnt/lab-scratch/more 0 8")
    cycle = engine("frozen_cycle", name)
    assert cycle["mode"] == "delta"
    assert content(rig, engine, name) == cycle["content"]
    assert job_facts(engine, "verify", name)["equal"]
    console = came_up(rig, engine, name)
    assert console.audits[-1].intact
    job_facts(engine, "unprotect", name)
    lab.remove_guest("a", name)
    assert target.peak_rss < 256 * MIB


@pytest.mark.long
def test_a_copy_cut_ten_times_resends_at_most_a_hundredth(
    rig: Rig, engine: EngineProcess, target: MasterTargetProcess, record_property: Callable[[str, object], None]
) -> None:
    """By the link's own counter, against an uninterrupted copy of the same disk; at 100 Mbit/s."""
    uncut, cut = copied_with_cuts(rig, engine, name := "cut-often")
    record_property("resent_ratio", cut / uncut)
    assert uncut > 256 * MIB
    assert cut <= uncut * 1.01, f"{cut / uncut:.4f} times"
    cycle = engine("frozen_cycle", name)
    assert content(rig, engine, name) == cycle["content"]
    job_facts(engine, "unprotect", name)
    rig.lab.remove_guest("a", name)


def job_facts(engine: EngineProcess, verb: str, *arguments: Any, **options: Any) -> dict[str, Any]:
    job = engine(verb, *arguments, **options)
    return dict(engine("wait", job["id"], 90.0))


def replicated(engine: EngineProcess, name: str) -> dict[str, Any] | None:
    try:
        return job_facts(engine, "replicate", name, keep=True)
    except EngineError as error:
        assert error.exit_code == 6  # noqa: PT017 - it takes a while
        return None


def home(rig: Rig, engine: EngineProcess, name: str) -> Path:
    """The replica's directory at site b."""
    return rig.lab.host_path("b", f"/srv/xfs/replicas/{engine('protection', name)['replica_id']}")


def content(rig: Rig, engine: EngineProcess, name: str) -> dict[str, str]:
    """The content of the newest point, as qemu-img reads the replica's files."""
    place = home(rig, engine, name)
    images = json.loads((place / "replica.json").read_text())["points"][-1]["images"]
    return {disk: content_of(str(place / image), "raw") for disk, image in images.items()}


def came_up(rig: Rig, engine: EngineProcess, name: str) -> Any:
    """A test failover whose machine has booted; cleaned up afterwards."""
    consoles = rig.lab.host_path("b", "/srv/console")
    before = set(consoles.glob("*"))
    job_facts(engine, "failover_test", name)
    try:

        def ready() -> Any:
            for path in set(consoles.glob(f"{name}*")) - before:
                console = parse_console(path.read_bytes().decode(errors="replace"))
                if console.ready:
                    return console
            return None

        return wait_for(ready, "the test is up", timeout=90)
    finally:
        job_facts(engine, "failover_cleanup", name)
