"""Scattered extents over a far link, beside one large read of as many bytes: of a served site, and of an agent."""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.bench._cluster import Cluster
from tests.bench._stats import OURS, Measured, Result, median, ratio
from tests.bench.far import SCATTERED, SINGLE, far

TITLE = "A delta of 3,000 scattered extents of 16 KiB, 10 ms away"
LARGE, AGENT, AGENT_LARGE = "one large read", "from an agent", "one large read from an agent"


def measure(cluster: Cluster) -> Result:
    """Needs no guest: both sources and the link are processes of this host."""
    with far() as place:

        def read(name: str, large: bool) -> Callable[[], Measured]:
            def work() -> Measured:
                before = time.process_time()
                seconds = place.read(name, SINGLE if large else SCATTERED)
                return Measured(seconds, time.process_time() - before)

            return work

        contenders = {
            OURS: read("remote", False),
            LARGE: read("remote", True),
            AGENT: read("agent", False),
            AGENT_LARGE: read("agent", True),
        }
        rounds = cluster.interleave(contenders)
    figures = {
        "far_scattered_vs_single": ratio(rounds, LARGE),
        "far_agent_scattered_vs_single": median(rounds[AGENT_LARGE]) / median(rounds[AGENT]),
    }
    return Result("far", TITLE, rounds, figures)
