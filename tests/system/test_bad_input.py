"""Bad input at the command line: a catalogued error, the exit code of its class, and nothing changed."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import Lab
from tests.system.asr_cli import AsrCli, AsrFailed
from tests.system.rig import wait_for

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

USAGE, NOT_FOUND, CONFLICT, REFUSED, UNREACHABLE, ACCESS, VAULT = 2, 3, 4, 5, 6, 7, 10

POLICY = ("policy", "create")
SITE = ("site", "add", "c", "--driver", "libvirt", "--set")
PROTECT = ("protect", "nobody", "--from", "a", "--to", "b", "--policy")

CASES = {
    "interval is no duration": ((*POLICY, "x", "--interval", "banana"), "invalid-value", USAGE),
    "interval below the least": ((*POLICY, "x", "--interval", "1s"), "invalid-value", USAGE),
    "negative interval": ((*POLICY, "x", "--interval=-5s"), "invalid-value", USAGE),
    "endless interval": ((*POLICY, "x", "--interval", "9" * 400), "invalid-value", USAGE),
    "keep below interval": ((*POLICY, "x", "--keep", "1s"), "invalid-value", USAGE),
    "window of no day": ((*POLICY, "x", "--resync-window", "25:00-26:00"), "invalid-value", USAGE),
    "unknown consistency": ((*POLICY, "x", "--consistency", "perhaps"), "invalid-value", USAGE),
    "threshold beyond all": ((*POLICY, "x", "--resync-threshold", "7"), "invalid-value", USAGE),
    "nameless policy": ((*POLICY, ""), "invalid-value", USAGE),
    "policy's name with a line break": ((*POLICY, "x\ny"), "invalid-value", USAGE),
    "same policy twice": ((*POLICY, "gold"), "already-exists", CONFLICT),
    "unknown policy": (("policy", "show", "nothing"), "not-found", NOT_FOUND),
    "unknown driver": (("site", "add", "c", "--driver", "nope"), "driver-not-found", NOT_FOUND),
    "uri missing": (("site", "add", "c", "--driver", "libvirt"), "invalid-setting", USAGE),
    "uri of something else": ((*SITE, "uri=http://host/"), "invalid-setting", USAGE),
    "uri is no uri": ((*SITE, "uri=://[::"), "invalid-setting", USAGE),
    "setting without a value": ((*SITE, "nonsense"), "invalid-value", USAGE),
    "unknown setting": ((*SITE, "uri=qemu:///system", "--set", "color=red"), "invalid-setting", USAGE),
    "relative replica_dir": ((*SITE, "uri=qemu:///system", "--set", "replica_dir=x"), "invalid-setting", USAGE),
    "nbd without a port": ((*SITE, "uri=qemu:///system", "--set", "nbd=tcp::99999"), "invalid-setting", USAGE),
    "same site twice": (("site", "add", "a", "--driver", "libvirt"), "already-exists", CONFLICT),
    "unreachable host": ((*SITE, "uri=qemu+tcp://10.77.0.77/system"), "site-unreachable", UNREACHABLE),
    "nothing listens": ((*SITE, "uri=qemu+tcp://10.77.0.1:9/system"), "site-unreachable", UNREACHABLE),
    "no such socket": ((*SITE, "uri=qemu+unix:///system?socket=/nowhere"), "site-unreachable", UNREACHABLE),
    "unknown site": (("site", "machines", "nowhere"), "not-found", NOT_FOUND),
    "unknown machine": ((*PROTECT, "gold"), "machine-not-found", NOT_FOUND),
    "unknown policy to protect by": ((*PROTECT, "silver"), "not-found", NOT_FOUND),
    "unprotected machine": (("failover", "test", "nobody"), "not-found", NOT_FOUND),
    "commit of nothing": (("failover", "commit", "nobody"), "not-found", NOT_FOUND),
    "timeout is no duration": (("failover", "planned", "nobody", "--timeout", "soon"), "invalid-value", USAGE),
    "network mapped to nothing": ((*PROTECT, "gold", "--network", "lab="), "invalid-value", USAGE),
    "unknown job": (("job", "show", "nothing"), "not-found", NOT_FOUND),
}


@pytest.fixture(scope="module")
def asr(lab: Lab) -> Iterator[AsrCli]:
    asr = AsrCli(lab, vault="/srv/asr-input/vault.db")
    asr.init()
    asr("policy", "create", "gold")
    yield asr
    asr.kill_service()


def place(asr: AsrCli, path: str = "") -> Path:
    """The host's path to a file of the command's site; by default the vault."""
    return asr.lab.sites["b"].disk_dir / (path or asr.vault).lstrip("/")


def records(vault: Path) -> str:
    """The whole content of a vault."""
    connection = sqlite3.connect(f"file:{vault}?mode=ro", uri=True)
    try:
        return "\n".join(connection.iterdump())
    finally:
        connection.close()


def failing(asr: AsrCli, *words: str) -> AsrFailed:
    """Run a verb that must fail; it also prints the error for people."""
    with pytest.raises(AsrFailed) as failed:
        asr(*words)
    return failed.value


@pytest.mark.parametrize("case", CASES)
def test_refused_with_its_code_and_nothing_changed(asr: AsrCli, case: str) -> None:
    words, code, exit_code = CASES[case]
    before = records(place(asr))
    failed = failing(asr, *words)
    assert failed.error is not None, failed
    assert (failed.error["code"], failed.exit_code) == (code, exit_code)
    assert all(str(failed.error[part]).strip() for part in ("happened", "cause", "action"))
    assert f"error [{code}]" in str(failed)
    assert "Traceback" not in str(failed)
    assert records(place(asr)) == before


@pytest.mark.parametrize("words", [("nonsense",), ("status", "--nonsense"), ("protect",), ("failover",)], ids=" ".join)
def test_words_that_are_not_a_verb(asr: AsrCli, words: tuple[str, ...]) -> None:
    done = asr.run(*words)
    assert done.returncode == USAGE
    assert "Usage" in done.stdout + done.stderr


def test_replica_directory_that_is_not_there(asr: AsrCli) -> None:
    """It is a mount point that asrcore never creates: the site is refused, and a machine if it vanishes later."""
    site = ["site", "add", "d", "--driver", "libvirt", "--set", "uri=qemu:///system", "--set", "replica_dir=/srv/none"]
    refused = failing(asr, *site)
    assert refused.error is not None
    assert refused.error["code"] == "invalid-setting"
    assert not place(asr, "/srv/none").exists()
    place(asr, "/srv/none").mkdir()
    asr.lab.define_guest("a", "bios-disk", "homeless")
    try:
        asr(*site)
        shutil.rmtree(place(asr, "/srv/none"))
        failed = failing(asr, "protect", "homeless", "--from", "a", "--to", "d", "--policy", "gold")
        assert failed.exit_code == REFUSED
        assert failed.error is not None
        assert "replica-dir-unusable" in str(failed.error["happened"])
        assert not place(asr, "/srv/none").exists()
    finally:
        asr("site", "remove", "d", "--yes")
        asr.lab.remove_guest("a", "homeless")


# -- vaults ----------------------------------------------------------------------------------------------------------


def newer(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        (table,) = connection.execute("SELECT name FROM sqlite_master WHERE name LIKE '%version%'").fetchone()
        connection.execute(f"UPDATE {table} SET version_num = '9999'")
    connection.close()


def text(path: Path) -> None:
    path.write_text("this is a shopping list\n" * 100)


def foreign(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE birds (name TEXT)")
    connection.close()


def torn(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


SPOILT = {"newer": (newer, "vault-too-new"), "text": (text, "not-a-vault"), "foreign": (foreign, "not-a-vault")}


@pytest.mark.parametrize("kind", SPOILT)
def test_file_that_is_no_vault_of_ours(asr: AsrCli, kind: str) -> None:
    """Reading verbs, writing verbs and `init` all leave it unchanged."""
    spoil, code = SPOILT[kind]
    path = place(asr, f"/srv/asr-input/{kind}.db")
    copy_of_vault(asr, path)
    spoil(path)
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    for words in (("status",), ("policy", "create", "x"), ("run",)):
        done = asr.run("--vault", f"/srv/asr-input/{kind}.db", *words, "--json" if words != ("run",) else "-v")
        assert done.returncode == VAULT, done
        assert f"[{code}]" in done.stderr
        assert "Traceback" not in done.stderr
    assert asr.run("init", "--vault", f"/srv/asr-input/{kind}.db").returncode in (CONFLICT, VAULT)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before


def test_torn_vault(asr: AsrCli) -> None:
    path = place(asr, "/srv/asr-input/torn.db")
    copy_of_vault(asr, path)
    torn(path)
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    for words in (("status", "--json"), ("policy", "create", "x", "--json")):
        done = asr.run("--vault", "/srv/asr-input/torn.db", *words)
        assert done.returncode == VAULT
        assert json.loads(done.stdout)["error"]["code"] in ("vault-damaged", "not-a-vault")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before


def copy_of_vault(asr: AsrCli, path: Path) -> None:
    """A complete copy, including its journal."""
    source = sqlite3.connect(f"file:{place(asr)}?mode=ro", uri=True)
    target = sqlite3.connect(path)
    source.backup(target)
    source.close()
    target.execute("PRAGMA journal_mode = WAL")  # as asrcore's vaults: otherwise opening it would change its header
    target.close()


def test_no_vault_and_one_too_many(asr: AsrCli) -> None:
    done = asr.run("--vault", "/srv/nowhere/vault.db", "status", "--json")
    assert done.returncode == VAULT
    assert json.loads(done.stdout)["error"]["code"] == "vault-not-found"
    assert not place(asr, "/srv/nowhere").exists()
    before = records(place(asr))
    failed = failing(asr, "init")
    assert failed.error is not None
    assert (failed.error["code"], failed.exit_code) == ("vault-exists", CONFLICT)
    assert records(place(asr)) == before


def test_second_engine_on_a_vault(asr: AsrCli) -> None:
    """The first one keeps running; the second one names it and exits."""
    asr.start_service()
    wait_for(lambda: "replicating with" in asr.log(), "the service runs", timeout=30)
    done = asr.run("run", timeout=30)
    assert done.returncode == CONFLICT
    assert "error [vault-in-use]" in done.stderr
    assert "asr" in done.stderr.split("another engine is working on this vault")[1]
    assert asr("status") == []  # reading is possible meanwhile
    asr.stop_service()
    assert asr.run("policy", "show", "gold").returncode == 0
    asr.start_service()  # the vault is free again
    wait_for(lambda: asr.log().count("replicating with") == 2, "the service runs again", timeout=30)
    asr.stop_service(signal.SIGINT)


# -- credentials -----------------------------------------------------------------------------------------------------


def test_wrong_credentials() -> None:
    """A host that requires a password and gets a wrong one: reported immediately, not retried."""
    with Lab("test-system-auth") as lab:
        site = lab.sites["a"]
        conf = site.disk_dir / "etc/libvirtd.conf"
        conf.write_text(conf.read_text().replace('auth_tcp = "none"', 'auth_tcp = "sasl"'))
        lab.host_path("a", "/srv/sasl.conf").write_text("mech_list: digest-md5\nsasldb_path: /srv/nobody.db\n")
        lab.run_in("a", ["mount", "--bind", "/srv/sasl.conf", "/etc/sasl2/libvirt.conf"])
        lab.site_down("a")
        lab.site_up("a")
        asr = AsrCli(lab)
        asr.run("init").check_returncode()
        before = records(place(asr))
        given = ["--set", f"uri={site.remote_uri}", "--set", "user=eve", "--set", "password=guess"]
        failed = failing(asr, "site", "add", "a", "--driver", "libvirt", *given)
        assert failed.error is not None
        assert (failed.error["code"], failed.exit_code) == ("access-denied", ACCESS)
        assert failed.error["retry"] is False
        assert "guess" not in json.dumps(failed.error)
        assert records(place(asr)) == before
        shutil.rmtree(place(asr).parent)
