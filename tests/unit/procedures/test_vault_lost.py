"""A vault that does not answer is no answer of a site: a step must not take it for a source that is lost."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest

from asrcore.driver import Site
from asrcore.errors import NotFound, VaultUnavailable
from asrcore.model.machine import PowerState
from asrcore.replication.context import Context
from tests.unit.rig import Rig


def prepare_undo(rig: Rig) -> None:
    rig.engine.failover_planned("web")


def nothing(rig: Rig) -> None:
    del rig


VERBS: dict[str, tuple[Callable[[Rig], object], Callable[[Rig], object]]] = {
    "undo": (prepare_undo, lambda rig: rig.engine.failover_undo("web")),
    "unprotect": (nothing, lambda rig: rig.engine.unprotect("web")),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_step_that_the_vault_did_not_answer_fails_instead_of_leaving_the_source_as_it_is(
    verb: str, protected: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, run = VERBS[verb]
    before(protected)
    site, left = Context.site, [True]

    def answer(context: Context, name: str) -> Site:
        if name == "a" and left:
            left.pop()
            raise VaultUnavailable(url="postgresql://db/asr", detail="the server closed the connection")
        return site(context, name)

    monkeypatch.setattr(Context, "site", answer)
    with pytest.raises(VaultUnavailable):
        run(protected)
    with suppress(NotFound):  # as the job does when the vault is back
        run(protected)
    assert not left
    assert protected.power("a") is PowerState.RUNNING
    assert protected.machine.marks == [] or verb == "undo"
