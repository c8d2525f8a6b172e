"""Errors sent between components: as code and attributes, rebuilt from the catalogue at the other side."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from typing import Any

from asrcore.errors import (
    AsrError,
    Cancelled,
    FrameRefused,
    PeerError,
    PeerFailed,
    PeerVersion,
    SiteUnreachable,
    catalogue,
)
from asrcore.model.watch import Stopped
from asrcore.wire import frames
from asrcore.wire.carrier import ConnectionLost
from asrcore.wire.frames import ProtocolError
from asrcore.wire.tally import Tally

__all__ = ["as_error", "error_head", "goodbye_error", "rebuilt"]

_log = Tally(logging.getLogger(__name__))  # what others cause is logged once a minute


def as_error(problem: BaseException, peer: str) -> AsrError:
    """Why a connection ended, as an error of the catalogue."""
    if isinstance(problem, AsrError):
        return problem
    if isinstance(problem, ProtocolError):
        if problem.reason == "version":
            return PeerVersion(peer=peer, theirs=problem.detail, ours=str(frames.VERSION))
        return FrameRefused(peer=peer, detail=str(problem))
    return SiteUnreachable(site=peer, detail=str(problem) or type(problem).__name__)


def goodbye_error(head: Mapping[str, Any], peer: str) -> Exception:
    """The other side's goodbye as an error."""
    reason, detail = str(head.get("reason", "")), str(head.get("detail", ""))
    if "code" in head:
        return rebuilt(head, "connecting", peer)
    if reason in ("", "stopped"):
        return ConnectionLost(detail or "the other side ended the connection")
    if reason == "version":
        return PeerVersion(peer=peer, theirs="another", ours=detail)
    return FrameRefused(peer=peer, detail=f"the other side refused a frame: {reason}: {detail}")


def error_head(call: str, problem: BaseException) -> dict[str, Any]:
    """The head of an ERROR. What is not in the catalogue is a defect: the log gets its traceback."""
    if isinstance(problem, AsrError):
        return {**problem.as_dict(), "attributes": {key: _plain(item) for key, item in problem.attributes.items()}}
    if isinstance(problem, Stopped):
        return error_head(call, Cancelled(work=call))
    if isinstance(problem, ProtocolError):  # not of the connection: of what one request carries
        return error_head(call, as_error(problem, "the sender"))
    _log.error("serving %s", call, exc_info=problem, extra={"kind": call})
    return {"code": "peer-failed", "attributes": {"detail": f"{type(problem).__name__}: {problem}"}}


def _plain(value: object) -> object:
    return value if isinstance(value, str | int | float | None) else str(value)


def rebuilt(head: Mapping[str, Any], call: str, peer: str) -> AsrError:
    """The error that a head describes; PeerError for one that this side does not know."""
    code, attributes = str(head.get("code", "")), head.get("attributes")
    fields = dict(attributes) if isinstance(attributes, dict) else {}
    if code == PeerFailed.code:
        return PeerFailed(peer=peer, operation=call, detail=fields.get("detail", ""))
    kind = catalogue().get(code)
    if kind is not None:
        with contextlib.suppress(TypeError, ValueError, KeyError, IndexError):
            return kind(**fields)
    texts = {name: str(head.get(name, "")) for name in ("happened", "cause", "action")}
    return PeerError(peer=peer, code=code, **texts)
