"""Crash points of each chapter, as committed in `places.txt`; `python -m tests.crash.memory.places` regenerates it."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

from tests.crash.memory._scenario import CHAPTERS
from tests.crash.memory._workers import Story, Workers

__all__ = ["cases", "committed", "render"]

FILE = Path(__file__).with_name("places.txt")

# A place that is the same moment in every chapter is killed only in the first chapter that has it: what every job does
# in the same way, and the ends of calls right after which the engine has its own crash point.
_ALIKE = (
    "inventory.powered-",
    "job.",
    "jobs.",
    "source.",
    "target.created",
    "target.cycle.opened",
    "target.points.dropped",
    "target.seal.applied",
    "target.flushed",
    "vault.add-",
    "vault.begin-incarnation.",
    "vault.begin-cycle.",
    "vault.forget-points.",
    "vault.mark-dropping.",
    "vault.record-point.",
    "vault.start-reverse.",
    "vault.transition.written",
    "vault.update-job.",
    "vault.update.written",
)
# Reached repeatedly within a cycle or a job: also killed the second time.
_LOOPS = (
    "cycle.disk-copied",
    "cycle.flushed",
    "cycle.recorded",
    "cycle.sealed",
    "target.flush",
    "target.seal.commit",
    "vault.transition.committed",
    "vault.update.committed",
)
# The same in the other direction: only what moves the machine is killed again.
_MIRRORED = {"back": ("failover.",), "commit-back": ("failover.", "commit."),
             "reprotect-back": ("reprotect.",)}  # fmt: skip


def render(found: dict[str, list[str]]) -> str:
    """Sorted, one section per chapter; `x2` marks places reached more than once; how often depends on the threads."""
    lines = []
    for chapter, names in found.items():
        lines.append(f"[{chapter}]")
        counted = Counter(names)
        lines += sorted(f"{name} x2" if name in _LOOPS and counted[name] > 1 else name for name in counted)
        lines.append("")
    return "\n".join(lines)


def committed() -> dict[str, dict[str, int]]:
    """Per chapter the places, with the minimum number of times each is reached."""
    result: dict[str, dict[str, int]] = {}
    for line in FILE.read_text().splitlines():
        if line.startswith("["):
            places = result.setdefault(line.strip("[]"), {})
        elif line:
            name, _, count = line.partition(" x")
            places[name] = int(count or 1)
    return result


def cases() -> list[tuple[str, str]]:
    """Chapter and place of every kill."""
    result = []
    seen: set[str] = set()
    for chapter, places in committed().items():
        for name, count in places.items():
            if name in seen and (name.startswith(_ALIKE) or not name.startswith(_MIRRORED.get(chapter, ("",)))):
                continue
            seen.add(name)
            result.append((chapter, name))
            if count > 1:
                result.append((chapter, f"{name}:{count}"))
    return result


def main() -> None:
    """Run the scenario undisturbed and write down the places it reaches."""
    with tempfile.TemporaryDirectory() as base, Workers(1) as lanes:
        story = Story(Path(base), lanes)
        FILE.write_text(render({name: story.places(name) for name in CHAPTERS}))


if __name__ == "__main__":
    main()
