"""What agents and files of facts report: judged before it is used, an error of that one server, and nothing stored."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs
import pytest

from asr_driver_physical.enrol.push import Enrolment, Limits, enrolment, write_out
from asr_driver_physical.errors import OddReport, OtherServer, RecordDamaged
from asr_driver_physical.inventory import PhysicalInventory
from asr_driver_physical.servers import reports
from asr_driver_physical.servers.identity import Identity, ServerRecord
from asr_driver_physical.servers.machine import description_of
from asr_driver_physical.servers.readiness import findings
from asr_driver_physical.servers.servers import Servers
from asr_driver_physical.settings import SiteSettings
from asr_driver_physical.source.source import PhysicalSource
from asr_mobility import facts
from asrcore import codec
from asrcore.driver import Fence, ViewRequest
from asrcore.errors import AsrError, SiteUnreachable
from asrcore.model.machine import PowerState
from asrcore.model.point import Consistency
from asrcore.model.policy import Policy
from asrcore.units import KiB, MiB
from drivers.physical.tests.test_parts import FACTS
from tests.faults import odd

COUNTS = [pytest.param(odd.USUAL, id="usual"), pytest.param(odd.WHOLE, id="whole", marks=pytest.mark.long)]
OTHER = "5e0c0a70-1ab0-4d5e-8c11-0a77aa010002"
DISK = {"id": "S1", "name": "sda", "size": MiB, "tracking": "none", "reason": "", "changed": []}
OPENED: dict[str, Any] = {"marks": {"S1": ["g", 1, "boot"]}, "disks": [DISK], "machine": FACTS["machine"]}
SETTLED: dict[str, Any] = {
    "live": False,
    "changed": {"S1": [[0, 4096]]},
    "marks": {"S1": ["g", 2, "boot"]},
    "machine": FACTS["machine"],
    "age": 0.5,
    "consistency": "filesystem",
}
HELD: dict[str, Any] = {"places": [[0, 4096]], "more": False}


class Agents:
    """A gateway whose servers answer what a test wants."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[Any, bytes]] = {
            "readiness": (FACTS, b""),
            "open": (OPENED, b""),
            "settle": (SETTLED, b""),
            "held": (HELD, bytes(4096)),
            "release": ({}, b""),
        }
        self.calls: list[tuple[str, str]] = []

    def connected(self) -> frozenset[str]:
        return frozenset({name for name, _ in self.calls})

    def call(self, server: str, call: str, arguments: Mapping[str, Any], timeout: float = 0.0) -> tuple[Any, bytes]:
        self.calls.append((server, call))
        return self.answers[call]

    def close(self) -> None:
        """Nothing is open."""


def with_id(machine_id: str) -> dict[str, Any]:
    return {**copy.deepcopy(FACTS), "machine": {**copy.deepcopy(FACTS["machine"]), "id": machine_id}}


def made(identity: Identity, name: str, facts: Mapping[str, Any]) -> Enrolment:
    result = enrolment(identity, name, ["h:1"], facts, Limits(), python="/usr/bin/python3")
    identity.save(result.record)
    return result


@pytest.fixture
def agents(monkeypatch: pytest.MonkeyPatch) -> Agents:
    agents = Agents()
    monkeypatch.setattr("asr_driver_physical.servers.servers.Gateway", lambda *_: agents)
    return agents


@pytest.fixture
def servers(agents: Agents, tmp_path: Path) -> Servers:
    """A site with the servers `web-a` and `web-b`."""
    settings = SiteSettings.parse(
        {"listen": "127.0.0.1:1", "identity": str(tmp_path / "identity"), "spool": str(tmp_path / "spool")}
    )
    opened = Servers("dc", settings)
    made(opened.identity, "web-a", FACTS)
    made(opened.identity, "web-b", with_id(OTHER))
    return opened


def read(servers: Servers, machine_id: str) -> None:
    """A whole view of a machine."""
    source = PhysicalSource(servers)
    with source.open_view(
        [ViewRequest(machine_id, "v", None)], consistency=Consistency.FILESYSTEM, freeze_limit=5.0
    ) as view:
        view.settle()
        view.confirm()
        (machine,) = view.machines.values()
        assert machine.description.machine.id == machine_id
        with machine.disks["S1"].reader() as reader:
            reader.read_into(0, memoryview(bytearray(4096)))


def records(servers: Servers) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (servers.identity.path / "servers").iterdir()}


def test_a_whole_view_is_read(servers: Servers) -> None:
    read(servers, FACTS["machine"]["id"])


# -- who a server is


def test_a_server_cannot_speak_for_another(servers: Servers, agents: Agents) -> None:
    before = records(servers)
    agents.answers["readiness"] = (with_id(OTHER), b"")
    agents.answers["open"] = ({**OPENED, "machine": with_id(OTHER)["machine"]}, b"")
    mine = FACTS["machine"]["id"]
    with pytest.raises(OtherServer, match=OTHER):
        PhysicalSource(servers).findings(mine, Policy("p"))
    with pytest.raises(OtherServer):
        read(servers, mine)
    agents.answers["open"] = (OPENED, b"")
    agents.answers["settle"] = ({**SETTLED, "machine": with_id(OTHER)["machine"]}, b"")
    with pytest.raises(OtherServer):
        read(servers, mine)
    assert records(servers) == before
    assert servers.server(OTHER).name == "web-b"
    agents.calls.clear()
    with pytest.raises(SiteUnreachable):
        PhysicalInventory(servers).fence(OTHER, Fence(2, "failed over"))
    assert servers.identity.server("web-a").fence is None  # type: ignore[union-attr]
    assert servers.identity.server("web-b").fence is not None  # type: ignore[union-attr]


def test_servers_that_call_themselves_the_same_have_ids_of_their_own(servers: Servers) -> None:
    enrolled = made(servers.identity, "web-c", FACTS)
    assert [item.code for item in enrolled.findings] == ["machine-id-shared"]
    ids = [item.id for item in PhysicalInventory(servers).machines()]
    assert len(set(ids)) == 3
    inventory = PhysicalInventory(servers)
    assert [inventory.machine(item).name for item in ids] == ["web-a", "web-b", "web-c"]
    read(servers, ids[2])
    again = made(servers.identity, "web-c", FACTS)
    assert servers.identity.server("web-c").machine_id == ids[2]  # type: ignore[union-attr]
    assert [item.code for item in again.findings] == ["machine-id-shared"]
    assert servers.identity.server("web-a").machine_id == ids[0]  # type: ignore[union-attr]


def test_a_board_with_a_placeholder_is_known_by_its_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"product_uuid": "03000200-0400-0500-0006-000700080009", "machine-id": "0123456789abcdef" * 2}
    monkeypatch.setattr(facts, "_text", lambda path: texts.get(path.name, ""))
    assert facts.machine_id() == "01234567-89ab-cdef-0123-456789abcdef"


# -- nonsense


def test_nonsense_of_one_server_leaves_the_others_alone(servers: Servers, agents: Agents) -> None:
    before = records(servers)
    nonsense: Any
    for nonsense in ({}, {"machine": None}, with_id("x"), {**FACTS, "machine": {"id": OTHER}}, [], None):
        agents.answers["readiness"] = (nonsense, b"")
        with pytest.raises(OddReport, match="web-a"):
            PhysicalSource(servers).findings(FACTS["machine"]["id"], Policy("p"))
    assert records(servers) == before
    agents.answers["readiness"] = (with_id(OTHER), b"")
    assert PhysicalSource(servers).findings(OTHER, Policy("p")) == []
    assert len(PhysicalInventory(servers).machines()) == 2


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 9_000, b'{"name": "web-a"}', b"\xff", None], ids=repr)
def test_a_damaged_record_leaves_the_others_alone(servers: Servers, content: bytes | None) -> None:
    path = servers.identity.path / "servers/web-a.json"
    if content is None:
        record = json.loads(path.read_text())
        record["facts"]["machine"]["id"] = None
        content = json.dumps(record).encode()
    path.write_bytes(content)
    assert [item.name for item in PhysicalInventory(servers).machines()] == ["web-b"]
    with pytest.raises(RecordDamaged, match="web-a"):
        servers.identity.server("web-a")
    inventory = PhysicalInventory(servers)
    # "Not found" would mean that the site was built anew and needs no quarantine.
    for ask in (inventory.fenced, lambda item: inventory.unfence(item, 9), inventory.machine):
        with pytest.raises(RecordDamaged):
            ask(FACTS["machine"]["id"])
    assert inventory.machine(OTHER).name == "web-b"
    again = made(servers.identity, "web-a", FACTS)
    assert ("quarantine-unknown" in [item.code for item in again.findings]) is (b"fence" not in content)
    assert servers.server(FACTS["machine"]["id"]).name == "web-a"


def test_a_fence_outlives_the_damage_of_its_record(servers: Servers) -> None:
    path = servers.identity.path / "servers/web-a.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "facts": None, "fence": {"epoch": 7, "reason": "failed over"}}))
    again = made(servers.identity, "web-a", FACTS)
    assert [item.code for item in again.findings] == []
    assert PhysicalInventory(servers).fenced(FACTS["machine"]["id"]) == Fence(7, "failed over")


def test_facts_that_an_earlier_version_stored_unjudged_leave_the_server_usable(servers: Servers) -> None:
    path = servers.identity.path / "servers/web-a.json"
    record = json.loads(path.read_text())
    record["facts"]["machine"]["cpus"] = "many"
    path.write_text(json.dumps(record))
    assert servers.server(FACTS["machine"]["id"]).name == "web-a"
    assert [item.name for item in PhysicalInventory(servers).machines()] == ["web-b"]
    assert PhysicalSource(servers).findings(FACTS["machine"]["id"], Policy("p")) == []
    assert len(PhysicalInventory(servers).machines()) == 2


@pytest.mark.parametrize("answer", [{}, {**FACTS["machine"], "cpus": "many"}, {**FACTS["machine"], "id": OTHER}, None])
def test_what_a_server_says_of_itself_is_judged(servers: Servers, agents: Agents, answer: Any) -> None:
    agents.calls.append(("web-a", "it is connected"))
    agents.answers["machine"] = (answer, b"")
    found = PhysicalInventory(servers).machine(FACTS["machine"]["id"])
    assert (found.id, found.cpus, found.power) == (FACTS["machine"]["id"], 4, PowerState.RUNNING)


def test_odd_but_real_servers_are_accepted_and_kept(servers: Servers) -> None:
    facts = copy.deepcopy(FACTS)
    facts["machine"]["vendor"], facts["machine"]["os"] = "Acme\x01 Inc.", "A\tB"
    facts["mounts"] = [{"path": "/mnt/caf\udce9\n", "kind": "ext4", "device": "sda2", "read_only": False}]
    facts["tracking"] = "bpf(0): permission denied\n0: (79) r1 = *(u64 *)(r1 +0)\n"
    facts["machine"]["disks"][0]["name"] = "cciss!c0d0"
    stored = None
    for name in ("_x", "wan+", "lan#1", "größe", "eth0.100", "br-1a2b", "enp0s31f6"):
        facts["machine"]["nics"] = [{"name": name, "mac": "", "driver": ""}]
        record = servers.identity.server("web-a")
        assert record is not None
        servers.note_facts(record, facts)
        stored = servers.identity.server("web-a")
        assert stored
        assert stored.facts["machine"]["nics"][0]["name"] == name
    assert stored
    assert stored.facts["mounts"][0]["path"] == "/mnt/caf\ufffd\ufffd"


def test_earlier_versions_read_the_records(servers: Servers) -> None:
    made(servers.identity, "web-c", FACTS)
    for path in (servers.identity.path / "servers").glob("*.json"):
        assert set(json.loads(path.read_text())) == {
            "name", "fingerprint", "identity", "facts", "fence", "ends", "renewals",
        }  # fmt: skip
    servers.identity.forget("web-c")
    assert sorted(item.name for item in (servers.identity.path / "servers").iterdir()) == ["web-a.json", "web-b.json"]


@pytest.mark.parametrize(
    ("call", "answer", "body"),
    [
        ("open", {}, b""),
        ("open", {**OPENED, "disks": [{**DISK, "size": -1}]}, b""),
        ("open", {**OPENED, "disks": [{**DISK, "size": 1.5}]}, b""),
        ("open", {**OPENED, "disks": [{**DISK, "size": 2**80}]}, b""),
        ("open", {**OPENED, "disks": [DISK, DISK]}, b""),
        ("open", {**OPENED, "disks": [{**DISK, "tracking": "odd"}]}, b""),
        ("open", {**OPENED, "disks": [{**DISK, "tracking": "changed", "changed": [[MiB, 1]]}]}, b""),
        ("open", {**OPENED, "disks": [{**DISK, "tracking": "changed", "changed": [[-1, 1]]}]}, b""),
        ("open", {**OPENED, "disks": [{**DISK, "name": "../../etc"}]}, b""),
        ("open", {**OPENED, "marks": []}, b""),
        ("open", {**OPENED, "marks": {"other": ["g", 1, "b"]}}, b""),
        ("settle", {**SETTLED, "age": -1e9}, b""),
        ("settle", {**SETTLED, "age": "long"}, b""),
        ("settle", {**SETTLED, "consistency": "perfect"}, b""),
        ("settle", {**SETTLED, "changed": {"S1": [[0, MiB + 1]]}}, b""),
        ("settle", {**SETTLED, "changed": {"S2": [[0, 1]]}}, b""),
        ("settle", {**SETTLED, "marks": {"S2": ["g", 1, "b"]}}, b""),
        ("held", {"places": [], "more": True}, b""),
        ("held", {"places": [[0, 4096]], "more": False}, bytes(4095)),
        ("held", {"places": [[MiB, 4096]], "more": False}, bytes(4096)),
        ("held", {"places": [[0, 4096]], "more": True}, bytes(4096)),
    ],
)
def test_an_answer_that_cannot_be_right_is_refused(
    servers: Servers, agents: Agents, call: str, answer: dict[str, Any], body: bytes
) -> None:
    agents.answers[call] = (answer, body)
    with pytest.raises(OddReport, match="web-a"):
        read(servers, FACTS["machine"]["id"])
    assert len(agents.calls) < 1_000


def test_what_is_read_has_the_length_that_was_asked_for() -> None:
    body = memoryview(bytes(8))
    assert reports.read_fits("s", {}, body, 8) is False
    assert reports.read_fits("s", {"zero": True}, body[:0], 8) is True
    assert reports.zero_numbers("s", {"zero": [1]}, body, [8, 4]) == {1}
    for wrong in (
        lambda: reports.read_fits("s", {}, body, 9),
        lambda: reports.read_fits("s", {"zero": 1}, body, 8),
        lambda: reports.zero_numbers("s", {"zero": [0]}, body, [8, 4]),
        lambda: reports.zero_numbers("s", {"zero": "all"}, body, [8]),
        lambda: reports.digests_fit("s", body, 1, 16),
    ):
        with pytest.raises(OddReport):
            wrong()


@pytest.mark.parametrize("card", ["../../victim/pwned", "a/b", "", "x y", "..", "e" * 65])
def test_a_card_s_name_leads_nowhere(servers: Servers, card: str, tmp_path: Path) -> None:
    nic = {"name": card, "mac": "52:54:00:00:00:01", "driver": "", "named_in": ["/etc/x"], "kept": False}
    with pytest.raises(OddReport):
        made(servers.identity, "web-c", {**FACTS, "network": [nic]})
    nic = {**nic, "name": "eth0", "mac": "52:54:00:00:00:01\nName=x"}
    with pytest.raises(OddReport):
        made(servers.identity, "web-c", {**FACTS, "network": [nic]})


def test_no_file_is_written_outside_of_the_directory(servers: Servers, tmp_path: Path) -> None:
    good = made(servers.identity, "web-c", FACTS)
    with pytest.raises(ValueError, match="leads out"):
        write_out(attrs.evolve(good, files={"/../../out": (b"", 0o600)}), tmp_path / "out")
    assert not (tmp_path.parent / "out").exists()


@pytest.mark.parametrize("count", COUNTS)
def test_no_report_ends_in_anything_but_its_own_error(count: int) -> None:
    sizes = {"S1": MiB}
    for reported in odd.inputs([FACTS, OPENED, SETTLED, HELD], count):
        try:
            value = json.loads(reported)
        except (ValueError, RecursionError):
            continue
        for judge in (
            lambda value: reports.facts_of("s", value),
            lambda value: reports.machine("s", value),
            lambda value: reports.opened("s", value),
            lambda value: reports.settled("s", value, sizes),
            lambda value: reports.held("s", value, memoryview(bytes(4 * KiB)), "S1", MiB, MiB),
        ):
            with suppress(OddReport):
                judge(value)


def test_a_deep_change_of_facts_ends_in_its_own_error() -> None:
    rng = random.Random(5)
    for _ in range(2_000):
        reported = copy.deepcopy(FACTS)
        place: Any = reported
        while isinstance(place, dict | list) and place:
            key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if rng.randrange(3) == 0 or not isinstance(place[key], dict | list):
                place[key] = odd.value(rng)
                break
            place = place[key]
        try:
            judged = reports.facts_of("s", reported)
        except OddReport:
            continue
        record = ServerRecord("s", "", "", judged, machine_id=OTHER)
        assert reports.facts_of("s", json.loads(json.dumps(judged).encode())) == judged
        codec.load(ServerRecord, codec.dump(record))
        try:
            description_of(record, judged["machine"])
            findings(judged)
        except AsrError:
            pytest.fail("what was accepted cannot be used")
