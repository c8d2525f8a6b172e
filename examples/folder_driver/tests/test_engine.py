"""The driver under a real engine: there, and home again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import asr_driver_folder.plugin
import pytest
from asr_driver_folder.replica import FolderWriter
from rig import make_machine, write
from worker import content

import asrcore
from asrcore.driver import SealSpec, StoredPoint
from asrcore.errors import SiteUnreachable, TrackingLost
from asrcore.model.machine import Firmware, Machine
from asrcore.model.point import Consistency
from asrcore.model.state import State
from asrcore.units import KiB, MiB


def plugins() -> asrcore.plugins.Plugins:
    found = asrcore.load_plugins()
    if "folder" not in found.drivers:  # else the package is installed
        assert found.register("folder", asr_driver_folder.plugin)
    return found


@pytest.fixture
def vault(tmp_path: Path) -> str:
    """Of a running machine that is protected."""
    vault = str(tmp_path / "vault.db")
    for site in ("home", "away"):
        (tmp_path / site).mkdir()
    machine = make_machine(tmp_path / "home", Machine("web1", "web1", 1, 0, Firmware.BIOS, ()), {"vda": 4 * MiB})
    (machine / "running").touch()
    with asrcore.Engine.create(vault, plugins()) as engine:
        engine.add_site("alpha", "folder", {"path": str(tmp_path / "home")})
        engine.add_site("beta", "folder", {"path": str(tmp_path / "away")})
        engine.vault.add_policy(asrcore.Policy("gold", interval=5.0, point_interval=5.0))
        engine.wait(engine.protect("web1", source="alpha", target="beta", policy="gold"))
    return vault


def test_there_and_home_again(vault: str, tmp_path: Path) -> None:
    home, away = tmp_path / "home" / "web1", tmp_path / "away" / "web1"
    with asrcore.Engine.open(vault, plugins()) as engine:
        write(home / "vda.raw", MiB, b"an order")
        done = json.loads(engine.wait(engine.replicate("web1")).result or "{}")
        assert 0 < done["bytes_sent"] <= 64 * KiB, "one block has changed since the mark"
        assert json.loads(engine.wait(engine.verify("web1")).result or "{}")["equal"]
        engine.wait(engine.failover_test("web1"))
        engine.wait(engine.failover_cleanup("web1"))

        write(home / "vda.raw", 2 * MiB, b"the last order")
        engine.wait(engine.failover_planned("web1"))
        assert content(away) == content(home), "nothing is lost"
        assert (away / "running").exists()
        assert not (home / "running").exists()
        assert engine.points("web1")[-1].consistency is Consistency.OFFLINE
        engine.wait(engine.failover_undo("web1"))
        assert (home / "running").exists()
        assert not away.exists()

        engine.wait(engine.failover_unplanned("web1"))
        engine.wait(engine.failover_commit("web1"))
        write(away / "vda.raw", 3 * MiB, b"an order at beta")
        done = json.loads(engine.wait(engine.reprotect("web1")).result or "{}")
        assert 0 < done["bytes_sent"] <= 128 * KiB, "the disks at home were the first content: differences are sent"
        engine.wait(engine.failover_planned("web1"))
        assert content(home) == content(away)
        assert (home / "vda.raw").read_bytes()[3 * MiB :].startswith(b"an order at beta")


def test_a_lost_mark_leads_to_a_comparison(vault: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    with asrcore.Engine.open(vault, plugins()) as engine:
        write(home / "web1" / "vda.raw", MiB, b"an order")
        shutil.rmtree(home / ".asr" / "snapshots" / "web1")
        with pytest.raises(TrackingLost):
            engine.wait(engine.replicate("web1"))
        assert engine.status()[0].protection.state is State.RESYNC_PENDING
        job = engine.resync("web1", now=True)
        assert job is not None
        done = json.loads(engine.wait(job).result or "{}")
        assert 0 < done["bytes_sent"] <= 64 * KiB, "one block differs"
        assert json.loads(engine.wait(engine.verify("web1")).result or "{}")["equal"]


def test_a_view_of_before_the_stop_is_not_the_last_delta(
    vault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cycle failed and is pending. What the machine writes afterwards must not be lost by resuming its view."""

    def cut(writer: FolderWriter, spec: SealSpec) -> StoredPoint:
        raise SiteUnreachable(site="beta", detail="the link is cut")

    home, away = tmp_path / "home" / "web1", tmp_path / "away" / "web1"
    with asrcore.Engine.open(vault, plugins()) as engine:
        write(home / "vda.raw", MiB, b"an order")
        with monkeypatch.context() as patched:
            patched.setattr(FolderWriter, "seal", cut)
            with pytest.raises(SiteUnreachable):
                engine.wait(engine.replicate("web1"))
        write(home / "vda.raw", 2 * MiB, b"the last order")
        engine.wait(engine.failover_planned("web1"))
        assert content(away) == content(home)
