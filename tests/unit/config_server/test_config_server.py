"""The configuration server over real TLS: access, permitted requests, and the life cycle of an identity."""

from __future__ import annotations

import json
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asrcore.config_server import web
from asrcore.config_server.api import make_app
from asrcore.config_server.web import WebServer
from asrcore.errors import (
    AlreadyExists,
    AsrError,
    CannotListen,
    CertificateExpired,
    InvalidValue,
    TokenRefused,
)
from asrcore.files import write_private
from asrcore.jobs import requested_by
from asrcore.pki import enrolment
from asrcore.pki.authority import Authority, keep_own
from asrcore.pki.enrolment import fetch_text
from asrcore.pki.request import make_request
from asrcore.units import DAY
from asrcore.vault import JobState
from asrcore.wire.carrier import Address
from asrcore.wire.tls import Component, Identity, Role
from tests import certificates
from tests.unit.rig import Rig


class Office:
    """A configuration server on loopback, its authority, and a protected machine `web` in the vault."""

    def __init__(self, rig: Rig, folder: Path) -> None:
        self.rig, self.folder = rig, folder
        self.vault = rig.engine.vault
        self.authority = Authority.create(folder / "ca", self.vault)
        own = folder / "config-server"
        issued = self.authority.issue(
            Component(Role.CONFIG_SERVER, "main"), make_request(enrolment.key_in(own)), ["127.0.0.1"]
        )
        enrolment.install(own, issued, "https://127.0.0.1")
        app = make_app(self.vault, self.authority, rig.clock)
        self.server = WebServer(app, Address("127.0.0.1", 0), Identity(own))
        self.server.start()
        self.url = f"https://{self.server.address}"

    def token(self, role: Role, name: str = "one") -> str:
        return enrolment.pack(self.authority.token(Component(role, name)), self.url)

    def join(self, role: Role, name: str = "one") -> Identity:
        directory = self.folder / f"{role.value}-{name}"
        enrolment.join(*enrolment.unpack(self.token(role, name)), directory)
        return Identity(directory)

    def get(self, identity: Identity, path: str) -> Any:
        return json.loads(fetch_text(identity, self.url, "GET", path))

    def post(self, identity: Identity, path: str, **body: object) -> Any:
        return json.loads(fetch_text(identity, self.url, "POST", path, body))


@pytest.fixture
def office(rig: Rig, tmp_path: Path) -> Iterator[Office]:
    rig.protect()
    made = Office(rig, tmp_path)
    yield made
    made.server.close()
    made.server.close()


# -- who is let in -----------------------------------------------------------------------------------------------------


def said_to(office: Office, identity: Identity | None) -> bytes:
    """The server's answer to a client that does not verify it; empty when it refuses the handshake."""
    if identity is None:
        context = ssl.create_default_context(cafile=office.folder / "ca" / "ca.pem")
        context.check_hostname = False
    else:
        context = identity.context(server=False)
        context.load_verify_locations(office.folder / "ca" / "ca.pem")
    address = office.server.address
    try:
        with (
            socket.create_connection((address.host, address.port), 10) as plain,
            context.wrap_socket(plain) as encrypted,
        ):
            encrypted.sendall(b"GET /v1/health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            return encrypted.recv(100)
    except (ssl.SSLError, ConnectionError):  # with TLS 1.3 the request may be sent before the refusal arrives
        return b""


def refusal(office: Office, identity: Identity) -> tuple[str, object]:
    """The error that a caller gets each time, and whose certificate it refers to."""
    reported = set()
    for _ in range(5):
        with pytest.raises(AsrError) as caught:
            office.get(identity, "/v1/health")
        reported.add((caught.value.code, caught.value.attributes.get("whose")))
    (found,) = reported
    return found


def test_who_talks_on_after_a_refusal_is_cut_off(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asrcore.pki.authority.LIFETIME", -1.0)
    context = office.join(Role.OPERATOR).context(server=False)
    address = office.server.address
    with socket.create_connection((address.host, address.port), 10) as plain:
        encrypted = context.wrap_socket(plain)
        with pytest.raises((ssl.SSLError, ConnectionError)):  # noqa: PT012 - which of them, the kernel decides
            for _ in range(1000):
                encrypted.sendall(bytes(64 * 1024))
        encrypted.close()


def test_who_is_let_in(office: Office) -> None:
    assert said_to(office, office.join(Role.AGENT)).startswith(b"HTTP/1.1 200")


def test_no_certificate(office: Office) -> None:
    assert said_to(office, None) == b""


def test_a_certificate_of_another_authority(office: Office, tmp_path: Path) -> None:
    certificates.Authority().issue(tmp_path / "stranger", "operator")
    stranger = Identity(tmp_path / "stranger")
    assert said_to(office, stranger) == b""
    (tmp_path / "stranger" / "ca.pem").write_text(office.authority.pem)  # this client trusts the server
    assert refusal(office, stranger) == ("certificate-unknown", "our")


def test_an_expired_certificate(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asrcore.pki.authority.LIFETIME", -1.0)
    expired = office.join(Role.OPERATOR)
    assert said_to(office, expired) == b""
    assert refusal(office, expired) == ("certificate-expired", "our")


def test_a_revoked_certificate_is_refused_at_once(office: Office) -> None:
    operator = office.join(Role.OPERATOR)
    assert office.get(operator, "/v1/machines")
    office.authority.revoke(Component(Role.OPERATOR, "one"))
    with pytest.raises(AsrError) as caught:
        office.get(operator, "/v1/machines")
    assert caught.value.code == "certificate-not-found"


def test_a_revocation_list_is_read_anew(office: Office) -> None:
    """A component that has fetched it refuses the revoked one in the handshake."""
    operator, other = office.join(Role.OPERATOR), office.join(Role.OPERATOR, "two")
    office.authority.revoke(Component(Role.OPERATOR, "one"))
    write_private(office.folder / "config-server" / "crl.pem", office.authority.revoked(), 0o644)
    assert said_to(office, operator) == b""
    assert refusal(office, operator) == ("certificate-revoked", "our")
    assert said_to(office, other).startswith(b"HTTP/1.1 200")


def test_a_token_is_good_for_joining_and_nothing_else(office: Office) -> None:
    token, url = enrolment.unpack(office.token(Role.OPERATOR))
    folder = office.folder / "token"
    folder.mkdir()
    for name, text in (("certificate.pem", token.certificate), ("key.pem", token.key), ("ca.pem", token.authority)):
        write_private(folder / name, text)
    identity = Identity(folder)
    for method, path in (
        ("GET", "/v1/health"),
        ("GET", "/v1/machines"),
        ("GET", "/metrics"),
        ("POST", "/v1/renew"),
        ("POST", "/v1/machines/web/jobs"),
    ):
        with pytest.raises(AsrError) as caught:
            fetch_text(identity, url, method, path, {} if method == "POST" else None)
        assert caught.value.code == "certificate-role", path


ROLES = [Role.PROCESS_SERVER, Role.MASTER_TARGET, Role.AGENT]


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.value)
def test_a_component_may_not_do_what_people_do(role: Role, office: Office) -> None:
    identity = office.join(role)
    assert office.get(identity, "/v1/health")["vault"] == "ok"
    for method, path in (
        ("GET", "/v1/machines"),
        ("GET", "/v1/jobs"),
        ("GET", "/metrics"),
        ("POST", "/v1/machines/web/jobs"),
        ("POST", "/v1/join"),
    ):
        with pytest.raises(AsrError) as caught:
            fetch_text(identity, office.url, method, path, {} if method == "POST" else None)
        assert caught.value.code == "certificate-role", path


def test_another_component_that_answers_is_not_trusted(office: Office) -> None:
    """A process server's certificate is valid, but it is not the configuration server."""
    imposter = office.join(Role.PROCESS_SERVER)
    app = make_app(office.vault, office.authority)
    with WebServer(app, Address("127.0.0.1", 0), imposter) as server:
        operator = office.join(Role.OPERATOR)
        with pytest.raises(AsrError) as caught:
            fetch_text(operator, f"https://{server.address}", "GET", "/v1/health")
    assert caught.value.code == "certificate-role"


# -- an identity's life ------------------------------------------------------------------------------------------------


def test_joining_is_resumed_after_a_crash(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    token, url = enrolment.unpack(office.token(Role.PROCESS_SERVER))
    directory = office.folder / "joined"
    with monkeypatch.context() as patch:
        patch.setattr(enrolment, "install", lambda *_: 1 // 0)  # the certificate is issued, and lost with the process
        with pytest.raises(ZeroDivisionError):
            enrolment.join(token, url, directory)
    assert str(enrolment.join(token, url, directory)) == "process-server one"
    assert {item.name for item in directory.iterdir()} == {
        "certificate.pem",
        "key.pem",
        "ca.pem",
        "crl.pem",
        "config-server",
    }
    assert (directory / "key.pem").stat().st_mode & 0o777 == 0o600
    with pytest.raises(AlreadyExists):
        enrolment.join(token, url, directory)
    with pytest.raises(TokenRefused, match="already used"):
        enrolment.join(token, url, office.folder / "thief")


def test_renewal_comes_before_the_end(office: Office) -> None:
    identity = office.join(Role.PROCESS_SERVER)
    former = (identity.directory / "certificate.pem").read_text()
    expires = enrolment.renew(identity.directory).expires_at
    assert (identity.directory / "certificate.pem").read_text() == former
    done = enrolment.renew(identity.directory, now=expires - 20 * 86400)
    assert done.certificate
    assert (identity.directory / "certificate.pem").read_text() != former
    assert office.get(identity, "/v1/health")
    assert enrolment.renew(identity.directory, force=True).expires_at >= done.expires_at
    assert enrolment.renew(identity.directory, now=expires - 95 * 86400).certificate, "it was issued in the future"


def test_a_renewal_fetches_what_was_revoked(office: Office) -> None:
    identity = office.join(Role.PROCESS_SERVER)
    former = (identity.directory / "crl.pem").read_text()
    office.join(Role.AGENT)
    office.authority.revoke(Component(Role.AGENT, "one"))
    assert not enrolment.renew(identity.directory).certificate
    assert (identity.directory / "crl.pem").read_text() != former


def test_a_component_that_was_off_for_long_gets_back_in(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its revocation list is too old: it trusts no peer, but it can fetch a new list."""
    with monkeypatch.context() as patch:
        patch.setattr("asrcore.pki.issuer.LIST_LIFETIME", -1.0)
        identity = office.join(Role.PROCESS_SERVER)
    with pytest.raises(CertificateExpired):
        office.get(identity, "/v1/health")
    assert not enrolment.renew(identity.directory).certificate
    assert office.get(identity, "/v1/health")


def test_a_server_that_was_off_for_long_opens_again(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    own, agent = office.folder / "config-server", office.join(Role.AGENT)
    with monkeypatch.context() as patch:
        patch.setattr("asrcore.pki.issuer.LIST_LIFETIME", -1.0)
        keep_own(own, office.authority)
    assert said_to(office, agent) == b""
    keep_own(own, office.authority)
    assert said_to(office, agent).startswith(b"HTTP/1.1 200")


def test_the_server_renews_its_own(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    own = office.folder / "config-server"
    former = (own / "certificate.pem").read_text()
    keep_own(own, office.authority)
    assert (own / "certificate.pem").read_text() == former
    monkeypatch.setattr("asrcore.pki.authority.LIFETIME", 400 * DAY)  # as if a third of its lifetime were left
    keep_own(own, office.authority)
    assert (own / "certificate.pem").read_text() != former
    identity, address = office.join(Role.OPERATOR), office.server.address
    with (
        socket.create_connection((address.host, address.port), 10) as plain,
        identity.context(server=False).wrap_socket(plain) as encrypted,
    ):
        shown = encrypted.getpeercert(binary_form=True)
    assert shown is not None
    assert ssl.DER_cert_to_PEM_cert(shown).strip() == (own / "certificate.pem").read_text().strip()


def test_a_token_that_is_none_is_reported_and_not_shown() -> None:
    for text in ("", "x", "aGFsbG8=", "e30="):
        with pytest.raises(InvalidValue) as caught:
            enrolment.unpack(text)
        assert "(not shown)" in str(caught.value)


# -- the API -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def operator(office: Office) -> Identity:
    return office.join(Role.OPERATOR, "ann")


def test_what_people_see(office: Office, operator: Identity) -> None:
    (machine,) = office.get(operator, "/v1/machines")
    assert (machine["machine"], machine["state"]) == ("web", "protected")
    assert [item["id"] for item in office.get(operator, "/v1/machines/web/points")] == [
        office.vault.protection("web").head_point
    ]
    assert office.get(operator, "/v1/servers") == []
    assert office.get(operator, "/v1/jobs") == []
    assert isinstance(office.get(operator, "/v1/events?limit=5"), list)


def test_a_verb_becomes_a_job_with_a_name_in_the_log(office: Office, operator: Identity) -> None:
    job = office.post(operator, "/v1/machines/web/jobs", verb="failover-test", point="latest", network="lab")
    assert (job["kind"], job["state"]) == ("failover-test", "queued")
    assert office.get(operator, f"/v1/jobs/{job['id']}")["machine"] == "web"
    assert json.loads(office.vault.job(job["id"]).arguments)["arguments"]["network"] == "lab"
    assert requested_by(office.vault.job(job["id"])) == "operator ann"
    (event,) = office.vault.events(kinds=["order"])
    assert event.text.startswith("operator ann requested failover-test")
    assert office.post(operator, f"/v1/jobs/{job['id']}/cancel") == {"asked": True}
    assert office.vault.cancel_requested(job["id"])
    office.vault.update_job(job["id"], state=JobState.DONE)
    assert office.post(operator, f"/v1/jobs/{job['id']}/cancel") == {"asked": False}


@pytest.mark.parametrize(
    ("path", "body", "code"),
    [
        ("/v1/machines/none/jobs", {"verb": "verify"}, "not-found"),
        ("/v1/machines/web/jobs", {}, "invalid-value"),
        ("/v1/machines/web/jobs", {"verb": "explode"}, "invalid-value"),
        ("/v1/machines/web/jobs", {"verb": "verify", "repair": "yes"}, "invalid-value"),
        ("/v1/machines/web/jobs", {"verb": "verify", "colour": "red"}, "invalid-value"),
        ("/v1/machines/web/jobs", {"verb": "failover-commit"}, "wrong-state"),
        ("/v1/machines/web/jobs", {"verb": "verify", "point": "x" * 70_000}, "request-refused"),
        ("/v1/jobs/none/cancel", {}, "not-found"),
        ("/v1/nothing", {}, "not-found"),
        ("/v1/machines", {}, "not-found"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_bad_requests_change_nothing(
    path: str, body: dict[str, object], code: str, office: Office, operator: Identity
) -> None:
    with pytest.raises(AsrError) as caught:
        office.post(operator, path, **body)
    assert caught.value.code == code
    assert caught.value.action_text
    assert office.vault.jobs() == []


def test_a_body_that_is_too_large_is_refused_before_it_arrives(office: Office, operator: Identity) -> None:
    context = operator.context(server=False)
    address = office.server.address
    for size in (99999999999999999999, 10**6):
        with (
            socket.create_connection((address.host, address.port), 10) as plain,
            context.wrap_socket(plain) as encrypted,
        ):
            head = f"POST /v1/machines/web/jobs HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n"
            encrypted.sendall(head.encode())
            assert b" 403 " in encrypted.recv(100)


def test_metrics(office: Office, operator: Identity) -> None:
    office.vault.join("ps1", "s1", host="h", sites=None, lease=60.0)
    text = fetch_text(operator, office.url, "GET", "/metrics")
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(lines['asr_machine_rpo_seconds{machine="web"}']) >= 0
    assert lines['asr_machine_cycles_total{machine="web"}'] == "1.0"
    assert lines['asr_machine_state{machine="web",state="protected"}'] == "1.0"
    assert float(lines['asr_machine_last_cycle_sent_bytes{machine="web"}']) > 0
    assert lines['asr_server_up{server="ps1"}'] == "1.0"
    assert {"asr_machine_health", "asr_machine_churn_bytes_per_second", "asr_machine_lag_seconds", "asr_jobs"} <= {
        name.partition("{")[0] for name in lines
    }
    for line in text.splitlines():
        assert not line or line.startswith("#") or line.rpartition(" ")[2], line


def test_many_at_once(office: Office, operator: Identity) -> None:
    done: list[int] = []
    threads = [
        threading.Thread(target=lambda: done.append(len(office.get(operator, "/v1/machines")))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert done == [1] * 8


def test_an_address_that_is_taken_is_reported(office: Office) -> None:
    app = make_app(office.vault, office.authority)
    again = web.WebServer(app, office.server.address, Identity(office.folder / "config-server"))
    with pytest.raises(CannotListen, match="already in use"):
        again.start()
    again.close()
