"""The library interface: everything that `asr` does, from Python.

    with asrcore.Engine.open("vault.db") as engine:
        job = engine.wait(engine.failover_test("web1"))

Methods that change something submit jobs. An engine that has `start`ed runs them itself; while another process works
on the vault (`asr run`), they are handed to that process. Either way `wait` follows a job to its end. Where no engine
works on a vault in a file, the first job starts one here. A vault on a database server is worked on by services only:
a job waits there for `asr run` or `asr process-server`.

What is imported within functions brings the driver contract and what works with it: 35 ms of CPU beside the 270 that
this module takes, and reading the vault (`asr job list`) needs none of it.
"""

from __future__ import annotations

import getpass
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

import attrs

from asrcore.closing import Closing
from asrcore.errors import (
    AlreadyExists,
    AlreadyProtected,
    AmbiguousName,
    AsrError,
    InvalidValue,
    MachineNotFound,
    NotFound,
    StillInUse,
    VaultInUse,
)
from asrcore.jobs import Jobs, enqueue, follow
from asrcore.model.point import RecoveryPoint
from asrcore.model.protection import NetworkMap, Protection, Site
from asrcore.model.server import ENGINE
from asrcore.model.state import Event, State, allowed
from asrcore.procedures import impact
from asrcore.procedures.impact import Impact
from asrcore.procedures.procedure import Arguments
from asrcore.replication.context import Context
from asrcore.replication.ids import new_id
from asrcore.service import status
from asrcore.service.member import Member, ServerIdentity
from asrcore.service.status import MachineStatus
from asrcore.service.waiting import waits_for
from asrcore.vault import Job, Vault

if TYPE_CHECKING:
    from asrcore import driver
    from asrcore.model.finding import Finding
    from asrcore.model.machine import Machine
    from asrcore.model.policy import Policy
    from asrcore.plugins import Plugins
    from asrcore.procedures.protect import Pairing
    from asrcore.service.servers import ServerStatus

__all__ = ["Engine", "MachineStatus"]

_log = logging.getLogger(__name__)

_REMOVALS = ("site-remove", "policy-remove")
_SERVICE = "service"
"""Who requests the jobs that the replication service starts."""


class Engine(Closing):
    """One vault and the engine that works on it. Safe to use from several threads; not to be shared by processes."""

    def __init__(self, vault: Vault, loaded: Plugins | None = None, clock: Callable[[], float] = time.time) -> None:
        self.vault = vault
        self.context = Context(vault, loaded, clock)
        self._working = ExitStack()
        self._jobs: Jobs | None = None
        self._member: Member | None = None
        self._stop = threading.Event()
        self._lost: AsrError | None = None

    @classmethod
    def create(cls, vault: str, loaded: Plugins | None = None) -> Self:
        """Make a new vault at a path or database URL. Raises VaultExists, NotAVault, VaultUnavailable."""
        return cls(Vault.create(vault), loaded)

    @classmethod
    def open(cls, vault: str, loaded: Plugins | None = None) -> Self:
        """Open a vault. Raises VaultNotFound, NotAVault, VaultTooNew, VaultUnavailable."""
        return cls(Vault.open(vault), loaded)

    @property
    def plugins(self) -> Plugins:
        """The plug-ins in use; the installed ones are loaded when they are first needed."""
        return self.context.plugins

    @property
    def working(self) -> bool:
        """Whether this is the engine that runs the vault's jobs, from `start` to `close`."""
        return self._jobs is not None

    # -- working ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Become the engine that runs this vault's jobs; interrupted jobs resume. Raises VaultInUse."""
        if self._jobs is not None:
            return
        if self.vault.shareable:
            host = f"{socket.gethostname()}, pid {os.getpid()}"
            self._join(ServerIdentity(ENGINE, new_id("s"), host), alone=True)
            return
        with ExitStack() as stack:
            stack.enter_context(self.vault.engine_lock(_holder()))
            self._begin(stack, None)

    def _join(self, identity: ServerIdentity, *, alone: bool) -> None:
        """Work as a server of a shared vault: fenced, so that it records nothing when others have taken over."""

        def lost(problem: AsrError) -> None:
            self._lost = problem
            self._stop.set()

        with ExitStack() as stack:
            lock = self.vault.session_lock(_holder(), shared=not alone)
            stack.callback(lock.close)
            member = Member(self.vault, identity, lost, lock=lock, alone=alone)
            stack.callback(member.leave)
            member.join(self._stop)
            self._begin(stack, identity.session)
            self._member = member

    def _begin(self, stack: ExitStack, session: str | None) -> None:
        from asrcore.procedures.catalogue import PROCEDURES  # noqa: PLC0415 - and the driver contract with it

        self._seal_secrets()
        jobs = Jobs(self.context, PROCEDURES, session)
        stack.callback(jobs.close)
        jobs.start()
        self._jobs = jobs
        self._working = stack.pop_all()

    def run(self, stop: threading.Event) -> None:
        """Be the replication service until `stop` is set (`asr run`).

        Raises VaultInUse, on a database server also later: when it has lost the vault to another engine; and
        ServerReplaced when it was silent for so long that others took over. `stop` is set then, and this process must
        end.
        """
        self._stop = stop
        self.start()
        self._replicate()

    def _replicate(self) -> None:
        from asrcore.service.scheduler import Scheduler  # noqa: PLC0415

        if self._lost is None and self._jobs is not None:
            Scheduler(self.context, partial(self._jobs.submit, who=_SERVICE)).run(self._stop)
        if self._lost is not None:
            raise self._lost

    def serve(self, identity: ServerIdentity, stop: threading.Event) -> None:
        """Be one of the process servers that share this vault, until `stop` is set (`asr process-server`): run the
        cycles and jobs of the machines that are assigned to it.

        Raises ServerNameTaken, VaultInUse (one engine has all of the vault), InvalidValue (the vault is a file, or the
        name is reserved), NotFound (a site that the vault does not know), and ServerReplaced when other servers have
        taken over its machines: `stop` is set then, and this process must end.
        """
        if identity.name == ENGINE:
            raise InvalidValue(what="name", value=identity.name, wanted="another one: it is the name of `asr run`")
        for unknown in set(identity.sites or ()) - {site.name for site in self.vault.sites()}:
            raise NotFound(kind="site", name=unknown, listing="asr site list")
        self._stop = stop
        self._join(identity, alone=False)
        try:
            self._replicate()
        finally:
            self._jobs = self._member = None
            self._working.close()

    def close(self) -> None:
        """Stop running jobs (they resume at the next start), close connections and the vault."""
        self._jobs = self._member = None
        self._working.close()
        self.context.close()
        self.vault.close()

    # -- sites and policies ------------------------------------------------------------------------------------------

    def add_site(self, name: str, driver_name: str, settings: Mapping[str, str]) -> Site:
        """Record a site after connecting to it with these settings. Raises what `Driver.connect` raises."""
        site = Site(name, driver_name, dict(settings))
        if any(other.name == name for other in self.vault.sites()):
            raise AlreadyExists(kind="site", name=name)
        self._prove(site)
        site = attrs.evolve(site, settings=self.plugins.adopted(driver_name, name, site.settings))
        self.vault.add_site(site, secret=self._secret(driver_name))
        return site

    def update_site(self, name: str, settings: Mapping[str, str]) -> Site:
        """Change some settings of a site ("" removes one), after connecting to it with them."""
        former = self.vault.site(name, without=settings.keys())  # one whose key is lost can be entered again
        merged = {key: value for key, value in {**former.settings, **settings}.items() if value != ""}
        site = attrs.evolve(former, settings=merged)
        self._prove(site)
        site = attrs.evolve(site, settings=self.plugins.adopted(site.driver, name, merged))
        self.vault.update_site(site, secret=self._secret(site.driver))
        self.context.forget_site(name)
        return site

    def policy_impact(self, policy: Policy) -> Impact:
        """What `update_policy` would do: changed fields, machines, and recovery points that would be deleted."""
        machines = [item for item in self.vault.protections() if item.policy == policy.name]
        points = [(item, self.vault.points(item.id)) for item in machines]
        return impact.of_policy_change(self.vault.policy(policy.name), policy, points, self.context.clock())

    def update_policy(self, policy: Policy) -> None:
        """Replace the policy of that name, for all machines that use it. A running service applies it at its next
        look. Recovery points stay until retention deletes those that are no longer kept. Raises NotFound."""
        self.vault.update_policy(policy)

    def remove_policy(self, name: str) -> None:
        """Raises NotFound, StillInUse while a machine uses it."""
        self.vault.remove_policy(name)

    def _secret(self, driver_name: str) -> set[str]:
        return {setting.name for setting in self.plugins.driver(driver_name).info.settings if setting.secret}

    def _seal_secrets(self) -> None:
        """Encrypt secrets that an earlier version recorded in clear."""
        for site in self.vault.sites():
            if site.driver in self.plugins.drivers and self.vault.seal_site(site.name, self._secret(site.driver)):
                text = "encrypted from now on; earlier copies of the vault still hold them unencrypted"
                _log.warning("the secret settings of site %s are %s", site.name, text)

    def _prove(self, site: Site) -> None:
        with self.plugins.connect(site.driver, site.name, site.settings) as connected:
            connected.status()

    def site_status(self, name: str) -> driver.SiteStatus:
        """The site's current status, asked from the site."""
        return self.context.site(name).status()

    def sweep_site(self, name: str) -> list[str]:
        """Delete resources orphaned at the site by interrupted runs; returns their names."""
        return self.context.site(name).sweep()

    def machines(self, site: str) -> list[Machine]:
        """The machines of a site."""
        return self.context.site(site).inventory.machines()

    # -- protection --------------------------------------------------------------------------------------------------

    def protect(
        self,
        machine: str,
        *,
        source: str,
        target: str,
        policy: str,
        networks: Mapping[str, str] | None = None,
        test_network: str = "",
    ) -> Job:
        """Start protecting a machine, given by name or id. Raises NotReady, AlreadyProtected (machine or name)."""
        from asrcore.procedures.protect import check_ready  # noqa: PLC0415 - and the driver contract with it

        pairing = self._pairing(machine, source=source, target=target, policy=policy, networks=networks)
        if any(other.name == pairing.name for other in self.vault.protections()):
            raise AlreadyProtected(what=f"a machine named {pairing.name!r}", name=pairing.name)
        check_ready(self.context, pairing)
        protection = Protection(
            id=new_id("m"),
            name=pairing.name,
            policy=policy,
            home_site=source,
            source_site=source,
            source_machine=pairing.machine_id,
            target_site=target,
            replica_id=new_id("r"),
            networks=pairing.networks,
            test_network=test_network,
            created_at=self.context.clock(),
        )
        self.vault.add_protection(protection)
        return self._submit("protect", protection, Arguments())

    def readiness(
        self, machine: str, *, source: str, target: str, policy: str, networks: Mapping[str, str] | None = None
    ) -> list[Finding]:
        """Findings for protecting a machine, the worst first; `protect` refuses when one is an ERROR."""
        from asrcore.procedures.protect import readiness  # noqa: PLC0415 - and the driver contract with it

        pairing = self._pairing(machine, source=source, target=target, policy=policy, networks=networks)
        return readiness(self.context, pairing)

    def _pairing(
        self, machine: str, *, source: str, target: str, policy: str, networks: Mapping[str, str] | None
    ) -> Pairing:
        from asrcore.procedures.protect import Pairing  # noqa: PLC0415 - and the driver contract with it

        self.vault.policy(policy)
        found = self._find(source, machine)
        return Pairing(found.name, policy, source, found.id, target, NetworkMap(dict(networks or {})))

    def _find(self, site: str, machine: str) -> Machine:
        matches = [item for item in self.machines(site) if machine in (item.id, item.name)]
        if not matches:
            raise MachineNotFound(site=site, machine=machine)
        if len(matches) > 1:
            raise AmbiguousName(kind="machine", name=machine, matches=", ".join(item.id for item in matches))
        return matches[0]

    def machine_impact(
        self,
        machine: str,
        *,
        policy: str | None = None,
        networks: Mapping[str, str] | None = None,
        test_network: str | None = None,
    ) -> Impact:
        """What `update_machine` would do, with the readiness findings that come with the change. Raises NotFound."""
        old = self.vault.protection(machine)
        new = _changed(old, policy, networks, test_network)
        policies = (self.vault.policy(old.policy), self.vault.policy(new.policy))
        try:
            findings = [f"{item.severity.value} [{item.code}] {item.what}" for item in self._changed_findings(old, new)]
        except AsrError as problem:
            findings = [f"Not checked at the sites: {problem}"]
        points = self.vault.points(old.id)
        return impact.of_machine_change(old, new, policies, points, findings, self.context.clock())

    def update_machine(
        self,
        machine: str,
        *,
        policy: str | None = None,
        networks: Mapping[str, str] | None = None,
        test_network: str | None = None,
    ) -> Protection:
        """Give a protected machine another policy, network mapping or test network; its recovery points stay.

        `networks` adds to the mapping ("" removes an entry), in the present direction. `test_network` "" is an isolated
        one. Raises NotFound, and NotReady if a readiness check fails only because of the change. Where a site does not
        answer the change is recorded unchecked, with a warning in the log: it may be needed to fail over.
        """
        from asrcore.procedures.protect import refuse  # noqa: PLC0415 - and the driver contract with it

        old = self.vault.protection(machine)
        new = _changed(old, policy, networks, test_network)
        self.vault.policy(new.policy)
        try:
            findings = self._changed_findings(old, new)
        except AsrError as problem:
            _log.warning("%s: the change was not checked at the sites: %s", old.name, problem)
        else:
            refuse(old.name, findings)
        return self.vault.update(old.id, policy=new.policy, networks=new.networks, test_network=new.test_network)

    def _changed_findings(self, old: Protection, new: Protection) -> list[Finding]:
        from asrcore.procedures.protect import changed_findings  # noqa: PLC0415 - and the driver contract with it

        if (new.policy, new.networks) == (old.policy, old.networks):
            return []
        return changed_findings(self.context, old, new)

    def unprotect(self, machine: str) -> Job:
        """End protection and delete the replica and all its recovery points; the machine itself is not changed."""
        return self._verb("unprotect", machine, Event.DISABLE)

    def replicate(self, machine: str, *, keep: bool = False) -> Job:
        """Run one cycle now. `keep`: its point is kept under the policy's retention, whatever the point interval says.

        Resumes an initial copy or a re-protect that failed.
        """
        protection = self.vault.protection(machine)
        resumed = {State.RESYNCING: "resync", State.REVERSING: "reprotect"}
        resumed |= dict.fromkeys((State.ENABLING, State.INITIAL_COPY, State.FINALIZING), "protect")
        if protection.state in resumed:
            return self._submit(resumed[protection.state], protection, Arguments())
        return self._verb("replicate", machine, Event.REPLICATE, keep=keep)

    def resync(self, machine: str, *, now: bool = False) -> Job | None:
        """Compare source and replica: in the policy's window (returns None), or `now`."""
        if now:
            return self._verb("resync", machine, Event.START_RESYNC)
        protection = self.vault.protection(machine)
        if protection.state is not State.RESYNC_PENDING:
            self.vault.transition(protection.id, Event.LOSE_TRACKING, resync_reason="A resync was requested.")
        return None

    def verify(self, machine: str, *, repair: bool = False, sha256: bool = False) -> Job:
        """Verify that the replica equals the frozen source; `repair` sends what differs, `sha256` also computes a
        SHA-256 per disk at both sides."""
        return self._verb("verify", machine, Event.VERIFY, repair=repair, sha256=sha256)

    # -- failover ----------------------------------------------------------------------------------------------------

    def failover_test(
        self,
        machine: str,
        *,
        point: str = "latest",
        network: str | None = None,
        prove: bool = False,
        allow_damaged: bool = False,
    ) -> Job:
        """Run a point in isolation while replication continues. `network`: connect it to that network of the target.
        `prove`: read all of the point first, to find damage; `allow_damaged`: use it although it is damaged."""
        protection = self.vault.protection(machine)
        wanted = protection.test_network if network is None else network
        given = {"point": point, "network": wanted, "prove": prove, "allow_damaged": allow_damaged}
        return self._verb("failover-test", machine, Event.TEST, **given)

    def failover_cleanup(self, machine: str) -> Job:
        """Delete the test machine and everything it wrote."""
        return self._submit("failover-cleanup", self.vault.protection(machine), Arguments())

    def failover_planned(
        self,
        machine: str,
        *,
        force_off: bool = False,
        timeout: float = 120.0,
        force: bool = False,
        prove: bool = False,
        allow_damaged: bool = False,
    ) -> Job:
        """Shut the source down, send the last delta, run the machine at the target. No data is lost. `force`: although
        the target finds that it cannot run the machine (TargetNotReady). Others: see `failover_test`."""
        given = {"force_off": force_off, "timeout": timeout, "force": force, "prove": prove}
        return self._verb("failover-planned", machine, Event.FAIL_OVER, allow_damaged=allow_damaged, **given)

    def failover_unplanned(
        self,
        machine: str,
        *,
        point: str = "latest",
        force: bool = False,
        prove: bool = False,
        allow_damaged: bool = False,
    ) -> Job:
        """Run a point at the target; the source is lost or given up. `force`: although the target finds that it cannot
        run the machine (TargetNotReady). Others: see `failover_test`."""
        given = {"point": point, "force": force, "prove": prove, "allow_damaged": allow_damaged}
        return self._verb("failover-unplanned", machine, Event.FAIL_OVER, **given)

    def failover_undo(self, machine: str) -> Job:
        """Before commit: delete the machine at the target and its writes; the source owns the machine again."""
        return self._verb("failover-undo", machine, Event.UNDO)

    def failover_commit(self, machine: str) -> Job:
        """Accept the machine at the target. It keeps its own disks; the replica and all its recovery points are
        deleted, so the failover cannot be undone."""
        return self._verb("failover-commit", machine, Event.COMMIT)

    def reprotect(self, machine: str) -> Job:
        """Replicate in the reverse direction, sending only what differs."""
        return self._verb("reprotect", machine, Event.REPROTECT)

    def adopt(self, machine: str) -> Job:
        """Record what the target holds where the vault is behind it (VaultBehind): recovery points, a failover."""
        return self._submit("adopt", self.vault.protection(machine), Arguments())

    def impact(self, verb: str, name: str, *, point: str = "latest") -> Impact:
        """What a verb would do, from the vault's records; nothing is changed. `verb`: `failover-planned`,
        `failover-unplanned` (to that `point`), `failover-undo`, `failover-commit` or `unprotect` of a machine,
        `site-remove` or `policy-remove`. Raises what the verb itself would raise for those records."""
        if verb in _REMOVALS:
            kind = verb.partition("-")[0]
            self._check_unused(kind, name)
            return impact.of_removal(kind, name)
        if verb not in impact.HARMFUL:
            raise InvalidValue(what="verb", value=verb, wanted=", ".join([*impact.HARMFUL, *_REMOVALS]))
        return impact.of_verb(self.vault, verb, name, point, self.context.clock())

    def _check_unused(self, kind: str, name: str) -> None:
        """The vault's own check, before a person is asked. Raises NotFound, StillInUse."""
        if kind == "policy":
            self.vault.policy(name)
            users = [item.name for item in self.vault.protections() if item.policy == name]
        else:
            if all(site.name != name for site in self.vault.sites()):
                raise NotFound(kind=kind, name=name, listing="asr site list")
            users = [
                item.name
                for item in self.vault.protections()
                if name in (item.home_site, item.source_site, item.target_site)
            ]
        if users:
            raise StillInUse(kind=kind, name=name, users=", ".join(users))

    # -- status ------------------------------------------------------------------------------------------------------

    def status(self) -> list[MachineStatus]:
        """All protected machines, by name. Asks no site: it also works when the primary site is lost."""
        return status.machines(self.vault, self.context.clock())

    def servers(self) -> list[ServerStatus]:
        """Process servers, or the one engine, as the vault knows them, and the master targets, which are queried."""
        from asrcore.service import servers  # noqa: PLC0415 - `asr status` needs no TLS

        now = self.context.clock()
        contact = self.site_status
        return [*servers.process_servers(self.vault, now), *servers.master_targets(self.vault, contact, now)]

    def points(self, machine: str) -> list[RecoveryPoint]:
        """Recovery points of a machine, oldest first."""
        return self.vault.points(self.vault.protection(machine).id)

    # -- jobs --------------------------------------------------------------------------------------------------------

    def wait(
        self,
        job: Job,
        on_change: Callable[[Job], None] | None = None,
        timeout: float | None = None,
        on_wait: Callable[[str], None] | None = None,
    ) -> Job:
        """Follow a job to its end, whoever runs it. Raises the job's error if it failed; TimedOut after `timeout`;
        EngineStopped when the engine of a vault in a file ends and none takes its place.

        `on_wait`: gets what the job waits for, every two seconds while no process works on it: the servers of a shared
        vault may come back at any time.
        """
        if self._jobs is not None:
            return self._jobs.wait(job.id, on_change, timeout)

        def idle(now: Job) -> None:
            if on_wait is not None and (text := self.waits_for(now)):
                on_wait(text)

        def alive() -> bool:
            return self.vault.shareable or self.vault.engine_holder() is not None

        return follow(self.vault, job.id, on_change, timeout, alive=alive, on_idle=idle)

    def waits_for(self, job: Job) -> str:
        """What a job waits for that no process works on: for example a server that is missing. Else empty."""
        return waits_for(self.vault, job)

    def cancel(self, job: Job) -> None:
        """Request the job's cancellation; what it copied is kept for the next run."""
        self.vault.request_cancel(job.id)

    def _verb(self, kind: str, machine: str, event: Event, **arguments: object) -> Job:
        protection = self.vault.protection(machine)
        allowed(protection.name, protection.state, event)
        return self._submit(kind, protection, Arguments(**arguments))  # type: ignore[arg-type]

    def _submit(self, kind: str, protection: Protection, arguments: Arguments) -> Job:
        return self._order(_person(), kind, protection, arguments)

    def _order(self, who: str, kind: str, protection: Protection, arguments: Arguments) -> Job:
        if self._jobs is None and not self.vault.shareable and self.vault.engine_holder() is None:
            with suppress(VaultInUse):  # another one was quicker; it will run the job
                self.start()
        if self._member is not None:
            self._member.plan()  # a machine that was just added has no server yet
        if self._jobs is not None:
            return self._jobs.submit(kind, protection, arguments, who=who)
        return enqueue(self.vault, kind, protection, arguments, now=self.context.clock(), who=who)


def _changed(
    old: Protection, policy: str | None, networks: Mapping[str, str] | None, test_network: str | None
) -> Protection:
    """A protection with those of the changes that are given."""
    networks_then = old.networks.changed(networks or {})
    policy_then = old.policy if policy is None else policy
    test_then = old.test_network if test_network is None else test_network
    return attrs.evolve(old, policy=policy_then, networks=networks_then, test_network=test_then)


def _person() -> str:
    """Who runs this process: requests of its jobs are recorded with it."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, in a container
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def _holder() -> str:
    words = [Path(sys.argv[0]).name]
    for before, word in zip(sys.argv, sys.argv[1:], strict=False):
        # What follows these may hold a password.
        secret = before in ("--vault", "--set") or word.startswith(("--vault=", "--set="))
        words.append("..." if secret else word)
    command = " ".join(words)
    return f"process {os.getpid()} on {socket.gethostname()}: {command}"
