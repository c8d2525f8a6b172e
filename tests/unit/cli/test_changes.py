"""`asr policy set`, `asr policy remove` and `asr machine set`."""

from __future__ import annotations

import pytest

from asrcore.testing.memory import MemoryWorld
from tests.unit.cli.conftest import Asr


@pytest.fixture
def protected(asr: Asr, sites: MemoryWorld) -> None:
    assert asr("protect", "web", "--from", "a", "--to", "b", "--policy", "gold")[0] == 0


def test_a_policy_is_changed_for_its_machines(asr: Asr, protected: None) -> None:
    before = asr("policy", "show", "gold")[1]
    code, done = asr("policy", "set", "gold", "--interval", "30s", "--point-every", "5min")
    assert code == 0
    assert done["plan"]["effects"] == [
        "interval: 5.0s -> 30s",
        "It applies to web.",
    ]
    after = asr("policy", "show", "gold")[1]
    assert after == {**before, "interval": 30.0, "point_interval": 300.0}
    assert asr("status")[1][0]["interval_seconds"] == 30.0


def test_each_option_of_a_policy_can_be_changed(asr: Asr, protected: None) -> None:
    words = "--keep 12h --consistency filesystem --freeze-limit 5s --resync-window 01:00-02:00"
    words += " --resync-threshold 0.25 --bandwidth 20Mbit --verify-every never --scrub-every 3d"
    changed = asr("policy", "set", "gold", *words.split())[1]["policy"]
    assert (changed["keep"], changed["consistency"], changed["freeze_limit"]) == (43200.0, "filesystem", 5.0)
    assert (changed["resync_window"], changed["resync_threshold"]) == ({"start": 3600.0, "end": 7200.0}, 0.25)
    assert (len(changed["bandwidth"]), changed["verify_every"], changed["scrub_every"]) == (1, 0.0, 259200.0)
    assert asr("policy", "set", "gold", "--bandwidth", "unlimited")[1]["policy"]["bandwidth"] == []


def test_a_dry_run_changes_nothing(asr: Asr, protected: None) -> None:
    before = asr("policy", "show", "gold")[1]
    assert set(asr("policy", "set", "gold", "--interval", "30s", "--point-every", "5min", "--dry-run")[1]) == {"plan"}
    assert asr("policy", "show", "gold")[1] == before
    assert set(asr("machine", "set", "web", "--test-network", "lab", "--dry-run")[1]) == {"plan"}
    assert asr("machine", "set", "web", "--test-network", "")[1]["plan"]["effects"] == ["Nothing changes."]


def test_a_machine_gets_another_policy_and_networks(asr: Asr, protected: None) -> None:
    assert asr("policy", "create", "silver")[0] == 0
    words = ["--policy", "silver", "--network", "lan=lan-b", "--network", "dmz=dmz-b", "--test-network", "lab"]
    changed = asr("machine", "set", "web", *words)[1]
    assert (changed["policy"], changed["test_network"]) == ("silver", "lab")
    assert changed["networks"] == {"lan": "lan-b", "dmz": "dmz-b"}
    assert asr("machine", "set", "web", "--network", "dmz=")[1]["networks"] == {"lan": "lan-b"}
    assert asr("status")[1][0]["policy"] == "silver"
    assert asr("policy", "remove", "silver", "--yes")[1]["error"]["code"] == "still-in-use"
    assert asr("policy", "remove", "gold")[1]["error"]["code"] == "confirmation-needed"
    assert asr("policy", "remove", "gold", "--yes")[1] == {"removed": "gold"}


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("policy set gold", "invalid-value"),
        ("policy set gold --interval 1s", "invalid-value"),
        ("policy set gold --consistency perfect", "invalid-value"),
        ("policy set none --interval 30s", "not-found"),
        ("policy remove none", "not-found"),
        ("machine set web", "invalid-value"),
        ("machine set web --network lan", "invalid-value"),
        ("machine set web --policy none", "not-found"),
        ("machine set none --policy gold", "not-found"),
    ],
)
def test_bad_input_is_refused(asr: Asr, protected: None, words: str, code: str) -> None:
    assert asr(*words.split())[1]["error"]["code"] == code
