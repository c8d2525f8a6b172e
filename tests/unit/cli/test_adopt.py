"""`asr machine adopt`: a person lets the vault record what the target holds."""

from __future__ import annotations

from pathlib import Path

from asrcore.model.machine import PowerState
from asrcore.testing.memory import MemoryWorld
from tests.put_back import put_back, take_copy
from tests.unit.cli.conftest import Asr


def test_a_failover_that_the_vault_does_not_know_is_shown_and_recorded(
    asr: Asr, sites: MemoryWorld, tmp_path: Path
) -> None:
    assert asr("protect", "web", "--from", "a", "--to", "b", "--policy", "gold")[0] == 0
    copy = take_copy(tmp_path / "vault.db", tmp_path / "copy.db")
    assert asr("failover", "unplanned", "web", "--yes")[0] == 0
    put_back(copy, tmp_path / "vault.db")
    code, refused = asr("failover", "unplanned", "web", "--yes")
    assert (code, refused["error"]["code"]) == (4, "vault-behind")
    assert "asr machine adopt web" in refused["error"]["action"]
    plan = asr("machine", "adopt", "web", "--dry-run")[1]["plan"]
    assert any("failed over to b" in effect for effect in plan["effects"])
    assert any("recorded as failed-over" in effect for effect in plan["effects"])
    assert asr("machine", "adopt", "web")[1]["error"]["code"] == "confirmation-needed"
    assert asr("status")[1][0]["state"] == "protected"
    assert asr("machine", "adopt", "web", "--yes")[0] == 0
    assert asr("status")[1][0]["state"] == "failed-over"
    assert asr("failover", "undo", "web", "--yes")[0] == 0
    assert sites.machine("web").value.power is PowerState.RUNNING


def test_where_vault_and_target_agree_nothing_is_recorded(asr: Asr, sites: MemoryWorld) -> None:
    assert asr("protect", "web", "--from", "a", "--to", "b", "--policy", "gold")[0] == 0
    before = asr("status")[1][0]
    assert "agree" in asr("machine", "adopt", "web", "--dry-run")[1]["plan"]["effects"][-1]
    assert asr("machine", "adopt", "web")[0] == 0
    after = asr("status")[1][0]
    assert (after["state"], after["epoch"], after["points"]) == (before["state"], before["epoch"], before["points"])
