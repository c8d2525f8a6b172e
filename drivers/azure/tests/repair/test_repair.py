"""Systems are repaired on the disk of the new machine, and the recovery point stays unchanged."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest

from asr_driver_azure.driver import AzureDriver
from asr_driver_azure.machines.record import repairs_blob
from asr_driver_azure.repair import rootfs, system_disk
from asr_driver_azure.site import AzureSite
from asrcore.driver import CycleSpec, PromoteSpec, ReplicaSpec, SealSpec, TestSpec, ViewRequest, different_blocks
from asrcore.driver import digests_of as digests_of_reader
from asrcore.model.extent import Extent
from asrcore.model.machine import Description, Disk, Firmware, Machine
from asrcore.model.point import Consistency
from asrcore.model.protection import NetworkMap
from asrcore.model.watch import Watch
from asrcore.units import MiB
from drivers.azure.tests.peers.arm.server import Cloud
from drivers.azure.tests.peers.storage import Storage

SIZE, START = 24 * MiB, 2 * MiB
UUID = str(uuid.UUID(int=7))
FSTAB = "/dev/sda1 / ext4 errors=remount-ro 0 1\n"
MENU = "linux /vmlinuz root=/dev/sda1 ro quiet\n"
OWN = "[Match]\nName=ens3\n[Network]\nAddress=10.0.0.2/24\n"
_numbers = itertools.count(1)


@attrs.define
class Bench:
    """A site, and the machine that is made from one point of a disk."""

    storage: Storage
    cloud: Cloud
    settings: dict[str, str]
    site: AzureSite
    id: str = ""

    def seal(self, image: Path, platform: str = "test", system: str = "Debian 12") -> None:
        """The image becomes the point `p` of a new machine."""
        self.id = f"repaired{next(_numbers)}"
        machine = Machine(self.id, self.id, 1, 64 * MiB, Firmware.BIOS, (Disk("sda", SIZE),), os=system)
        description = Description(machine, platform)
        data = image.read_bytes()
        replica = self.site.target.create_replica(ReplicaSpec(self.id, self.id, 1, description), Watch())
        with replica.open_cycle(CycleSpec("c", 1, None, {"sda": SIZE})) as writer:
            for at in range(0, SIZE, MiB):
                piece = data[at : at + MiB]
                if any(piece):
                    writer.write("sda", at, memoryview(piece))
                else:
                    writer.zero("sda", at, MiB)
            writer.seal(SealSpec("p", 1.0, Consistency.CRASH, True, description))

    def promote(self) -> tuple[str, ...]:
        """Promote the machine; returns the repairs."""
        spec = PromoteSpec(self.id, "p", 1, NetworkMap({}))
        return self.site.failover.promote(spec, Watch()).repairs

    def disk(self, machine_id: str = "") -> Path:
        """The managed disk's content."""
        ((name, _),) = self.site.machines.disks(machine_id or self.id).values()
        return self.cloud.content.path(f"disks/{name}")

    def point(self) -> bytes:
        """The content of the blob's snapshot, read without the driver."""
        ((name, snapshot),) = [key for key in self.storage.blobs(self.settings["container"])
                               if key[1] and f"/{self.id}/" in key[0]]  # fmt: skip
        return self.storage.content(self.settings["container"], name, snapshot)[:SIZE]


@pytest.fixture(scope="module")
def connect(storage: Storage, cloud: Cloud) -> Iterator[Callable[..., Bench]]:
    sites = []

    def connect(**more: str) -> Bench:
        settings = storage.settings() | cloud.settings() | more
        sites.append(AzureDriver().connect("azure", settings))
        return Bench(storage, cloud, settings, sites[-1])

    yield connect
    for site in sites:
        site.close()


@pytest.fixture
def bench(connect: Callable[..., Bench]) -> Iterator[Bench]:
    made = connect()
    yield made
    made.site.failover.undo(made.id, 1)
    assert made.cloud.names() == []


def run(*words: str | Path, text: str = "") -> str:
    path = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    done = subprocess.run(words, input=text, text=True, capture_output=True, check=False, env=path, timeout=60)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def image_of(directory: Path, files: dict[str, str]) -> Path:
    """A disk with one partition that contains these files."""
    tree, part, image = directory / "tree", directory / "part", directory / "disk"
    for path, text in files.items():
        (tree / path.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
        (tree / path.lstrip("/")).write_text(text)
    image.write_bytes(bytes(SIZE))
    run("sfdisk", "-q", image, text=f"label: dos\nstart={START // 512},type=83\n")
    part.write_bytes(bytes(SIZE - START))
    run("mkfs.ext4", "-q", "-U", UUID, "-E", "root_owner=0:0,nodiscard", "-d", tree, part)
    _put(image, part)
    return image


def _put(image: Path, part: Path) -> None:
    with image.open("r+b") as file:
        file.seek(START)
        file.write(part.read_bytes())


def debugfs(image: Path, *requests: str) -> str:
    """Run debugfs requests that may change the image; returns the output."""
    return run("debugfs", "-w", "-f", "-", f"{image}?offset={START}", text="".join(f"{item}\n" for item in requests))


def content(image: Path, path: str) -> str:
    """The content of a file of the image."""
    return run("debugfs", "-R", f"cat {path}", f"{image}?offset={START}")


@pytest.fixture
def debian(tmp_path: Path) -> Path:
    """A system that names its root by a device, after a crash: a block is in the journal only."""
    image = image_of(
        tmp_path,
        {
            "/etc/fstab": FSTAB,
            "/boot/grub/grub.cfg": MENU,
            "/etc/systemd/network/50-lan.network": OWN,
            "/etc/journalled": "old" + "\n" * 4000,
        },
    )
    block = run("debugfs", "-R", "blocks /etc/journalled", f"{image}?offset={START}").split()[0]
    (tmp_path / "block").write_bytes(b"new" + b"\n" * 4093)
    debugfs(image, "sif /etc/fstab uid 12", "sif /etc/fstab mode 0100640", "ea_set /etc/fstab user.mine kept")
    debugfs(image, "jo", f"jw -b {block} {tmp_path / 'block'}", "jc")
    assert "needs_recovery" in run("dumpe2fs", "-h", f"{image}?offset={START}")
    assert content(image, "/etc/journalled").startswith("old")
    return image


def test_a_system_is_made_ready(bench: Bench, debian: Path, tmp_path: Path) -> None:
    bench.seal(debian)
    reported = bench.promote()
    assert reported == (
        "/etc/fstab: /dev/sda1 by UUID",
        "/boot/grub/grub.cfg: root by UUID, kernel console on the serial port",
        "/etc/systemd/network/00-asrcore-azure.network: DHCP on cards of Azure's hypervisor",
    )
    disk = bench.disk()
    assert content(disk, "/etc/fstab") == FSTAB.replace("/dev/sda1", f"UUID={UUID}")
    assert content(disk, "/boot/grub/grub.cfg").startswith(f"linux /vmlinuz root=UUID={UUID} ro quiet console=")
    assert "hv_netvsc" in content(disk, "/etc/systemd/network/00-asrcore-azure.network")
    assert content(disk, "/etc/systemd/network/50-lan.network") == OWN
    assert content(disk, "/etc/journalled").startswith("new"), "the journal is replayed"
    said = run("debugfs", "-R", "stat /etc/fstab", f"{disk}?offset={START}")
    assert "Mode:  0640" in said
    assert "User:    12" in said
    assert "kept" in run("debugfs", "-R", "ea_get /etc/fstab user.mine", f"{disk}?offset={START}")
    run("e2fsck", "-f", "-n", f"{disk}?offset={START}")
    assert bench.point() == debian.read_bytes(), "the point is unchanged"
    assert bench.promote() == reported, "a repeated call returns the same"


def test_a_test_is_made_ready_too(bench: Bench, debian: Path) -> None:
    bench.seal(debian)
    made = bench.site.failover.start_test(TestSpec("t", bench.id, "p", "asr-t"), Watch())
    assert len(made.repairs) == 3
    assert UUID in content(bench.disk(made.machine_id), "/etc/fstab")
    bench.site.failover.stop_test(bench.id, "t")
    assert bench.point() == debian.read_bytes()


def test_the_way_home_tells_the_repairs_as_changes(bench: Bench, debian: Path) -> None:
    """The stored digests are those of the repaired disk: the repairs are copied in the failback."""
    bench.seal(debian)
    bench.promote()
    request = ViewRequest(bench.id, "view", None)
    with bench.site.source.open_view([request], consistency=Consistency.CRASH, freeze_limit=5.0) as view:
        disk = view.machines[bench.id].disks["sda"]
        whole = Extent(0, SIZE)
        with bench.site.target.replica(bench.id).reader("sda") as home:
            differs = different_blocks(whole, disk.digests(whole), digests_of_reader(home, whole))
        here, point = bench.disk().read_bytes()[:SIZE], bench.point()
        assert differs
        assert all(here[item.offset : item.end] != point[item.offset : item.end] for item in differs)
        repaired = bytearray(point)
        for item in differs:
            repaired[item.offset : item.end] = here[item.offset : item.end]
        assert bytes(repaired) == here
    bench.site.source.keep_marks(bench.id, [])


def test_one_that_is_ready_is_the_point(bench: Bench, tmp_path: Path) -> None:
    files = {"/etc/fstab": f"UUID={UUID} / ext4\n", "/boot/grub/grub.cfg": "linux /v root=UUID=x console=ttyS0\n"}
    image = image_of(tmp_path, files)
    bench.seal(image)
    assert bench.promote() == ()
    assert bench.disk().read_bytes()[:SIZE] == image.read_bytes()


@pytest.mark.parametrize("settings", [{"repair": "off"}, {}])
def test_it_may_be_switched_off(connect: Callable[..., Bench], debian: Path, settings: dict[str, str]) -> None:
    bench = connect(**settings)
    bench.seal(debian, system="Debian 12" if settings else "Windows Server 2022")
    assert bench.promote() == ()
    assert bench.disk().read_bytes()[:SIZE] == debian.read_bytes()
    bench.site.failover.undo(bench.id, 1)


def _no_table(image: Path) -> str:
    with image.open("r+b") as file:
        file.write(bytes(512))
    return "no partition table"


def _swap(image: Path) -> str:
    part = image.with_name("swap")
    part.write_bytes(bytes(SIZE - START))
    run("mkswap", "-q", part)
    _put(image, part)
    return "0 partitions of its first disk are an ext root file system (the disk holds swap)"


def _broken(image: Path) -> str:
    """More damage than e2fsck repairs automatically."""
    debugfs(image, "jo", "jc", "clri /etc")
    return "root file system"


def _torn(image: Path) -> str:
    """The root is intact; the directory of the boot menu is damaged."""
    block = int(run("debugfs", "-R", "blocks /boot/grub", f"{image}?offset={START}").split()[0])
    size = int(re.findall(r"Block size: +(\d+)", run("dumpe2fs", "-h", f"{image}?offset={START}"))[0])
    with image.open("r+b") as file:
        file.seek(START + block * size)
        file.write(b"rubbish!" * (size // 8))
    return "e2fsck ended with 4"


def _beyond(image: Path) -> str:
    """A partition table with a partition beyond the end of the disk."""
    run("sfdisk", "-q", image, text=f"label: dos\nstart={START // 512},type=83\n")
    with image.open("r+b") as file:
        file.seek(446 + 12)
        file.write((SIZE // 512).to_bytes(4, "little"))
    return "beyond the end of the disk"


def _endless(image: Path) -> str:
    """A text file of a terabyte."""
    debugfs(image, f"sif /etc/fstab size {1 << 40}")
    return "0 partitions of its first disk are an ext root file system"


def _crowded(image: Path) -> str:
    (image.parent / "one").write_text("[Match]\n")
    words = [f"write {image.parent / 'one'} {number}.network" for number in range(250)]
    debugfs(image, "cd /etc/systemd/network", *words)
    return "more than 200 files"


@pytest.mark.parametrize("harm", [_no_table, _swap, _broken, _torn, _beyond, _endless, _crowded])
def test_what_is_not_understood_is_left(bench: Bench, debian: Path, harm: Callable[[Path], str]) -> None:
    why = harm(debian)
    bench.seal(debian)
    (reported,) = bench.promote()
    assert reported.startswith("the system was not changed: ")
    assert why in reported
    assert bench.disk().read_bytes()[:SIZE] == debian.read_bytes()


def test_without_room_for_a_copy(bench: Bench, debian: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_disk, "_SPARE", 1 << 60)
    bench.seal(debian)
    (reported,) = bench.promote()
    assert "no room" in reported
    assert bench.disk().read_bytes()[:SIZE] == debian.read_bytes()


def test_without_the_tools(bench: Bench, debian: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rootfs._PATH, "PATH", "/nowhere")
    bench.seal(debian)
    (reported,) = bench.promote()
    assert "is not installed where the engine runs" in reported
    assert bench.disk().read_bytes()[:SIZE] == debian.read_bytes()


def test_an_interrupted_one_begins_anew(
    bench: Bench, connect: Callable[..., Bench], debian: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed with repairs on the disk; meanwhile repairs were switched off: nothing of them is left."""
    bench.seal(debian)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("asr_driver_azure.blobs.digests.DigestTable.save", killed)
        with pytest.raises(KeyboardInterrupt):
            bench.promote()
    (unfinished,) = [item["name"] for item in bench.cloud.all("disks")]
    path = bench.cloud.content.path(f"disks/{unfinished}")
    assert UUID in content(path, "/etc/fstab")
    # As if a repair had been written where the point has no data: only the record shows that.
    place = 20 * MiB
    assert not any(debian.read_bytes()[place : place + MiB])
    name = repairs_blob(unfinished.removesuffix("-0"))
    found = bench.site.account.container.read(name)
    assert found is not None
    record = json.loads(found[0])
    assert record["extents"]
    bench.site.account.container.write(
        name, json.dumps(record | {"extents": [*record["extents"], [place, 65536]]}).encode()
    )
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"a repair")
    without = connect(container=bench.settings["container"], repair="off")
    without.id = bench.id
    assert without.promote() == ()
    assert bench.disk().read_bytes()[:SIZE] == debian.read_bytes()


def test_a_host_without_the_tools_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert AzureDriver().check_host() == []
    monkeypatch.setitem(rootfs._PATH, "PATH", "/nowhere")
    (finding,) = AzureDriver().check_host()
    assert "e2fsprogs fdisk util-linux" in finding.action
