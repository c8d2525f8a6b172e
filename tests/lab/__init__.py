"""Two fully separate libvirt sites on one machine, and small real guests whose replicas can be audited."""

from tests.lab._bare import BareMachine
from tests.lab._console import Ack, Audit, Console, Down, Hardware
from tests.lab._guest import BlankDisk, Kind
from tests.lab._lab import Lab
from tests.lab._mount import mounted
from tests.lab._run import CommandFailed, LabError
from tests.lab._server import Server
from tests.lab._site import REPLICA_DIRS, ReplicaDir, Site

__all__ = [
    "REPLICA_DIRS",
    "Ack",
    "Audit",
    "BareMachine",
    "BlankDisk",
    "CommandFailed",
    "Console",
    "Down",
    "Hardware",
    "Kind",
    "Lab",
    "LabError",
    "ReplicaDir",
    "Server",
    "Site",
    "mounted",
]
