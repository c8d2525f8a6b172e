"""The issuer without a register, as drivers use it."""

from __future__ import annotations

from pathlib import Path

import pytest

from asrcore.errors import AlreadyExists, AuthorityUnusable
from asrcore.pki.issuer import Issuer, new_key
from asrcore.units import DAY
from asrcore.wire import Component, Role

BOX = Component(Role.AGENT, "box")
NOW = 1_800_000_000.0


def test_no_certificate_outlives_its_authority(tmp_path: Path) -> None:
    issuer = Issuer.create(tmp_path / "ca", NOW)
    assert issuer.ends == NOW + 3650 * DAY
    key = new_key().public_key()
    soon = issuer.issue(BOX, key, NOW, NOW + 90 * DAY)
    assert soon.not_valid_after_utc.timestamp() == NOW + 90 * DAY
    late = issuer.issue(BOX, key, issuer.ends - DAY, issuer.ends + 89 * DAY)
    assert late.not_valid_after_utc.timestamp() == issuer.ends
    late.verify_directly_issued_by(issuer.certificate)
    with pytest.raises(AuthorityUnusable, match="has expired"):
        issuer.issue(BOX, key, issuer.ends, issuer.ends + DAY)


def test_a_certificate_may_be_valid_earlier(tmp_path: Path) -> None:
    issuer = Issuer.create(tmp_path / "ca", NOW, earlier=2 * DAY)
    made = issuer.issue(BOX, new_key().public_key(), NOW, NOW + DAY, earlier=1 * DAY)
    assert issuer.certificate.not_valid_before_utc.timestamp() == NOW - 2 * DAY
    assert made.not_valid_before_utc.timestamp() == NOW - DAY


def test_an_authority_is_opened_again(tmp_path: Path) -> None:
    first = Issuer.create(tmp_path / "ca", NOW)
    made = Issuer(tmp_path / "ca").issue(BOX, new_key().public_key(), NOW, NOW + DAY)
    made.verify_directly_issued_by(first.certificate)
    with pytest.raises(AlreadyExists):
        Issuer.create(tmp_path / "ca", NOW)
