"""A driver, and its connection to a site, which gives the roles."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import attrs

from asrcore.closing import Closing
from asrcore.errors import UnsupportedOperation
from asrcore.model.finding import Finding

if TYPE_CHECKING:
    from asrcore.driver._failover import Failover
    from asrcore.driver._inventory import Inventory
    from asrcore.driver._source import Source
    from asrcore.driver._target import Target

__all__ = ["API", "Capability", "Check", "Driver", "DriverInfo", "Setting", "Site", "SiteStatus"]


API = (1, 0)
"""Version of this contract: (major, minor). The engine refuses a driver of another major."""


class Capability(Enum):
    """What a site can do. The conformance kit runs the tests of the capabilities that a driver claims."""

    POWER = "power"
    FENCE = "fence"
    SOURCE = "source"
    TRACKING = "tracking"
    GROUPS = "groups"
    TARGET = "target"
    FAILOVER = "failover"
    SEED = "seed"


@attrs.frozen
class Setting:
    """A setting of a site, given as text: `asr site add NAME --driver D --set name=value`."""

    name: str
    help: str
    required: bool = False
    default: str = ""
    secret: bool = False


@attrs.frozen
class DriverInfo:
    """Who a driver is. `capabilities` is all it may offer; a connected site may offer less (`SiteStatus`)."""

    name: str
    title: str
    version: str
    api: tuple[int, int]
    capabilities: frozenset[Capability]
    settings: tuple[Setting, ...] = ()


@attrs.frozen
class SiteStatus:
    """Status of a connected site, reported by the site; `details` are facts for people (`replica kind: reflink`).

    `skew`: seconds by which the site's clock is ahead of this host's, where the site reports its time; it is shown,
    and nothing else depends on it.
    """

    version: str
    capabilities: frozenset[Capability]
    details: Mapping[str, str] = attrs.field(factory=dict)
    skew: float | None = None


@attrs.frozen
class Check:
    """One thing that was tried at a site. `told`: what the platform answered; `seconds`: how long it took."""

    name: str
    passed: bool
    seconds: float
    told: str


class Driver(ABC):
    """Registered by the plug-in hook `asr_register_drivers`; one object serves any number of sites."""

    info: ClassVar[DriverInfo]

    def check_host(self) -> list[Finding]:
        """What this host lacks for the driver to work, for `asr doctor`."""
        return []

    def check(self, settings: Mapping[str, str], record: Path | None = None) -> Generator[Check]:
        """Try the driver's operations at a site of these settings, on little data, and delete everything that was made
        for it, also when the generator is closed early. Yields each check when it has ended. For platforms that no test
        environment has. `record`: a file for the platform's answers, word for word but without secrets."""
        raise UnsupportedOperation(driver=self.info.name, operation="check a site")

    def adopt(self, name: str, settings: Mapping[str, str]) -> Mapping[str, str]:
        """Settings to record besides those that were entered, such as an identity by which storage is recognised later.
        Called when a site is added, and when its settings change, after the site has answered. What is recorded already
        stays; an operator clears such a setting to have it made again. `name` is for messages."""
        return {}

    @abstractmethod
    def connect(self, name: str, settings: Mapping[str, str]) -> Site:
        """Connect to a site; `name` is for messages. `settings` has no names but those of `info.settings`.

        Raises InvalidSetting, SiteUnreachable, AccessDenied, HostIncomplete.
        """


class Site(Closing):
    """A connection to a site. Safe to use from several threads."""

    name: str
    driver: str

    def status(self) -> SiteStatus:
        """Raises SiteUnreachable when the site does not answer."""
        raise NotImplementedError

    @property
    def inventory(self) -> Inventory:
        """Machines and their power."""
        raise self._unsupported("list machines")

    @property
    def source(self) -> Source:
        """Reads frozen machines."""
        raise self._unsupported("be a source")

    @property
    def target(self) -> Target:
        """Holds replicas."""
        raise self._unsupported("be a target")

    @property
    def failover(self) -> Failover:
        """Makes machines of recovery points."""
        raise self._unsupported("run replicas")

    def sweep(self) -> list[str]:
        """Delete resources orphaned at the site by interrupted runs; returns their names.

        Only for what no other operation would find. A driver whose left-overs lie beside the replica or the machine
        that they belong to finds them there, and has nothing to do here."""
        return []

    def _unsupported(self, operation: str) -> UnsupportedOperation:
        return UnsupportedOperation(driver=self.driver, operation=operation)
