"""Sites and drivers that are broken."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from asrcore.driver import (
    API,
    Capability,
    SiteStatus,
)
from asrcore.testing.memory import MemoryDriver, MemorySite

from ._mutant import MUTANTS, Mutant, MutantDriver, caught_by


@caught_by("test_a_site_may_be_closed_twice")
class ClosingTwiceFails(MemorySite):
    def close(self) -> None:
        if self.session.closed:
            raise RuntimeError("it is closed")
        super().close()


@caught_by("test_a_site_that_does_not_answer_is_unreachable")
class CutIsNotTold(MemorySite):
    def status(self) -> SiteStatus:
        with self.session.world.look() as state:
            return SiteStatus("1", state.capabilities)


@caught_by("test_a_role_that_is_not_claimed_is_unsupported")
class OffersWhatItDoesNotClaim(MemorySite):
    def status(self) -> SiteStatus:
        status = super().status()
        return attrs.evolve(status, capabilities=status.capabilities - {Capability.FAILOVER})


class _ClaimsMoreThanItsDriver(MutantDriver):
    info = attrs.evolve(MemoryDriver.info, capabilities=MemoryDriver.info.capabilities - {Capability.SEED})


class _SpeaksAnotherContract(MutantDriver):
    info = attrs.evolve(MemoryDriver.info, api=(API[0] + 1, 0))


class _TakesNoSettingForAny(MutantDriver):
    def connect(self, name: str, settings: Mapping[str, str]) -> MemorySite:
        return super().connect(name, {"world": f"{type(self).__name__.strip('_')}-home", **settings})


MUTANTS += [
    Mutant(
        "ClaimsMoreThanItsDriver",
        "site",
        _ClaimsMoreThanItsDriver(),
        frozenset({"test_sites_claim_only_what_the_driver_offers"}),
    ),
    Mutant("SpeaksAnotherContract", "site", _SpeaksAnotherContract(), frozenset({"test_driver_speaks_this_contract"})),
    Mutant(
        "TakesNoSettingForAny", "site", _TakesNoSettingForAny(), frozenset({"test_a_missing_required_setting_is_told"})
    ),
]
