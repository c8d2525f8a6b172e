"""What the kit cannot test for every target: the page blobs, leases and snapshots themselves."""

from __future__ import annotations

import base64
import json
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from azure.core.exceptions import HttpResponseError, ServiceResponseError
from azure.storage.blob import BlobClient, BlobLeaseClient

from asr_driver_azure.blobs import vhd
from asr_driver_azure.blobs.pageblob import PageBlob
from asr_driver_azure.blobs.record import lease_of
from asr_driver_azure.cloud.errors import retry_after
from asr_driver_azure.target import writer as writer_module
from asr_driver_azure.target.readiness import ASKED_BY_THE_ENGINE, REQUESTS_PER_CYCLE, REQUESTS_PER_DISK
from asrcore.driver import CycleSpec
from asrcore.errors import AsrError, InvalidSetting, SiteUnreachable, StaleEpoch, WrongState
from asrcore.testing.conformance._target_bench import Data, Same, TargetBench, Zero, noise
from asrcore.units import KiB, MiB, TiB
from drivers.azure.tests.peers.proxy import REQUESTS_PER_SECOND
from drivers.azure.tests.peers.storage import Storage
from drivers.azure.tests.target.rig import TargetRig


@pytest.fixture(scope="module")
def rig(storage: Storage) -> Iterator[TargetRig]:
    with TargetRig(storage) as made:
        yield made


@pytest.fixture
def target(rig: TargetRig) -> Iterator[TargetBench]:
    bench = TargetBench(rig)
    yield bench
    bench.close()


def blob_of(rig: TargetRig, target: TargetBench, disk: str) -> str:
    names = {name for name, _ in rig.storage.blobs(rig.settings["container"]) if f"/{target.id}/disks/{disk}-" in name}
    assert len(names) == 1
    return names.pop()


def test_a_blob_is_a_disk_that_qemu_reads(rig: TargetRig, target: TargetBench, tmp_path: Path) -> None:
    """A replica can be used without this software: the blob is a fixed VHD, at each point."""
    target.first_points("p1", "p2")
    sizes = target.sizes | {target.second: 3 * MiB}
    target.cycle("p3", Data(target.second, 3 * MiB - 512, noise(512)), sizes=sizes)
    blobs = rig.storage.blobs(rig.settings["container"])
    for disk in target.sizes:
        name = blob_of(rig, target, disk)
        for blob, snapshot in blobs:
            if blob != name:
                continue
            image = tmp_path / "disk.vhd"
            image.write_bytes(rig.storage.content(rig.settings["container"], blob, snapshot))
            command = ["qemu-img", "info", "--output=json", "-f", "vpc", str(image)]
            reported = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)
            assert reported["virtual-size"] == image.stat().st_size - vhd.FOOTER
    target.check()


def test_snapshots_are_points_and_nothing_else_is_left(rig: TargetRig, target: TargetBench) -> None:
    target.first_points("p1", "p2", "p3")
    target.cycle("p4", keep=False)
    target.cycle("p5", keep=False)
    target.replica.drop_points(["p2"], 1)
    ours = [key for key in rig.storage.blobs(rig.settings["container"]) if f"/{target.id}/" in key[0]]
    assert sum(bool(snapshot) for _, snapshot in ours) == 2 * len(target.points)
    assert sum(name.endswith(".index") for name, _ in ours) == 0
    assert sum("/points/" in name for name, _ in ours) == len(target.points)


def test_zeroes_of_a_discarded_cycle_are_put_back(target: TargetBench) -> None:
    """Only a diff that reports cleared pages includes them."""
    target.cycle("p1", Data(target.first, 0, noise(MiB)))
    with target.open("c2") as writer:
        target.send(writer, [Zero(target.first, 0, 512 * KiB), Data(target.first, 2 * MiB, noise(64 * KiB))])
        writer.flush()
        writer.discard()
    target.cycle("p2", Data(target.first, 3 * MiB - 4 * KiB, noise(4 * KiB)))
    target.check()


def test_a_diff_that_is_all_pages_is_noticed(rig: TargetRig, target: TargetBench) -> None:
    """The test above fails if the service answers as Azurite does: so it does test the diff."""
    target.cycle("p1", Data(target.first, 0, noise(MiB)))
    with target.open("c2") as writer:
        target.send(writer, [Zero(target.first, 0, 512 * KiB)])
        writer.flush()
        writer.discard()
    with rig.storage.switched("no_diff"):
        target.cycle("p2")
    with pytest.raises(AssertionError, match="not what was sent"):
        target.check()
    target.expected.pop("p2", None)


def test_a_torn_cycle_is_covered_or_put_back(rig: TargetRig, target: TargetBench) -> None:
    """Data that a killed engine had sent without an acknowledgement do not count, wherever they were written."""
    target.first_points("p1")
    writer = target.open("c2")
    target.send(writer, [Data(target.first, 0, noise(MiB)), Zero(target.second, 0, MiB)])
    writer._uploader.drain()  # type: ignore[attr-defined]
    rig.abandon(writer)
    rig.restart()
    calls = [Same(target.first, 0, 64 * KiB), Data(target.first, 64 * KiB, noise(64 * KiB))]
    with target.open("c2") as writer:
        assert writer.done(target.first) == []
        target.send(writer, calls)
        target.seal(writer, "p2", calls)
    target.check()


@pytest.mark.parametrize("keep", [True, False])
def test_a_cycle_costs_the_requests_that_are_estimated(rig: TargetRig, target: TargetBench, keep: bool) -> None:
    target.first_points("p1")
    target.cycle("p2", keep=False)
    spec, replica = attrs.evolve(target.seal_spec("p3"), keep=keep), target.replica
    before = len(rig.storage.proxy.requests)
    with replica.open_cycle(CycleSpec("c3", 1, "p2", target.sizes)) as writer:
        target.send(writer, [Same(target.first, 0, 64 * KiB)])
        writer.flush()
        writer.seal(spec)
    cost = len(rig.storage.proxy.requests) - before
    estimate = REQUESTS_PER_CYCLE + REQUESTS_PER_DISK * len(target.sizes)
    assert estimate - 2 <= cost + ASKED_BY_THE_ENGINE <= estimate


def test_nothing_is_written_twice(rig: TargetRig, target: TargetBench) -> None:
    calls = [Data(target.first, 0, noise(MiB)), Data(target.second, 0, noise(MiB))]
    before = rig.storage.proxy.sent()
    writer = target.open("c1")
    target.send(writer, calls)
    writer.flush()
    rig.abandon(writer)
    rig.restart()
    with target.open("c1") as writer:
        target.seal(writer, "p1", calls)
    assert rig.storage.proxy.sent() - before == 2 * MiB
    target.check()


def test_small_writes_are_gathered(rig: TargetRig, target: TargetBench) -> None:
    with target.open("c1") as writer:
        before = rig.storage.proxy.count("update")
        target.send(writer, [Data(target.first, at * 4 * KiB, noise(4 * KiB)) for at in range(256)])
        writer.flush()
        assert rig.storage.proxy.count("update") - before == 1


def test_a_delta_sends_what_changed(rig: TargetRig, target: TargetBench) -> None:
    """At most 1.1 x the changed 64 KiB blocks, wherever they are."""
    target.first_points("p1")
    blocks = [0, 3, 4, 17, 31, 40, 47]
    before = rig.storage.proxy.sent()
    target.cycle("p2", *(Data(target.first, block * 64 * KiB, noise(64 * KiB)) for block in blocks))
    assert len(blocks) * 64 * KiB <= rig.storage.proxy.sent() - before <= 1.1 * len(blocks) * 64 * KiB
    target.check()


def test_a_fresh_blob_costs_no_clears(rig: TargetRig, target: TargetBench) -> None:
    before = rig.storage.proxy.count("clear")
    target.cycle("p1", Zero(target.first, 0, 2 * MiB), Data(target.first, 2 * MiB, noise(64 * KiB)))
    assert rig.storage.proxy.count("clear") == before
    target.cycle("p2", Zero(target.first, 0, 3 * MiB))
    assert rig.storage.proxy.count("clear") == before + 1
    target.check()


def test_a_quiet_cycle_asks_for_no_diff(rig: TargetRig, target: TargetBench) -> None:
    target.first_points("p1")
    requests = rig.storage.proxy.requests
    before = sum(item.comp == "pagelist" for item in requests)
    target.cycle("p2", Data(target.first, 0, noise(64 * KiB)), keep=False)  # a kept one queries the stored size
    assert sum(item.comp == "pagelist" for item in requests) == before


def test_a_busy_service_is_waited_for(rig: TargetRig, target: TargetBench, monkeypatch: pytest.MonkeyPatch) -> None:
    """By all threads, and for as long as it requests."""
    monkeypatch.setattr(rig.storage.proxy, "busy_seconds", 2.0)
    with target.open("c1") as writer:
        rig.storage.proxy.busy_for = 3
        before = len(rig.storage.proxy.requests)
        calls = [Data(target.first, 0, noise(MiB))]
        target.send(writer, calls)
        target.seal(writer, "p1", calls)
    assert rig.target_site.account.calls.pacer.delays == 3
    assert rig.target_site.status().details["busy answers"] == "3"
    seen = rig.storage.proxy.requests[before:]
    refused = [item.at for item in seen if item.status == 503]
    assert len(refused) == 3
    late = [item.at - at for at in refused for item in seen if 0.3 < item.at - at < 1.9]
    assert late == [], "only requests in flight may still arrive"
    target.check()


def test_a_bit_that_is_turned_on_the_way_is_noticed(rig: TargetRig, target: TargetBench) -> None:
    """By the service, which gets the MD5 of each put; it is sent again."""
    with target.open("c1") as writer:
        before = len(rig.storage.proxy.requests)
        rig.storage.proxy.corrupt = 2
        calls = [Data(target.first, 0, noise(MiB))]
        target.send(writer, calls)
        target.seal(writer, "p1", calls)
    assert rig.storage.proxy.corrupt == 0
    puts = [item.status for item in rig.storage.proxy.requests[before:] if item.action == "update"]
    assert puts.count(400) == 2
    target.check()


# -- what the service refuses


def test_the_proxy_is_strict(rig: TargetRig, target: TargetBench) -> None:
    """Without the driver: what Azure would refuse, and Azurite would not."""
    container = rig.target_site.account.container.client
    blob = container.get_blob_client("strict")
    blob.create_page_blob(8 * MiB)
    blob.upload_page(bytes(4 * MiB), 0, 4 * MiB)
    with pytest.raises(HttpResponseError) as caught:
        blob.upload_page(bytes(4 * MiB + 512), 0, 4 * MiB + 512)
    assert caught.value.status_code == 413
    container.get_blob_client("large").create_page_blob(8 * TiB)
    with pytest.raises(HttpResponseError) as caught:
        container.get_blob_client("larger").create_page_blob(8 * TiB + 512)
    assert caught.value.status_code == 400
    path = next(path for path in rig.storage.proxy._recent if path.endswith("/strict"))
    blob.get_blob_properties()
    rig.storage.proxy._recent[path].extend([time.monotonic()] * REQUESTS_PER_SECOND)
    with pytest.raises(HttpResponseError) as caught:
        blob.get_blob_properties()
    assert caught.value.status_code == 503
    assert retry_after(caught.value) == 1
    container.get_blob_client("large").get_blob_properties()  # the limit applies to one blob
    time.sleep(1.1)
    for name in ("large", "strict"):
        rig.target_site.account.container.delete(name)


# -- points


class Killed(BaseException):
    """The process ends here; nothing after it is run."""


@pytest.mark.parametrize("place", ["closed", "snapshotted", "described", "sealed"])
def test_a_recorded_point_is_whole(
    rig: TargetRig, target: TargetBench, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Whenever the engine dies while it seals, the points in the record are readable and have the sealed content."""

    def reach(name: str) -> None:
        if name == f"azure.{place}":
            raise Killed

    target.cycle("p1", Data(target.first, 0, noise(MiB)))
    before = bytes(target.head[target.first])
    calls = [Data(target.first, 0, noise(MiB))]
    with target.open("c2") as writer:
        target.send(writer, calls)
        monkeypatch.setattr(writer_module, "reach", reach)
        with pytest.raises(Killed):
            target.seal(writer, "p2", calls)
        monkeypatch.undo()
        rig.abandon(writer)
    rig.restart()
    replica = rig.target_site.target.replica(target.id)
    assert [point.id for point in replica.info().points] == (["p1", "p2"] if place == "sealed" else ["p1"])
    wanted = {"p1": before, "p2": calls[0].data + before[MiB:]}
    for point in replica.info().points:
        found = bytearray(target.sizes[target.first])
        with replica.reader(target.first, point.id) as reader:
            reader.read_into(0, memoryview(found))
        assert found == wanted[point.id], f"point {point.id} has wrong content"


# -- ownership


def test_an_older_owner_is_kept_out_by_the_lease(rig: TargetRig, target: TargetBench) -> None:
    """The service refuses its puts; the driver's own check is not the only protection."""
    target.first_points("p1")
    name = blob_of(rig, target, target.first)
    with target.open("c2") as writer:
        target.replica.raise_epoch(2)
        target.send(writer, [Data(target.first, 0, noise(64 * KiB))])
        with pytest.raises(StaleEpoch):
            writer.flush()
    client = rig.storage.direct.get_blob_client(rig.settings["container"], name)
    client.upload_page(noise(512), 0, 512, lease=lease_of(target.id, 2))
    with pytest.raises(Exception, match="LeaseIdMismatch"):
        client.upload_page(noise(512), 0, 512, lease=lease_of(target.id, 1))
    target.check("p1")


def test_a_put_of_a_dead_writer_does_not_arrive(rig: TargetRig, target: TargetBench) -> None:
    """A put that is still in flight when the engine restarts would overwrite newer data."""
    target.first_points("p1")
    held, go = threading.Event(), threading.Event()

    def hold(request: object) -> None:
        if getattr(request, "action", "") == "update" and not held.is_set():
            held.set()
            assert go.wait(60)

    late = target.open("c2")
    with rig.storage.switched("hold", hold):
        target.send(late, [Data(target.first, 0, noise(64 * KiB))])
        sender = threading.Thread(target=lambda: _quiet(late.flush))
        sender.start()
        assert held.wait(60)
    calls = [Data(target.first, 0, noise(64 * KiB))]
    with target.open("c2") as writer:
        target.send(writer, calls)
        writer.flush()
        go.set()
        sender.join(60)
        with pytest.raises(WrongState):
            late.flush()
        target.seal(writer, "p2", calls)
    rig.abandon(late)
    target.check()


def test_who_was_followed_by_another_writer_seals_nothing(rig: TargetRig, target: TargetBench) -> None:
    """All its puts had arrived when the other engine opened the cycle: only the sequence number shows the other's."""
    target.first_points("p1")
    calls = [Data(target.first, 0, noise(64 * KiB))]
    former = target.open("c2")
    target.send(former, calls)
    former.flush()
    others = [Data(target.first, 64 * KiB, noise(64 * KiB))]
    with target.open("c2") as writer:
        target.send(writer, others)
        writer.flush()
        with pytest.raises(WrongState):
            former.seal(target.seal_spec("p2"))
        assert target.points == ["p1"]
    rig.abandon(former)
    with target.open("c2") as writer:
        assert {item.offset for item in writer.done(target.first)} == {0}
        target.seal(writer, "p2", [*calls, *others])
    target.check()


def test_a_seal_that_failed_is_repeated(rig: TargetRig, target: TargetBench, monkeypatch: pytest.MonkeyPatch) -> None:
    target.first_points("p1")
    calls = [Data(target.first, 0, noise(64 * KiB))]
    with target.open("c2") as writer:
        target.send(writer, calls)
        with monkeypatch.context() as patch:
            patch.setattr(PageBlob, "snapshot_now", _unreachable)
            with pytest.raises(SiteUnreachable):
                writer.seal(target.seal_spec("p2"))
        target.seal(writer, "p2", calls)
    target.check()


def test_a_lost_answer_at_the_end_is_no_other_writer(
    rig: TargetRig, target: TargetBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cycle is retried by the next engine that opens it, and sends nothing twice."""
    target.first_points("p1")
    calls = [Data(target.first, 0, noise(64 * KiB))]
    writer = target.open("c2")
    target.send(writer, calls)
    writer.flush()
    page = rig.target_site.account.container.page_blob(blob_of(rig, target, target.first))
    number, lost = BlobClient.set_sequence_number, [True]

    def numbered(client: BlobClient, *words: Any, **named: Any) -> Any:
        answer = number(client, *words, **named)
        if client.blob_name == page.name and lost and lost.pop():
            raise ServiceResponseError("the connection broke")
        return answer

    monkeypatch.setattr(BlobClient, "set_sequence_number", numbered)
    with pytest.raises(SiteUnreachable) as caught:
        writer.seal(target.seal_spec("p2"))
    assert caught.value.retry
    writer.close()
    before = rig.storage.proxy.sent()
    with target.open("c2") as writer:
        target.seal(writer, "p2", calls)
    assert rig.storage.proxy.sent() == before
    target.check()


def _unreachable(page: PageBlob, lease: str) -> str:
    raise SiteUnreachable(site="azure", detail="the link was cut")


def _quiet(call: object) -> None:
    try:
        call()  # type: ignore[operator]
    except AsrError:
        return


def test_a_raise_that_was_killed_is_finished_by_the_next(rig: TargetRig, target: TargetBench) -> None:
    target.first_points("p1")
    replica = target.replica
    record = replica.record()  # type: ignore[attr-defined]
    page = rig.target_site.account.container.page_blob(record.disks[target.first].blob)
    # As if it had been killed after the record and one of two blobs.
    rig.target_site.account.container.change(
        target.id, "azure", lambda item: attrs.evolve(item, epoch=2, leases=(1, 2))
    )
    assert page.take(lease_of(target.id, 2), [lease_of(target.id, 1)])
    target.replica.raise_epoch(3)
    target.epoch = 3
    with pytest.raises(StaleEpoch):
        target.replica.open_cycle(CycleSpec("c9", 2, "p1", target.sizes)).close()
    target.cycle("p2", Data(target.first, 0, noise(64 * KiB)))
    target.check()


def test_a_lease_of_somebody_else_is_respected(rig: TargetRig, target: TargetBench) -> None:
    target.first_points("p1")
    name = blob_of(rig, target, target.first)
    lease = rig.storage.direct.get_blob_client(rig.settings["container"], name)
    BlobLeaseClient(lease).break_lease(lease_break_period=0)
    other = lease.acquire_lease(-1)
    with pytest.raises(AsrError) as caught:
        target.open("c2").close()
    assert caught.value.code == "azure-lease-held"
    other.release()
    with target.open("c2") as writer:
        target.seal(writer, "p2", [])
    target.check()


# -- trouble


def test_settings_are_checked(rig: TargetRig) -> None:
    good = rig.settings
    for wrong in (
        {"account_url": "http://example.com"},
        {"container": "Upper"},
        {"subscription": "s"},
        {"tenant": "t"},
        {"networks": "lan"},
        {"networks": "lan=a/b+open"},
        {"size_rules": "web"},
        {"ca_file": "missing.pem"},
    ):
        with pytest.raises(InvalidSetting):
            rig.driver.connect("azure", good | wrong)


def test_a_wrong_key_is_told(rig: TargetRig) -> None:
    with pytest.raises(AsrError) as caught:
        rig.driver.connect("azure", rig.settings | {"account_key": base64.b64encode(b"x" * 64).decode()})
    assert caught.value.code == "access-denied"


def test_a_link_that_is_cut_in_a_cycle(rig: TargetRig, target: TargetBench) -> None:
    target.first_points("p1")
    rig.target_site.account.calls.patience = 1.0
    calls = [Data(target.first, 0, noise(64 * KiB))]
    try:
        with target.open("c2") as writer, rig.storage.switched("cut"):
            target.send(writer, calls)
            with pytest.raises(SiteUnreachable):
                writer.flush()
    finally:
        rig.target_site.account.calls.patience = 60.0
    assert target.points == ["p1"]
    with target.open("c2") as writer:
        target.send(writer, calls)
        target.seal(writer, "p2", calls)
    target.check()
