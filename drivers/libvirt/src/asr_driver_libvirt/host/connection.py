"""The connection to one libvirt host: kept alive, reopened when it broke, its errors translated."""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Callable, Iterator

import libvirt

from asr_driver_libvirt.host import events
from asr_driver_libvirt.host.errors import translated
from asr_driver_libvirt.host.lifecycle import Lifecycle
from asr_driver_libvirt.settings import DRIVER, SiteSettings
from asrcore.driver import Closing
from asrcore.errors import MachineNotFound, SiteUnreachable

__all__ = ["LibvirtHost"]

# A cut link is noticed when 3 answers in 5 s steps are missing: every call on it fails after 20 s at most.
KEEPALIVE_SECONDS = 5
KEEPALIVE_COUNT = 3
# connect(2) to an unreachable host blocks for more than two minutes, and libvirt has no limit for it.
OPEN_SECONDS = 15.0

# libvirt's: type, prompt, challenge, default, and the place for the answer.
_Credential = list[int | str | None]


class LibvirtHost(Closing):
    """What all roles of a site stand on. The connection is shared by all threads; libvirt's calls are thread-safe.

    `name` is the site's; `reading`: names of the views whose backup jobs this process reads from.
    """

    driver = DRIVER

    def __init__(self, name: str, settings: SiteSettings) -> None:
        self.name = name
        self.settings = settings
        self._lock = threading.Lock()
        self._conn: libvirt.virConnect | None = None
        self.lifecycle = Lifecycle()
        self.reading: set[str] = set()
        self._closed = False

    def conn(self) -> libvirt.virConnect:
        """A live connection. Raises SiteUnreachable, AccessDenied."""
        with self._lock:
            if self._closed:
                raise SiteUnreachable(site=self.name, detail="the connection was closed")
            if self._conn is not None and not _alive(self._conn):
                _close(self._conn, self.lifecycle)
                self._conn = None
            if self._conn is None:
                self._conn, self.lifecycle = self._open()
            return self._conn

    @property
    def connected(self) -> bool:
        """Whether the connection is alive now; sends nothing and opens nothing."""
        conn = self._conn
        return conn is not None and _alive(conn)

    @property
    def closed(self) -> bool:
        """Whether it was closed for good."""
        return self._closed

    @contextlib.contextmanager
    def guard(self, operation: str, machine: str = "") -> Iterator[None]:
        """Translate libvirt's errors into the catalogue's. `machine`: whom a missing domain is reported as."""
        try:
            yield
        except libvirt.libvirtError as error:
            conn = self._conn
            dead = conn is not None and not _alive(conn)
            raise translated(error, site=self.name, operation=operation, machine=machine, dead=dead) from error

    def domain(self, machine_id: str) -> libvirt.virDomain:
        """The domain of that UUID. Raises MachineNotFound, SiteUnreachable."""
        try:
            uuid.UUID(machine_id)
        except ValueError as error:  # libvirt calls it an invalid argument; it is no machine's id
            raise MachineNotFound(site=self.name, machine=machine_id) from error
        with self.guard("looking up a machine", machine_id):
            return self.conn().lookupByUUIDString(machine_id)

    def _open(self) -> tuple[libvirt.virConnect, Lifecycle]:
        events.start()
        lifecycle = Lifecycle()
        opened: list[libvirt.virConnect] = []
        failed: list[libvirt.libvirtError] = []
        given_up = threading.Event()
        done = threading.Event()

        def run() -> None:
            try:
                conn = libvirt.openAuth(self.settings.uri, self._auth(), 0)
                conn.setKeepAlive(KEEPALIVE_SECONDS, KEEPALIVE_COUNT)
                lifecycle.register(conn)
                opened.append(conn)
            except libvirt.libvirtError as error:
                failed.append(error)
            finally:
                done.set()
                if given_up.is_set() and opened:
                    _close(opened[0], lifecycle)

        threading.Thread(target=run, name=f"libvirt-open-{self.name}", daemon=True).start()
        if not done.wait(OPEN_SECONDS):
            given_up.set()
            raise SiteUnreachable(site=self.name, detail=f"{self.settings.uri}: no answer within {OPEN_SECONDS:g} s")
        if failed:
            raise translated(failed[0], site=self.name, operation="connecting", dead=True) from failed[0]
        return opened[0], lifecycle

    def _auth(self) -> list[list[int] | Callable[[tuple[_Credential, ...], None], int] | None]:
        wanted = [libvirt.VIR_CRED_AUTHNAME, libvirt.VIR_CRED_USERNAME, libvirt.VIR_CRED_PASSPHRASE]
        wanted += [libvirt.VIR_CRED_ECHOPROMPT, libvirt.VIR_CRED_NOECHOPROMPT]
        names = {libvirt.VIR_CRED_AUTHNAME, libvirt.VIR_CRED_USERNAME, libvirt.VIR_CRED_ECHOPROMPT}

        def answer(credentials: tuple[_Credential, ...], _: None) -> int:
            for credential in credentials:
                value = self.settings.user if credential[0] in names else self.settings.password
                if not value:
                    return -1
                credential[4] = value
            return 0

        return [wanted, answer, None]

    def close(self) -> None:
        """Close the connection; open views end."""
        with self._lock:
            self._closed = True
            conn, self._conn = self._conn, None
        if conn is not None:
            _close(conn, self.lifecycle)


def _alive(conn: libvirt.virConnect) -> bool:
    try:
        return bool(conn.isAlive())
    except libvirt.libvirtError:
        return False


def _close(conn: libvirt.virConnect, lifecycle: Lifecycle) -> None:
    lifecycle.unregister(conn)
    with contextlib.suppress(libvirt.libvirtError):
        conn.close()
