"""Content of managed disks and snapshots: sparse files, and the part of the blob protocol that their SAS allows."""

from __future__ import annotations

import os
import secrets
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import attrs

from asr_driver_azure.blobs import vhd
from drivers.azure.tests.peers.arm.schema import Refusal

BLOCK = 4096
"""Pages are listed and compared in blocks of this many bytes."""
MOST_PUT = 4 << 20


@attrs.define
class Access:
    """A SAS: its owner, whether it allows writing, and its expiry."""

    owner: str
    write: bool
    until: float
    token: str = attrs.field(factory=lambda: secrets.token_urlsafe(24))


class Content:
    """Files in `directory`, by the name of the resource. An upload has its footer at the end until it is revoked."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._access: dict[str, Access] = {}
        self.delay = 0.0
        """Seconds that each put takes."""
        self.replaces = False
        """Whether a SAS becomes invalid when another one is granted for the same access."""
        self.granted_count = 0
        self.tokens: set[str] = set()
        """The tokens of all SAS granted so far."""
        self.late = 0
        """Requests with an expired SAS."""
        self.read = 0
        """Bytes of content read so far."""

    def path(self, owner: str) -> Path:
        """The file of a disk (`disks/NAME`) or snapshot (`snapshots/NAME`)."""
        return self._directory / owner.replace("/", "_")

    def make(self, owner: str, size: int) -> None:
        """A new, empty one."""
        with self.path(owner).open("wb") as file:
            file.truncate(size)

    def copy(self, owner: str, to: str) -> None:
        """A copy, for a snapshot."""
        command = ["cp", "--reflink=auto", "--sparse=always", str(self.path(owner)), str(self.path(to))]
        subprocess.run(command, check=True, timeout=300)

    def remove(self, owner: str) -> None:
        """Gone."""
        self.path(owner).unlink()

    def finish(self, owner: str) -> None:
        """End an upload: the footer is read and cut off. Raises Refusal for a wrong footer."""
        path = self.path(owner)
        size = path.stat().st_size - vhd.FOOTER
        with path.open("r+b") as file:
            file.seek(size)
            try:
                reported = vhd.parse(file.read())
            except ValueError as problem:
                raise Refusal(409, "InvalidVhd", f"{owner}: {problem}") from problem
            if reported != size:
                raise Refusal(409, "InvalidVhd", f"{owner}: the footer has {reported} bytes, the disk has {size}")
            file.truncate(size)

    # -- SAS

    def grant(self, owner: str, *, write: bool, seconds: float) -> str:
        """Path and query of a SAS. Granting the same access again extends the same SAS."""
        with self._lock:
            found = next((item for item in self._access.values() if item.owner == owner and item.write == write), None)
            if found is not None and self.replaces:
                del self._access[found.token]
                found = None
            self.granted_count += 1
            access = found or Access(owner, write, 0)
            access.until = time.time() + seconds
            self._access[access.token] = access
            self.tokens.add(access.token)
        until = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(access.until))
        kind = "rw" if write else "r"
        return f"/md-content/{owner.replace('/', '-')}?sv=2026-06-06&sr=b&sp={kind}&se={until}&sig={access.token}"

    def granted(self, owner: str) -> bool:
        """Whether access is granted."""
        return any(item.owner == owner for item in self._access.values())

    def revoke(self, owner: str) -> None:
        """End all access to it."""
        with self._lock:
            self._access = {token: item for token, item in self._access.items() if item.owner != owner}

    def expire(self) -> None:
        """Let every SAS expire now."""
        with self._lock:
            for item in self._access.values():
                item.until = 0

    # -- the protocol

    def serve(self, method: str, query: dict[str, str], headers: Any, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Answer one request with a SAS. Raises Refusal."""
        access = self._access.get(query.get("sig", ""))
        if access is None or access.until < time.time():
            self.late += access is not None
            raise Refusal(403, "AuthenticationFailed", "the SAS is unknown, revoked or expired")
        size = self.path(access.owner).stat().st_size
        comp = query.get("comp", "")
        if method == "HEAD":
            return 200, self._headers(size) | {"Content-Length": str(size)}, b""
        if method == "GET" and comp == "pagelist":
            return 200, {"Content-Type": "application/xml"}, self._pages(access.owner, headers, size)
        if method == "GET" and not comp:
            return self._read(access.owner, headers, size)
        if method == "PUT" and comp == "page":
            return self._write(access, headers, body, size)
        # A disk's SAS allows nothing else: no create, no delete, no lease, no metadata, no snapshot.
        raise Refusal(403, "AuthorizationPermissionMismatch", f"{method} {comp} is not allowed on a managed disk")

    def _headers(self, size: int) -> dict[str, str]:
        return {
            "x-ms-blob-type": "PageBlob",
            "ETag": '"0x1"',
            "Last-Modified": "Wed, 25 Nov 2026 00:00:00 GMT",
            "x-ms-version": "2026-06-06",
            "Accept-Ranges": "bytes",
        }

    def _write(self, access: Access, headers: Any, body: bytes, size: int) -> tuple[int, dict[str, str], bytes]:
        if not access.write:
            raise Refusal(403, "AuthorizationPermissionMismatch", "the SAS is for reading")
        if headers.get("Content-MD5"):
            raise Refusal(400, "UnsupportedHeader", "Content-MD5 is not supported on a managed disk")
        start, end = _span(headers, size)
        if start % 512 or end % 512 or end > size or start >= end:
            raise Refusal(416, "InvalidPageRange", f"{start}-{end} of {size}")
        time.sleep(self.delay)
        clear = headers.get("x-ms-page-write") == "clear"
        if not clear and (len(body) != end - start or len(body) > MOST_PUT):
            raise Refusal(413, "RequestBodyTooLarge", f"{len(body)} bytes for {end - start}")
        with self.path(access.owner).open("r+b") as file:
            os.pwrite(file.fileno(), bytes(end - start) if clear else body, start)
        return 201, self._headers(size) | {"x-ms-blob-sequence-number": "0"}, b""

    def _read(self, owner: str, headers: Any, size: int) -> tuple[int, dict[str, str], bytes]:
        start, end = _span(headers, size)
        with self.path(owner).open("rb") as file:
            data = os.pread(file.fileno(), end - start, start)
        with self._lock:
            self.read += len(data)
        reported = {"Content-Range": f"bytes {start}-{start + len(data) - 1}/{size}"}
        return 206, self._headers(size) | reported, data

    def _pages(self, owner: str, headers: Any, size: int) -> bytes:
        start, end = _span(headers, size)
        former = headers.get("x-ms-previous-snapshot-url")
        if former is None:
            rows = [(a, b, "PageRange") for a, b in self._runs(owner, None, start, end)]
        else:
            token = former.partition("sig=")[2].partition("&")[0]
            base = self._access.get(token)
            if base is None or base.until < time.time():
                raise Refusal(400, "PreviousSnapshotCannotBeNewer", "no access to the previous snapshot")
            changed = self._runs(owner, base.owner, start, end)
            rows = [(a, b, "PageRange" if self._holds(owner, a, b) else "ClearRange") for a, b in changed]
        text = "".join(f"<{kind}><Start>{a}</Start><End>{b - 1}</End></{kind}>" for a, b, kind in rows)
        return f'<?xml version="1.0" encoding="utf-8"?><PageList>{text}</PageList>'.encode()

    def _holds(self, owner: str, start: int, end: int) -> bool:
        with self.path(owner).open("rb") as file:
            return any(os.pread(file.fileno(), end - start, start))

    def _runs(self, owner: str, base: str | None, start: int, end: int) -> list[tuple[int, int]]:
        """Blocks with data, or that differ from `base`; with a base, runs of zeroes are kept apart from data."""
        runs: list[tuple[int, int]] = []
        former = self.path(base).open("rb") if base else None
        was_zero = False
        with self.path(owner).open("rb") as file:
            for at in range(start // BLOCK * BLOCK, end, BLOCK):
                here = os.pread(file.fileno(), BLOCK, at)
                there = os.pread(former.fileno(), BLOCK, at) if former else bytes(len(here))
                if here == there.ljust(len(here), b"\0"):
                    continue
                zero = not any(here)
                stop = min(at + BLOCK, end)
                if runs and runs[-1][1] == at and zero is was_zero:
                    runs[-1] = (runs[-1][0], stop)
                else:
                    runs.append((max(at, start), stop))
                was_zero = zero
        if former:
            former.close()
        return runs


def _span(headers: Any, size: int) -> tuple[int, int]:
    text = headers.get("x-ms-range") or headers.get("Range")
    if not text:
        return 0, size
    start, _, end = text.removeprefix("bytes=").partition("-")
    return int(start), min(int(end) + 1 if end else size, max(size, int(end or 0) + 1))
