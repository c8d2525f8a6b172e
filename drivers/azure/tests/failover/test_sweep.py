"""The sweeper deletes orphaned resources of its own site, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import pytest

from asr_driver_azure.machines.record import MACHINES, tags_for
from asrcore.driver import TestSpec, ViewRequest
from asrcore.model.point import Consistency
from asrcore.model.watch import Watch
from asrcore.testing.conformance._target_bench import TargetBench
from asrcore.units import MiB
from drivers.azure.tests.failover.rig import FailoverRig
from drivers.azure.tests.peers.arm.server import Cloud
from drivers.azure.tests.peers.storage import Storage


@pytest.fixture(scope="module")
def other(storage: Storage, cloud: Cloud) -> Iterator[FailoverRig]:
    """Another site, with its own container, in the same resource group."""
    with FailoverRig(storage, cloud) as made:
        yield made


def test_what_nobody_knows(rig: FailoverRig, target: TargetBench) -> None:
    rig.promote(target)
    rig.target_site.failover.start_test(TestSpec("t1", target.id, "p1", "asr-t1"), Watch())
    known = rig.cloud.names()
    tags = tags_for(rig.target_site.account.container.identity, "nobody")
    body = {"location": "westeurope", "tags": tags, "properties": {"securityRules": []}}
    rig.cloud._make("networkSecurityGroups", "nobody-nsg", body)
    creation = {"createOption": "Upload", "uploadSizeBytes": 20 * MiB + 512}
    disk = {"location": "westeurope", "tags": tags, "properties": {"creationData": creation}}
    rig.cloud._make("disks", "nobody-0", disk)
    rig.target_site.account.arm.grant("disks", "nobody-0", write=True, seconds=3600)
    others = {"location": "westeurope", "properties": {"securityRules": []}}
    rig.cloud._make("networkSecurityGroups", "of-a-user", others)
    assert sorted(rig.target_site.sweep()) == ["disks/nobody-0", "networkSecurityGroups/nobody-nsg"]
    assert rig.target_site.sweep() == []
    assert set(rig.cloud.names()) == {*known, "networkSecurityGroups/of-a-user"}
    rig.cloud._items.pop(("networkSecurityGroups", "of-a-user"))
    rig.target_site.failover.stop_test(target.id, "t1")


def test_what_another_site_made_stays(rig: FailoverRig, other: FailoverRig, target: TargetBench) -> None:
    """A test, a failover, and a resource that an engine of the other site is about to make; also with the sites
    exchanged."""
    rig.promote(target)
    rig.target_site.inventory.power_on(target.id)
    rig.target_site.failover.start_test(TestSpec("t1", target.id, "p1", "asr-t1"), Watch())
    before = rig.cloud.names()
    other.target_site.account.make_container()
    assert other.target_site.sweep() == []
    assert rig.target_site.sweep() == []
    assert rig.cloud.names() == before
    tags = tags_for(other.target_site.account.container.identity, "nobody")
    body = {"location": "westeurope", "tags": tags, "properties": {"securityRules": []}}
    rig.cloud._make("networkSecurityGroups", "nobody-nsg", body)
    assert rig.target_site.sweep() == []
    assert other.target_site.sweep() == ["networkSecurityGroups/nobody-nsg"]
    rig.target_site.failover.stop_test(target.id, "t1")


def test_a_committed_machine_stays_though_its_records_are_lost(rig: FailoverRig) -> None:
    bench = TargetBench(rig)
    bench.first_points("p1")
    rig.promote(bench)
    rig.target_site.inventory.power_on(bench.id)
    rig.target_site.failover.commit(bench.id, 1, Watch())
    before = rig.cloud.names()
    (name,) = [item.name for item in rig.target_site.machines.all_defined()]
    kept = rig.target_site.account.container.read(f"{MACHINES}{name}.json")
    assert kept is not None
    rig.target_site.account.container.delete(f"{MACHINES}{name}.json")
    assert rig.target_site.sweep() == []
    assert rig.cloud.names() == before
    rig.target_site.account.container.write(f"{MACHINES}{name}.json", kept[0])
    bench.close()
    rig.remove_target_machine(bench.id)
    assert rig.cloud.names() == []


def test_marks_of_a_machine_that_is_simply_there_stay(rig: FailoverRig, target: TargetBench) -> None:
    """Until the machine is deleted."""
    rig.promote(target)
    rig.target_site.inventory.power_on(target.id)
    (machine,) = rig.cloud.all("virtualMachines")
    body = {key: machine[key] for key in ("location", "properties")}
    rig.target_site.failover.undo(target.id, 1)
    creation = {"createOption": "Upload", "uploadSizeBytes": 20 * MiB + 512}
    rig.cloud._make("disks", "theirs-os", {"location": "westeurope", "properties": {"creationData": creation}})
    rig.cloud.item("disks", "theirs-os")["properties"]["diskState"] = "Unattached"
    storage = {
        "osDisk": {
            "createOption": "Attach",
            "osType": "Linux",
            "managedDisk": {"id": rig.cloud.id("disks", "theirs-os")},
        },
        "dataDisks": [],
    }
    properties = body["properties"] | {"storageProfile": storage, "networkProfile": {"networkInterfaces": []}}
    properties = {key: properties[key] for key in ("hardwareProfile", "storageProfile", "networkProfile")}
    rig.cloud._make("virtualMachines", "theirs", {"location": "westeurope", "properties": properties})
    request = ViewRequest("theirs", "view", None)
    rig.target_site.source.open_view([request], consistency=Consistency.CRASH, freeze_limit=5.0).close()
    marks = [item["name"] for item in rig.cloud.all("snapshots")]
    assert len(marks) == 1
    assert rig.target_site.sweep() == []
    assert [item["name"] for item in rig.cloud.all("snapshots")] == marks
    rig.cloud._delete("virtualMachines", "theirs")
    assert rig.target_site.sweep() == [f"snapshots/{marks[0]}"]
    rig.cloud._delete("disks", "theirs-os")


def test_what_a_deletion_began_is_ended(rig: FailoverRig) -> None:
    bench = TargetBench(rig)
    bench.first_points("p1")
    rig.target_site.account.container.change(bench.id, "azure", lambda record: attrs.evolve(record, deleting=True))
    assert rig.target_site.sweep() == [f"replica {bench.id}"]
    names = {name for name, _ in rig.storage.blobs(rig.settings["container"])}
    assert not [name for name in names if bench.id in name]
