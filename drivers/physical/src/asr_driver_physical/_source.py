"""The source role: servers that are read through their agents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from asr_driver_physical import _readiness, _view
from asrcore.driver import FrozenView, Source, ViewRequest
from asrcore.errors import UnsupportedOperation
from asrcore.model.finding import Finding
from asrcore.model.point import Consistency, Mark
from asrcore.model.policy import Policy

if TYPE_CHECKING:
    from asr_driver_physical._site import PhysicalSite

__all__ = ["PhysicalSource"]


class PhysicalSource(Source):
    """Of one site."""

    def __init__(self, site: PhysicalSite) -> None:
        self._site = site

    def findings(self, machine_id: str, policy: Policy) -> list[Finding]:
        """What the agent finds now. Raises MachineNotFound, SiteUnreachable."""
        server = self._site.server(machine_id)
        facts, _ = self._site.gateway.call(server.name, "readiness", {})
        self._site.note_facts(server.name, facts)
        about_certificate = _readiness.certificate_finding(server.ends)
        return [*_readiness.findings(facts), *([about_certificate] if about_certificate else [])]

    def open_view(
        self, requests: Sequence[ViewRequest], *, consistency: Consistency, freeze_limit: float
    ) -> FrozenView:
        """See Source. A freeze is what makes an instant here, so each consistency is asked for in the same way."""
        if len(requests) != 1:
            raise UnsupportedOperation(driver=self._site.driver, operation="freeze several machines at one instant")
        (request,) = requests
        server = self._site.server(request.machine_id)
        spool = self._site.spool(server.name)
        return _view.open_view(self._site.gateway, spool, server, request.view_id, request.since, freeze_limit)

    def keep_marks(self, machine_id: str, keep: Sequence[Mark]) -> None:
        """See Source."""
        server = self._site.server(machine_id)
        marks = [known for known in map(_view.marks_in, keep) if known is not None]
        if keep and not marks:
            return  # none of them is ours: without any, tracking would end
        if not keep:
            self._site.spool(server.name).clear()
        self._site.gateway.call(server.name, "keep", {"marks": marks})
