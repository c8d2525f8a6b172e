"""What runs that never came back have left in the cloud."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asr_driver_azure._arm import KINDS, tags_of
from asr_driver_azure._build import Builder
from asr_driver_azure._failover import test_owner
from asr_driver_azure._machine import MACHINES, TAG_COMMITTED, TAG_CONTAINER, TAG_OWNER
from asr_driver_azure._record import REPLICAS, lease_of

if TYPE_CHECKING:
    from asr_driver_azure._site import AzureSite

__all__ = ["sweep"]


def sweep(site: AzureSite) -> list[str]:
    """Remove what belongs to no machine, no test and no failover that is recorded; names of what was removed.

    Whoever makes something records first what it is for. So it is enough to look at the resources before the records.
    """
    removed = []
    owners, known = _made(site) if site.settings.runs_machines else ({}, set())
    for replica_id in site.container.folders(REPLICAS):
        loaded = site.container.load(replica_id)
        if loaded is None:
            continue
        record = loaded.record
        if record.deleting:
            site.container.erase(record, [lease_of(replica_id, item) for item in record.leases])
            removed.append(f"replica {replica_id}")
            continue
        known |= {test_owner(replica_id, test_id) for test_id in record.tests}
        if record.promotion is not None:
            known |= {record.promotion.machine, record.promotion.aside}
    for owner, names in sorted(owners.items()):
        if owner not in known:
            Builder(site).remove(owner)
            removed += names or [f"{MACHINES}{owner}"]
    return removed


def _made(site: AzureSite) -> tuple[dict[str, list[str]], set[str]]:
    """Resources by owner, of this container only; and the owners that are not left over whatever replicas say."""
    owners: dict[str, list[str]] = {}
    known = set()
    for kind in KINDS:
        for item in site.arm.listed(kind):
            tags = tags_of(item)
            if kind == "virtualMachines" and TAG_OWNER not in tags:
                known.add(str(item["name"]))  # simply there: what carries its name are its marks
            if tags.get(TAG_CONTAINER) != site.container.identity or TAG_OWNER not in tags:
                continue
            owners.setdefault(tags[TAG_OWNER], []).append(f"{kind}/{item['name']}")
            if TAG_COMMITTED in tags:
                known.add(tags[TAG_OWNER])
    for blob in site.container.listed(MACHINES):
        owners.setdefault(blob.name[len(MACHINES) :].partition("/")[0].removesuffix(".json"), [])
    return owners, known | {item.name for item in site.machines.all_defined()}
