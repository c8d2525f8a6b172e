"""Frozen disks read over TLS, with certificates made here."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab import Lab

pytestmark = pytest.mark.system


def openssl(*words: str | Path) -> None:
    subprocess.run(["openssl", *words], check=True, capture_output=True)


def certify(ca: Path, directory: Path, role: str, names: str) -> None:
    """ROLE's key and certificate, and ca-cert.pem, in a directory."""
    directory.mkdir(parents=True)
    shutil.copy(ca / "ca-cert.pem", directory)
    request, extension = directory / "request", directory / "extension"
    extension.write_text(f"subjectAltName={names}\nextendedKeyUsage=serverAuth,clientAuth\n")
    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={role}"]
    openssl("req", *new, "-keyout", directory / f"{role}-key.pem", "-out", request)
    signer: list[str | Path] = ["-CA", ca / "ca-cert.pem", "-CAkey", ca / "ca-key.pem", "-CAcreateserial", "-days", "2"]
    out: list[str | Path] = ["-extfile", extension, "-out", directory / f"{role}-cert.pem"]
    openssl("x509", "-req", "-in", request, *signer, *out)


@pytest.fixture(scope="module")
def clients(lab: Lab, tmp_path_factory: pytest.TempPathFactory, restart_libvirtd: Callable[[], None]) -> Iterator[Path]:
    """Directories `client` (signed by the server's authority) and `stranger` (by another authority)."""
    made = tmp_path_factory.mktemp("pki")
    for name in ("ours", "other"):
        (made / name).mkdir()
        new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2", "-subj", f"/CN={name}"]
        usage = ["-addext", "keyUsage=critical,keyCertSign"]
        out: list[str | Path] = ["-keyout", made / name / "ca-key.pem", "-out", made / name / "ca-cert.pem"]
        openssl("req", "-x509", *new, *usage, *out)
    certify(made / "ours", made / "server", "server", "IP:10.77.0.1")
    certify(made / "ours", made / "client", "client", "DNS:engine")
    certify(made / "other", made / "stranger", "client", "DNS:engine")
    shutil.copy(made / "ours" / "ca-cert.pem", made / "stranger")
    conf = lab.sites["a"].disk_dir / "etc" / "qemu.conf"
    before = conf.read_text()
    conf.write_text(f'{before}\nbackup_tls_x509_cert_dir = "{made}/server"\nbackup_tls_x509_verify = 1\n')
    restart_libvirtd()
    yield made
    conf.write_text(before)
    restart_libvirtd()


def test_disks_are_read_over_tls_by_whom_the_host_trusts(
    lab: Lab, start: Callable[[str], None], clients: Path, engines: Callable[..., Any]
) -> None:
    lab.define_guest("a", "bios-direct", "secret", rate=5)
    start("secret")
    machine = lab.sites["a"].virsh("domuuid", "secret").stdout.strip()
    settings = {"uri": "qemu+tcp://10.77.0.1/system", "nbd_tls": f"{clients}/client"}
    engine = engines("b", **settings)
    engine.open(machine=machine, view="tls")
    assert "tls='yes'" in lab.sites["a"].virsh("backup-dumpxml", "secret").stdout
    content = engine.hash(view="tls", disk="vda")
    assert "nbd-in-the-clear" not in {code for _, code, *_ in engine.findings(machine=machine)}
    engine.kill()
    again = engines("b", **settings)
    again.open(machine=machine, view="tls")
    assert again.hash(view="tls", disk="vda") == content
    again.kill()
    stranger = engines("b", **settings | {"nbd_tls": f"{clients}/stranger"})
    stranger.open(machine=machine, view="tls")
    with pytest.raises(Exception, match=r"site-unreachable|access-denied"):
        stranger.hash(view="tls", disk="vda")
    stranger.keep(machine=machine, marks=[])
    lab.sites["a"].virsh("destroy", "secret")
