"""Re-protect and failback on memory sites: only differences are sent."""

from __future__ import annotations

import pytest

from asrcore.errors import SiteUnreachable
from asrcore.model.machine import PowerState
from asrcore.model.state import State
from tests.unit.rig import Rig, facts


def test_there_and_back_again_sends_only_differences(protected: Rig) -> None:
    protected.engine.failover_planned("web")
    protected.engine.failover_commit("web")
    assert protected.protection.state is State.COMMITTED
    assert protected.engine.points("web") == []  # the replica and all its points are deleted
    protected.away.machine("web").write("vda", 64 * 1024, b"written at the other site")
    job = protected.engine.reprotect("web")
    assert facts(job)["bytes_sent"] == 64 * 1024  # one block of the comparison
    assert protected.protection.direction.value == "reverse"
    assert protected.content() == protected.truth()
    protected.engine.failover_planned("web")
    assert protected.power("a") is PowerState.RUNNING
    protected.engine.failover_commit("web")
    job = protected.engine.reprotect("web")
    assert facts(job)["bytes_sent"] == 0
    assert protected.protection.direction.value == "forward"
    assert protected.protection.epoch > 4


def test_reprotect_needs_the_former_source(protected: Rig) -> None:
    protected.home.cut()
    protected.engine.failover_unplanned("web")
    protected.engine.failover_commit("web")
    with pytest.raises(SiteUnreachable):
        protected.engine.reprotect("web")
    assert protected.protection.state is State.COMMITTED


def test_a_rebuilt_first_site_gets_everything(protected: Rig) -> None:
    protected.home.cut()
    protected.engine.failover_unplanned("web")
    protected.engine.failover_commit("web")
    protected.home.restore()
    protected.home.remove_machine("web")
    job = protected.engine.reprotect("web")
    assert int(str(facts(job)["bytes_sent"])) > 200_000
    assert protected.content() == protected.truth()
