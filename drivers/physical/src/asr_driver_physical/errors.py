"""The driver's own entries of the error catalogue."""

from __future__ import annotations

from asrcore.errors import AsrError, Category

__all__ = ["NotReadyToEnrol", "OtherIdentity", "PushFailed", "ServerTooBusy", "SpoolFull"]


class SpoolFull(AsrError):
    code = "physical-spool-full"
    category = Category.CAPACITY
    happened = "the spool at {where} has no room for what {server!r} has changed: {detail}"
    cause = "What a server holds still at a freeze waits there until it has been sent on."
    action = "Free space there, or raise the site's setting spool_limit; replication goes on by itself."
    retry = True


class ServerTooBusy(AsrError):
    code = "physical-server-too-busy"
    category = Category.CAPACITY
    happened = "{server!r} writes faster than it can be read: {pending} bytes are left after {rounds} rounds"
    cause = "A recovery point needs a moment at which little is left to be read. Link, limits and workload decide."
    action = "Raise the agent's bandwidth, or replicate at quieter hours; what was copied is kept."
    retry = True


class NotReadyToEnrol(AsrError):
    code = "physical-not-ready"
    category = Category.REFUSED
    happened = "{server!r} cannot be protected: {findings}"
    cause = "The probe found what would keep the mobility service from running, or the replica from booting."
    action = "Mend each finding as it says, then push again. Nothing was installed."


class PushFailed(AsrError):
    code = "physical-push-failed"
    category = Category.DRIVER
    happened = "{operation} on {server!r} failed: {detail}"
    cause = "The server refused or broke a step over SSH."
    action = "Mend it there and repeat: every step may be repeated."


class OtherIdentity(AsrError):
    code = "physical-other-identity"
    category = Category.REFUSED
    happened = "{server!r} is enrolled with another identity than that in {identity}"
    cause = "Process servers of a site share one identity; with a second one the server would be lost to the others."
    action = "Copy the identity's directory from the site's other process server, or push with --replace-identity."
