"""NBD over TCP with TLS, with real servers and certificates made by the tests."""

import datetime
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from asr_storage.nbd.client import NbdClient, NbdError, NbdTimeout, TlsFiles
from asr_storage.qemu import img
from asr_storage.qemu.nbd_server import QemuNbd
from asrcore.units import MiB
from drivers.storage.tests.nbdkit import Nbdkit, free_port


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    img.create(path, 16 * MiB, "qcow2")
    return path


def make_ca(directory: Path, name: str) -> Path:
    """A certificate authority: NAME.pem and NAME-key.pem."""
    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2", "-subj", f"/CN={name}"]
    out: list[str | Path] = ["-keyout", directory / f"{name}-key.pem", "-out", directory / f"{name}.pem"]
    usage = ["-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign,cRLSign"]
    subprocess.run(["openssl", "req", "-x509", *new, *out, *usage], check=True, capture_output=True)
    return directory / f"{name}.pem"


def make_leaf(ca: Path, directory: Path, role: str, names: str, *, trusts: Path, days: int = 2) -> Path:
    """DIRECTORY with ROLE-cert.pem signed by CA, its key, and TRUSTS as ca-cert.pem."""
    directory.mkdir()
    shutil.copy(trusts, directory / "ca-cert.pem")
    key, request, extension = directory / f"{role}-key.pem", directory / "request", directory / "extension"
    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={directory.name}"]
    subprocess.run(["openssl", "req", *new, "-keyout", key, "-out", request], check=True, capture_output=True)
    extension.write_text(
        f"subjectAltName={names}\nbasicConstraints=CA:FALSE\nkeyUsage=digitalSignature\n"
        "extendedKeyUsage=serverAuth,clientAuth\n"
    )
    signer: list[str | Path] = [
        "-CA",
        ca,
        "-CAkey",
        ca.with_name(f"{ca.stem}-key.pem"),
        "-CAcreateserial",
        "-days",
        str(days),
    ]
    out: list[str | Path] = ["-extfile", extension, "-out", directory / f"{role}-cert.pem"]
    subprocess.run(["openssl", "x509", "-req", "-in", request, *signer, *out], check=True, capture_output=True)
    return directory


def revoke(ca: Path, revoked: Path, directory: Path) -> None:
    """A revocation list with one certificate, where QEMU expects it."""
    authority = x509.load_pem_x509_certificate(ca.read_bytes())
    key = load_pem_private_key(ca.with_name(f"{ca.stem}-key.pem").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    serial = x509.load_pem_x509_certificate(revoked.read_bytes()).serial_number
    now = datetime.datetime.now(datetime.UTC)
    entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()
    builder = x509.CertificateRevocationListBuilder(authority.subject, now, now + datetime.timedelta(days=2))
    builder = builder.add_revoked_certificate(entry).add_extension(x509.CRLNumber(1), critical=False)
    (directory / "ca-crl.pem").write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pki")
    ours, other = make_ca(directory, "ours"), make_ca(directory, "other")
    make_leaf(ours, directory / "server", "server", "DNS:localhost,IP:127.0.0.1", trusts=ours)
    make_leaf(ours, directory / "elsewhere", "server", "DNS:elsewhere.example", trusts=ours)
    make_leaf(ours, directory / "client", "client", "DNS:site-a", trusts=ours)
    make_leaf(ours, directory / "misled", "client", "DNS:site-a", trusts=other)
    make_leaf(other, directory / "stranger", "client", "DNS:site-a", trusts=ours)
    make_leaf(ours, directory / "expired", "client", "DNS:site-a", trusts=ours, days=-1)
    make_leaf(ours, directory / "revoked", "client", "DNS:site-a", trusts=ours)
    revoke(ours, directory / "revoked" / "client-cert.pem", directory / "server")
    (directory / "nobody").mkdir()
    shutil.copy(ours, directory / "nobody" / "ca-cert.pem")
    return directory


@contextmanager
def tls_server(image: Path, certificates: Path) -> Iterator[int]:
    """qemu-nbd on TCP, its clients' certificates verified; yields the port."""
    port = free_port()
    credentials = f"tls-creds-x509,id=t,endpoint=server,dir={certificates},verify-peer=yes"
    tls = ["--object", credentials, "--tls-creds", "t"]
    listen = ["--bind=127.0.0.1", f"--port={port}", "--persistent", "--shared=0"]
    with subprocess.Popen(
        ["qemu-nbd", *tls, *listen, "-r", "-f", "qcow2", image], stderr=subprocess.DEVNULL
    ) as process:
        try:
            for _ in range(200):
                with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                    break
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.02)
                    pytest.fail("qemu-nbd did not start")
            yield port
        finally:
            process.kill()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_tls_reads(image: Path, pki: Path, host: str) -> None:
    with QemuNbd(image, "qcow2", writable=True) as server, server.connect() as client:
        client.write(b"secret" * 500_000, 0)
    with (
        tls_server(image, pki / "server") as port,
        NbdClient.connect_tcp(host, port, "", tls=TlsFiles(pki / "client")) as client,
    ):
        back = bytearray(3_000_000)
        client.read_into(back, 0)
        assert back == b"secret" * 500_000


@pytest.mark.parametrize(
    ("server_files", "client_files"),
    [
        pytest.param("server", "misled", id="server-of-another-ca"),
        pytest.param("elsewhere", "client", id="server-of-another-name"),
        pytest.param("server", "stranger", id="client-of-another-ca"),
        pytest.param("server", "expired", id="client-expired"),
        pytest.param("server", "revoked", id="client-revoked"),
        pytest.param("server", "nobody", id="client-without-certificate"),
        pytest.param("server", None, id="client-without-tls"),
        pytest.param("server", "nowhere", id="certificates-missing"),
    ],
)
def test_tls_refuses(image: Path, pki: Path, server_files: str, client_files: str | None) -> None:
    tls = None if client_files is None else TlsFiles(pki / client_files)
    with tls_server(image, pki / server_files) as port, pytest.raises(NbdError) as caught:
        NbdClient.connect_tcp("localhost", port, "", tls=tls, timeout=5).close()
    assert not isinstance(caught.value, NbdTimeout)


def test_tls_is_never_given_up_for_a_server_without_it(pki: Path, tmp_path: Path) -> None:
    with Nbdkit.run("tcp", tmp_path, "memory", "1M") as server:
        with pytest.raises(NbdError, match="TLS"):
            server.connect(5, TlsFiles(pki / "client"))
        with server.connect(5) as client:
            assert client.size == MiB
