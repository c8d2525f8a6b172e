"""An engine in a separate process: one JSON request per input line, one answer per output line.

Run inside a site of the lab, where paths, sockets and addresses are the site's; it can be killed like an engine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Mapping

from blake3 import blake3

from asr_driver_libvirt.driver import LibvirtDriver
from asr_driver_libvirt.site import LibvirtSite
from asrcore.driver import DiskView, FrozenView, MachineView, Tracking, ViewRequest
from asrcore.errors import AsrError
from asrcore.model.point import Consistency, Mark
from asrcore.model.policy import Policy

Answer = dict[str, object]


class Engine:
    """The public methods are the calls that a request may use."""

    def __init__(self, settings: Mapping[str, str]) -> None:
        self._site: LibvirtSite = LibvirtDriver().connect("a", settings)
        self._views: dict[str, FrozenView] = {}

    def open(self, machine: str, view: str, since: str | None = None, consistency: str = "crash") -> Answer:
        mark = None if since is None else Mark(since)
        begun = time.monotonic()
        found = self._site.source.open_view(
            [ViewRequest(machine, view, mark)], consistency=Consistency(consistency), freeze_limit=5.0
        )
        self._views[view] = found
        of = found.machines[machine]
        return {
            "seconds": time.monotonic() - begun,
            "taken_at": found.taken_at,
            "consistency": of.consistency.value,
            "power": of.description.machine.power.value,
            "artifacts": {
                item.name: {"size": len(item.data), "sha256": hashlib.sha256(item.data).hexdigest()}
                for item in of.description.artifacts
            },
            "notices": [item.code for item in of.notices],
            "mark": None if of.mark is None else of.mark.token,
            "disks": {key: self._disk(disk) for key, disk in of.disks.items()},
        }

    def _disk(self, disk: DiskView) -> Answer:
        changed = None
        if disk.tracking is Tracking.CHANGED:
            changed = [[item.offset, item.length, item.zero] for item in disk.changed()]
        return {"size": disk.disk.size, "tracking": disk.tracking.value, "reason": disk.reason, "changed": changed}

    def _machine(self, view: str) -> MachineView:
        return next(iter(self._views[view].machines.values()))

    def hash(self, view: str, disk: str) -> str:
        of = self._machine(view).disks[disk]
        digest, buffer = blake3(), bytearray(4 << 20)
        with of.reader() as reader:
            for offset in range(0, of.disk.size, len(buffer)):
                piece = memoryview(buffer)[: min(len(buffer), of.disk.size - offset)]
                reader.read_into(offset, piece)
                digest.update(piece)
        return digest.hexdigest()

    def read_until_it_fails(self, view: str, disk: str, ready: str) -> Answer:
        of = self._machine(view).disks[disk]
        buffer = memoryview(bytearray(1 << 20))
        with of.reader() as reader:
            while True:
                reader.read_into(0, buffer)
                if ready:
                    print(json.dumps({"result": ready}), flush=True)
                    ready = ""

    def confirm(self, view: str) -> None:
        self._views[view].confirm()

    def close(self, view: str) -> None:
        self._views.pop(view).close()

    def keep(self, machine: str, marks: list[str]) -> None:
        self._site.source.keep_marks(machine, [Mark(mark) for mark in marks])

    def findings(self, machine: str, consistency: str = "crash") -> list[list[str]]:
        policy = Policy("p", consistency=Consistency(consistency))
        return [
            [item.severity.value, item.code, item.what, item.action]
            for item in self._site.source.findings(machine, policy)
        ]

    def machines(self) -> Answer:
        return {machine.name: machine.id for machine in self._site.inventory.machines()}

    def power(self, machine: str) -> str:
        return self._site.inventory.machine(machine).power.value

    def power_on(self, machine: str) -> None:
        self._site.inventory.power_on(machine)

    def power_off(self, machine: str, graceful: bool, timeout: float) -> None:
        self._site.inventory.power_off(machine, graceful=graceful, timeout=timeout)


def main() -> None:
    engine = Engine(json.loads(sys.argv[1]))
    print(json.dumps({"result": "ready"}), flush=True)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        begun = time.monotonic()
        try:
            answer: Answer = {"result": getattr(engine, name)(**arguments)}
        except AsrError as error:
            answer = {"error": error.code, "text": f"{error} {error.action_text}", "seconds": time.monotonic() - begun}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
