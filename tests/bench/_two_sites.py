"""asrcore at two sites: an engine at the guest's site, a master target at the other, TLS and compression between
them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import attrs

from tests.bench._cluster import PLACE, Cluster
from tests.bench._stats import Measured
from tests.system.two_sites import master_target, paired, sent_bytes

__all__ = ["APART", "NOT_APART", "two_sites"]

APART = "asrcore, two sites"
"""The contender's name."""
NOT_APART = f"{APART}, and bytes on the wire: too slow for --quick"
PROTECT_SECONDS = 120.0


@contextmanager
def two_sites(field: Cluster, guest: str) -> Iterator[Callable[..., Measured]]:
    """Protect the guest, and yield a function that runs a verb on it to its end. It measures the CPU time of both
    processes and `link_bytes`, the bytes that left the guest's site."""
    with (
        master_target(field.lab, PLACE) as target,
        paired(field.lab, target, "tests.bench._worker") as engine,
    ):
        job = engine("protect", guest, source="a", target="there", policy="still")
        engine("wait", job["id"], PROTECT_SECONDS, timeout=PROTECT_SECONDS + 10)

        def ours(verb: str, **options: object) -> Measured:
            cpu, sent = target.cpu_seconds, sent_bytes(field.lab)
            done = field.measured("measured", verb, guest, worker=engine, **options)
            link = float(sent_bytes(field.lab) - sent)
            spent = done.cpu_seconds + target.cpu_seconds - cpu
            return attrs.evolve(done, cpu_seconds=spent, more={**done.more, "link_bytes": link})

        yield ours
        job = engine("unprotect", guest)
        engine("wait", job["id"], PROTECT_SECONDS, timeout=PROTECT_SECONDS + 10)
