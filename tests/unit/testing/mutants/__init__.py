"""Memory drivers that are broken on purpose, each in one way, and the tests of the kit that must detect it."""

from __future__ import annotations

from . import cycles, failover, inventory, replica, site, source
from ._mutant import MUTANTS, Mutant

__all__ = ["MUTANTS", "Mutant", "cycles", "failover", "inventory", "replica", "site", "source"]
