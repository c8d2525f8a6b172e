"""The binding behaves as the driver expects, checked with the test driver in libvirt's client library.

The test driver has no backups, block jobs, guest agent or streams: the tests on real hosts cover those calls.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar, get_args, get_origin, get_type_hints

import libvirt
import pytest

from asr_driver_libvirt.host.connection import LibvirtHost
from asr_driver_libvirt.host.nvram import NvramReader
from asr_driver_libvirt.settings import SiteSettings
from asrcore.errors import AccessDenied

STUB = Path(__file__).parent.parent / "stubs/libvirt.pyi"
NVRAM = "/images/web.fd"
HOST = f"""<node>
<domain type='test'>
  <name>web</name><memory>1024</memory><os><type>hvm</type></os>
  <devices><disk type='file'><source file='/images/web'/><target dev='vda'/></disk></devices>
</domain>
<network><name>lan</name></network>
<pool type='dir'>
  <name>images</name><target><path>/images</path></target>
  <volume><name>web.fd</name><capacity>1000</capacity><target><path>{NVRAM}</path></target></volume>
</pool>
</node>"""
CHECKPOINT = "<domaincheckpoint><name>first</name></domaincheckpoint>"

P = ParamSpec("P")
R = TypeVar("R")


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """A connection to a new host with one domain, one network and one pool."""
    file = tmp_path / "host.xml"
    file.write_text(HOST)
    return f"test://{file}"


@pytest.fixture
def conn(uri: str) -> Iterator[libvirt.virConnect]:
    connection = libvirt.open(uri)
    yield connection
    connection.close()


@pytest.fixture
def no_keepalive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets LibvirtHost connect: the test driver has no link to keep alive."""
    monkeypatch.setattr(libvirt.virConnect, "setKeepAlive", lambda *_: 0)


@functools.cache
def stub() -> dict[str, object]:
    """The names in the stub."""
    names: dict[str, object] = {}
    # An annotation may name a class that comes later.
    exec("from __future__ import annotations\n" + STUB.read_text(), names)
    return names


def called(call: Callable[P, R], *arguments: P.args, **options: P.kwargs) -> R:
    """Call it, and compare the result with the stub's annotation."""
    owner, _, method = call.__qualname__.rpartition(".")
    declared = getattr(stub()[owner], method) if owner else stub()[method]
    assert isinstance(declared, types.FunctionType)
    hint = get_type_hints(declared, stub())["return"]
    value = call(*arguments, **options)
    assert fits(value, hint), f"{call.__qualname__} is declared as {hint} and returned {value!r}"
    return value


def fits(value: object, hint: object) -> bool:
    kinds = get_args(hint)
    if isinstance(hint, types.UnionType):
        return any(fits(value, kind) for kind in kinds)
    if get_origin(hint) is list:
        return isinstance(value, list) and all(fits(item, kinds[0]) for item in value)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(fits, value, kinds))
    assert isinstance(hint, type)
    return type(value).__name__ == hint.__name__  # the stub's classes are not the binding's


def test_hosts_and_networks(conn: libvirt.virConnect) -> None:
    assert called(conn.isAlive) == 1
    assert called(conn.getLibVersion) >= 9_000_000
    called(conn.getVersion)
    called(conn.getHostname)
    assert [network.name() for network in called(conn.listAllNetworks)] == ["lan"]
    network = called(conn.networkCreateXML, "<network><name>dmz</name></network>")
    assert called(called(conn.networkLookupByName, "dmz").name) == "dmz"
    called(network.destroy)


def test_domains(conn: libvirt.virConnect) -> None:
    (domain,) = called(conn.listAllDomains)
    called(domain.shutdown)
    assert called(domain.state) == [libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN]
    called(domain.create)
    assert (called(domain.isActive), called(domain.isPersistent)) == (1, 1)
    assert called(called(conn.lookupByName, "web").name) == "web"
    assert called(domain.UUID).hex() == called(domain.UUIDString).replace("-", "")
    assert called(called(conn.lookupByUUIDString, domain.UUIDString()).ID) == domain.ID()
    assert "<source file='/images/web'/>" in called(domain.XMLDesc, libvirt.VIR_DOMAIN_XML_INACTIVE)
    assert len(called(domain.blockInfo, "vda")) == 3
    called(domain.setAutostart, 1)
    assert called(domain.autostart) == 1
    assert (called(domain.snapshotNum), called(domain.hasManagedSaveImage)) == (0, 0)
    called(domain.fsFreeze)
    called(domain.fsThaw)
    called(domain.destroy)
    called(domain.createWithFlags)
    domain.destroy()
    xml = domain.XMLDesc()
    called(domain.undefineFlags, libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE)
    assert called(conn.defineXML, xml).name() == "web"


def test_metadata_is_removed_by_none(conn: libvirt.virConnect) -> None:
    (domain,) = conn.listAllDomains()
    kind, uri, flags = libvirt.VIR_DOMAIN_METADATA_ELEMENT, "urn:asr", libvirt.VIR_DOMAIN_AFFECT_CONFIG
    called(domain.setMetadata, kind, "<mark/>", "asr", uri, flags)
    assert called(domain.metadata, kind, uri, flags) == "<mark/>"
    called(domain.setMetadata, kind, None, None, uri, flags)
    with pytest.raises(libvirt.libvirtError) as caught:
        domain.metadata(kind, uri, flags)
    assert called(caught.value.get_error_code) == libvirt.VIR_ERR_NO_DOMAIN_METADATA
    assert "metadata" in (called(caught.value.get_error_message) or "")
    assert fits(caught.value.err, get_type_hints(stub()["libvirtError"], stub())["err"])


def test_an_error_of_the_binding_itself_has_neither_code_nor_text() -> None:
    error = libvirt.libvirtError("no connection")
    error.err = None
    assert (called(error.get_error_code), called(error.get_error_message)) == (None, None)


def test_checkpoints(conn: libvirt.virConnect) -> None:
    (domain,) = conn.listAllDomains()
    checkpoint = called(domain.checkpointCreateXML, CHECKPOINT)
    assert called(called(domain.checkpointLookupByName, "first").getName) == "first"
    assert len(called(domain.listAllCheckpoints)) == 1
    assert "bitmap='first'" in called(checkpoint.getXMLDesc, libvirt.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN)
    called(checkpoint.delete)


def test_storage(conn: libvirt.virConnect) -> None:
    volume = called(conn.storageVolLookupByPath, NVRAM)
    assert (called(volume.name), called(volume.path)) == ("web.fd", NVRAM)
    assert "<capacity unit='bytes'>1000</capacity>" in called(volume.XMLDesc)
    called(volume.delete)
    xml = "<pool type='dir'><name>scratch</name><target><path>/scratch</path></target></pool>"
    pool = called(conn.storagePoolCreateXML, xml)
    called(pool.refresh)
    assert called(pool.listAllVolumes) == []
    called(pool.destroy)


def ask_for_password(uri: str) -> None:
    """Make the host require a password from now on."""
    file = Path(uri.removeprefix("test://"))
    file.write_text(HOST.replace("<node>", "<node><auth><user password='secret'>admin</user></auth>"))


def test_a_start_is_heard(uri: str, no_keepalive: None) -> None:
    with LibvirtHost("a", SiteSettings(uri)) as host:
        (domain,) = host.conn().listAllDomains()
        machine_id, lifecycle = domain.UUIDString(), host.lifecycle
        before = lifecycle.stamp(machine_id)
        domain.destroy()
        domain.create()
        assert lifecycle.wait(lambda: lifecycle.stamp(machine_id) != before, 20)


def test_a_host_gets_the_credentials_it_asks_for(uri: str, no_keepalive: None) -> None:
    ask_for_password(uri)
    with LibvirtHost("a", SiteSettings(uri, user="admin", password="secret")) as host:
        assert host.conn().isAlive()
    for user, password in (("admin", "guess"), ("admin", ""), ("", "")):
        with LibvirtHost("a", SiteSettings(uri, user=user, password=password)) as host, pytest.raises(AccessDenied):
            host.conn()


def test_credentials_are_what_the_stub_says(uri: str) -> None:
    asked: list[object] = []

    def answer(credentials: tuple[list[int | str | None], ...], _: None) -> int:
        asked.append(credentials)
        return -1

    ask_for_password(uri)
    with pytest.raises(libvirt.libvirtError):
        libvirt.openAuth(uri, [[libvirt.VIR_CRED_AUTHNAME, libvirt.VIR_CRED_PASSPHRASE], answer, None])
    (credentials,) = asked
    assert isinstance(credentials, tuple)
    assert all(fits(credential, stub()["_Credential"]) for credential in credentials)
    assert len(credentials) > 0


def test_uefi_variables_that_are_too_large_are_not_read(
    uri: str, no_keepalive: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    aborted = []

    def abort(stream: libvirt.virStream) -> None:
        aborted.append(stream)

    monkeypatch.setattr(libvirt.virStorageVol, "download", lambda *_: 0)
    monkeypatch.setattr(libvirt.virStream, "recv", lambda _, size: bytes(size))  # endless
    monkeypatch.setattr(libvirt.virStream, "abort", abort)
    with LibvirtHost("a", SiteSettings(uri)) as host:
        assert NvramReader(host).read(NVRAM) is None
    assert "more than 67108864 bytes" in caplog.text
    assert len(aborted) == 1
