"""Test failovers: a disposable, isolated machine of a recovery point, while replication continues."""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from pathlib import Path

import attrs

from asr_driver_libvirt.failover.instances import (
    Platform,
    disks_of_domain,
    hold,
    make_images,
    of_point,
    released,
    write_nvram,
)
from asr_driver_libvirt.xml import instance
from asr_driver_libvirt.xml.domain import parse_domain
from asr_storage.files.durable import fsync_directory, remove_tree, write_durably
from asr_storage.replica.replica import FileReplica
from asr_storage.replica.store import Home, checked_id
from asrcore import codec
from asrcore.crashpoint import reach
from asrcore.driver import Instance, TestSpec
from asrcore.errors import AlreadyExists, InvalidValue
from asrcore.model.watch import Watch

__all__ = ["TestRecord", "start", "stop", "test_ids"]


@attrs.frozen
class TestRecord:
    """What a test has that must be deleted after it; written before any of it is created."""

    test_id: str
    point_id: str
    machine_id: str
    name: str
    network: str
    own_network: bool
    logs: tuple[str, ...] = ()
    __test__ = False  # not a test class, despite its name


def test_ids(home: Home) -> list[str]:
    """Tests that are running or left over."""
    directory = home.path / "tests"
    if not directory.is_dir():
        return []
    return sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))


def start(platform: Platform, replica: FileReplica, spec: TestSpec, watch: Watch) -> Instance:
    """See Failover.start_test."""
    directory = replica.home.test(spec.test_id)
    with replica.errors("making a test machine"):
        test = _load(directory)
        if test is None:
            test = _record(platform, replica, spec, directory)
        reach("failover.test.recorded")
        watch.check()
        domain = platform.find(test.machine_id)
        if domain is None:
            xml = _make(platform, replica, test, directory)
            watch.check()
            domain = platform.define(xml)
            reach("failover.test.defined")
        if test.own_network:
            name = test.network
            platform.make_network(name, instance.isolated_network(name, _bridge(name)))
        reach("failover.test.network")
        platform.start(domain)
        reach("failover.test.started")
    return Instance(test.machine_id, test.name)


def _record(platform: Platform, replica: FileReplica, spec: TestSpec, directory: Path) -> TestRecord:
    with replica.working("making a test machine") as record:
        point = of_point(record, spec.point_id)
        model = parse_domain(platform.domain_xml(replica.home.description(spec.point_id)))
        if not spec.name or not spec.name.isprintable() or "/" in spec.name:
            raise InvalidValue(what="name of the test", value=spec.name, wanted="printable, without slashes")
        if len(spec.name.encode()) > 200:  # libvirt makes names of files of it
            raise InvalidValue(what="name of the test", value=spec.name, wanted="200 bytes at most")
        own = not spec.network and bool(model.nics)
        network = f"asr-test-{_short(replica.replica_id, spec.test_id)}" if own else spec.network
        if spec.network and spec.network not in platform.network_names():
            raise InvalidValue(what="test network", value=spec.network, wanted=f"a network of site {platform.name}")
        machine_id = str(uuid.uuid5(uuid.NAMESPACE_URL, f"asr-test/{replica.replica_id}/{spec.test_id}"))
        there = platform.find_name(spec.name)
        if there is not None and there.UUIDString() != machine_id:
            raise AlreadyExists(kind="machine", name=spec.name)
        directory.mkdir(0o711, exist_ok=True)
        fsync_directory(directory.parent)
        test = TestRecord(spec.test_id, spec.point_id, machine_id, spec.name, network, own)
        write_durably(directory / "test.json", codec.dump(test))
        hold(replica, record, _holder(spec.test_id), point)
        return test


def _make(platform: Platform, replica: FileReplica, test: TestRecord, directory: Path) -> str:
    """Images and definition. The images are created again as long as there is no domain that may have written them."""
    with replica.working("making a test machine") as found:
        point = of_point(found, test.point_id)
        record = hold(replica, found, _holder(test.test_id), point)
        description = replica.home.description(test.point_id)
        images = make_images(replica, record, _holder(test.test_id), point, directory, own=False)
        reach("failover.test.images")
        nvram = write_nvram(description, directory)
        xml, logs = instance.test_machine(
            platform.domain_xml(description),
            machine_id=test.machine_id,
            name=test.name,
            made=instance.Made(replica.replica_id, test.point_id, "test", test.test_id),
            disks=disks_of_domain(description, images),
            nvram=nvram,
            network=test.network,
            exists=os.path.exists,
        )
        write_durably(directory / "test.json", codec.dump(attrs.evolve(test, logs=tuple(logs))))
        return xml


def stop(platform: Platform, replica: FileReplica, test_id: str) -> None:
    """See Failover.stop_test."""
    directory = replica.home.test(checked_id("test id", test_id))
    with replica.errors("removing a test machine"):
        test = _load(directory)
        if test is not None:
            domain = platform.find(test.machine_id)
            if domain is not None:
                platform.remove(domain, tpm=True)
            reach("failover.test.undefined")
            if test.own_network:
                platform.remove_network(test.network)
            for path in test.logs:
                with contextlib.suppress(FileNotFoundError):
                    Path(path).unlink()
            reach("failover.test.unplugged")
        with replica.working("removing a test machine") as record:
            released(replica, record, _holder(test_id))
            reach("failover.test.released")
            remove_tree(directory)
        reach("failover.test.removed")


def _load(directory: Path) -> TestRecord | None:
    try:
        return codec.load(TestRecord, (directory / "test.json").read_bytes())
    except FileNotFoundError:
        return None


def _holder(test_id: str) -> str:
    return f"test:{test_id}"


def _short(*parts: str) -> str:
    return hashlib.sha256("/".join(parts).encode()).hexdigest()[:8]


def _bridge(network: str) -> str:
    return f"asrt{_short(network)}"  # 15 letters are the kernel's limit for a name
