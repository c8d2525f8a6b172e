"""Keys that seal secrets: made once, readable by their owner only, and the wrong one never opens a private key."""

from __future__ import annotations

import base64
import stat
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import assume, given
from hypothesis import strategies as st

from asrcore.errors import SecretKeyUnusable
from asrcore.sealkey import SealKey, authority_key, open_private_key, seal_private_key

PRIVATE = ec.generate_private_key(ec.SECP256R1())
PLAIN = PRIVATE.private_bytes(
    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
)
KEYS = st.binary(min_size=32, max_size=32)


def seal_at(path: Path) -> SealKey:
    return SealKey(str(path), what="the test", variable="ASR_TEST_KEY")


def seal_of(path: Path, text: bytes, mode: int = 0o600) -> SealKey:
    """Of a key file with that text."""
    path.write_bytes(text)
    path.chmod(mode)
    return seal_at(path)


def plain(key: object) -> bytes:
    """A private key as unencrypted PEM, to compare it."""
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "key"


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for the key files of hypothesis, which are written again for each example."""
    return tmp_path_factory.mktemp("keys")


# -- the key in a file -------------------------------------------------------------------------------------------------


def test_a_key_is_made_once_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "new" / "key"
    made = seal_at(path).raw(make=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert list(path.parent.iterdir()) == [path]
    assert len(made) == 32
    assert seal_at(path).raw(make=True) == made
    assert seal_at(path).raw() == made
    assert base64.b64decode(path.read_text("ascii")) == made


def test_no_key_is_made_by_reading(path: Path) -> None:
    with pytest.raises(SecretKeyUnusable, match="No such file"):
        seal_at(path).raw()
    assert not path.exists()


def test_of_two_that_make_it_at_once_both_have_the_same(path: Path) -> None:
    together, found = threading.Barrier(8), []

    def make() -> None:
        together.wait()
        found.append(seal_at(path).raw(make=True))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert set(found) == {seal_at(path).raw()}
    assert list(path.parent.iterdir()) == [path]


@given(key=KEYS)
def test_a_key_is_read_as_it_was_written(key: bytes, examples: Path) -> None:
    seal = seal_of(examples / "read", base64.b64encode(key) + b"\n")
    assert seal.raw() == key
    assert seal.password() == base64.b64encode(key)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o620, 0o601])
def test_a_key_that_others_may_use_is_refused(mode: int, path: Path) -> None:
    seal = seal_of(path, base64.b64encode(bytes(32)), mode)
    with pytest.raises(SecretKeyUnusable, match="users other than its owner"):
        seal.raw()


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o700])
def test_a_key_of_its_owner_alone_is_used(mode: int, path: Path) -> None:
    assert seal_of(path, base64.b64encode(bytes(32)), mode).raw() == bytes(32)


@given(text=st.binary(max_size=80))
def test_what_is_no_key_is_refused(text: bytes, examples: Path) -> None:
    with suppress(ValueError):  # no base64 at all
        assume(len(base64.b64decode(text.strip(), validate=True)) != 32)
    with pytest.raises(SecretKeyUnusable) as caught:
        seal_of(examples / "damaged", text).raw()
    assert caught.value.attributes["where"] == str(examples / "damaged")
    assert caught.value.attributes["variable"] == "ASR_TEST_KEY"


@given(key=KEYS, cut=st.integers(0, 43))
def test_a_key_that_was_cut_is_refused(key: bytes, cut: int, examples: Path) -> None:
    with pytest.raises(SecretKeyUnusable, match="not a key of 32 bytes"):
        seal_of(examples / "cut", base64.b64encode(key)[:cut]).raw()


def test_the_environment_names_another_place(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    default = path.with_name("default")
    assert SealKey.named("ASR_TEST_KEY", default, what="the test").where == str(default)
    monkeypatch.setenv("ASR_TEST_KEY", str(path))
    assert SealKey.named("ASR_TEST_KEY", default, what="the test").where == str(path)


def test_the_key_of_an_authority_lies_beside_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASR_CA_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    assert authority_key(Path("ca")).where == str(tmp_path / "ca.key")
    monkeypatch.setenv("ASR_CA_KEY", "/elsewhere")
    assert authority_key(Path("ca")).where == "/elsewhere"


# -- private keys ------------------------------------------------------------------------------------------------------


@given(key=KEYS, scalar=st.integers(1, 2**256 - 2**225))
def test_a_private_key_comes_back(key: bytes, scalar: int, examples: Path) -> None:
    private = ec.derive_private_key(scalar, ec.SECP256R1())
    seal = seal_of(examples / "sealing", base64.b64encode(key))
    sealed = seal_private_key(private, seal)
    assert b"BEGIN ENCRYPTED PRIVATE KEY" in sealed
    assert plain(open_private_key(sealed, seal_at(examples / "sealing"))) == plain(private)


def test_sealing_makes_the_key_that_opens(path: Path) -> None:
    sealed = seal_private_key(PRIVATE, seal_at(path))
    assert plain(open_private_key(sealed, seal_at(path))) == PLAIN


@given(key=KEYS, other=KEYS)
def test_another_key_opens_nothing(key: bytes, other: bytes, examples: Path) -> None:
    assume(key != other)
    sealed = seal_private_key(PRIVATE, seal_of(examples / "one", base64.b64encode(key)))
    with pytest.raises(SecretKeyUnusable, match="encrypted with another key"):
        open_private_key(sealed, seal_of(examples / "other", base64.b64encode(other)))


def test_a_sealed_key_does_not_open_when_the_seal_key_is_lost(path: Path) -> None:
    sealed = seal_private_key(PRIVATE, seal_at(path))
    path.unlink()
    with pytest.raises(SecretKeyUnusable, match="No such file"):
        open_private_key(sealed, seal_at(path))
    assert not path.exists(), "a new key would hide that the old one is lost"


def test_a_sealed_key_that_was_damaged_does_not_open(path: Path) -> None:
    sealed = seal_private_key(PRIVATE, seal_at(path))
    head, *body, foot = sealed.splitlines()
    content = bytearray(base64.b64decode(b"".join(body)))
    content[-1] ^= 1
    damaged = b"\n".join([head, base64.b64encode(content), foot, b""])
    for pem in (damaged, sealed[: len(sealed) // 2], head + b"\n" + foot):
        with pytest.raises(SecretKeyUnusable):
            open_private_key(pem, seal_at(path))


def test_an_unencrypted_key_of_an_earlier_version_needs_no_seal_key(path: Path) -> None:
    assert plain(open_private_key(PLAIN, seal_at(path))) == PLAIN
    assert not path.exists()


@given(text=st.binary(max_size=200))
def test_what_is_no_private_key_is_refused(text: bytes, examples: Path) -> None:
    assume(b"ENCRYPTED" not in text)
    with pytest.raises(ValueError):
        open_private_key(text, seal_at(examples / "none"))
