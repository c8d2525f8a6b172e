"""The library in 40 lines: protect a machine, verify its replica, list its points, fail over to an older one.

Run it anywhere; the memory driver stands for two real sites. `engine.wait` raises what a job failed with.
"""

from __future__ import annotations

import json
import tempfile

import asrcore
from asrcore.testing import memory
from asrcore.units import MiB, format_time


def main(vault: str) -> None:
    home, away = memory.MemoryWorld("home"), memory.MemoryWorld("away")
    shop = home.add_machine("shop", {"vda": 4 * MiB})
    plugins = asrcore.load_plugins()
    plugins.register("memory", memory)

    with asrcore.Engine.create(vault, plugins) as engine:
        engine.add_site("alpha", "memory", {"world": "home"})
        engine.add_site("beta", "memory", {"world": "away"})
        engine.vault.add_policy(asrcore.Policy("gold", interval=5.0, point_interval=5.0))
        engine.wait(engine.protect("shop", source="alpha", target="beta", policy="gold"))

        shop.write("vda", 0, b"good order")
        engine.wait(engine.replicate("shop", keep=True))
        good = engine.points("shop")[-1]  # oldest first
        shop.write("vda", 0, b"ransomware")
        engine.wait(engine.replicate("shop", keep=True))

        proof = json.loads(engine.wait(engine.verify("shop")).result or "{}")
        print("replica equals source:", proof["equal"])
        for point in engine.points("shop"):
            print(point.id, format_time(point.taken_at), point.consistency.value)

        engine.wait(engine.failover_unplanned("shop", point=good.id))
        print("runs at beta with:", away.machine("shop").read("vda", 0, 10).decode())
        engine.wait(engine.failover_commit("shop"))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(f"{folder}/vault.db")
