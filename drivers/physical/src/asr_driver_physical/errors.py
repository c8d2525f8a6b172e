"""The driver's own entries of the error catalogue."""

from __future__ import annotations

from asrcore.errors import AsrError, Category

__all__ = [
    "NotReadyToEnrol",
    "OddReport",
    "OtherIdentity",
    "OtherServer",
    "PushFailed",
    "RecordDamaged",
    "ServerTooBusy",
    "SpoolFull",
]


class SpoolFull(AsrError):
    code = "physical-spool-full"
    category = Category.CAPACITY
    happened = "the spool at {where} has no space for the changes of {server!r}: {detail}"
    cause = "What a server captures at a freeze is kept there until it was sent to the target."
    action = "Free space there, or raise the site's setting spool_limit. Replication continues automatically."
    retry = True


class ServerTooBusy(AsrError):
    code = "physical-server-too-busy"
    category = Category.CAPACITY
    happened = "{server!r} writes faster than it can be read: {pending} bytes remain after {rounds} rounds"
    cause = (
        "A recovery point needs a moment with few unread changes. The link, the agent's limits or the load prevents it."
    )
    action = "Raise the agent's limits (`asr physical push`), or replicate at times of less load. Copied data is kept."
    retry = True


class NotReadyToEnrol(AsrError):
    code = "physical-not-ready"
    category = Category.REFUSED
    happened = "{server!r} cannot be protected: {findings}"
    cause = "The probe found problems that prevent the mobility service from running, or the replica from booting."
    action = "Resolve each finding, then push again. Nothing was installed."


class PushFailed(AsrError):
    code = "physical-push-failed"
    category = Category.DRIVER
    happened = "{operation} on {server!r} failed: {detail}"
    cause = "A step over SSH was refused or failed on the server."
    action = "Fix it there, then retry. Every step may be repeated."


class OtherIdentity(AsrError):
    code = "physical-other-identity"
    category = Category.REFUSED
    happened = "{server!r} is enrolled with another identity than that in {identity}"
    cause = "Process servers of a site share one identity; with a second one the other process servers lose the server."
    action = "Copy the identity's directory from the site's other process server, or push with --replace-identity."


class OddReport(AsrError):
    code = "physical-odd-report"
    category = Category.REFUSED
    happened = "{server!r} reported what cannot be right: {detail}"
    cause = "Its agent is damaged, of another version, or was replaced. Nothing of the report was used or stored."
    action = "Install the agent again (`asr physical push`). Other servers of the site are not affected."
    retry = True


class OtherServer(AsrError):
    code = "physical-other-server"
    category = Category.REFUSED
    happened = "{server!r} says that it is the machine {reported}, but {enrolled} was enrolled under this name"
    cause = (
        "Its firmware or system was replaced, its disks run in another machine, or it pretends to be another server."
    )
    action = (
        "If it is another server, enrol it under another name. If its firmware or system was replaced, push to it "
        "again (`asr physical push`): its id and its recovery points stay. Nothing was read from it."
    )
    retry = True


class RecordDamaged(AsrError):
    code = "physical-record-damaged"
    category = Category.INTEGRITY
    happened = "the record of server {server!r} cannot be read: {detail}"
    cause = "The file {path} was changed or damaged, or is of a newer version."
    action = "Restore it from a backup, or push to the server again (`asr physical push`). Other servers still work."
