"""The definition of a mutant, and the list of mutants."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import attrs

from asrcore.testing.memory import MemoryDriver, MemorySite
from asrcore.testing.memory._failover import MemoryFailover
from asrcore.testing.memory._inventory import MemoryInventory
from asrcore.testing.memory._session import Session
from asrcore.testing.memory._source import MemorySource
from asrcore.testing.memory._target import MemoryReplica, MemoryTarget, MemoryWriter

__all__ = ["MUTANTS", "Mutant", "MutantDriver", "caught_by"]


class MutantDriver(MemoryDriver):
    """The memory driver with some roles replaced."""

    def __init__(
        self,
        *,
        inventory: type[MemoryInventory] = MemoryInventory,
        source: type[MemorySource] = MemorySource,
        target: type[MemoryTarget] = MemoryTarget,
        replica: type[MemoryReplica] = MemoryReplica,
        writer: type[MemoryWriter] = MemoryWriter,
        failover: type[MemoryFailover] = MemoryFailover,
        site: type[MemorySite] = MemorySite,
    ) -> None:
        self._site = site
        replica = type("Replica", (replica,), {"writer_type": writer})
        self._types = {
            "inventory_type": inventory,
            "source_type": source,
            "target_type": type("Target", (target,), {"replica_type": replica}),
            "failover_type": failover,
        }

    def site(self, session: Session) -> MemorySite:
        lost: dict[str, bytes] = session.world.__dict__.pop("lost_at_kill", {})
        with session.world.change() as state:
            for replica_id in lost.keys() & state.replicas.keys():
                state.replicas[replica_id] = pickle.loads(lost[replica_id])
        site: MemorySite = type("Site", (self._site,), self._types)(session)
        return site


@attrs.frozen
class Mutant:
    """A broken driver and the names of exactly those tests of the kit that fail for it. `role`: whose tests are run."""

    name: str
    role: str
    driver: MutantDriver
    caught_by: frozenset[str]
    holds_still: bool = True


MUTANTS: list[Mutant] = []


def caught_by(*tests: str, tried_as: str = "", holds_still: bool = True) -> Callable[[type[Any]], type[Any]]:
    """Register a broken role. `tried_as`: the role whose tests are run, if not its own. Without `holds_still` it is
    tested on machines whose disks have no snapshots."""

    def register(broken: type[Any]) -> type[Any]:
        roles = {
            "inventory": MemoryInventory,
            "source": MemorySource,
            "target": MemoryTarget,
            "replica": MemoryReplica,
            "writer": MemoryWriter,
            "failover": MemoryFailover,
            "site": MemorySite,
        }
        role = next(name for name, kind in roles.items() if issubclass(broken, kind))
        driver = MutantDriver(**{role: broken})
        MUTANTS.append(Mutant(broken.__name__, tried_as or role, driver, frozenset(tests), holds_still))
        return broken

    return register
