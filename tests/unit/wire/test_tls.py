"""Access: each invalid certificate is refused with its own error, at both sides, and nothing is served."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest

from asrcore.errors import (
    AsrError,
    CertificateExpired,
    CertificateMissing,
    CertificateRevoked,
    CertificateRole,
    CertificateUnknown,
    IdentityUnusable,
    SiteUnreachable,
    TimedOut,
)
from asrcore.remote import RemoteDriver
from asrcore.remote.master_target import MasterTarget
from asrcore.testing.memory import MemoryDriver, MemoryWorld
from asrcore.wire.carrier import Address, Carrier, ConnectionLost, Limits
from asrcore.wire.channel import Channel
from asrcore.wire.listener import Listener
from asrcore.wire.tls import Component, Identity, Role
from tests.certificates import Authority
from tests.unit.service.waiting import wait_until

LIMITS = Limits(connect=10.0, silence=10.0)


@attrs.define
class Place:
    """A master target that serves a memory world, and a directory for identities."""

    directory: Path
    authority: Authority
    serving: Path
    target: MasterTarget

    def engine(self, name: str = "engine", role: str = "process-server", **options: object) -> Path:
        """A valid identity of an engine, modified by `options`."""
        return self.authority.issue(self.directory / name, role, name, **options)  # type: ignore[arg-type]

    def connect(self, identity: Path, **settings: str) -> None:
        """Use the site as an engine does; raises the engine's error."""
        given = {"address": str(self.target.address), "identity": str(identity), "silence": "10s", **settings}
        with RemoteDriver().connect("there", given) as site:
            assert site.target.replicas() == []


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    authority = Authority()
    serving = authority.issue(tmp_path / "serving", "master-target", "beta", crl=True)
    MemoryWorld("served")
    with (
        MemoryDriver().connect("served", {"world": "served"}) as site,
        MasterTarget(site, Address("127.0.0.1", 0), Identity(serving), limits=LIMITS) as target,
    ):
        yield Place(tmp_path, authority, serving, target)


def test_good_certificates_connect(place: Place) -> None:
    place.connect(place.engine())
    place.connect(place.engine("config", "config-server"))
    assert place.target.component == Component(Role.MASTER_TARGET, "beta")


# -- what the serving side refuses ------------------------------------------------------------------------------------


def other_authority(place: Place) -> Path:
    identity = Authority("another").issue(place.directory / "stranger", "process-server")
    (identity / "ca.pem").write_bytes((place.serving / "ca.pem").read_bytes())  # it does trust the serving side
    return identity


def revoked(place: Place) -> Path:
    identity = place.engine()
    place.authority.revoke(identity)
    place.authority.write_crl(place.serving)
    return identity


REFUSED: dict[str, tuple[type[AsrError], Callable[[Place], Path]]] = {
    "of another authority": (CertificateUnknown, other_authority),
    "expired": (CertificateExpired, lambda place: place.engine(days=(-10, -1))),
    "not yet valid": (CertificateUnknown, lambda place: place.engine(days=(2, 10))),
    "revoked": (CertificateRevoked, revoked),
    "of an agent": (CertificateRole, lambda place: place.engine(role="agent")),
    "of a master target": (CertificateRole, lambda place: place.engine(role="master-target")),
    "of no component": (CertificateRole, lambda place: place.engine(uris=())),
    "of two components": (
        CertificateRole,
        lambda place: place.engine(uris=("asr://process-server/one", "asr://agent/two")),
    ),
    "of an unknown role": (CertificateRole, lambda place: place.engine(uris=("asr://king/one",))),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_engine_is_refused(place: Place, case: str) -> None:
    error, make = REFUSED[case]
    with pytest.raises(error) as problem:
        place.connect(make(place))
    assert problem.value.attributes["whose"] == "our"
    place.connect(place.engine("good"))  # and other peers are not affected


def test_who_shows_no_certificate_is_refused(place: Place) -> None:
    class Nobody(Identity):
        """Trusts the authority, has no certificate."""

        def _make(self, *, server: bool, check_host: bool) -> object:  # type: ignore[override]
            import ssl

            context = ssl.create_default_context(cafile=str(self.directory / "ca.pem"))
            context.check_hostname = check_host
            return context

    identity = Nobody(place.engine())
    carrier = Carrier.dial(place.target.address, identity, [Role.MASTER_TARGET], limits=LIMITS)
    with pytest.raises(CertificateMissing) as problem:
        Channel(carrier, dialled=True)
    assert problem.value.attributes["whose"] == "our"


def test_a_revocation_ends_what_is_connected(place: Place) -> None:
    identity = place.engine()
    given = {"address": str(place.target.address), "identity": str(identity), "silence": "10s"}
    with RemoteDriver().connect("there", given) as site:
        place.authority.revoke(identity)
        place.authority.write_crl(place.serving)

        def refused() -> bool:
            try:
                site.status()
            except CertificateRevoked:
                return True
            except SiteUnreachable:
                pass
            return False

        wait_until(refused, "the revoked engine is refused")


def test_an_expired_revocation_list_lets_nobody_in(place: Place) -> None:
    """Otherwise an attacker who withholds new lists could keep revoked components connected."""
    place.authority.write_crl(place.serving, days=(-9, -2))
    with pytest.raises(CertificateExpired):
        place.connect(place.engine())


# -- what the engine refuses ------------------------------------------------------------------------------------------

THEIRS: dict[str, tuple[type[AsrError], Callable[[Authority, Path], Path], dict[str, str]]] = {
    "of another authority": (
        CertificateUnknown,
        lambda _, path: Authority("another").issue(path, "master-target"),
        {},
    ),
    "expired": (CertificateExpired, lambda authority, path: authority.issue(path, "master-target", days=(-9, -1)), {}),
    "of an agent": (CertificateRole, lambda authority, path: authority.issue(path, "agent"), {}),
    "of another name": (
        CertificateRole,
        lambda authority, path: authority.issue(path, "master-target", "gamma"),
        {"peer": "beta"},
    ),
    "for another address": (
        CertificateUnknown,
        lambda authority, path: authority.issue(path, "master-target", addresses=("10.0.0.9",)),
        {},
    ),
}


@pytest.mark.parametrize("case", THEIRS)
def test_a_bad_master_target_is_refused(tmp_path: Path, case: str) -> None:
    error, make, settings = THEIRS[case]
    authority = Authority()
    serving = make(authority, tmp_path / "serving")
    MemoryWorld("served")
    engine = authority.issue(tmp_path / "engine", "process-server")
    (serving / "ca.pem").write_bytes((engine / "ca.pem").read_bytes())
    with (
        MemoryDriver().connect("served", {"world": "served"}) as site,
        MasterTarget(site, Address("127.0.0.1", 0), Identity(serving), limits=LIMITS) as target,
    ):
        given = {"address": str(target.address), "identity": str(engine), "silence": "10s", **settings}
        with pytest.raises(error) as problem:
            RemoteDriver().connect("there", given)
        assert problem.value.attributes["whose"] == "its"


def test_a_named_peer_may_have_any_address(tmp_path: Path) -> None:
    authority = Authority()
    serving = authority.issue(tmp_path / "serving", "master-target", "beta", addresses=())
    engine = authority.issue(tmp_path / "engine", "process-server")
    MemoryWorld("served")
    with (
        MemoryDriver().connect("served", {"world": "served"}) as site,
        MasterTarget(site, Address("127.0.0.1", 0), Identity(serving), limits=LIMITS) as target,
    ):
        given = {"address": str(target.address), "identity": str(engine), "peer": "beta"}
        RemoteDriver().connect("there", given).close()


# -- who does not speak the protocol ----------------------------------------------------------------------------------


def test_plain_bytes_are_refused(place: Place) -> None:
    with socket.create_connection(("127.0.0.1", place.target.address.port), 10) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
        connection.settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(4096) == b""
    place.connect(place.engine())


def test_a_server_that_says_nothing_is_given_up(tmp_path: Path) -> None:
    identity = Identity(Authority().issue(tmp_path / "engine", "process-server"))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = Address("127.0.0.1", silent.getsockname()[1])
        with pytest.raises(TimedOut):
            Carrier.dial(address, identity, [Role.MASTER_TARGET], limits=Limits(connect=0.5))


def test_who_is_not_there_is_unreachable(tmp_path: Path) -> None:
    identity = Identity(Authority().issue(tmp_path / "engine", "process-server"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(SiteUnreachable):
        Carrier.dial(Address("127.0.0.1", port), identity, [Role.MASTER_TARGET], limits=LIMITS)


def test_a_component_without_our_protocol_is_refused(place: Place) -> None:
    """It has a valid certificate and sends something else."""
    for data in (b"\0" * 200, b"ASRW" + bytes(196)):
        identity = Identity(place.engine())
        carrier = Carrier.dial(place.target.address, identity, [Role.MASTER_TARGET], limits=LIMITS)
        carrier.send(data)
        with pytest.raises(ConnectionLost, match="closed the connection"):
            carrier.fill(memoryview(bytearray(1 << 16)))
        carrier.close()
    place.connect(place.engine())


def test_a_peer_that_falls_silent_is_let_go(place: Place) -> None:
    """Half-open: its connection exists, but nothing arrives any more."""
    identity = Identity(place.engine())
    authority, silence = place.authority, Limits(connect=5.0, silence=1.0)
    heard: list[Channel] = []
    serving = authority.issue(place.directory / "quick", "master-target")
    listener = Listener(
        Address("127.0.0.1", 0),
        Identity(serving),
        [Role.PROCESS_SERVER],
        place.target._server,
        limits=silence,
        accepted=heard.append,
    )
    listener.start()
    carrier = Carrier.dial(listener.address, identity, [Role.MASTER_TARGET], limits=LIMITS)
    from asrcore.wire.frames import Connection

    carrier.send(Connection(dialled=True).hello())
    wait_until(lambda: heard and heard[0].error is not None, "the silent peer is disconnected")
    assert isinstance(heard[0].error, TimedOut)
    carrier.close()
    listener.close()


def test_one_that_lives_is_kept_however_idle(place: Place) -> None:
    """The serving side has a longer limit, but knows that of the engine."""
    given = {"address": str(place.target.address), "identity": str(place.engine()), "silence": "1s"}
    with RemoteDriver().connect("there", given) as site:
        channel = site._links.channel()
        threading.Event().wait(2.5)
        assert channel.error is None


# -- identities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["certificate.pem", "key.pem", "ca.pem"])
def test_an_incomplete_identity_is_named(tmp_path: Path, name: str) -> None:
    identity = Authority().issue(tmp_path, "agent")
    (identity / name).unlink()
    with pytest.raises(IdentityUnusable, match=name):
        Identity(identity).context(server=True)


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    (Authority().issue(tmp_path, "agent") / "key.pem").chmod(0o644)
    with pytest.raises(IdentityUnusable, match="users other than its owner"):
        Identity(tmp_path).context(server=True)


def test_a_key_of_another_certificate_is_refused(tmp_path: Path) -> None:
    authority = Authority()
    one, two = authority.issue(tmp_path / "one", "agent"), authority.issue(tmp_path / "two", "agent")
    (one / "key.pem").write_bytes((two / "key.pem").read_bytes())
    with pytest.raises(IdentityUnusable):
        Identity(one).context(server=False)


@pytest.mark.parametrize("name", ["certificate.pem", "ca.pem", "crl.pem"])
def test_rubbish_is_refused(tmp_path: Path, name: str) -> None:
    identity = Authority().issue(tmp_path, "agent", crl=True)
    (identity / name).write_text("rubbish")
    with pytest.raises(IdentityUnusable, match=name):
        Identity(identity).context(server=False)


def test_a_renewed_certificate_is_taken_up(tmp_path: Path) -> None:
    authority = Authority()
    identity = Identity(authority.issue(tmp_path, "agent", "one"))
    first = identity.context(server=True)
    assert identity.context(server=True) is first
    authority.issue(tmp_path, "agent", "two")
    assert identity.context(server=True) is not first
    assert identity.component() == Component(Role.AGENT, "two")


@pytest.mark.parametrize("name", ["web1", "web 1", "a/b", "ü%"])
def test_a_component_is_its_uri(name: str) -> None:
    component = Component(Role.AGENT, name)
    assert Component.parse(component.uri) == component


@pytest.mark.parametrize("uri", ["asr://agent", "asr://agent/", "asr://king/x", "http://agent/x", "asr://agent/x?y"])
def test_other_uris_name_nobody(uri: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Component.parse(uri)
