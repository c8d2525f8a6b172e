"""Deletes resources that interrupted runs have left in the cloud."""

from __future__ import annotations

from asr_driver_azure.account import AzureAccount
from asr_driver_azure.blobs.record import REPLICAS, lease_of
from asr_driver_azure.cloud.arm import KINDS, tags_of
from asr_driver_azure.machines.builder import Builder
from asr_driver_azure.machines.machines import Machines
from asr_driver_azure.machines.record import MACHINES, TAG_COMMITTED, TAG_CONTAINER, TAG_OWNER, test_owner

__all__ = ["sweep"]


def sweep(account: AzureAccount, machines: Machines) -> list[str]:
    """Delete what belongs to no recorded machine, test or failover; names of what was deleted.

    The record comes before the resources are created. So it is enough to list the resources before reading the records.
    """
    removed = []
    owners, known = _made(account, machines) if account.settings.runs_machines else ({}, set())
    for replica_id in account.container.folders(REPLICAS):
        loaded = account.container.load(replica_id)
        if loaded is None:
            continue
        record = loaded.record
        if record.deleting:
            account.container.erase(record, [lease_of(replica_id, item) for item in record.leases])
            removed.append(f"replica {replica_id}")
            continue
        known |= {test_owner(replica_id, test_id) for test_id in record.tests}
        if record.promotion is not None:
            known |= {record.promotion.machine, record.promotion.aside}
    for owner, names in sorted(owners.items()):
        if owner not in known:
            Builder(account).remove(owner)
            removed += names or [f"{MACHINES}{owner}"]
    return removed


def _made(account: AzureAccount, machines: Machines) -> tuple[dict[str, list[str]], set[str]]:
    """Resources by owner, of this container only; and the owners that are not left over whatever replicas say."""
    owners: dict[str, list[str]] = {}
    known = set()
    for kind in KINDS:
        for item in account.arm.listed(kind):
            tags = tags_of(item)
            if kind == "virtualMachines" and TAG_OWNER not in tags:
                known.add(str(item["name"]))  # not created by the driver: what carries its name are its marks
            if tags.get(TAG_CONTAINER) != account.container.identity or TAG_OWNER not in tags:
                continue
            owners.setdefault(tags[TAG_OWNER], []).append(f"{kind}/{item['name']}")
            if TAG_COMMITTED in tags:
                known.add(tags[TAG_OWNER])
    for blob in account.container.listed(MACHINES):
        owners.setdefault(blob.name[len(MACHINES) :].partition("/")[0].removesuffix(".json"), [])
    return owners, known | {item.name for item in machines.all_defined()}
