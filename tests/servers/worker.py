"""A process server over memory worlds: `python -m tests.servers.worker URL FOLDER NAME LEASE`.

As `asr process-server` runs it, except for the driver, which also records each point that it sealed.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
from pathlib import Path

from asrcore.driver import Driver, SealSpec, StoredPoint
from asrcore.engine import Engine
from asrcore.errors import ServerReplaced
from asrcore.hookspecs import hookimpl
from asrcore.plugins import Plugins
from asrcore.replication.ids import new_id
from asrcore.service.member import ServerIdentity
from asrcore.testing.memory import MemoryDriver, MemorySite
from asrcore.testing.memory._session import Session
from asrcore.testing.memory._target import MemoryReplica, MemoryTarget, MemoryWriter

GIVEN_UP = 4


class _Writer(MemoryWriter):
    trace: Path
    server: str

    def seal(self, spec: SealSpec) -> StoredPoint:
        with self._session.world.change():  # the world is locked: the lines are in the order of the seals
            stored = super().seal(spec)
            line = {"server": self.server, "replica": self._id, "epoch": self._spec.epoch, "point": stored.id}
            with self.trace.open("a") as file:
                file.write(json.dumps(line) + "\n")
        return stored


class _Replica(MemoryReplica):
    writer_type = _Writer


class _Target(MemoryTarget):
    replica_type = _Replica


class _Site(MemorySite):
    target_type = _Target


class _Driver(MemoryDriver):
    def site(self, session: Session) -> MemorySite:
        return _Site(session)


class _Plugin:
    @hookimpl
    def asr_register_drivers(self) -> list[Driver]:
        return [_Driver()]


def main(url: str, folder: str, name: str, lease: str) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("dbos").setLevel(logging.WARNING)
    _Writer.trace, _Writer.server = Path(folder) / "seals", name
    plugins = Plugins()
    assert plugins.register("memory", _Plugin())
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    with Engine.open(url, plugins) as engine:
        try:
            engine.serve(ServerIdentity(name, new_id("s"), "here", lease=float(lease)), stop)
        except ServerReplaced as problem:
            logging.getLogger(__name__).error("%s", problem)
            sys.exit(GIVEN_UP)


if __name__ == "__main__":
    main(*sys.argv[1:])
