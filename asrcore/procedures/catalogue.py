"""All kinds of jobs, by the verb that starts them."""

from __future__ import annotations

from asrcore.procedures.adopt import ADOPT
from asrcore.procedures.drill import CLEANUP, TEST
from asrcore.procedures.failover import PLANNED, UNPLANNED
from asrcore.procedures.procedure import Procedure
from asrcore.procedures.protect import PROTECT, UNPROTECT
from asrcore.procedures.replicate import REPLICATE, RESYNC
from asrcore.procedures.reprotect import REPROTECT
from asrcore.procedures.undo_commit import COMMIT, UNDO
from asrcore.procedures.verify import VERIFY

__all__ = ["PROCEDURES"]

PROCEDURES: dict[str, Procedure] = {
    procedure.kind: procedure
    for procedure in (
        PROTECT,
        UNPROTECT,
        REPLICATE,
        RESYNC,
        VERIFY,
        TEST,
        CLEANUP,
        PLANNED,
        UNPLANNED,
        UNDO,
        COMMIT,
        REPROTECT,
        ADOPT,
    )
}
