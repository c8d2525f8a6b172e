"""The listener for agents, and the other processes that use it. The agents' ends are the agent's own channel."""

from __future__ import annotations

import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import attrs
import pytest

from asr_driver_physical.servers.hub import Gateway
from asr_driver_physical.servers.identity import FenceRecord, Identity
from asr_driver_physical.settings import SiteSettings
from asr_mobility.channel import CallFailed, Channel
from asrcore.errors import AccessDenied, AsrError, SiteUnreachable, TimedOut, ViewLost
from asrcore.units import MiB
from drivers.physical.tests.rig import wait_until
from drivers.physical.tests.test_parts import dial, enrol

Answers = Callable[[str, object], tuple[dict[str, object], bytes]]


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """What this process opens now gets a descriptor above 1023."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    with ExitStack() as opened:
        opened.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(1100):
            opened.callback(os.close, os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        yield


def serving(place: SiteSettings, identity: Identity, tmp_path: Path, answer: Answers) -> Channel:
    """The channel of an enrolled server whose agent answers so."""
    context = enrol(identity, tmp_path)
    carrier = context.wrap_socket(socket.create_connection((place.host, place.port), 10))
    return Channel(carrier, dialled=True, me={"name": "box", "identity": "aa" * 16}, serve=answer)


@pytest.mark.usefixtures("many_descriptors")
def test_a_process_may_have_many_descriptors(
    place: SiteSettings, identity: Identity, gateway: Gateway, tmp_path: Path
) -> None:
    content = os.urandom(2 * MiB)
    with closing(serving(place, identity, tmp_path, lambda call, arguments: ({}, content))) as end:
        assert bytes(gateway.call("box", "read", {})[1]) == content
        assert gateway._hub is not None
        hub_end = gateway._hub._sessions["box"]._carrier._fileno
        with closing(Gateway("dc", place, identity)) as other:
            assert bytes(other.call("box", "read", {})[1]) == content
            assert other._relay is not None
            assert min(end._socket.fileno(), hub_end, other._relay._carrier._fileno) > 1023


def test_an_agent_s_error_is_raised_as_the_site_s(
    place: SiteSettings, identity: Identity, gateway: Gateway, tmp_path: Path
) -> None:
    def answer(call: str, arguments: object) -> tuple[dict[str, object], bytes]:
        if call == "defect":
            raise ZeroDivisionError("oops")
        raise CallFailed(call, {"machine": "", "detail": "why"})

    with closing(serving(place, identity, tmp_path, answer)), closing(Gateway("other", place, identity)) as other:
        for way, name in ((gateway, "dc"), (other, "other")):
            with pytest.raises(ViewLost) as lost:
                way.call("box", "view-lost", {})
            assert lost.value.attributes == {"machine": "box", "detail": "why"}
            with pytest.raises(AccessDenied, match="'of-tomorrow'"):
                way.call("box", "of-tomorrow", {})
            with pytest.raises(AsrError, match="ZeroDivisionError: oops") as failed:
                way.call("box", "defect", {})
            assert (failed.value.code, failed.value.attributes["site"]) == ("driver-failed", name)


@pytest.mark.parametrize("relayed", [False, True])
def test_an_agent_that_does_not_answer_is_disconnected(
    relayed: bool, place: SiteSettings, identity: Identity, gateway: Gateway, tmp_path: Path
) -> None:
    go = threading.Event()

    def answer(call: str, arguments: object) -> tuple[dict[str, object], bytes]:
        go.wait(30)
        return {}, b""

    with closing(serving(place, identity, tmp_path, answer)) as end, closing(Gateway("dc", place, identity)) as other:
        with pytest.raises(TimedOut, match=r"read on server box did not finish within 0\.3 seconds"):
            (other if relayed else gateway).call("box", "read", {}, timeout=0.3)
        assert end.wait_ended(10)
        assert "it does not answer" in end.reason
        assert gateway.connected() == {}
        go.set()


def test_a_call_ends_with_its_connection(
    place: SiteSettings, identity: Identity, gateway: Gateway, tmp_path: Path
) -> None:
    asked = threading.Event()

    def answer(call: str, arguments: object) -> tuple[dict[str, object], bytes]:
        asked.set()
        time.sleep(1)
        return {}, b""

    with closing(serving(place, identity, tmp_path, answer)) as end:

        def kill() -> None:
            assert asked.wait(10)
            end.end("killed")

        threading.Thread(target=kill, daemon=True).start()
        begun = time.monotonic()
        with pytest.raises(SiteUnreachable, match=r"'dc'.*server box: the other side closed the connection"):
            gateway.call("box", "read", {})
        assert time.monotonic() - begun < 10


def test_a_server_that_connects_again_replaces_its_connection(
    place: SiteSettings, identity: Identity, gateway: Gateway, tmp_path: Path
) -> None:
    context = enrol(identity, tmp_path)
    with closing(dial(place, context)) as first:
        wait_until(lambda: list(gateway.connected()) == ["box"], "it is connected")
        with closing(dial(place, context)):
            assert first.wait_ended(10)
            assert "has connected again" in first.reason
            assert list(gateway.connected()) == ["box"]
            assert bytes(gateway.call("box", "read", {})[1]) == b"content"


def test_an_agent_learns_why_it_is_refused(
    place: SiteSettings, identity: Identity, gateway: Gateway, tmp_path: Path
) -> None:
    with closing(dial(place, enrol(identity, tmp_path), "bb" * 16)) as channel:
        assert channel.wait_ended(10)
        assert "hardware of box differs" in channel.reason
    assert gateway.connected() == {}


def test_a_quarantined_server_is_shut_down_when_it_connects(
    place: SiteSettings, identity: Identity, gateway: Gateway, tmp_path: Path
) -> None:
    calls: list[tuple[str, object]] = []

    def answer(call: str, arguments: object) -> tuple[dict[str, object], bytes]:
        calls.append((call, arguments))
        return {}, b""

    context = enrol(identity, tmp_path)
    identity.change("box", lambda record: attrs.evolve(record, fence=FenceRecord(1, "failed over")))
    carrier = context.wrap_socket(socket.create_connection((place.host, place.port), 10))
    with closing(Channel(carrier, dialled=True, me={"name": "box", "identity": "aa" * 16}, serve=answer)):
        wait_until(lambda: calls, "the order to shut down")
    assert calls == [("power-off", {"graceful": True})]


def test_another_process_takes_over_when_the_listening_one_ends(
    place: SiteSettings, identity: Identity, tmp_path: Path
) -> None:
    context = enrol(identity, tmp_path)
    first = Gateway("dc", place, identity)
    with closing(Gateway("dc", place, identity)) as second:
        assert (first.listens, second.listens) == (True, False)
        first.close()
        wait_until(lambda: second._relay is not None and second._relay.error, "it learns of the end")
        assert second.connected() == {}
        assert second.listens
        with closing(dial(place, context)):
            wait_until(lambda: list(second.connected()) == ["box"], "it is connected")
