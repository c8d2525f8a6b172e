"""Machines of a host, their power, and their quarantine."""

from __future__ import annotations

import contextlib
import logging

import libvirt

from asr_driver_libvirt.host import paused
from asr_driver_libvirt.host.connection import LibvirtHost
from asr_driver_libvirt.host.power import power_of
from asr_driver_libvirt.xml.domain import FENCE_URI, fence_from_xml, fence_xml, machine_of, parse_domain
from asrcore.crashpoint import reach
from asrcore.driver import Fence, Inventory
from asrcore.errors import ShutdownFailed, WrongState
from asrcore.model.machine import Machine

__all__ = ["LibvirtInventory"]

_log = logging.getLogger(__name__)
_ELEMENT = libvirt.VIR_DOMAIN_METADATA_ELEMENT
_CONFIG = libvirt.VIR_DOMAIN_AFFECT_CONFIG


class LibvirtInventory(Inventory):
    """A machine's id is its domain's UUID: it outlives renaming."""

    def __init__(self, host: LibvirtHost) -> None:
        self._host = host

    def machines(self) -> list[Machine]:
        """Running or not, in order of their names. Raises SiteUnreachable."""
        with self._host.guard("listing machines"):
            found = []
            for domain in self._host.conn().listAllDomains(0):
                try:
                    found.append(_machine(domain))
                except libvirt.libvirtError as error:
                    if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:  # it was removed meanwhile
                        raise
            return sorted(found, key=lambda machine: machine.name)

    def machine(self, machine_id: str) -> Machine:
        """Raises MachineNotFound, SiteUnreachable."""
        with self._host.guard("describing a machine", machine_id):
            return _machine(self._host.domain(machine_id))

    # -- power

    def power_on(self, machine_id: str) -> None:
        """Raises WrongState when it is fenced."""
        with self._host.guard("starting a machine", machine_id):
            domain = self._host.domain(machine_id)
            fence = self.fenced(machine_id)
            if fence is not None:
                raise WrongState(
                    machine=domain.name(),
                    event="be started",
                    state="fenced",
                    reason=f"It was quarantined at epoch {fence.epoch}: {fence.reason}",
                    possible="take it back with a failback, or release it",
                )
            if domain.isActive() and paused.is_held(domain):
                paused.release(domain)
            if not domain.isActive():
                domain.create()
            elif domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED:
                domain.resume()

    def power_off(self, machine_id: str, *, graceful: bool, timeout: float) -> None:
        """Raises ShutdownFailed when a guest that was asked still runs after `timeout` seconds."""
        with self._host.guard("stopping a machine", machine_id):
            domain = self._host.domain(machine_id)
            if not domain.isActive():
                return
            if paused.is_held(domain):
                paused.release(domain)
            elif graceful:
                self._shut_down(domain, timeout)
            else:
                _destroy(domain)

    def _shut_down(self, domain: libvirt.virDomain, timeout: float) -> None:
        if domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED:
            domain.resume()  # a paused guest cannot react
        # Asked twice: a guest that is still booting, or whose agent just restarts, misses the first time.
        for _ in range(2):
            with contextlib.suppress(libvirt.libvirtError):  # off meanwhile, which is seen next
                domain.shutdown()
            if self._host.lifecycle.wait(lambda: not _active(domain), timeout / 2):
                return
        raise ShutdownFailed(machine=domain.name(), seconds=timeout)

    # -- quarantine

    def fence(self, machine_id: str, fence: Fence) -> None:
        """The record first: from then on asrcore does not start it, even if the engine is killed before it stops."""
        with self._host.guard("fencing a machine", machine_id):
            domain = self._host.domain(machine_id)
            if domain.isPersistent():
                known = _fence_of(domain)
                if known is not None and known.epoch > fence.epoch:
                    fence = known
                else:
                    reach("libvirt.fence")
                    domain.setMetadata(_ELEMENT, fence_xml(fence), "asrfence", FENCE_URI, _CONFIG)
                reach("libvirt.fenced")
                domain.setAutostart(0)
            if domain.isActive():
                _destroy(domain)

    def unfence(self, machine_id: str, epoch: int) -> None:
        """Autostart stays off: the operator who releases the machine decides about that."""
        with self._host.guard("releasing a machine", machine_id):
            domain = self._host.domain(machine_id)
            known = _fence_of(domain)
            if known is not None and known.epoch <= epoch:
                domain.setMetadata(_ELEMENT, None, None, FENCE_URI, _CONFIG)

    def fenced(self, machine_id: str) -> Fence | None:
        """Raises MachineNotFound, SiteUnreachable."""
        with self._host.guard("looking for a fence", machine_id):
            return _fence_of(self._host.domain(machine_id))


def _machine(domain: libvirt.virDomain) -> Machine:
    active = domain.isActive() == 1
    model = parse_domain(domain.XMLDesc(0 if active else libvirt.VIR_DOMAIN_XML_INACTIVE))
    sizes: dict[str, int] = {}
    for disk in model.hard_disks:
        # A missing image, or storage that is not mounted: the machine is listed nevertheless.
        with contextlib.suppress(libvirt.libvirtError):
            sizes[disk.id] = domain.blockInfo(disk.id)[0]
    return machine_of(model, sizes, power_of(domain))


def _fence_of(domain: libvirt.virDomain) -> Fence | None:
    if not domain.isPersistent():
        return None
    try:
        return fence_from_xml(domain.metadata(_ELEMENT, FENCE_URI, _CONFIG))
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_METADATA:
            return None
        raise


def _active(domain: libvirt.virDomain) -> bool:
    try:
        return bool(domain.isActive())
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:  # transient ones vanish
            return False
        raise


def _destroy(domain: libvirt.virDomain) -> None:
    try:
        domain.destroy()
    except libvirt.libvirtError:
        if _active(domain):
            raise
