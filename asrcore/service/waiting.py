"""What a job waits for that does not move, as a sentence for the person who waits for it."""

from __future__ import annotations

from collections.abc import Sequence

from asrcore.errors import NotFound
from asrcore.model.server import ENGINE, Server
from asrcore.service.assign import reached
from asrcore.vault import Job, JobState, Vault

__all__ = ["waits_for"]


def waits_for(vault: Vault, job: Job) -> str:
    """Empty while a process works on the job, or when it has ended."""
    if job.state.ended:
        return ""
    # Its step names what it waits for in the process that has taken it up.
    begun = job.state is JobState.RUNNING or bool(job.step)
    servers = vault.servers()
    if not servers:
        holder = vault.engine_holder()
        if holder is None:
            services = "`asr run` or `asr process-server`" if vault.shareable else "`asr run`"
            return f"no engine works on the vault; start {services}"
        return "" if begun else f"waiting for {holder}"
    try:
        protection = vault.protection(job.machine)
    except NotFound:  # any of them ends the job of a machine that is no longer protected
        return _none_alive(servers)
    session = vault.assigned().get(protection.id)
    its = next((server for server in servers if server.session == session), None)
    if its is not None and its.alive:
        return "" if begun else f"waiting for {_named(its)}"
    if its is not None and len(servers) > 1 and any(server.alive for server in servers):
        return f"{_named(its)}; another server takes over"
    if none := _none_alive(servers):
        return none
    sites = reached(job.kind, protection.source_site, protection.target_site)
    if not any(server.alive and server.reaches(*sites) for server in servers):
        return f"no living server reaches {' and '.join(sites)}"
    return "waiting to be assigned to a server"


def _none_alive(servers: Sequence[Server]) -> str:
    if any(server.alive for server in servers):
        return ""
    newest = min(servers, key=lambda server: server.silent)
    return f"no server is alive: {_named(newest)}"


def _named(server: Server) -> str:
    name = "the engine" if server.name == ENGINE else f"process server {server.name}"
    return f"{name} on {server.host}, last seen {server.silent:.0f} s ago"
