"""Azure's errors translated into the catalogue's, and the driver's own errors."""

from __future__ import annotations

from collections.abc import Mapping

from azure.core.exceptions import (
    AzureError,
    ClientAuthenticationError,
    HttpResponseError,
    ServiceRequestError,
    ServiceResponseError,
)

from asrcore.errors import AccessDenied, AsrError, Category, DriverFailed, SiteUnreachable, TargetFull, TargetReadOnly

__all__ = [
    "LeaseHeld",
    "NetworkUnknown",
    "QuotaExceeded",
    "SizeNotFound",
    "StateRefused",
    "UploadFailed",
    "code_of",
    "retry_after",
    "status_of",
    "translated",
    "waits",
]


class SizeNotFound(AsrError):
    code = "azure-size-not-found"
    category = Category.REFUSED
    happened = "no machine size of {region} fits {machine!r}: {needs}"
    cause = "No size that the settings `sizes` and `size_rules` allow fits it, or the region or subscription has none."
    action = "Add sizes to the site's `sizes`, or set one for this machine with `size_rules`, then retry."


class QuotaExceeded(AsrError):
    code = "azure-quota-exceeded"
    category = Category.CAPACITY
    happened = "the subscription of site {site!r} has no room for {operation}: {detail}"
    cause = "A quota of the subscription or the capacity of the region is used up."
    action = "Raise the quota in Azure, or delete what uses it; then retry. Recovery points are intact."
    retry = True


class StateRefused(AsrError):
    code = "azure-state-refused"
    category = Category.CONFLICT
    happened = "{operation} was refused at site {site!r}: {detail}"
    cause = "The resource is in a state that does not allow it: in use, being read, or being changed."
    action = "The detail is Azure's own message. Wait for what uses the resource, or end that in Azure; then retry."
    retry = True


class LeaseHeld(AsrError):
    code = "azure-lease-held"
    category = Category.CONFLICT
    happened = "blob {blob} of replica {replica!r} has a lease of unknown origin"
    cause = "Another program or a person leased the blob, or broke the engine's lease. Nothing was written."
    action = "Find out who holds the lease. If it is not needed, break it in Azure, then retry."


class NetworkUnknown(AsrError):
    code = "azure-network-unknown"
    category = Category.REFUSED
    happened = "site {site!r} has no network {network!r}"
    cause = "The site's setting `networks` assigns a subnet to each network name; this name is not in it."
    action = "Add it to `networks`, or map the machine's network to one that is in it, then retry."


class UploadFailed(AsrError):
    code = "azure-upload-failed"
    category = Category.DRIVER
    happened = "Azure did not accept disk {disk!r}: it is in state {state}"
    cause = "Something other than asrcore changed the disk during the upload, or Azure refused to finish the upload."
    action = "Check the disk in Azure; delete it if it is not in use, then retry. The recovery point is intact."


_BUSY = {"ServerBusy", "OperationTimedOut", "InternalError", "TooManyRequests", "Md5Mismatch"}
_READ_ONLY = {"AuthorizationPermissionMismatch", "InsufficientAccountPermissions", "AccountIsDisabled"}
_FULL = {"AccountLimitExceeded", "BlobTierInadequateForContentLength"}
_QUOTA = {"QuotaExceeded", "SkuNotAvailable", "AllocationFailed", "ZonalAllocationFailed"}
_DENIED = {401, 403}


def status_of(error: BaseException) -> int:
    """The HTTP status of an answer; 0 if none came."""
    return (error.status_code or 0) if isinstance(error, HttpResponseError) else 0


def code_of(error: BaseException) -> str:
    """Azure's own error code; empty if it gave none."""
    code = getattr(error, "error_code", None)
    if code is None and isinstance(error, HttpResponseError) and error.error is not None:
        code = error.error.code
    if code is None:
        code = _headers(error).get("x-ms-error-code")
    return str(getattr(code, "value", code) or "")


def _headers(error: BaseException) -> Mapping[str, str]:
    found: Mapping[str, str] = getattr(getattr(error, "response", None), "headers", None) or {}
    return found


def retry_after(error: BaseException) -> float | None:
    """Seconds that the service asks to wait, if it does."""
    value = _headers(error).get("Retry-After")
    try:
        return max(0.0, float(value)) if value else None
    except ValueError:
        return None


def waits(error: BaseException) -> bool:
    """Whether the same request may succeed when it is sent again."""
    if isinstance(error, ClientAuthenticationError) or _mistrusted(error):
        return False
    if isinstance(error, ServiceRequestError | ServiceResponseError):
        return True
    return status_of(error) in (408, 429, 500, 502, 503, 504) or code_of(error) in _BUSY


def _mistrusted(error: BaseException) -> bool:
    """Whether the server's certificate is not trusted. The SDK passes on its HTTP library's message as text."""
    return isinstance(error, ServiceRequestError) and "CERTIFICATE_VERIFY_FAILED" in str(error)


def translated(error: AzureError, *, site: str, operation: str, where: str = "") -> AsrError:
    """The catalogue's error for Azure's. `where`: what was to be written, if anything was."""
    code, detail = code_of(error), " ".join(str(error.message or error).split())[:400]
    if _mistrusted(error):
        return AccessDenied(site=site, detail=f"{operation}: the server's certificate is not trusted: {detail}")
    if isinstance(error, ServiceRequestError | ServiceResponseError) or waits(error):
        return SiteUnreachable(site=site, detail=f"{operation}: {detail}")
    if where and code in _READ_ONLY:
        return TargetReadOnly(where=where, detail=detail)
    if where and code in _FULL:
        return TargetFull(where=where, detail=detail)
    if isinstance(error, ClientAuthenticationError) or status_of(error) in _DENIED:
        return AccessDenied(site=site, detail=f"{operation}: {detail}")
    # One code for both: Azure distinguishes them in the text only.
    if code == "OperationNotAllowed" and "quota" not in detail.lower():
        return StateRefused(site=site, operation=operation, detail=detail)
    if code in _QUOTA or code == "OperationNotAllowed":
        return QuotaExceeded(site=site, operation=operation, detail=detail)
    return DriverFailed(operation=operation, site=site, detail=detail)
