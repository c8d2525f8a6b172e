"""A point records the consistency that was reached, not the one that was requested."""

from __future__ import annotations

import pytest

from tests.system.rig import Rig, wait_for

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]


def test_filesystem_consistency_with_and_without_the_agent(rig: Rig) -> None:
    lab, name = rig.lab, rig.guest("frozen", rate=20)
    rig.engine("add_policy", "quiet", consistency="filesystem")
    rig.protect(name, policy="quiet")
    rig.rows(name, 5)
    frozen = rig.replicate(name)
    assert frozen["consistency"] == "filesystem"
    rig.rows(name, 5)  # it was thawed

    lab.command("a", name, "kill $(pidof qemu-ga)")
    agent = "org.qemu.guest_agent.0' state='connected'"
    wait_for(
        lambda: agent not in lab.sites["a"].virsh("dumpxml", name).stdout, "libvirt reports the agent as disconnected"
    )
    without = rig.replicate(name)
    assert without["consistency"] == "crash"
    rig.rows(name, 5)

    said = {point["id"]: point["consistency"] for point in rig.engine("points", name)}
    assert said[frozen["point"]] == "filesystem"
    assert said[without["point"]] == "crash"
    with rig.tested(name, frozen["point"]) as console:
        assert console.audits[-1].intact
        assert console.audits[-1].rows > 0
    codes = {item["code"] for item in rig.engine("readiness", name, source="a", target="xfs", policy="quiet")}
    assert "guest-agent-missing" in codes
    rig.forget(name)
