"""The failover role: machines are made of recovery points."""

from __future__ import annotations

from abc import ABC, abstractmethod

import attrs

from asrcore.model.protection import NetworkMap
from asrcore.model.watch import Watch

__all__ = ["Failover", "Instance", "PromoteSpec", "TestSpec"]


@attrs.frozen
class TestSpec:
    """A test failover: a disposable copy-on-write machine of a point. With `network` "" it is isolated: connected to
    no network."""

    test_id: str
    replica_id: str
    point_id: str
    name: str
    network: str = ""
    __test__ = False  # not a test class, whatever pytest thinks of the name


@attrs.frozen
class PromoteSpec:
    """A real failover: the machine of a point, with its own name, id, and mapped networks."""

    replica_id: str
    point_id: str
    epoch: int
    networks: NetworkMap


@attrs.frozen
class Instance:
    """A machine that was made of a recovery point. `repairs`: what was changed on its disks, never in the point, so
    that it comes up at this site, and what was not understood and left; lines for the log."""

    machine_id: str
    name: str
    repairs: tuple[str, ...] = ()


class Failover(ABC):
    """Makes machines from recovery points. Nothing here changes a point: instances write to copies or overlays."""

    @abstractmethod
    def start_test(self, spec: TestSpec, watch: Watch) -> Instance:
        """Make and start a test machine; the same test id again returns it. Raises PointNotFound, DriverFailed."""

    @abstractmethod
    def stop_test(self, replica_id: str, test_id: str) -> None:
        """Stop a test machine and delete everything that belongs to it; an unknown test is already deleted."""

    @abstractmethod
    def tests(self, replica_id: str) -> list[str]:
        """Ids of tests that are running or left over; none for an unknown replica."""

    @abstractmethod
    def promote(self, spec: PromoteSpec, watch: Watch) -> Instance:
        """Make the machine of a point, not started. A fenced machine of the same id is put aside for undo.

        Repeating with the same spec returns it; with another point, the former (stopped) machine is replaced
        (WrongState while it runs). Raises AlreadyExists when an unfenced machine has the id or the name.
        """

    @abstractmethod
    def undo(self, replica_id: str, epoch: int) -> None:
        """Stop the promoted machine and delete it with its writes; restore the machine that `promote` put aside."""

    @abstractmethod
    def commit(self, replica_id: str, epoch: int, watch: Watch) -> None:
        """Make the promotion final: the machine's disks become independent of the replica, the replica and its points
        are deleted, and so are disks made by asrcore that the machine put aside was using. Disks made by the user are
        kept."""
