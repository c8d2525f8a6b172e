"""What the kit cannot test: Azure's networks, permissions and limits, and the messages about them."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import attrs
import pytest
from azure.core.exceptions import HttpResponseError

from asr_driver_azure.blobs import vhd
from asr_driver_azure.driver import AzureDriver
from asr_driver_azure.machines.builder import Builder
from asrcore.driver import (
    CycleSpec,
    Fence,
    PromoteSpec,
    ReplicaSpec,
    SealSpec,
    TestSpec,
    Tracking,
    ViewRequest,
    different_blocks,
)
from asrcore.errors import AccessDenied, AsrError, UnsupportedOperation
from asrcore.model.extent import Extent
from asrcore.model.finding import Severity
from asrcore.model.machine import Description, Disk, Firmware, Machine, Nic
from asrcore.model.point import Consistency
from asrcore.model.policy import Policy
from asrcore.model.protection import NetworkMap
from asrcore.model.watch import Watch
from asrcore.testing.conformance._target_bench import Data, TargetBench, Zero, noise
from asrcore.units import GiB, KiB, MiB, TiB
from drivers.azure.tests.failover.rig import FailoverRig
from drivers.azure.tests.peers.arm import traffic
from drivers.azure.tests.peers.arm.server import Cloud


def card_of(cloud: Cloud) -> dict[str, object]:
    (card,) = cloud.all("networkInterfaces")
    properties: dict[str, object] = card["properties"]
    return properties


# -- networks


def test_a_public_address_where_it_is_asked_for(rig: FailoverRig, target: TargetBench) -> None:
    rig.promote(target, "dmz")
    card = card_of(rig.cloud)
    assert "production/subnets/dmz" in repr(card)
    assert "networkSecurityGroups/lab-nsg" in repr(card)
    assert [item["sku"]["name"] for item in rig.cloud.all("publicIPAddresses")] == ["Standard"]


def test_none_where_it_is_not(rig: FailoverRig, target: TargetBench) -> None:
    rig.promote(target, "lab")
    assert rig.cloud.all("publicIPAddresses") == []
    assert "production/subnets/lab" in repr(card_of(rig.cloud))


def test_a_test_has_no_public_address_even_in_a_named_network(rig: FailoverRig, target: TargetBench) -> None:
    rig.target_site.failover.start_test(TestSpec("t1", target.id, "p1", "asr-t1", "dmz"), Watch())
    assert rig.cloud.all("publicIPAddresses") == []
    assert "production/subnets/dmz" in repr(card_of(rig.cloud))


def test_a_network_that_nobody_named(rig: FailoverRig, target: TargetBench) -> None:
    with pytest.raises(AsrError) as caught:
        rig.promote(target, "elsewhere")
    assert caught.value.code == "azure-network-unknown"
    assert rig.cloud.names() == []
    assert rig.target_site.failover.tests(target.id) == []


def test_a_machine_has_boot_diagnostics_and_the_right_generation(rig: FailoverRig, target: TargetBench) -> None:
    rig.promote(target)
    rig.target_site.inventory.power_on(target.id)
    (machine,) = rig.cloud.all("virtualMachines")
    assert machine["properties"]["diagnosticsProfile"] == {"bootDiagnostics": {"enabled": True}}
    assert machine["properties"]["hardwareProfile"]["vmSize"] == "Standard_B1ls"
    assert {item["properties"].get("hyperVGeneration") for item in rig.cloud.all("disks")} == {"V1", None}


def test_the_base_is_taken_before_the_machine_runs(rig: FailoverRig, target: TargetBench) -> None:
    rig.promote(target)
    order = [item["path"] for item in rig.cloud.traffic if item["method"] == "PUT"]
    base = max(index for index, path in enumerate(order) if "/snapshots/" in path)
    rig.target_site.inventory.power_on(target.id)
    order = [item["path"] for item in rig.cloud.traffic if item["method"] == "PUT"]
    assert base < max(index for index, path in enumerate(order) if "/virtualMachines/" in path)


def test_uefi_becomes_generation_2(rig: FailoverRig) -> None:
    """Disk and machine, on a size that boots the disk, although a smaller allowed size does not."""
    disk = Disk("vda", 2 * MiB)
    machine = Machine("uefi", "uefi", 1, 64 * MiB, Firmware.UEFI, (disk,), (Nic("52:54:00:00:00:01", "lan"),))
    description = Description(machine, "test")
    site = rig._driver.connect("azure", rig.settings | {"sizes": "Standard_A1_v2,Standard_D2ps_v5,Standard_D4s_v5"})
    replica = site.target.create_replica(ReplicaSpec("uefi", "uefi", 1, description), Watch())
    with replica.open_cycle(CycleSpec("c", 1, None, {"vda": disk.size})) as writer:
        writer.write("vda", 0, memoryview(b"boot".ljust(512)))
        writer.seal(SealSpec("p", 1.0, Consistency.CRASH, True, description))
    site.failover.promote(PromoteSpec("uefi", "p", 1, NetworkMap({})), Watch())
    site.inventory.power_on("uefi")
    (made,) = rig.cloud.all("disks")
    assert made["properties"]["hyperVGeneration"] == "V2"
    (run,) = rig.cloud.all("virtualMachines")
    assert run["properties"]["hardwareProfile"]["vmSize"] == "Standard_D4s_v5"
    assert rig.cloud.hypervisor(run["name"]).uefi is True
    assert site.inventory.machine("uefi").firmware is Firmware.UEFI
    site.failover.undo("uefi", 1)
    site.close()


def test_nothing_gets_in_or_out_of_a_test_in_no_network(rig: FailoverRig, target: TargetBench) -> None:
    """Rules before all others, for every protocol, port and address; on the subnet of each network interface."""
    rig.target_site.failover.start_test(TestSpec("t1", target.id, "p1", "asr-t1"), Watch())
    (group,) = [item for item in rig.cloud.all("networkSecurityGroups") if item["name"] != "lab-nsg"]
    rules = [rule["properties"] for rule in group["properties"]["securityRules"]]
    assert sorted(rule["direction"] for rule in rules) == ["Inbound", "Outbound"]
    for rule in rules:
        assert rule["access"] == "Deny"
        assert rule["priority"] == 100, "the lowest number has the highest priority"
        ends = ("sourceAddressPrefix", "destinationAddressPrefix", "sourcePortRange", "destinationPortRange")
        assert {rule[end] for end in (*ends, "protocol")} == {"*"}
    (network,) = [item for item in rig.cloud.all("virtualNetworks") if item["name"] != "production"]
    (subnet,) = network["properties"]["subnets"]
    assert subnet["properties"]["networkSecurityGroup"]["id"] == group["id"]
    assert network["properties"].get("virtualNetworkPeerings", []) == []
    cards = rig.cloud.all("networkInterfaces")
    assert cards != []
    for card in cards:
        (config,) = card["properties"]["ipConfigurations"]
        assert config["properties"]["subnet"]["id"] == subnet["id"]
        assert "publicIPAddress" not in config["properties"]
        assert "networkSecurityGroup" not in card["properties"], "it would be evaluated in addition"
    rig.target_site.failover.stop_test(target.id, "t1")


def test_the_disk_is_the_point(rig: FailoverRig, target: TargetBench) -> None:
    rig.promote(target)
    for disk, size in target.sizes.items():
        name, reported = rig._disks(target.id)[disk]
        assert reported == size
        with rig.cloud.content.path(f"disks/{name}").open("rb") as file:
            content = file.read()
        assert content[:size] == target.head[disk]
        assert len(content) == vhd.managed_size(size)
        assert not any(content[size:])


def test_the_first_disk_is_the_system_whatever_its_name(rig: FailoverRig) -> None:
    disks = (Disk("root", 2 * MiB), Disk("data", MiB))
    description = Description(Machine("two", "two", 1, 64 * MiB, Firmware.BIOS, disks), "test")
    replica = rig.target_site.target.create_replica(ReplicaSpec("two", "two", 1, description), Watch())
    with replica.open_cycle(CycleSpec("c", 1, None, {disk.id: disk.size for disk in disks})) as writer:
        writer.write("root", 0, memoryview(b"boot".ljust(512)))
        writer.seal(SealSpec("p", 1.0, Consistency.CRASH, True, description))
    rig.target_site.failover.promote(PromoteSpec("two", "p", 1, NetworkMap({})), Watch())
    assert [disk.id for disk in rig.target_site.inventory.machine("two").disks] == ["root", "data"]
    rig.target_site.inventory.power_on("two")
    (machine,) = rig.cloud.all("virtualMachines")
    system = machine["properties"]["storageProfile"]["osDisk"]["managedDisk"]["id"].rpartition("/")[2]
    assert rig.cloud.content.path(f"disks/{system}").read_bytes().startswith(b"boot")
    assert [disk.id for disk in rig.target_site.inventory.machine("two").disks] == ["root", "data"]
    rig.target_site.failover.undo("two", 1)


# -- what is refused


def test_a_missing_permission_is_told(rig: FailoverRig, target: TargetBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.cloud, "deny", r"PUT .*/disks/")
    with pytest.raises(AccessDenied, match="no authorization"):
        rig.promote(target)
    monkeypatch.setattr(rig.cloud, "deny", "")
    rig.promote(target)
    test_the_disk_is_the_point(rig, target)


def test_a_wrong_secret_is_told(rig: FailoverRig) -> None:
    site = rig._driver.connect("azure", rig.settings | {"client_secret": "wrong"})
    site.account.make_container()
    with pytest.raises(AccessDenied):
        site.inventory.machines()
    site.close()


def test_a_certificate_that_nobody_vouches_for(rig: FailoverRig) -> None:
    settings = {key: value for key, value in rig.settings.items() if key != "ca_file"}
    site = rig._driver.connect("azure", settings)
    site.account.make_container()  # storage, which is another server, is contacted first
    with pytest.raises(AccessDenied, match="certificate"):
        site.inventory.machines()
    site.close()


def test_a_footer_that_is_wrong_is_refused_at_the_end(
    rig: FailoverRig, target: TargetBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A half-made machine can still be deleted."""
    with monkeypatch.context() as patch:
        patch.setattr(vhd, "footer", lambda size, identity: bytes(512))
        with pytest.raises(AsrError, match="footer"):
            rig.promote(target)
    assert any(item["properties"]["diskState"] == "ActiveUpload" for item in rig.cloud.all("disks"))
    rig.target_site.failover.undo(target.id, 1)
    assert rig.cloud.names() == []


# -- readiness and limits


def test_findings(rig: FailoverRig, target: TargetBench) -> None:
    disks = (Disk("vda", 3 * TiB), Disk("vdb", 9 * TiB), Disk("vdc", MiB + 512))
    nics = (Nic("52:54:00:00:00:01", "unknown"),)
    large = Machine("m", "m", 999, MiB, Firmware.BIOS, disks, nics, secure_boot=True)
    given = attrs.evolve(target.description("x"), machine=large)
    found = {item.code: item for item in rig.target_site.target.findings(given, Policy("p"))}
    wanted = {"azure-disk-too-large", "azure-system-disk-too-large", "azure-network-missing", "azure-size-missing"}
    assert {code for code, item in found.items() if item.severity is Severity.ERROR} == wanted
    assert {"azure-disk-rounded", "azure-no-secure-boot", "azure-guest", "azure-cost"} <= found.keys()
    fine = {item.code: item for item in rig.target_site.target.findings(target.description("x"), Policy("p"))}
    assert not [item for item in fine.values() if item.severity is Severity.ERROR]
    assert "Standard_B1ls" in fine["azure-size"].what


def test_the_estimate_of_requests_is_near(rig: FailoverRig, target: TargetBench) -> None:
    """A cycle in which nothing changes, as the estimate counts it."""
    target.cycle("p2")
    before = len(rig.storage.proxy.requests)
    with target.open("c3") as writer:
        writer.flush()
        target.seal(writer, "p3", [])
    requests = len(rig.storage.proxy.requests) - before
    found = rig.target_site.target.findings(target.description("x"), Policy("p"))
    (cost,) = [item for item in found if item.code == "azure-cost"]
    reported = re.search(r"about (\d+) requests a day", cost.what)
    assert reported is not None
    estimate = int(reported[1]) / (86400 / Policy("p").interval)
    assert 0.6 < requests / estimate < 1.5, f"{requests} requests, estimated {estimate}"


def test_the_estimate_of_the_first_copy(rig: FailoverRig) -> None:
    """In bytes and in writes; and the number of writes is as estimated if the disks are full of data."""
    disks = (Disk("vda", 3 * GiB), Disk("vdb", GiB))
    large = Description(Machine("m", "m", 1, MiB, Firmware.BIOS, disks), "test")
    (cost,) = [item.what for item in rig.target_site.target.findings(large, Policy("p")) if item.code == "azure-cost"]
    assert cost.startswith("up to 4.0 GiB of page blobs and 1025 writes at first;"), "the footers add one"
    bench = TargetBench(rig)
    (cost,) = [
        item.what
        for item in rig.target_site.target.findings(bench.description("p1"), Policy("p"))
        if item.code == "azure-cost"
    ]
    reported = re.search(r"(\d+) writes at first", cost)
    assert reported is not None
    before = rig.storage.proxy.count("update")
    bench.cycle("p1", *(Data(disk, 0, noise(size)) for disk, size in bench.sizes.items()))
    writes = rig.storage.proxy.count("update") - before
    assert int(reported[1]) <= writes <= int(reported[1]) + len(bench.sizes), "a disk's last write is not a full one"
    bench.close()
    rig.target_site.target.delete_replica(bench.id, 1)


def test_what_is_stored_is_told(rig: FailoverRig, target: TargetBench) -> None:
    stored = rig.target_site.status().details["stored"]
    assert re.match(r"\d+ replicas, \d+ points; [\d.]+ [KM]iB", stored)


def test_a_point_tells_what_is_stored_for_it(rig: FailoverRig, target: TargetBench) -> None:
    """As Azure lists it, without the driver; for a point that is not kept, the last known state."""

    def held() -> int:
        record = rig.target_site.account.container.record(target.id, "azure")
        assert record.head is not None
        total = 0
        for disk_id, disk in record.head.disks.items():
            blob = rig.storage.direct.get_blob_client(rig.settings["container"], disk.blob, snapshot=disk.snapshot)
            pages = [(page.start or 0, (page.end or 0) + 1) for page in blob.list_page_ranges()]
            total += sum(min(end, disk.size) - start for start, end in pages if start < disk.size)
            assert disk_id in target.sizes
        return total

    assert target.replica.info().points[-1].held == held()
    before = held()
    target.cycle("p2", Data(target.first, MiB, noise(256 * KiB)), Zero(target.first, 0, 64 * KiB))
    assert held() == before + 192 * KiB
    assert target.replica.info().points[-1].held == held()
    point = target.cycle("p3", Data(target.first, MiB + 512 * KiB, noise(64 * KiB)), keep=False)
    assert point.held == before + 192 * KiB
    assert held() == before + 256 * KiB


def test_several_disks_are_not_frozen_while_the_machine_runs(rig: FailoverRig, target: TargetBench) -> None:
    rig.promote(target)
    source, request = rig.target_site.source, ViewRequest(target.id, "view", None)
    rig.target_site.inventory.power_on(target.id)
    assert "azure-several-disks" in {item.code for item in source.findings(target.id, Policy("p"))}
    with pytest.raises(UnsupportedOperation):
        source.open_view([request], consistency=Consistency.CRASH, freeze_limit=5.0)
    rig.target_site.inventory.power_off(target.id, graceful=False, timeout=30.0)
    with source.open_view([request], consistency=Consistency.CRASH, freeze_limit=5.0) as view:
        assert view.machines[target.id].consistency is Consistency.OFFLINE
    source.keep_marks(target.id, [])


def test_a_comparison_for_the_way_home_downloads_little(rig: FailoverRig, target: TargetBench) -> None:
    target.cycle("p2", Data(target.first, 0, noise(3 * MiB)))
    spec = PromoteSpec(target.id, "p2", 1, NetworkMap({"lan": "lab"}))
    rig.target_site.failover.promote(spec, Watch())
    name, size = rig._disks(target.id)[target.first]
    with rig.cloud.content.path(f"disks/{name}").open("r+b") as file:
        file.seek(MiB)
        file.write(b"changed in the cloud")
    before = rig.cloud.content.read
    request = ViewRequest(target.id, "view", None)
    with rig.target_site.source.open_view([request], consistency=Consistency.CRASH, freeze_limit=5.0) as view:
        disk = view.machines[target.id].disks[target.first]
        assert disk.hashes_at_source
        whole = Extent(0, size)
        assert different_blocks(whole, disk.digests(whole), target.digests(target.first)) == [Extent(MiB, 64 * KiB)]
    assert rig.cloud.content.read - before == 64 * KiB


def test_seven_snapshots_at_once(rig: FailoverRig, target: TargetBench, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.promote(target)
    monkeypatch.setattr(rig.cloud.compute, "snapshot_window", 300.0)
    rig.target_site.account.arm.calls.patience = 0.0
    source = rig.target_site.source

    def freeze(number: int) -> None:
        request = ViewRequest(target.id, f"view{number}", None)
        source.open_view([request], consistency=Consistency.CRASH, freeze_limit=5.0).close()

    for number in range(6):  # the promotion also took one
        freeze(number)
    with pytest.raises(AsrError, match="seven snapshots"):
        freeze(6)
    rig.target_site.account.arm.calls.patience = 60.0


def test_an_eighth_snapshot_waits_as_long_as_azure_says_and_alone(
    rig: FailoverRig, target: TargetBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.promote(target)
    monkeypatch.setattr(rig.cloud.compute, "snapshot_window", 8.0)
    rig.cloud.compute._taken.clear()
    before, begun = len(rig.cloud.traffic), time.monotonic()
    name, _ = rig._disks(target.id)[target.first]
    builder = Builder(rig.target_site.account)

    def take(number: int) -> float:
        builder.snapshot(f"{name}-s{number}", "nobody", name, target.first, "view")
        return time.monotonic() - begun

    with ThreadPoolExecutor(1) as pool:
        taken = pool.map(take, range(8))
        looked = 0
        while not refusals(rig, before) or looked < 5:
            assert time.monotonic() - begun < 7
            rig.target_site.account.arm.get("disks", name)
            looked += bool(refusals(rig, before))
        assert time.monotonic() - begun < 7, "other operations were delayed"
        assert max(taken) >= 7.5
    assert len(refusals(rig, before)) == 1, "the request was repeated too early"
    builder.remove("nobody")


def refusals(rig: FailoverRig, since: int) -> list[str]:
    """Requests that Azure refused as too many."""
    return [item["path"] for item in rig.cloud.traffic[since:] if item["status"] == 429]


def test_five_snapshots_of_a_disk_are_read_at_once(rig: FailoverRig, target: TargetBench) -> None:
    rig.promote(target)
    name, _ = rig._disks(target.id)[target.first]
    builder, arm = Builder(rig.target_site.account), rig.target_site.account.arm
    for number in range(6):
        builder.snapshot(f"{name}-r{number}", "nobody", name, target.first, "view")
    for number in range(5):
        arm.grant("snapshots", f"{name}-r{number}", write=False, seconds=60)
    with pytest.raises(AsrError, match="five snapshots") as caught:
        arm.grant("snapshots", f"{name}-r5", write=False, seconds=60)
    assert caught.value.code == "azure-state-refused"
    arm.grant("snapshots", f"{name}-r4", write=False, seconds=60)  # again one of the five
    arm.revoke("snapshots", f"{name}-r0")
    arm.grant("snapshots", f"{name}-r5", write=False, seconds=60)
    builder.remove("nobody")


@pytest.mark.parametrize(
    "verb",
    [
        lambda blob: blob.create_page_blob(20 * MiB),
        lambda blob: blob.delete_blob(),
        lambda blob: blob.create_snapshot(),
        lambda blob: blob.acquire_lease(),
        lambda blob: blob.set_blob_metadata({"a": "b"}),
        lambda blob: blob.resize_blob(40 * MiB),
        lambda blob: blob.set_sequence_number("update", "1"),
        lambda blob: blob.upload_page(bytes(512), 0, 512, transactional_content_md5=bytes(16)),
    ],
)
def test_a_disk_takes_pages_and_nothing_else(rig: FailoverRig, verb: Callable[[Any], object]) -> None:
    """With its SAS; Azure refuses everything that is valid for a blob only."""
    creation = {"createOption": "Upload", "uploadSizeBytes": 20 * MiB + 512}
    rig.target_site.account.arm.put(
        "disks", "strict", {"location": "westeurope", "properties": {"creationData": creation}}
    )
    sas = rig.target_site.account.arm.grant("disks", "strict", write=True, seconds=60)
    with rig.target_site.account.clients.disk(sas) as blob:
        blob.upload_page(b"x" * 512, 0, 512)
        with pytest.raises(HttpResponseError):
            verb(blob)
        assert blob.download_blob(0, 512).readall() == b"x" * 512
    Builder(rig.target_site.account).remove_resource("disks", "strict")


def test_a_fenced_machine_carries_a_sign(rig: FailoverRig, target: TargetBench) -> None:
    rig.promote(target)
    rig.target_site.inventory.power_on(target.id)
    rig.target_site.inventory.fence(target.id, Fence(4, "it runs elsewhere"))
    (machine,) = rig.cloud.all("virtualMachines")
    assert "it runs elsewhere" in machine["tags"]["asr-fence"]
    rig.target_site.inventory.unfence(target.id, 4)
    (machine,) = rig.cloud.all("virtualMachines")
    assert "asr-fence" not in machine["tags"]


def test_the_server_is_strict(rig: FailoverRig) -> None:
    """What Azure would refuse, without the driver."""
    arm = rig.target_site.account.arm
    disk = {
        "location": "westeurope",
        "properties": {"creationData": {"createOption": "Upload", "uploadSizeBytes": 20 * MiB + 512}},
    }
    for wrong in (
        disk | {"colour": "red"},
        disk | {"location": "nowhere"},
        disk | {"properties": {"creationData": {"createOption": "upload", "uploadSizeBytes": 20 * MiB + 512}}},
        disk | {"properties": {"creationData": {"createOption": "Upload", "uploadSizeBytes": 20 * MiB}}},
        disk | {"properties": {"creationData": {"createOption": "Upload", "uploadSizeBytes": 3 * MiB + 512}}},
        disk | {"tags": {"x": "y" * 300}},
    ):
        with pytest.raises(AsrError):
            arm.put("disks", "wrong", wrong)
    assert rig.cloud.names() == []


def test_recorded_traffic_is_as_the_sdk_describes_it(rig: FailoverRig, target: TargetBench) -> None:
    rig.promote(target, "dmz")
    rig.target_site.failover.start_test(TestSpec("t1", target.id, "p1", "asr-t1"), Watch())
    rig.target_site.inventory.power_on(target.id)
    rig.target_site.inventory.machines()
    rig.target_site.inventory.fence(target.id, Fence(4, "it runs elsewhere"))
    rig.target_site.inventory.unfence(target.id, 4)
    rig.target_site.failover.stop_test(target.id, "t1")
    heard = list(rig.cloud.traffic)
    assert traffic.problems(heard) == []
    kinds = {kind for kind in traffic.KINDS if any(f"/{kind}" in item["path"] for item in heard)}
    assert kinds == set(traffic.KINDS), "the traffic covers every kind"


def _spoilt(heard: list[dict[str, Any]], spoil: Callable[[dict[str, Any]], object]) -> list[str]:
    """The finding for a damaged answer about a disk."""
    (*_, item) = [item for item in heard if item["given"] and item["method"] == "PUT" and "/disks/" in item["path"]]
    copy: dict[str, Any] = json.loads(json.dumps(item))
    spoil(copy)
    return traffic.problems([copy])


@pytest.mark.parametrize(
    ("spoil", "reported"),
    [
        (lambda item: item["given"]["properties"].update(colour="red"), "has no property 'colour'"),
        (lambda item: item["given"]["properties"].update(diskState="Ready"), "must be one of"),
        (lambda item: item["given"]["properties"].update(diskSizeBytes="1"), "must be int"),
        (lambda item: item["headers"].clear(), "nowhere to ask"),
        (lambda item: item["sent"].update(colour="red"), "has no property 'colour'"),
        (lambda item: item["sent"].update(managedBy="me"), "managedBy can only be read"),
        (lambda item: item["sent"]["properties"].update(diskSizeBytes=1), "diskSizeBytes can only be read"),
        (lambda item: item["sent"]["properties"]["creationData"].update(sourceUniqueId="1"), "can only be read"),
        (lambda item: item.update(status=409), "an error of another form"),
        (lambda item: item.update(path="/subscriptions/x/providers/Microsoft.Compute/images"), "not described"),
    ],
)
def test_what_is_not_as_described_is_told(
    rig: FailoverRig, target: TargetBench, spoil: Callable[[dict[str, Any]], object], reported: str
) -> None:
    rig.promote(target)
    (problem,) = _spoilt(rig.cloud.traffic, spoil)
    assert reported in problem


def test_two_vaults_that_protect_one_machine_keep_their_own_snapshots(rig: FailoverRig, target: TargetBench) -> None:
    owners = ("aaaa1111", "bbbb2222")
    rig.promote(target)
    sites = [AzureDriver().connect("azure", {**rig.settings, "owner": owner}) for owner in owners]
    marks = []
    for number, site in enumerate(sites):
        request = ViewRequest(target.id, f"view{number}", None)
        with site.source.open_view([request], consistency=Consistency.CRASH, freeze_limit=5.0) as view:
            machine = view.machines[target.id]
            assert machine.mark is not None
            marks.append(machine.mark)
            warned = {item.code for item in machine.notices}
            # The vault stores a notice when it changes, and each cycle makes new snapshots.
            assert "/snapshots/" not in str(machine.notices)
        site.source.keep_marks(target.id, [marks[-1]])
    assert warned == {"protected-by-another-vault"}
    for number, (site, mark) in enumerate(zip(sites, marks, strict=True)):
        request = ViewRequest(target.id, f"next{number}", mark)
        with site.source.open_view([request], consistency=Consistency.CRASH, freeze_limit=5.0) as view:
            tracking = {disk.tracking for disk in view.machines[target.id].disks.values()}
            assert tracking == {Tracking.CHANGED}, "the other vault left its snapshots"
    sites[1].source.keep_marks(target.id, [])
    tags = {item["tags"].get("asr-vault") for item in rig.cloud.all("snapshots")}
    assert tags == {"aaaa1111"}
    found = {item.code: item for item in sites[1].source.findings(target.id, Policy("p"))}
    name = next(item["name"] for item in rig.cloud.all("snapshots"))
    assert f"/snapshots/{name}" in found["protected-by-another-vault"].action
    sites[0].source.keep_marks(target.id, [])
    assert rig.cloud.all("snapshots") == []
    for site in sites:
        site.close()


def test_each_vault_gets_its_own_tag_and_keeps_it(rig: FailoverRig) -> None:
    first, second = (AzureDriver().adopt("azure", rig.settings) for _ in range(2))
    assert first.keys() == second.keys() == {"owner"}
    assert first != second
    assert AzureDriver().adopt("azure", {**rig.settings, **first}) == {}
