"""The source role: servers that are read through their agents."""

from __future__ import annotations

from collections.abc import Sequence

from asr_driver_physical.servers import readiness
from asr_driver_physical.servers.servers import Servers
from asr_driver_physical.source import view
from asrcore.driver import FrozenView, Source, ViewRequest
from asrcore.errors import UnsupportedOperation
from asrcore.model.finding import Finding
from asrcore.model.point import Consistency, Mark
from asrcore.model.policy import Policy

__all__ = ["PhysicalSource"]


class PhysicalSource(Source):
    """Of one site."""

    def __init__(self, servers: Servers) -> None:
        self._servers = servers

    def findings(self, machine_id: str, policy: Policy) -> list[Finding]:
        """Findings from the agent's current facts. Raises MachineNotFound, SiteUnreachable."""
        server = self._servers.server(machine_id)
        reported, _ = self._servers.gateway.call(server.name, "readiness", {})
        facts = self._servers.note_facts(server, reported)
        about_certificate = readiness.certificate_finding(server.ends)
        return [*readiness.findings(facts), *([about_certificate] if about_certificate else [])]

    def open_view(
        self, requests: Sequence[ViewRequest], *, consistency: Consistency, freeze_limit: float
    ) -> FrozenView:
        """See Source. An instant is always taken with a freeze, so each consistency is requested in the same way."""
        if len(requests) != 1:
            raise UnsupportedOperation(driver=self._servers.driver, operation="freeze several machines at one instant")
        (request,) = requests
        server = self._servers.server(request.machine_id)
        spool = self._servers.spool(server.name)
        return view.open_view(self._servers.gateway, spool, server, request.view_id, request.since, freeze_limit)

    def keep_marks(self, machine_id: str, keep: Sequence[Mark]) -> None:
        """See Source."""
        server = self._servers.server(machine_id)
        marks = [known for known in map(view.marks_in, keep) if known is not None]
        if keep and not marks:
            return  # none is this driver's: without any mark, tracking would end
        if not keep:
            self._servers.spool(server.name).clear()
        self._servers.gateway.call(server.name, "keep", {"marks": marks})
