"""The status of master targets: one that serves, and later disappears."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import asrcore
from asrcore.testing import memory
from asrcore.testing.memory import MemoryWorld
from tests.certificates import Authority
from tests.unit.remote.serving import Served


def test_a_master_target_is_reported_up_and_down(tmp_path: Path) -> None:
    authority = Authority()
    target = authority.issue(tmp_path / "target", "master-target", "beta")
    engine_identity = authority.issue(tmp_path / "engine", "process-server")
    home = MemoryWorld("servers-home")
    home.add_machine("web", {"vda": 1 << 20}).start()
    MemoryWorld("servers-away", path=tmp_path / "away")
    served = Served("servers-away", tmp_path / "away", target)
    plugins = asrcore.load_plugins()
    plugins.register("memory", memory)
    try:
        with asrcore.Engine.create(str(tmp_path / "vault.db"), plugins) as engine:
            assert engine.servers() == []
            engine.add_site("a", "memory", {"world": home.name})
            settings = {"address": served.address, "identity": str(engine_identity), "peer": "beta", "silence": "2s"}
            engine.add_site("there", "remote", settings)
            engine.vault.add_policy(asrcore.Policy("gold"))
            engine.wait(engine.protect("web", source="a", target="there", policy="gold"))
            (up,) = [item for item in engine.servers() if item.role == "master-target"]
            assert (up.name, up.where, up.sites, up.up) == ("beta", served.address, ("there",), True)
            assert (up.version, up.machines, up.error) == (version("asrcore"), 1, None)
            served.stop()
            (down,) = [item for item in engine.servers() if item.role == "master-target"]
            (last,) = engine.vault.last_cycles().values()
            assert (down.up, down.version, down.machines) == (False, "", 1)
            assert down.seen_at == last.sealed_at, "when something last arrived there"
            assert down.error is not None
            assert down.document()["error"]["code"] == down.error.code == "site-unreachable"
    finally:
        served.stop()
