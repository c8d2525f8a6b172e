"""Two vaults protect one machine: each works with its own checkpoints, views and scratch files only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from asr_driver_libvirt.driver import LibvirtDriver
from asr_driver_libvirt.host import paused
from asr_driver_libvirt.site import LibvirtSite
from asr_driver_libvirt.source import left_over, source
from asrcore.driver import FrozenView, MachineView, Tracking, ViewRequest
from asrcore.errors import MachineBusy
from asrcore.model.extent import Extent
from asrcore.model.point import Consistency, Mark
from asrcore.model.policy import Policy
from tests.lab import BareMachine, Lab

pytestmark = pytest.mark.system

MIB = 1 << 20


class Machine(BareMachine):
    """As two vaults see it."""

    def open(self, vault: LibvirtSite, view_id: str, since: Mark | None = None) -> tuple[FrozenView, MachineView]:
        view = vault.source.open_view(
            [ViewRequest(self.id, view_id, since)], consistency=Consistency.CRASH, freeze_limit=5.0
        )
        return view, view.machines[self.id]

    def cycle(
        self, vault: LibvirtSite, view_id: str, since: Mark | None = None
    ) -> tuple[MachineView, list[Extent], Mark]:
        view, machine = self.open(vault, view_id, since)
        disk = machine.disks["vda"]
        changed = disk.changed() if disk.tracking is Tracking.CHANGED else []
        view.confirm()
        view.close()
        assert machine.mark is not None
        vault.source.keep_marks(self.id, [machine.mark])
        return machine, changed, machine.mark


@pytest.fixture
def machine(lab: Lab) -> Iterator[Machine]:
    made = Machine(lab, "a", "shared")
    yield made
    made.remove()


@pytest.fixture
def vaults(lab: Lab, nbd_directory: Path) -> Iterator[Callable[[str], LibvirtSite]]:
    opened: list[LibvirtSite] = []

    def vault(owner: str) -> LibvirtSite:
        settings = {"uri": lab.uri("a"), "nbd": f"unix:{nbd_directory}", "owner": owner}
        opened.append(LibvirtDriver().connect("a", settings))
        return opened[-1]

    yield vault
    for site in opened:
        site.close()


Vaults = Callable[[str], LibvirtSite]


def test_two_vaults_take_turns_and_each_has_its_exact_delta(machine: Machine, vaults: Vaults) -> None:
    one, two = vaults("aaaa1111"), vaults("bbbb2222")
    _, _, first = machine.cycle(one, "c1")
    assert [item for item in two.source.findings(machine.id, Policy("p")) if item.code == "protected-by-another-vault"]
    machine.write("1M")
    _, _, second = machine.cycle(two, "c2")
    machine.write("2M")
    found, changed, first = machine.cycle(one, "c3", first)
    assert (found.disks["vda"].tracking, changed) == (
        Tracking.CHANGED,
        [Extent(MIB, 65536), Extent(2 * MIB, 65536)],
    )
    machine.write("3M")
    found, changed, second = machine.cycle(two, "c4", second)
    assert (found.disks["vda"].tracking, changed) == (
        Tracking.CHANGED,
        [Extent(2 * MIB, 65536), Extent(3 * MIB, 65536)],
    )
    two.source.keep_marks(machine.id, [])
    machine.write("4M")
    found, changed, first = machine.cycle(one, "c5", first)
    assert (found.disks["vda"].tracking, changed) == (
        Tracking.CHANGED,
        [Extent(3 * MIB, 65536), Extent(4 * MIB, 65536)],
    )
    codes = {item.code for item in one.source.findings(machine.id, Policy("p"))}
    assert "protected-by-another-vault" not in codes, "the other one has ended its protection"
    one.source.keep_marks(machine.id, [])
    assert machine.checkpoints() == set()


def test_a_view_of_another_vault_is_waited_for_and_left_alone(lab: Lab, machine: Machine, vaults: Vaults) -> None:
    one, two = vaults("aaaa1111"), vaults("bbbb2222")
    machine.cycle(two, "c0")
    view, frozen = machine.open(one, "c1")
    scratch = lab.run_in("a", ["sh", "-c", "ls /srv/images/shared.qcow2.asr-*"]).stdout.split()
    assert scratch
    with pytest.raises(MachineBusy, match=r"another vault.*aaaa1111"):
        machine.open(two, "c2")
    two.source.keep_marks(machine.id, [])
    assert lab.run_in("a", ["sh", "-c", "ls /srv/images/shared.qcow2.asr-*"]).stdout.split() == scratch
    with frozen.disks["vda"].reader() as reader:
        reader.read_into(0, memoryview(bytearray(512)))
    view.confirm()
    view.close()
    assert len(machine.checkpoints()) == 1, "the one of the vault that still protects the machine"
    assert one.source.findings(machine.id, Policy("p")) == []


def test_a_vault_that_is_gone_is_reported_with_the_commands_that_end_it(machine: Machine, vaults: Vaults) -> None:
    one, two = vaults("aaaa1111"), vaults("bbbb2222")
    machine.cycle(one, "c1")
    (name,) = machine.checkpoints()
    found = [item for item in two.source.findings(machine.id, Policy("p")) if item.code == "protected-by-another-vault"]
    assert "aaaa1111" in found[0].what
    command = f"virsh checkpoint-delete {machine.name} {name}"
    assert command in found[0].action
    machine.virsh("checkpoint-delete", machine.name, name)
    assert "protected-by-another-vault" not in {item.code for item in two.source.findings(machine.id, Policy("p"))}
    machine.cycle(one, "c2")
    # A vault made anew in place of one that was lost takes its tag.
    again = vaults("aaaa1111")
    again.source.keep_marks(machine.id, [])
    assert machine.checkpoints() == set()


def test_a_machine_that_another_vault_holds_for_reading_is_not_released(machine: Machine, vaults: Vaults) -> None:
    one, two = vaults("aaaa1111"), vaults("bbbb2222")
    machine.virsh("destroy", machine.name)
    view, frozen = machine.open(one, "c1")
    with pytest.raises(MachineBusy, match="another vault"):
        machine.open(two, "c2")
    two.source.keep_marks(machine.id, [])
    with frozen.disks["vda"].reader() as reader:
        reader.read_into(0, memoryview(bytearray(512)))
    view.confirm()
    view.close()


def test_a_killed_engines_guard_leaves_what_another_vault_holds(machine: Machine, vaults: Vaults) -> None:
    one, two = vaults("aaaa1111"), vaults("bbbb2222")
    machine.virsh("destroy", machine.name)
    domain = two.host.domain(machine.id)
    paused.hold(domain, "bbbb2222")
    assert left_over.end(one.host, one.host.domain(machine.id), "", held=True) == ""
    paused.release(domain, "aaaa1111")
    assert paused.holder(domain) == "bbbb2222"
    assert left_over.end(two.host, domain, "", held=True) == "stopped the machine"


def test_a_hold_without_a_tag_is_left_while_its_engine_may_use_it(
    machine: Machine, vaults: Vaults, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = vaults(""), vaults("aaaa1111")
    machine.virsh("destroy", machine.name)
    view, frozen = machine.open(before, "c1")
    with pytest.raises(MachineBusy, match="domjobabort"):
        machine.open(after, "c2")
    after.source.keep_marks(machine.id, [])
    with frozen.disks["vda"].reader() as reader:
        reader.read_into(0, memoryview(bytearray(512)))
    view.close()
    monkeypatch.setattr(source, "_UNUSED_HOLD_SECONDS", 0.1)
    paused.hold(before.host.domain(machine.id), "")
    view, _ = machine.open(after, "c3")
    view.close()
    assert machine.lab.state("a", machine.name) == "shut off"


def test_what_a_site_without_a_tag_left_is_recognised_once_it_has_one(machine: Machine, vaults: Vaults) -> None:
    before = vaults("")
    _, _, mark = machine.cycle(before, "c1")
    old = machine.checkpoints()
    after = vaults("aaaa1111")
    machine.write("1M")
    _, changed, mark = machine.cycle(after, "c2", mark)
    assert changed == [Extent(MIB, 65536)]
    assert not old & machine.checkpoints(), "the mark before was this vault's"
    after.source.keep_marks(machine.id, [])
    assert machine.checkpoints() == set()
