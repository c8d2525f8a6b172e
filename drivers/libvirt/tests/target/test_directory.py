"""A replica directory is recognised by its mark: one whose file system is not mounted is not used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from asr_driver_libvirt.driver import LibvirtDriver
from asr_driver_libvirt.settings import SiteSettings
from asr_driver_libvirt.site import LibvirtSite
from asrcore.driver import ReplicaSpec
from asrcore.errors import InvalidSetting, ReplicaDirNotMounted
from asrcore.model.watch import Watch
from drivers.libvirt.tests.target.conftest import MIB, machine, run
from tests.lab import mounted

pytestmark = pytest.mark.system


def settings(directory: Path) -> dict[str, str]:
    return {"uri": "qemu:///system", "replica_dir": str(directory)}


def site(directory: Path, mark: str) -> LibvirtSite:
    """Not connected: the target role needs no libvirt for its work on files."""
    return LibvirtSite("b", SiteSettings.parse({**settings(directory), "replica_mark": mark}))


def spec(replica_id: str) -> ReplicaSpec:
    return ReplicaSpec(replica_id, "web", 1, machine({"vda": MIB}))


def test_a_file_system_that_is_not_mounted(tmp_path: Path) -> None:
    with mounted(tmp_path, "ext4", 16 * MIB) as directory:
        mark = LibvirtDriver().adopt("b", settings(directory))["replica_mark"]
        target, failover = site(directory, mark).target, site(directory, mark).failover
        target.create_replica(spec("r1"), Watch())
        run("umount", directory)
        refused: list[Callable[[], object]] = [
            lambda: target.create_replica(spec("r2"), Watch()),
            lambda: target.replica("r1"),
            target.replicas,
            target.capacity,
            lambda: target.delete_replica("r1", 1),
            lambda: failover.stop_test("r1", "t1"),
            lambda: failover.undo("r1", 2),
        ]
        for call in refused:
            with pytest.raises(ReplicaDirNotMounted, match="of site 'b'"):
                call()
        assert list(directory.iterdir()) == [], "the file system below it was written to"
        run("mount", "-o", "loop", tmp_path / "ext4.img", directory)
        assert target.replicas() == ["r1"]
        assert target.replica("r1").info().points == ()
        target.delete_replica("r1", 1)
        assert target.replicas() == []


def test_another_directory_in_its_place(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for directory in (first, second):
        directory.mkdir()
    marks = [LibvirtDriver().adopt("b", settings(directory))["replica_mark"] for directory in (first, second)]
    assert marks[0] != marks[1]
    with pytest.raises(ReplicaDirNotMounted):
        site(second, marks[0]).target.replicas()


def test_a_mark_is_made_once(tmp_path: Path) -> None:
    """A second vault records the same one; what is recorded stays; an older directory gets one."""
    (tmp_path / ".asr-replicas").write_text("asrcore keeps replicas of machines here\n")
    first = LibvirtDriver().adopt("b", settings(tmp_path))
    second = LibvirtDriver().adopt("b", settings(tmp_path))
    assert second["replica_mark"] == first["replica_mark"]
    assert LibvirtDriver().adopt("b", {**settings(tmp_path), **first}) == {}


def test_each_vault_gets_its_own_tag_and_keeps_it() -> None:
    uri = {"uri": "qemu:///system"}
    first, second = (LibvirtDriver().adopt("b", uri) for _ in range(2))
    assert first.keys() == second.keys() == {"owner"}
    assert first != second
    assert LibvirtDriver().adopt("b", {**uri, **first}) == {}
    assert SiteSettings.parse({**uri, **first}).owner == first["owner"]


def test_no_directory_at_all(tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match="is its file system mounted"):
        LibvirtDriver().adopt("b", settings(tmp_path / "gone"))
    with pytest.raises(ReplicaDirNotMounted):
        site(tmp_path / "gone", "0123456789abcdef").target.capacity()


def test_a_site_of_an_older_vault_works_without_one(tmp_path: Path) -> None:
    target = site(tmp_path, "").target
    target.create_replica(spec("r1"), Watch())
    assert target.replicas() == ["r1"]
