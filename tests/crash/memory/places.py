"""Named places of each chapter, as committed in `places.txt`; `python -m tests.crash.memory.places` writes it anew."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

from tests.crash.memory._scenario import CHAPTERS
from tests.crash.memory._workers import Story, Workers

__all__ = ["cases", "committed", "render"]

FILE = Path(__file__).with_name("places.txt")

# What is the same moment wherever it comes is killed in the first chapter that has it, not in all of them: what every
# job does alike, and the ends of calls that the engine names itself right after.
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
    "vault.begin-cycle.",
    "vault.forget-points.",
    "vault.mark-dropping.",
    "vault.record-point.",
    "vault.start-reverse.",
    "vault.transition.written",
    "vault.update-job.",
    "vault.update.written",
)
# Reached again and again within a cycle or a job: killed the second time, too.
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
# The same way in the other direction: only what moves the machine is killed again.
_MIRRORED = {"back": ("failover.",), "commit-back": ("failover.", "commit."),
             "reprotect-back": ("reprotect.",)}  # fmt: skip


def render(found: dict[str, list[str]]) -> str:
    """Sorted, one section a chapter; `x2` marks what is reached more than once: how often, the threads decide."""
    lines = []
    for chapter, names in found.items():
        lines.append(f"[{chapter}]")
        counted = Counter(names)
        lines += sorted(f"{name} x2" if name in _LOOPS and counted[name] > 1 else name for name in counted)
        lines.append("")
    return "\n".join(lines)


def committed() -> dict[str, dict[str, int]]:
    """Per chapter the places, and how often each is reached at least."""
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
    """Tell the story undisturbed and write down what it reaches."""
    with tempfile.TemporaryDirectory() as base, Workers(1) as lanes:
        story = Story(Path(base), lanes)
        FILE.write_text(render({name: story.places(name) for name in CHAPTERS}))


if __name__ == "__main__":
    main()
