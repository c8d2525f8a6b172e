"""What comes in from outside: odd input is refused with an error of the catalogue, and nothing is stored of it."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import random
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import attrs
import pytest
from cryptography import x509

from asrcore.config_server.api import make_app
from asrcore.driver import CycleSpec, ReplicaSpec, SealSpec
from asrcore.errors import AsrError, InvalidValue
from asrcore.model.machine import Description, Disk, Firmware, Machine
from asrcore.model.point import Consistency
from asrcore.model.watch import Watch
from asrcore.pki import enrolment
from asrcore.pki.authority import Authority
from asrcore.pki.request import Token, make_request
from asrcore.procedures.procedure import Arguments
from asrcore.remote import calls
from asrcore.remote.server import SiteServer
from asrcore.testing.memory import MemoryDriver, MemoryWorld
from asrcore.units import MiB
from asrcore.wire.failures import error_head
from asrcore.wire.tls import Component, Role
from tests.faults import odd
from tests.unit.rig import Rig

COUNTS = [pytest.param(odd.USUAL, id="usual"), pytest.param(odd.WHOLE, id="whole", marks=pytest.mark.long)]


# -- the configuration server's API


class Api:
    """The application without its socket; the caller is an operator."""

    def __init__(self, rig: Rig, folder: Path) -> None:
        rig.protect()
        authority = Authority.create(folder / "ca", rig.engine.vault)
        operator = Component(Role.OPERATOR, "ops")
        issued = authority.issue(operator, make_request(enrolment.key_in(folder / "ops")))
        serial = f"{x509.load_pem_x509_certificate(issued.certificate.encode()).serial_number:x}"
        self.peer = {"subjectAltName": (("URI", operator.uri),), "serialNumber": serial}
        self.app = make_app(rig.engine.vault, authority, rig.clock)

    async def _call(self, method: str, path: str, query: bytes, body: bytes, headers: list[tuple[bytes, bytes]]) -> int:
        parts = [body[:100], body[100:]]
        sent: list[Mapping[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": parts.pop(0) if parts else b"", "more_body": bool(parts)}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http", "method": method, "path": path, "raw_path": path.encode("utf-8", "replace"),
            "query_string": query, "headers": headers, "asr.peer": self.peer,
        }  # fmt: skip
        await self.app(scope, receive, send)
        json.loads(b"".join(item.get("body", b"") for item in sent))
        return int(sent[0]["status"])

    def call(self, method: str, path: str, *, query: bytes = b"", body: bytes = b"", length: str | None = None) -> int:
        """The status of the answer, which is JSON."""
        headers = [] if length is None else [(b"content-length", length.encode())]
        return asyncio.run(self._call(method, path, query, body, headers))


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    yield made
    made.engine.close()


@pytest.fixture
def api(rig: Rig, tmp_path: Path) -> Api:
    return Api(rig, tmp_path)


ORDERS: list[dict[str, object]] = [
    {"verb": "verify"},
    {"verb": "failover-test", "point": "latest", "network": "lan"},
    {"verb": "failover-planned", "force_off": True, "timeout": 60.0},
    {"verb": "replicate", **attrs.asdict(Arguments())},
]


@pytest.mark.parametrize("count", COUNTS)
def test_odd_requests_are_refused_and_store_nothing(api: Api, rig: Rig, count: int) -> None:
    for number, body in enumerate(odd.inputs(ORDERS, count)):
        before = len(rig.engine.vault.jobs(10_000)) if number % 100 == 0 else None
        status = api.call("POST", "/v1/machines/web/jobs", body=body)
        assert status in (200, 400, 403, 404, 409), body[:300]
        if before is not None:
            assert len(rig.engine.vault.jobs(10_000)) - before == (status == 200)
    for job in rig.engine.vault.jobs(10_000):  # what was accepted can be carried out
        Arguments.from_json(json.dumps(json.loads(job.arguments)["arguments"]))


@pytest.mark.parametrize("count", COUNTS)
def test_odd_paths_and_queries_are_refused(api: Api, count: int) -> None:
    rng = random.Random(1)
    for _ in range(count // 5):
        text = str(odd.value(rng, 0))
        name = "limit" if rng.randrange(2) else "machine"
        query = f"{name}={quote(text, errors='surrogatepass')}".encode()
        path = f"/v1/machines/{text.replace('/', '')}/points"
        assert api.call("GET", "/v1/events", query=query) in (200, 400), text[:100]
        assert api.call("GET", path) in ((200,) if text == "web" else (400, 404)), text[:100]


@pytest.mark.parametrize("length", ["9" * 5_000, "99999999999999999999", "65537", "-1", "\u0669" * 3, "ab"])
def test_odd_lengths_are_refused_before_the_body_is_read(api: Api, length: str) -> None:
    assert api.call("POST", "/v1/machines/web/jobs", body=b"{}", length=length) in (400, 403)


@pytest.mark.parametrize(
    "body",
    [
        {"verb": "failover-planned", "timeout": True},
        {"verb": "failover-planned", "timeout": -1},
        {"verb": "failover-planned", "timeout": 1e300},
        {"verb": "failover-planned", "force_off": 1},
        {"verb": "failover-planned", "odd": 1},
        {"verb": "replicate", "point": "\0"},
    ],
)
def test_arguments_are_judged_by_type_and_limit(api: Api, rig: Rig, body: dict[str, object]) -> None:
    before = len(rig.engine.vault.jobs(1000))
    assert api.call("POST", "/v1/machines/web/jobs", body=json.dumps(body).encode()) == 400
    assert len(rig.engine.vault.jobs(1000)) == before


# -- tokens, and the answers of a configuration server


TOKENS: list[dict[str, object]] = [
    {"url": "https://hub.example:8443", "certificate": "c", "key": "k", "authority": "a"},
    {"url": "https://[::1]:1", "certificate": "c", "key": "k", "authority": "a"},
]


@pytest.mark.parametrize("count", COUNTS)
def test_odd_tokens_are_refused(count: int) -> None:
    for text in odd.inputs(TOKENS, count):
        with suppress(InvalidValue):
            token, url = enrolment.unpack(base64.b64encode(text).decode())
            assert isinstance(token, Token)
            assert url.startswith("https://")


def test_a_token_that_is_refused_is_not_shown() -> None:
    with pytest.raises(InvalidValue, match="not shown"):
        enrolment.unpack(base64.b64encode(b'{"key": "secret"}').decode())


@pytest.mark.parametrize(
    "url",
    ["https://hub:99999", "https://hub:abc", "https://[::1", "https://", "http://hub", "https://h\n", "https://\ud800"],
)
def test_a_token_with_an_odd_address_is_refused(url: str) -> None:
    text = json.dumps({**TOKENS[0], "url": url}).encode()
    with pytest.raises(InvalidValue):
        enrolment.unpack(base64.b64encode(text).decode())


# -- a master target's calls

_DESCRIPTION = Description(Machine("m", "m", 1, MiB, Firmware.BIOS, (Disk("vda", MiB),)), "memory")
CALLS: list[dict[str, object]] = [
    {"call": "replica.info", "replica": "r1"},
    {"call": "replica.raise_epoch", "replica": "r1", "epoch": 1},
    {"call": "replica.drop_points", "replica": "r1", "epoch": 1, "point_ids": ["p1"]},
    {"call": "replica.digests", "replica": "r1", "disk": "vda", "offset": 0, "length": 65536},
    {"call": "replica.pin", "replica": "r1", "point_id": "p1", "pinned": True},
    {"call": "source.keep_marks", "machine_id": "m", "keep": []},
    {
        "call": "target.create_replica",
        "spec": calls.plain(ReplicaSpec("r1", "m", 1, _DESCRIPTION)),
    },
    {
        "call": "replica.open_cycle",
        "replica": "r1",
        "spec": calls.plain(CycleSpec("c1", 1, None, {"vda": MiB})),
    },
    {
        "call": "cycle.seal",
        "cycle": "x",
        "spec": calls.plain(SealSpec("p1", 1.0, Consistency.CRASH, True, _DESCRIPTION)),
    },
]


class _Peer:
    """What a server asks of a channel."""

    component = Component(Role.PROCESS_SERVER, "p")
    about: Mapping[str, Any] = {"session": "s"}

    def drain(self, seconds: float) -> None:
        """There is nothing under way."""


@pytest.mark.parametrize("count", COUNTS)
def test_odd_calls_are_refused_without_a_traceback(count: int, caplog: pytest.LogCaptureFixture) -> None:
    world = MemoryWorld("odd-calls")
    world.add_machine("m", {"vda": MiB})
    with MemoryDriver().connect("odd", {"world": "odd-calls"}) as site:
        server = SiteServer(site)
        for text in odd.inputs(CALLS, count):
            try:
                head = json.loads(text)
                call = str(head["call"])
            except (ValueError, RecursionError, KeyError, TypeError):
                continue  # refused as a frame
            with caplog.at_level(logging.ERROR):
                try:
                    server.call(_Peer(), call, head, b"", Watch())  # type: ignore[arg-type]
                except AsrError:
                    pass
                except Exception as problem:  # noqa: BLE001 - what is not of the catalogue is what this looks for
                    pytest.fail(f"{error_head(call, problem)}: {text[:300]!r}")
        server.close()
