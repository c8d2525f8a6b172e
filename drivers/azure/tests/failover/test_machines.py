"""What the kit cannot ask: networks as Azure has them, tokens and SAS that run out, left-overs, limits, the probe."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import pytest

from asr_driver_azure import _vhd
from asr_driver_azure._access import Access
from asr_driver_azure._machine import tags_for
from asrcore.driver import (
    CycleSpec,
    Fence,
    PromoteSpec,
    ReplicaSpec,
    SealSpec,
    TestSpec,
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
from asrcore.testing.conformance._target_bench import Data, TargetBench, noise
from asrcore.units import KiB, MiB, TiB
from drivers.azure.tests.failover.rig import FailoverRig
from drivers.azure.tests.peers.arm import traffic
from drivers.azure.tests.peers.arm.server import Cloud
from drivers.azure.tests.peers.storage import Storage


@pytest.fixture(scope="module")
def rig(storage: Storage, cloud: Cloud) -> Iterator[FailoverRig]:
    with FailoverRig(storage, cloud) as made:
        yield made


@pytest.fixture
def target(rig: FailoverRig) -> Iterator[TargetBench]:
    bench = TargetBench(rig)
    bench.first_points("p1")
    yield bench
    rig.target_site.failover.undo(bench.id, bench.replica.info().epoch)
    bench.close()
    rig.remove_target_machine(bench.id)
    assert rig.cloud.names() == []


def promote(rig: FailoverRig, target: TargetBench, network: str = "lab") -> None:
    spec = PromoteSpec(target.id, "p1", 1, NetworkMap({"lan": network}))
    rig.target_site.failover.promote(spec, Watch())


def card_of(cloud: Cloud) -> dict[str, object]:
    (card,) = cloud.all("networkInterfaces")
    properties: dict[str, object] = card["properties"]
    return properties


# -- networks


def test_a_public_address_where_it_is_asked_for(rig: FailoverRig, target: TargetBench) -> None:
    promote(rig, target, "dmz")
    card = card_of(rig.cloud)
    assert "production/subnets/dmz" in repr(card)
    assert "networkSecurityGroups/lab-nsg" in repr(card)
    assert [item["sku"]["name"] for item in rig.cloud.all("publicIPAddresses")] == ["Standard"]


def test_none_where_it_is_not(rig: FailoverRig, target: TargetBench) -> None:
    promote(rig, target, "lab")
    assert rig.cloud.all("publicIPAddresses") == []
    assert "production/subnets/lab" in repr(card_of(rig.cloud))


def test_a_test_has_no_public_address_even_in_a_named_network(rig: FailoverRig, target: TargetBench) -> None:
    rig.target_site.failover.start_test(TestSpec("t1", target.id, "p1", "asr-t1", "dmz"), Watch())
    assert rig.cloud.all("publicIPAddresses") == []
    assert "production/subnets/dmz" in repr(card_of(rig.cloud))


def test_a_network_that_nobody_named(rig: FailoverRig, target: TargetBench) -> None:
    with pytest.raises(AsrError) as told:
        promote(rig, target, "elsewhere")
    assert told.value.code == "azure-network-unknown"
    assert rig.cloud.names() == []
    assert rig.target_site.failover.tests(target.id) == []


def test_a_machine_has_boot_diagnostics_and_the_right_generation(rig: FailoverRig, target: TargetBench) -> None:
    promote(rig, target)
    rig.target_site.inventory.power_on(target.id)
    (machine,) = rig.cloud.all("virtualMachines")
    assert machine["properties"]["diagnosticsProfile"] == {"bootDiagnostics": {"enabled": True}}
    assert machine["properties"]["hardwareProfile"]["vmSize"] == "Standard_B1ls"
    assert {item["properties"].get("hyperVGeneration") for item in rig.cloud.all("disks")} == {"V1", None}


def test_the_base_is_taken_before_the_machine_runs(rig: FailoverRig, target: TargetBench) -> None:
    promote(rig, target)
    order = [item["path"] for item in rig.cloud.traffic if item["method"] == "PUT"]
    base = max(index for index, path in enumerate(order) if "/snapshots/" in path)
    rig.target_site.inventory.power_on(target.id)
    order = [item["path"] for item in rig.cloud.traffic if item["method"] == "PUT"]
    assert base < max(index for index, path in enumerate(order) if "/virtualMachines/" in path)


def test_the_disk_is_the_point(rig: FailoverRig, target: TargetBench) -> None:
    promote(rig, target)
    for disk, size in target.sizes.items():
        name, told = rig._disks(target.id)[disk]
        assert told == size
        with rig.cloud.content.path(f"disks/{name}").open("rb") as file:
            content = file.read()
        assert content[:size] == target.head[disk]
        assert len(content) == _vhd.managed_size(size)
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


# -- what runs out


def test_a_token_is_renewed(rig: FailoverRig, target: TargetBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.cloud, "token_seconds", 2)
    rig.restart()
    promote(rig, target)
    rig.cloud._tokens.clear()  # all that were given out are worth nothing now
    given = rig.cloud.tokens_given
    monkeypatch.setattr(rig.cloud, "token_seconds", 3600)
    rig.restart()
    rig.target_site.inventory.power_on(target.id)
    assert rig.cloud.tokens_given > given


def test_a_sas_is_renewed_in_the_middle(rig: FailoverRig, target: TargetBench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a copy that takes longer than the SAS lives."""
    put, puts = Access.put, []

    def expiring(self: Access, offset: int, data: bytes) -> None:
        puts.append(offset)
        if len(puts) == 2:
            rig.cloud.content.expire()
        put(self, offset, data)

    monkeypatch.setattr(Access, "put", expiring)
    promote(rig, target)
    assert len(puts) >= 2
    test_the_disk_is_the_point(rig, target)


def test_a_missing_permission_is_told(rig: FailoverRig, target: TargetBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.cloud, "deny", r"PUT .*/disks/")
    with pytest.raises(AccessDenied, match="no authorization"):
        promote(rig, target)
    monkeypatch.setattr(rig.cloud, "deny", "")
    promote(rig, target)
    test_the_disk_is_the_point(rig, target)


def test_a_wrong_secret_is_told(rig: FailoverRig) -> None:
    site = rig._driver.connect("azure", rig.settings | {"client_secret": "wrong"})
    with pytest.raises(AccessDenied):
        site.inventory.machines()
    site.close()


def test_a_certificate_that_nobody_vouches_for(rig: FailoverRig) -> None:
    settings = {key: value for key, value in rig.settings.items() if key != "ca_file"}
    site = rig._driver.connect("azure", settings)
    site.arm.calls.patience = 1.0
    with pytest.raises(AsrError):
        site.inventory.machines()
    site.close()


def test_a_footer_that_is_wrong_is_refused_at_the_end(
    rig: FailoverRig, target: TargetBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is half made can still be removed."""
    with monkeypatch.context() as patch:
        patch.setattr(_vhd, "footer", lambda size, identity: bytes(512))
        with pytest.raises(AsrError, match="footer"):
            promote(rig, target)
    assert any(item["properties"]["diskState"] == "ActiveUpload" for item in rig.cloud.all("disks"))
    rig.target_site.failover.undo(target.id, 1)
    assert rig.cloud.names() == []


# -- left-overs


def test_the_sweeper_takes_what_nobody_knows(rig: FailoverRig, target: TargetBench) -> None:
    promote(rig, target)
    rig.target_site.failover.start_test(TestSpec("t1", target.id, "p1", "asr-t1"), Watch())
    known = rig.cloud.names()
    body = {"location": "westeurope", "tags": tags_for("nobody"), "properties": {"securityRules": []}}
    rig.cloud._make("networkSecurityGroups", "nobody-nsg", body)
    creation = {"createOption": "Upload", "uploadSizeBytes": 20 * MiB + 512}
    disk = {"location": "westeurope", "tags": tags_for("nobody"), "properties": {"creationData": creation}}
    rig.cloud._make("disks", "nobody-0", disk)
    rig.target_site.arm.grant("disks", "nobody-0", write=True, seconds=3600)
    others = {"location": "westeurope", "properties": {"securityRules": []}}
    rig.cloud._make("networkSecurityGroups", "of-a-user", others)
    assert sorted(rig.target_site.sweep()) == ["disks/nobody-0", "networkSecurityGroups/nobody-nsg"]
    assert rig.target_site.sweep() == []
    assert set(rig.cloud.names()) == {*known, "networkSecurityGroups/of-a-user"}
    rig.cloud._items.pop(("networkSecurityGroups", "of-a-user"))
    rig.target_site.failover.stop_test(target.id, "t1")


def test_the_sweeper_ends_what_a_deletion_began(rig: FailoverRig) -> None:
    bench = TargetBench(rig)
    bench.first_points("p1")
    rig.target_site.container.change(bench.id, "azure", lambda record: attrs.evolve(record, deleting=True))
    assert rig.target_site.sweep() == [f"replica {bench.id}"]
    names = {name for name, _ in rig.storage.blobs(rig.settings["container"])}
    assert not [name for name in names if bench.id in name]


# -- readiness, limits, and the probe


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
    told = re.search(r"about (\d+) requests a day", cost.what)
    assert told is not None
    estimate = int(told[1]) / (86400 / Policy("p").interval)
    assert 0.6 < requests / estimate < 1.5, f"{requests} requests, estimated {estimate}"


def test_what_is_stored_is_told(rig: FailoverRig, target: TargetBench) -> None:
    stored = rig.target_site.status().details["stored"]
    assert re.match(r"\d+ replicas, \d+ points; [\d.]+ [KM]iB", stored)


def test_several_disks_are_not_frozen_while_the_machine_runs(rig: FailoverRig, target: TargetBench) -> None:
    promote(rig, target)
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
    promote(rig, target)
    monkeypatch.setattr(rig.cloud.compute, "snapshot_window", 300.0)
    rig.target_site.arm.calls.patience = 0.0
    source = rig.target_site.source

    def freeze(number: int) -> None:
        request = ViewRequest(target.id, f"view{number}", None)
        source.open_view([request], consistency=Consistency.CRASH, freeze_limit=5.0).close()

    for number in range(6):  # the promotion took one, too
        freeze(number)
    with pytest.raises(AsrError, match="seven snapshots"):
        freeze(6)
    rig.target_site.arm.calls.patience = 60.0


def test_a_fenced_machine_carries_a_sign(rig: FailoverRig, target: TargetBench) -> None:
    promote(rig, target)
    rig.target_site.inventory.power_on(target.id)
    rig.target_site.inventory.fence(target.id, Fence(4, "it works elsewhere"))
    (machine,) = rig.cloud.all("virtualMachines")
    assert "it works elsewhere" in machine["tags"]["asr-fence"]
    rig.target_site.inventory.unfence(target.id, 4)
    (machine,) = rig.cloud.all("virtualMachines")
    assert "asr-fence" not in machine["tags"]


def test_the_probe_passes_and_leaves_nothing(rig: FailoverRig) -> None:
    checks = list(rig._driver.check(rig.settings))
    assert [item for item in checks if not item.passed] == []
    assert len(checks) == 11
    assert rig.cloud.names() == []
    containers = [item.name for item in rig.storage.direct.list_containers() if item.name.startswith("asr-check")]
    assert containers == []


def test_a_probe_that_fails_cleans_up(rig: FailoverRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.cloud, "deny", r"PUT .*/virtualMachines/")
    checks = list(rig._driver.check(rig.settings))
    assert [item.name for item in checks if not item.passed] == [
        "make a disk by upload, and start a machine in an isolated network"
    ]
    assert rig.cloud.names() == []


def test_the_server_is_strict(rig: FailoverRig) -> None:
    """What Azure would refuse, past the driver."""
    arm = rig.target_site.arm
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
    promote(rig, target, "dmz")
    rig.target_site.failover.start_test(TestSpec("t1", target.id, "p1", "asr-t1"), Watch())
    rig.target_site.inventory.power_on(target.id)
    rig.target_site.inventory.machines()
    rig.target_site.inventory.fence(target.id, Fence(4, "it works elsewhere"))
    rig.target_site.inventory.unfence(target.id, 4)
    rig.target_site.failover.stop_test(target.id, "t1")
    heard = list(rig.cloud.traffic)
    assert traffic.problems(heard) == []
    kinds = {kind for kind in traffic.KINDS if any(f"/{kind}" in item["path"] for item in heard)}
    assert kinds == set(traffic.KINDS), "every kind was spoken of"


def _spoilt(heard: list[dict[str, Any]], spoil: Callable[[dict[str, Any]], object]) -> list[str]:
    """What is told of an answer about a disk, spoilt."""
    (*_, item) = [item for item in heard if item["given"] and item["method"] == "PUT" and "/disks/" in item["path"]]
    copy: dict[str, Any] = json.loads(json.dumps(item))
    spoil(copy)
    return traffic.problems([copy])


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda item: item["given"]["properties"].update(colour="red"), "has no property 'colour'"),
        (lambda item: item["given"]["properties"].update(diskState="Ready"), "must be one of"),
        (lambda item: item["given"]["properties"].update(diskSizeBytes="1"), "must be int"),
        (lambda item: item["headers"].clear(), "nowhere to ask"),
        (lambda item: item["sent"].update(colour="red"), "has no property 'colour'"),
        (lambda item: item.update(status=409), "an error of another form"),
        (lambda item: item.update(path="/subscriptions/x/providers/Microsoft.Compute/images"), "not described"),
    ],
)
def test_what_is_not_as_described_is_told(
    rig: FailoverRig, target: TargetBench, spoil: Callable[[dict[str, Any]], object], told: str
) -> None:
    promote(rig, target)
    (problem,) = _spoilt(rig.cloud.traffic, spoil)
    assert told in problem
