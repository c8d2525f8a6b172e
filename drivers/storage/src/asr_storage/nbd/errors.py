"""What can go wrong with a disk that is read or written over NBD."""

import errno
from collections.abc import Sequence

__all__ = ["NbdContextMissing", "NbdError", "NbdExportMissing", "NbdTimeout"]


class NbdError(Exception):
    """An NBD operation failed. `errno` is None where libnbd gives none (TLS, protocol)."""

    def __init__(self, what: str, detail: str, *, export: str, errno: int | None) -> None:
        super().__init__(f"NBD export {export!r}: {what}: {detail}")
        self.what = what
        self.detail = detail
        self.export = export
        self.errno = errno


class NbdTimeout(NbdError):
    """The server was silent for the time limit. The client can only be closed."""


class NbdExportMissing(NbdError):
    """The server is there but has no export of that name."""


class NbdContextMissing(NbdError):
    """The server does not offer the `contexts` asked for, such as a dirty bitmap."""

    def __init__(self, contexts: Sequence[str], *, export: str) -> None:
        names = ", ".join(contexts)
        super().__init__("block status", f"not offered: {names}", export=export, errno=errno.ENOTSUP)
        self.contexts = tuple(contexts)
