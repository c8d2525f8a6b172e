"""Which process server works on which machine: a pure function of servers and placements."""

from __future__ import annotations

import math
from collections.abc import Sequence

from asrcore.model.server import AT_TARGET, Placement, Server

__all__ = ["SLACK", "assign", "reached"]

SLACK = 0.1
"""Servers count as balanced while the busiest has less than a tenth more than another: a move interrupts work."""


def assign(servers: Sequence[Server], machines: Sequence[Placement]) -> dict[str, str]:
    """The changes to make: machine -> session of its new server.

    A machine stays where it is while that server is alive and reaches both of its sites. The others are given to the
    server with the fewest machines, first those that few servers can take. A machine that no server can take is left
    as it is. Idle machines are moved when servers are not balanced.

    Where the job of a machine needs its target only, as an unplanned failover does, a server that reaches the target
    can take it if no living one reaches both: the source's site may be lost.
    """
    living = [server for server in servers if server.alive]
    load = {server.session: 0 for server in living}
    able = {item.machine: _able(living, item) for item in machines}
    stay, orphans = [], []
    for item in machines:
        if any(server.session == item.session for server in able[item.machine]):
            load[str(item.session)] += 1
            stay.append(item)
        elif able[item.machine]:
            orphans.append(item)

    def idlest(item: Placement) -> str:
        return min(able[item.machine], key=lambda server: (load[server.session], server.name)).session

    changes = {}
    for item in sorted(orphans, key=lambda item: (len(able[item.machine]), item.machine)):
        changes[item.machine] = idlest(item)
        load[changes[item.machine]] += 1
    for item in sorted(stay, key=lambda item: item.machine):
        here, there = str(item.session), idlest(item)
        if not item.busy and load[here] - load[there] >= max(2, math.ceil(SLACK * load[here])):
            changes[item.machine] = there
            load[here] -= 1
            load[there] += 1
    return changes


def _able(living: Sequence[Server], item: Placement) -> list[Server]:
    both = [one for one in living if one.reaches(item.source_site, item.target_site)]
    if both or not item.target_suffices:
        return both
    return [one for one in living if one.reaches(item.target_site)]


def reached(kind: str, source: str, target: str) -> tuple[str, ...]:
    """The sites that a server must reach for a job of this kind."""
    return (target,) if kind in AT_TARGET else (source, target)
