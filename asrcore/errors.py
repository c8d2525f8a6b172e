"""The error catalogue: every expected failure, with a stable code, a cause and a next action.

An error is a class: its template says what happened, its attributes fill the template, its code never changes.
Anything that is not an `AsrError` and reaches a person is a defect and shows a traceback. The classes, `Category` and
`catalogue` are public; a list of their names in `__all__` would only repeat the module.
"""

from __future__ import annotations

from enum import Enum
from string import Formatter
from typing import Any, ClassVar, final


class Category(Enum):
    """The class of an error; the value is the exit code of `asr`."""

    USAGE = 2
    NOT_FOUND = 3
    CONFLICT = 4
    REFUSED = 5
    UNREACHABLE = 6
    ACCESS = 7
    CAPACITY = 8
    INTEGRITY = 9
    VAULT = 10
    DRIVER = 11
    CANCELLED = 12


_catalogue: dict[str, type[AsrError]] = {}


class AsrError(Exception):
    """Base of the tree. Subclasses set the class attributes; instances carry the values that fill the templates.

    `retry` says whether waiting may help: a full disk or a cut link may recover, a missing mount does not. It decides
    how a cycle is retried (W6 in docs/reference/site-recovery-map.md), and whether the machine is critical meanwhile.
    """

    code: ClassVar[str]
    category: ClassVar[Category]
    happened: ClassVar[str]
    cause: ClassVar[str]
    action: ClassVar[str]
    retry: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        if cls.code in _catalogue:
            raise TypeError(f"error code {cls.code!r} is taken by {_catalogue[cls.code].__name__}")
        _catalogue[cls.code] = cls

    def __init__(self, **attributes: object) -> None:
        missing = self.fields() - set(attributes)
        if missing:
            raise TypeError(f"{type(self).__name__} needs {', '.join(sorted(missing))}")
        self.attributes = attributes
        super().__init__(self.happened.format(**attributes))

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.attributes))

    @classmethod
    def fields(cls) -> set[str]:
        """Names of the attributes that the templates use."""
        texts = (cls.happened, cls.cause, cls.action)
        return {name for text in texts for _, name, _, _ in Formatter().parse(text) if name}

    @final
    @property
    def cause_text(self) -> str:
        """Why it happened, filled in."""
        return self.cause.format(**self.attributes)

    @final
    @property
    def action_text(self) -> str:
        """What to do next, filled in."""
        return self.action.format(**self.attributes)

    @final
    def as_dict(self) -> dict[str, object]:
        """For `--json`: code, category, what happened, cause, next action, whether a retry may help."""
        return {
            "code": self.code,
            "category": self.category.name.lower(),
            "happened": str(self),
            "cause": self.cause_text,
            "action": self.action_text,
            "retry": self.retry,
        }


def _rebuild(kind: type[AsrError], attributes: dict[str, object]) -> AsrError:
    return kind(**attributes)


def catalogue() -> dict[str, type[AsrError]]:
    """Every known error class by its code, including those of the drivers that are imported."""
    return dict(sorted(_catalogue.items()))


# -- bad input ---------------------------------------------------------------------------------------------------


class InvalidValue(AsrError):
    code = "invalid-value"
    category = Category.USAGE
    happened = "{what}: {value!r} is not accepted"
    cause = "{what} must be {wanted}."
    action = "Use a value of that form."


class ConfirmationNeeded(AsrError):
    code = "confirmation-needed"
    category = Category.USAGE
    happened = "`{verb}` is not confirmed; nothing was changed"
    cause = "The command may lose data or interrupt a service, so it needs a confirmation. {reason}."
    action = "See what it would do with --dry-run, then run it with --yes."


class InvalidSetting(AsrError):
    code = "invalid-setting"
    category = Category.USAGE
    happened = "setting {setting!r} of driver {driver}: {problem}"
    cause = "The driver does not accept the site's settings as given."
    action = (
        "`asr driver list` lists the settings of each driver; correct them with `asr site add` or `asr site update`."
    )


class AlreadyExists(AsrError):
    code = "already-exists"
    category = Category.CONFLICT
    happened = "{kind} {name!r} already exists"
    cause = "Names are unique in a vault."
    action = "Choose another name, or use the existing one."


class AlreadyProtected(AsrError):
    code = "already-protected"
    category = Category.CONFLICT
    happened = "{what} is already protected, as {name!r}"
    cause = "A machine is protected once, under a name that is unique in the vault."
    action = "See it with `asr status`. To protect another machine of that name, rename it at its site first."


class StillInUse(AsrError):
    code = "still-in-use"
    category = Category.CONFLICT
    happened = "{kind} {name!r} is in use by {users}"
    cause = "Protected machines depend on it."
    action = (
        "Nothing was removed. Give them another policy with `asr machine set`; a site is free after `asr unprotect`, "
        "which deletes their replicas."
    )


class NotFound(AsrError):
    code = "not-found"
    category = Category.NOT_FOUND
    happened = "{kind} {name!r} is not in the vault"
    cause = "It was never added, or it was removed."
    action = "See what is there with `{listing}`."


class MachineNotFound(AsrError):
    code = "machine-not-found"
    category = Category.NOT_FOUND
    happened = "site {site!r} has no machine {machine!r}"
    cause = "The machine was removed or renamed at the site, or the name is misspelt."
    action = "See the site's machines with `asr site machines {site}`."


class AmbiguousName(AsrError):
    code = "ambiguous-name"
    category = Category.USAGE
    happened = "{name!r} names more than one {kind}"
    cause = "It matches: {matches}."
    action = "Use the id instead of the name."


class PointNotFound(AsrError):
    code = "point-not-found"
    category = Category.NOT_FOUND
    happened = "machine {machine!r} has no recovery point {point!r}"
    cause = "It never existed or was deleted, or the time is before the oldest recovery point."
    action = "See the points with `asr point list {machine}`."


class ReplicaNotFound(AsrError):
    code = "replica-not-found"
    category = Category.NOT_FOUND
    happened = "site {site!r} has no replica {replica!r}"
    cause = "It was deleted, or the replica directory is not the one that it was written to."
    action = "Check the target site with `asr site show {site}`; mount the right directory, then retry."


class ReplicaDirNotMounted(AsrError):
    code = "replica-dir-not-mounted"
    category = Category.UNREACHABLE
    happened = "the replica directory {path!r} of site {site!r} is not the one that was recorded"
    cause = (
        "Its file system is not mounted, or another one is: the directory lacks the mark {mark}. Nothing was written."
    )
    action = (
        "Mount it; replication continues within a minute. If the replicas were moved there from another directory, "
        "copy its file `.asr-replicas` as well. To begin with an empty directory, clear the setting: `asr site update "
        "{site} --set replica_mark=`, or the option of `asr master-target`."
    )


# -- states ------------------------------------------------------------------------------------------------------


class WrongState(AsrError):
    code = "wrong-state"
    category = Category.CONFLICT
    happened = "{machine!r} cannot {event} while it is {state}"
    cause = "{reason}"
    action = "Possible now: {possible}."


class MachineBusy(AsrError):
    code = "machine-busy"
    category = Category.CONFLICT
    happened = "{machine!r} is busy with {work}"
    cause = "Only one job at a time may work on a machine."
    action = "Wait for it to end (`asr job list`), then retry."
    retry = True


class StaleEpoch(AsrError):
    code = "stale-epoch"
    category = Category.CONFLICT
    happened = "replica {replica!r} refuses epoch {epoch}: it is owned at epoch {owner}"
    cause = "A failover or a re-protect has happened since; this writer is from before it."
    action = "Nothing was written. Check with `asr status` which site owns the machine; do not force it."


class StaleBase(AsrError):
    code = "stale-base"
    category = Category.INTEGRITY
    happened = "replica {replica!r} is at point {head}, but the cycle is based on {base}"
    cause = "The vault and the replica disagree about the last sealed point."
    action = "Nothing was written. `asr resync MACHINE --now` compares source and replica and makes them equal."
    retry = True


class NotReady(AsrError):
    code = "not-ready"
    category = Category.REFUSED
    happened = "{machine!r} cannot be protected: {findings}"
    cause = "Readiness checks found problems that would make the replica incomplete or unbootable."
    action = "Resolve each finding as described, then protect again."


class TargetNotReady(AsrError):
    code = "target-not-ready"
    category = Category.REFUSED
    happened = "{machine!r} was not failed over, site {site!r} cannot run it: {findings}"
    cause = "The target was checked before anything was taken from the source, which continues as before."
    action = "Resolve each finding at {site}, then fail over again; `--force` fails over in spite of them."


class PointDamaged(AsrError):
    code = "point-damaged"
    category = Category.INTEGRITY
    happened = "recovery point {point} of {machine!r} is damaged: {damage}"
    cause = "A file of the replica was changed, lost or cut off, or its disk returns other data than was written."
    action = (
        "Choose another recovery point; the newest one before it that is not known to be damaged is {other}. "
        "`--allow-damaged` uses this one as it is. While the source runs, `asr verify {machine} --repair` repairs the "
        "latest state."
    )


class NoPlannedFailover(AsrError):
    code = "no-planned-failover"
    category = Category.REFUSED
    happened = "{machine!r} has no planned failover from a site of driver {driver}"
    cause = "That site cannot read a machine that is shut down, so the machine's last writes would be lost."
    action = (
        "Stop its workload, take a recovery point with `asr replicate {machine}`, shut the machine down by hand, then "
        "run `asr failover unplanned {machine}`."
    )


class NoFailback(AsrError):
    code = "no-failback"
    category = Category.REFUSED
    happened = "{machine!r} cannot be replicated back to site {site!r}: driver {driver} is a source only"
    cause = "Nothing there can receive the disks; a physical server cannot be written while it is off."
    action = "Protect it to another site, as a virtual machine: `asr unprotect {machine}`, then `asr protect`."


class UnsupportedOperation(AsrError):
    code = "unsupported-operation"
    category = Category.REFUSED
    happened = "driver {driver} cannot {operation}"
    cause = "The platform or this driver does not offer it."
    action = "`asr driver list` shows what each driver can do."


# -- drivers and sites ---------------------------------------------------------------------------------------------


class DriverNotFound(AsrError):
    code = "driver-not-found"
    category = Category.NOT_FOUND
    happened = "there is no driver {driver!r}"
    cause = "Its package is not installed with asrcore, or it failed to load."
    action = "`asr driver list` lists the drivers, and the reason if one failed to load."


class PluginFailed(AsrError):
    code = "plugin-failed"
    category = Category.DRIVER
    happened = "the commands of plug-in {plugin!r} cannot be used"
    cause = "{problem}"
    action = "Update or uninstall its package. `asr driver list` names every plug-in that failed to load."


class DriverIncompatible(AsrError):
    code = "driver-incompatible"
    category = Category.DRIVER
    happened = "driver {driver!r} has contract version {theirs}, this engine has {ours}"
    cause = "The driver and asrcore implement different major versions of the driver contract."
    action = "Install a driver and an asrcore whose versions match."


class DriverFailed(AsrError):
    code = "driver-failed"
    category = Category.DRIVER
    happened = "{operation} failed at site {site!r}: {detail}"
    cause = "The platform refused the operation or failed during it."
    action = "The detail is the platform's own message: fix it there, then retry. Existing recovery points are intact."
    retry = True


class SiteUnreachable(AsrError):
    code = "site-unreachable"
    category = Category.UNREACHABLE
    happened = "site {site!r} cannot be reached: {detail}"
    cause = "The host is down, the network link is cut, or its service is not running."
    action = "Check the host and the link, then retry. If the site is lost: `asr failover unplanned MACHINE`."
    retry = True


class AccessDenied(AsrError):
    code = "access-denied"
    category = Category.ACCESS
    happened = "site {site!r} refused access: {detail}"
    cause = "The user, key, certificate or permission is wrong. A retry alone does not help."
    action = "Correct the credentials (`asr site update`), then retry; `asr replicate MACHINE` resumes replication."


class TimedOut(AsrError):
    code = "timed-out"
    category = Category.UNREACHABLE
    happened = "{operation} did not finish within {seconds:g} seconds"
    cause = "The other side hangs or is overloaded. {detail}"
    action = "Check the other side, then retry."
    retry = True


class HostIncomplete(AsrError):
    code = "host-incomplete"
    category = Category.DRIVER
    happened = "this host lacks {what}"
    cause = "A program or library that the driver calls is not installed. {detail}"
    action = "`asr doctor` shows what is missing and the command that installs it."


# -- components of other hosts ---------------------------------------------------------------------------------------


class IdentityUnusable(AsrError):
    code = "identity-unusable"
    category = Category.ACCESS
    happened = "the identity in {directory} cannot be used: {problem}"
    cause = "It needs certificate.pem, key.pem (readable only by its owner) and ca.pem, and they must belong together."
    action = "Name the right directory, or enrol this component again: `asr ca token`, then `asr join`."


class CertificateMissing(AsrError):
    code = "certificate-missing"
    category = Category.ACCESS
    happened = "connection with {peer} refused: {whose} certificate was not presented"
    cause = "Both sides of a connection must present a certificate of the same authority."
    action = "Give the component an identity (certificate.pem, key.pem, ca.pem), then retry."


class CertificateUnknown(AsrError):
    code = "certificate-unknown"
    category = Category.ACCESS
    happened = "connection with {peer} refused: {whose} certificate is not from a known authority"
    cause = (
        "The two components were enrolled with different authorities, or something else answers at that address. "
        "{detail}"
    )
    action = "Check the address; enrol both components with the same authority."


class CertificateExpired(AsrError):
    code = "certificate-expired"
    category = Category.ACCESS
    happened = "connection with {peer} refused: {whose} certificate, or the revocation list, is not valid at this time"
    cause = "It was not renewed in time, or the clock of a host is wrong. {detail}"
    action = (
        "Check the clocks of both hosts. `asr renew --identity DIR` fetches the newest revocation list. A component "
        "whose certificate has expired must be enrolled again: `asr ca token`, then `asr join` into an empty directory."
    )


class CertificateRevoked(AsrError):
    code = "certificate-revoked"
    category = Category.ACCESS
    happened = "connection with {peer} refused: {whose} certificate was revoked"
    cause = "The authority's revocation list names it."
    action = (
        "If the component is to be trusted again, enrol it again: `asr ca token`, then `asr join` into an empty "
        "directory."
    )


class CertificateRole(AsrError):
    code = "certificate-role"
    category = Category.ACCESS
    happened = "connection with {peer} refused: {whose} certificate is for {found}, not for {wanted}"
    cause = "A component may only do what the role in its certificate allows."
    action = "Use the identity directory of the right component, or connect to the right address."


# -- the wire --------------------------------------------------------------------------------------------------------


class PeerVersion(AsrError):
    code = "peer-version"
    category = Category.DRIVER
    happened = "{peer} uses version {theirs} of the wire protocol, this side uses {ours}"
    cause = "The two sides run different major versions of asrcore."
    action = "Nothing was changed. Install matching versions on both sides."


class FrameRefused(AsrError):
    code = "frame-refused"
    category = Category.INTEGRITY
    happened = "the connection with {peer} was closed: {detail}"
    cause = "A frame was damaged, repeated, reordered or forged in transit, or one side has a defect."
    action = "The frame was not used; the work resumes where it was. If it happens again, check the network link."
    retry = True


class PeerError(AsrError):
    code = "peer-error"
    category = Category.DRIVER
    happened = "{peer}: {happened}"
    cause = "The other side reported error {code}, which this version does not know: {cause}"
    action = "{action}"
    retry = True


class PeerFailed(AsrError):
    code = "peer-failed"
    category = Category.DRIVER
    happened = "{operation} failed at {peer}: {detail}"
    cause = "The other side raised an error that is not in the catalogue: a defect."
    action = "Its log has the traceback: report it. Existing recovery points are intact."
    retry = True


class CannotListen(AsrError):
    code = "cannot-listen"
    category = Category.USAGE
    happened = "cannot listen at {address}: {detail}"
    cause = "The address does not belong to this host, its port is in use, or more rights are needed."
    action = "Choose another address, or stop the program that uses it."


# -- source --------------------------------------------------------------------------------------------------------


class ViewLost(AsrError):
    code = "view-lost"
    category = Category.UNREACHABLE
    happened = "the frozen view of {machine!r} ended early: {detail}"
    cause = (
        "While its disks were read, the machine was stopped, started or killed, its host failed, or space for scratch "
        "files ran short."
    )
    action = "The cycle is retried automatically; what was copied is kept."
    retry = True


class ScratchSpaceLow(AsrError):
    code = "scratch-space-low"
    category = Category.CAPACITY
    happened = "{machine!r} was not read: {free} are free for scratch files at {place} of site {site!r}, not {wanted}"
    cause = "While a machine is read, what it overwrites is kept there. A machine that has no space left there stops."
    action = (
        "Free or add space there, or use another directory of that host: `asr site update {site} --set "
        "scratch_dir=DIRECTORY`. Replication then resumes automatically."
    )
    retry = True


class SourceWasPaused(ViewLost):
    code = "source-was-paused"
    happened = "{machine!r} was paused for lack of space while its disks were read, and was resumed: {detail}"
    cause = "What a machine overwrites while it is read is kept in scratch files, and these had no space left."
    action = (
        "The machine runs again, and the cycle is retried automatically. Free or add space for scratch files, or set "
        "another directory for them (`scratch_dir` of the site)."
    )


class SourcePaused(AsrError):
    code = "source-paused"
    category = Category.DRIVER
    happened = "{machine!r} does not run: its host at site {site!r} paused it: {detail}"
    cause = "A disk of the machine failed or had no space left. A paused machine does nothing until it is resumed."
    action = (
        "Repair its storage or free space there, then resume it at its host (libvirt: `virsh resume {machine}`). A "
        "machine that was paused for lack of scratch space is resumed automatically when there is space."
    )


class TrackingLost(AsrError):
    code = "tracking-lost"
    category = Category.INTEGRITY
    happened = "the changes of {machine!r} since the last point are not known: {detail}"
    cause = "The change log was lost or damaged (a crash of the machine or its host, or a replaced disk)."
    action = (
        "Source and replica are compared automatically in the policy's resync window. To start now: `asr resync "
        "{machine} --now`."
    )
    retry = True


class FenceRefused(AsrError):
    code = "fence-refused"
    category = Category.CONFLICT
    happened = "{site!r} refuses to quarantine {machine!r}, which may still run there: {detail}"
    cause = "The machine was failed over, and its old site answers but could not stop it: it may run at both sites."
    action = (
        "Stop it at {site!r} by hand, and keep it off. The quarantine is tried again every few seconds. To have it at "
        "{site!r} instead: `asr failover undo {machine}`, which deletes what it wrote since the failover."
    )


class QuarantinedByAnother(AsrError):
    code = "quarantined-by-another"
    category = Category.CONFLICT
    happened = "{machine!r} is quarantined at {site!r}, and no failover of this vault explains it: {detail}"
    cause = (
        "Another vault, a later copy of this one or an earlier release has sent the quarantine. The machine may run at "
        "another site. It was not started."
    )
    action = (
        "Find out where {machine!r} runs. If another vault has failed it over: undo the failover there, or end its "
        "protection here with `asr unprotect {machine}`. If it runs nowhere: remove the quarantine by hand (libvirt: "
        "`virsh metadata {machine} https://asrcore.dev/xmlns/libvirt/1.0/fence --config --remove`), and start it."
    )


class MarksLeft(AsrError):
    code = "marks-left"
    category = Category.CONFLICT
    happened = "what tracked the changes of {machine!r} at {site!r} is still there ({marks}): {detail}"
    cause = "It can be deleted neither in the machine's images nor by the hypervisor now."
    action = "Repair what the detail names and unprotect again, or delete it: {commands}."
    retry = True


class ShutdownFailed(AsrError):
    code = "shutdown-failed"
    category = Category.CONFLICT
    happened = "{machine!r} did not shut down within {seconds:g} seconds"
    cause = "The guest ignored or delayed the shutdown request."
    action = "Shut it down from inside the guest and retry; or retry with `--force-off`, which acts like a power cut."


# -- target --------------------------------------------------------------------------------------------------------


class TargetFull(AsrError):
    code = "target-full"
    category = Category.CAPACITY
    happened = "the target has no space left at {where}"
    cause = "Replica, recovery points and journal fill the file system. {detail}"
    action = "Free or add space there; replication then resumes automatically. Existing recovery points are intact."
    retry = True


class TargetReadOnly(AsrError):
    code = "target-read-only"
    category = Category.ACCESS
    happened = "the target cannot be written at {where}"
    cause = "The directory is read-only or belongs to another user. {detail}"
    action = (
        "Remount it writable or correct its owner; replication continues within a minute. Existing recovery points are "
        "intact."
    )


class ReplicaPromoted(AsrError):
    code = "replica-promoted"
    category = Category.CONFLICT
    happened = "replica {replica!r} of {machine!r} takes no data: the machine was failed over to it"
    cause = (
        "Writing to it would overwrite what the failed-over machine stands on. If `asr status` does not show the "
        "failover, this vault is older than the replica: it was restored from a backup."
    )
    action = (
        "If `asr status` shows the failover: `asr failover commit {machine}` or `asr failover undo {machine}`. If not: "
        "`asr machine adopt {machine}` records it."
    )


class VaultBehind(AsrError):
    code = "vault-behind"
    category = Category.CONFLICT
    happened = "the vault is behind site {site!r} for {machine!r}: {detail}"
    cause = (
        "The vault was restored from a backup, its database lost its last transactions, or a newer copy of the vault "
        "is used by another engine. Nothing was changed."
    )
    action = "{way_out}"


class ReplicaDamaged(AsrError):
    code = "replica-damaged"
    category = Category.INTEGRITY
    happened = "replica {replica!r} is damaged: {detail}"
    cause = "A file of the replica was changed, lost or truncated by something other than asrcore."
    action = (
        "`asr verify MACHINE --repair` repairs content. If files are missing: `asr unprotect MACHINE`, which deletes "
        "the replica and all its recovery points, then `asr protect`."
    )


class VerifyFailed(AsrError):
    code = "verify-failed"
    category = Category.INTEGRITY
    happened = "{different} bytes of {machine!r} differ between source and replica"
    cause = "The replica's content is not what was sent: a fault of storage, memory or software."
    action = "`asr verify {machine} --repair` sends these blocks again; then check the target's storage."


class DemoFailed(AsrError):
    code = "demo-failed"
    category = Category.INTEGRITY
    happened = "a check of `asr demo` failed: {claim}"
    cause = "A step ended, but its result is not what the engine promises. Your vault and machines are not involved."
    action = "This is a defect: run `asr demo` again, and report it with the output of both runs."


# -- vault and jobs --------------------------------------------------------------------------------------------------


class VaultNotFound(AsrError):
    code = "vault-not-found"
    category = Category.VAULT
    happened = "there is no vault at {url}"
    cause = "`asr init` was not run, or --vault or ASR_VAULT names another place."
    action = "Create one with `asr --vault {url} init`, or name the right one."


class VaultMoved(AsrError):
    code = "vault-moved"
    category = Category.VAULT
    happened = "the vault at {url} was moved away"
    cause = "`asr vault move` moved it, to be used at another host; its last content here is in {left}."
    action = "Use the vault at its new place. If that one is lost, rename {left} back to its old name."


class VaultExists(AsrError):
    code = "vault-exists"
    category = Category.CONFLICT
    happened = "a vault already exists at {url}"
    cause = "`asr init` was run for it before."
    action = "It was not changed. Use it, or name another place with --vault."


class NotAVault(AsrError):
    code = "not-a-vault"
    category = Category.VAULT
    happened = "{url} is not a vault"
    cause = "The file or database holds something else. {detail}"
    action = "It was not changed. Name the vault with --vault or ASR_VAULT."


class VaultTooNew(AsrError):
    code = "vault-too-new"
    category = Category.VAULT
    happened = "the vault at {url} has version {found}, newer than this asrcore knows ({known})"
    cause = "A newer asrcore upgraded it."
    action = "It was not changed. Install that newer asrcore here too."


class VaultDamaged(AsrError):
    code = "vault-damaged"
    category = Category.VAULT
    happened = "the vault at {url} is damaged: {detail}"
    cause = "Something other than asrcore wrote to it, or its storage lost or changed bytes."
    action = "Nothing was changed. Stop the engine and restore the vault from a backup."


class VaultInUse(AsrError):
    code = "vault-in-use"
    category = Category.CONFLICT
    happened = "another engine is working on this vault: {holder}"
    cause = "Only one engine at a time runs the jobs and cycles of a vault."
    action = "Use that engine (`asr` commands hand their jobs to it), or stop it first."
    retry = True


class VaultUnavailable(AsrError):
    code = "vault-unavailable"
    category = Category.VAULT
    happened = "the vault at {url} cannot be used: {detail}"
    cause = "Its file system is full, read-only or missing, or the database does not answer."
    action = "Fix that, then retry. Nothing was recorded."
    retry = True


class VaultReadOnly(VaultUnavailable):
    code = "vault-read-only"
    happened = "the vault at {url} cannot be written: {detail}"
    cause = "The database is a standby, or its transactions are read-only by default."
    action = (
        "Connect to the primary: name all hosts in the URL and add `target_session_attrs=read-write`. "
        "Work continues when the vault can be written again. Nothing was recorded."
    )


class VaultForbidden(VaultUnavailable):
    code = "vault-forbidden"
    happened = "the database refuses access to the vault at {url}: {detail}"
    cause = "The role in the vault's URL has lost a privilege that it needs."
    action = (
        "Make that role the owner of the database and of the tables in it. Work continues when it has its privileges "
        "again. Nothing was recorded."
    )


class VaultPooled(AsrError):
    code = "vault-pooled"
    category = Category.VAULT
    happened = "the vault at {url} is reached through a connection pooler that does not keep sessions: {detail}"
    cause = (
        "A lock and time limits are kept in sessions of PostgreSQL. pgbouncer in transaction or statement mode shares "
        "a session among clients, and by default refuses the settings of one."
    )
    action = (
        "Connect to PostgreSQL directly. If a pooler is needed, set `pool_mode = session` and "
        "`ignore_startup_parameters = options` for this database in pgbouncer.ini."
    )


class WrongCycle(AsrError):
    code = "wrong-cycle"
    category = Category.INTEGRITY
    happened = "cycle {cycle} of {machine!r} is not the current one: {detail}"
    cause = "A second engine worked on the machine, or asrcore has a defect."
    action = "Nothing was recorded; the next cycle starts from the recorded state. If it happens again, report it."
    retry = True


class JobFailed(AsrError):
    code = "job-failed"
    category = Category.DRIVER
    happened = "job {job} failed: {detail}"
    cause = "A step of the job raised an error that is not in the catalogue."
    action = "This is a defect: report it with the traceback that `asr job show {job}` shows."


class JobFromBackup(AsrError):
    code = "job-from-backup"
    category = Category.CONFLICT
    happened = "job {job} was not resumed: the vault was put back to an earlier copy in which it had not ended"
    cause = "It may have ended or been cancelled since, so it waits for a person."
    action = "Check the machine with `asr status`. If the work is still wanted, run the command again."


class EngineStopped(AsrError):
    code = "engine-stopped"
    category = Category.UNREACHABLE
    happened = "job {job} has not ended, and no engine is working on the vault"
    cause = "The process that ran it was stopped or died."
    action = "The job resumes at its current step as soon as `asr run` or another job starts an engine."
    retry = True


class SecretKeyUnusable(AsrError):
    code = "secret-key-unusable"
    category = Category.ACCESS
    happened = "the key of {what} at {where} cannot be used: {problem}"
    cause = "Secret settings of sites and private keys of authorities are encrypted; their key is stored separately."
    action = (
        "Restore the key from its backup, or name its place with {variable}. If it is lost, enter the secrets again "
        "with `asr site update SITE --set NAME=@FILE`, and make a new authority in an empty directory."
    )


class CertificateNotFound(AsrError):
    code = "certificate-not-found"
    category = Category.NOT_FOUND
    happened = "there is no valid certificate of {what}"
    cause = "It was never issued, has expired, or was revoked."
    action = "`asr ca list` shows the certificates that were issued."


class TokenRefused(AsrError):
    code = "token-refused"
    category = Category.ACCESS
    happened = "the join token was refused: {reason}"
    cause = "A token is valid for one component, once, and for a short time."
    action = "Create another one with `asr ca token` on the configuration server, and join with that."


class AuthorityUnusable(AsrError):
    code = "authority-unusable"
    category = Category.ACCESS
    happened = "the certificate authority in {directory} cannot be used: {problem}"
    cause = "It needs ca.pem and ca-key.pem (readable only by its owner), and they must belong together."
    action = "Name the right directory with `--ca`. `asr ca init` creates an authority where there is none."


class RequestRefused(AsrError):
    code = "request-refused"
    category = Category.ACCESS
    happened = "the certificate request was refused: {reason}"
    cause = "A component makes its own key and signs its request with it; this request does not fit that."
    action = "Join or renew again with this version of `asr`."


class NotAssigned(AsrError):
    code = "not-assigned"
    category = Category.CONFLICT
    happened = "{machine!r} is no longer assigned to process server {server!r}"
    cause = "It was moved to another server: this one was silent for longer than its lease, or the load was balanced."
    action = "Nothing was recorded. The other server continues with the machine. No action needed."


class ServerReplaced(AsrError):
    code = "server-replaced"
    category = Category.CONFLICT
    happened = "process server {server!r} was replaced: other servers have taken over its machines"
    cause = "It was silent for longer than its lease: it was paused, overloaded, or cut off from the vault."
    action = "It no longer records anything. Start it again; its service unit does so automatically."


class ServerNameTaken(AsrError):
    code = "server-name-taken"
    category = Category.CONFLICT
    happened = "a process server named {server!r} already works on this vault, on host {host!r}"
    cause = "Each server needs a unique name. A server that died keeps its name for its lease of {seconds:g} seconds."
    action = "Choose another name with `--name`, or wait that long if the other one has died."
    retry = True


class Cancelled(AsrError):
    code = "cancelled"
    category = Category.CANCELLED
    happened = "{work} was cancelled"
    cause = "Cancellation was requested."
    action = "Run the command again; it resumes where it stopped."
