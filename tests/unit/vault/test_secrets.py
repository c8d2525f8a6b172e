"""Secret settings: encrypted in the vault, with a separate key; older vaults are converted."""

from __future__ import annotations

import base64
import stat
from collections.abc import Iterator
from pathlib import Path

import keyring
import pytest
from keyring.backend import KeyringBackend

from asrcore.errors import SecretKeyUnusable, VaultDamaged
from asrcore.model.protection import Site
from asrcore.vault import Vault, _rows, _schema, move
from asrcore.vault._place import Place
from asrcore.vault._secrets import key_file
from tests.unit.vault import samples

SECRET = "S3cr3t-of-the-site"
SITE = Site("far", "memory", {"uri": "memory://far", "password": SECRET})


@pytest.fixture(autouse=True)
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "keys" / "vault.key"
    monkeypatch.setenv("ASR_KEY", str(path))
    return path


def recorded(vault: Vault, name: str = "far") -> str:
    with vault._read() as connection:
        row = connection.execute(_schema.sites.select().filter_by(name=name)).mappings().one()
        return str(row["settings"])


def test_a_secret_comes_back_and_is_not_in_the_vault(vault: Vault, place: str, key: Path) -> None:
    vault.add_site(SITE, secret=["password"])
    assert vault.site("far") == SITE
    assert SECRET not in recorded(vault)
    assert "memory://far" in recorded(vault)
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    with Vault.open(place) as again:
        assert again.site("far") == SITE
        assert {item.name: item.settings for item in again.sites()}["far"] == {**SITE.settings, "password": "(secret)"}


def test_the_key_is_needed_for_secrets_only(vault: Vault, place: str, key: Path) -> None:
    vault.add_site(SITE, secret=["password"])
    key.rename(key.with_name("elsewhere"))
    with Vault.open(place) as again:
        assert again.site("north") == samples.NORTH
        assert len(again.sites()) == 3
        assert again.site("far", without=["password"]).settings == {"uri": "memory://far"}
        with pytest.raises(SecretKeyUnusable, match="No such file") as caught:
            again.site("far")
        assert str(key) in str(caught.value)


@pytest.mark.parametrize("what", ["another", "damaged", "readable", "directory"])
def test_a_key_that_does_not_fit_is_reported(what: str, vault: Vault, place: str, key: Path) -> None:
    vault.add_site(SITE, secret=["password"])
    if what == "another":
        key.write_text(base64.b64encode(bytes(32)).decode())
    elif what == "damaged":
        key.write_text("short")
    elif what == "readable":
        key.chmod(0o644)
    else:
        key.unlink()
        key.mkdir()
    with Vault.open(place) as again:
        with pytest.raises(SecretKeyUnusable) as caught:
            again.site("far")
        assert SECRET not in repr(caught.value.as_dict())
        if what == "another":  # the only operation that works without the former key
            again.update_site(SITE, secret=["password"])
            assert again.site("far") == SITE


def test_a_secret_cannot_be_put_in_another_s_place(vault: Vault, key: Path) -> None:
    vault.add_site(SITE, secret=["password"])
    vault.add_site(Site("near", "memory", {"password": "x"}), secret=["password"])
    with vault._write("test") as connection:
        connection.execute(_schema.sites.update().filter_by(name="near").values(settings=recorded(vault)))
    with pytest.raises(SecretKeyUnusable, match="another key"):
        vault.site("near")


def test_a_damaged_secret_is_reported(vault: Vault, key: Path) -> None:
    vault.add_site(SITE, secret=["password"])
    with vault._write("test") as connection:
        broken = _rows._dump({"password": {"sealed": "!"}})
        connection.execute(_schema.sites.update().filter_by(name="far").values(settings=broken))
    with pytest.raises(VaultDamaged):
        vault.site("far")


def test_what_was_recorded_before_is_sealed_once(vault: Vault, key: Path) -> None:
    vault.add_site(SITE)
    assert SECRET in recorded(vault)
    assert vault.seal_site("far", {"password"})
    assert SECRET not in recorded(vault)
    assert vault.site("far") == SITE
    assert not vault.seal_site("far", {"password"})
    assert not vault.seal_site("far", {"nothing"})
    assert not vault.seal_site("gone", {"password"})


def test_nothing_of_it_stays_in_the_files(path: Path, key: Path) -> None:
    def content() -> bytes:
        return b"".join(item.read_bytes() for item in path.parent.glob("vault.db*"))

    with Vault.open(path) as vault:
        for number in range(40):  # so that the record moves about in its page, and pages are freed
            vault.add_site(Site(f"far-{number}", "memory", {"password": f"{SECRET}-{number}", "x": "y" * 300}))
        for number in range(0, 40, 2):
            vault.remove_site(f"far-{number}")
        assert SECRET.encode() in content()
        for number in range(1, 40, 2):
            assert vault.seal_site(f"far-{number}", {"password"})
        assert SECRET.encode() not in content()
    assert SECRET.encode() not in content()


def test_the_default_place_of_the_key(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASR_KEY", raising=False)
    with Vault.open(path) as vault:
        vault.add_site(SITE, secret=["password"])
    assert (tmp_path / "vault.db.key").exists()
    assert key_file(Place.of("postgresql://host/asr")).name == "vault.key"
    destination = tmp_path / "carried.db"
    move(path, destination, "a test")
    assert stat.S_IMODE((tmp_path / "carried.db.key").stat().st_mode) == 0o600
    (tmp_path / "vault.db.key").unlink()
    with Vault.open(destination) as vault:
        assert vault.site("far") == SITE


class _Keyring(KeyringBackend):
    priority = 1.0

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept: dict[tuple[str, str], str] = {}

    def get_password(self, service: str, username: str) -> str | None:
        return self.kept.get((service, username))

    def set_password(self, service: str, username: str, password: str) -> None:
        self.kept[service, username] = password


@pytest.fixture
def ring() -> Iterator[_Keyring]:
    former, made = keyring.get_keyring(), _Keyring()
    keyring.set_keyring(made)
    yield made
    keyring.set_keyring(former)


def test_the_key_may_be_in_a_keyring(ring: _Keyring, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASR_KEY", "keyring:asrcore/main")
    with Vault.open(path) as vault:
        vault.add_site(SITE, secret=["password"])
    assert list(ring.kept) == [("asrcore", "main")]
    with Vault.open(path) as vault:
        assert vault.site("far") == SITE
        ring.kept.clear()
    with Vault.open(path) as vault, pytest.raises(SecretKeyUnusable, match="not there"):
        vault.site("far")
