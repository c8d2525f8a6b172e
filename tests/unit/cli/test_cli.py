"""`asr` as people and scripts use it, on memory sites, with real jobs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from asrcore.cli._main import _hoisted
from asrcore.jobs import enqueue
from asrcore.procedures.procedure import Arguments
from asrcore.testing.memory import MemoryWorld
from asrcore.vault import Vault
from tests.unit.cli.conftest import Asr


def test_a_clock_in_doubt_is_shown_and_accepted(asr: Asr, sites: MemoryWorld, tmp_path: Path) -> None:
    assert asr("protect", "web", "--from", "a", "--to", "b", "--policy", "gold")[0] == 0
    assert asr("clock", "show")[1]["in_doubt"] is None
    assert asr("clock", "accept", "--yes")[1] == {"accepted": False}
    with Vault.open(tmp_path / "vault.db") as vault:
        vault.doubt_clock(5.0, "the clock was set forward by 2d 0h", boot="b", elapsed=0.0, anchors={}, gaps={})
    doubt = asr("clock", "show")[1]["in_doubt"]
    assert doubt == {"since": "1970-01-01T00:00:05.000Z", "reason": "the clock was set forward by 2d 0h"}
    assert "asr clock accept" in asr("clock", "show", as_json=False)[1]
    assert [reason["code"] for reason in asr("status")[1][0]["health"]["reasons"]] == ["no-engine", "retention-held"]
    assert asr("clock", "accept", "--yes")[1] == {"accepted": True}
    assert [reason["code"] for reason in asr("status")[1][0]["health"]["reasons"]] == ["no-engine"]


def test_the_main_job_by_command_line(asr: Asr, sites: MemoryWorld) -> None:
    assert [machine["name"] for machine in asr("site", "machines", "a")[1]] == ["web"]
    code, done = asr("protect", "web", "--from", "a", "--to", "b", "--policy", "gold")
    assert code == 0
    assert done["result"]["bytes_sent"] > 0
    (status,) = asr("status")[1]
    assert status["state"] == "protected"
    assert [reason["code"] for reason in status["health"]["reasons"]] == ["no-engine"], "no service runs"
    assert {"machine", "rpo_seconds", "last_point", "points", "direction", "epoch"} <= set(status)
    assert 100_000 <= status["stored_bytes"] < 110_000, "whole blocks that the machine has written"
    sites.machine("web").write("vda", 0, b"y" * 5000)
    assert asr("replicate", "web", "--keep")[1]["result"]["mode"] == "delta"
    assert len(asr("point", "list", "web")[1]) == 2
    assert asr("verify", "web")[1]["result"]["equal"]
    assert asr("failover", "test", "web")[0] == 0
    assert asr("failover", "cleanup", "web")[0] == 0
    assert asr("failover", "planned", "web", "--yes")[1]["result"]["machine"] == "web"
    assert asr("failover", "undo", "web", "--yes")[0] == 0
    assert asr("failover", "unplanned", "web", "--point", "latest", "--yes")[0] == 0
    assert asr("failover", "commit", "web", "--yes")[0] == 0
    assert asr("reprotect", "web")[1]["result"]["bytes_sent"] == 0
    assert asr("status")[1][0]["direction"] == "reverse"
    assert asr("resync", "web")[1]["window"] == "always"
    assert asr("resync", "web", "--now")[1]["result"]["mode"] == "compare"
    kinds = {job["kind"] for job in asr("job", "list")[1]}
    assert {"protect", "replicate", "verify", "failover-planned", "reprotect"} <= kinds
    assert any(event["kind"] == "failover" for event in asr("event", "list", "web")[1])
    assert asr("unprotect", "web", "--yes")[0] == 0
    assert asr("status")[1] == []


@pytest.mark.parametrize(
    ("words", "exit_code", "code"),
    [
        (["policy", "create", "x", "--interval", "1s"], 2, "invalid-value"),
        (["policy", "create", "x", "--interval", "soon"], 2, "invalid-value"),
        (["policy", "create", "x", "--keep", "1s"], 2, "invalid-value"),
        (["policy", "create", "x", "--consistency", "perfect"], 2, "invalid-value"),
        (["policy", "create", "x", "--resync-window", "25:00-26:00"], 2, "invalid-value"),
        (["policy", "create", "x", "--bandwidth", "20"], 2, "invalid-value"),
        (["policy", "create", "x", "--bandwidth", "20Mbit@noon"], 2, "invalid-value"),
        (["policy", "create", "x", "--bandwidth", "1kbit"], 2, "invalid-value"),
        (["policy", "create", ""], 2, "invalid-value"),
        (["policy", "create", "gold"], 4, "already-exists"),
        (["policy", "show", "none"], 3, "not-found"),
        (["site", "add", "c", "--driver", "none"], 3, "driver-not-found"),
        (["site", "add", "c", "--driver", "memory"], 2, "invalid-setting"),
        (["site", "add", "c", "--driver", "memory", "--set", "world"], 2, "invalid-value"),
        (["site", "add", "c", "--driver", "memory", "--set", "world=home", "--set", "no=1"], 2, "invalid-setting"),
        (["site", "add", "a", "--driver", "memory", "--set", "world=home"], 4, "already-exists"),
        (["site", "machines", "none"], 3, "not-found"),
        (["protect", "none", "--from", "a", "--to", "b", "--policy", "gold"], 3, "machine-not-found"),
        (["protect", "web", "--from", "a", "--to", "b", "--policy", "none"], 3, "not-found"),
        (["protect", "web", "--from", "a", "--to", "b", "--policy", "gold", "--network", "lan"], 2, "invalid-value"),
        (["replicate", "web"], 3, "not-found"),
        (["failover", "unplanned", "web"], 3, "not-found"),
        (["job", "show", "nope"], 3, "not-found"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_refused_by_class(
    asr: Asr, sites: MemoryWorld, words: list[str], exit_code: int, code: str
) -> None:
    before = asr("policy", "list")[1], asr("site", "list")[1], asr("status")[1]
    got, document = asr(*words)
    assert (got, document["error"]["code"]) == (exit_code, code)
    assert document["error"]["cause"]
    assert document["error"]["action"]
    assert before == (asr("policy", "list")[1], asr("site", "list")[1], asr("status")[1])


def test_bandwidth_rules_are_kept_and_shown(asr: Asr, sites: MemoryWorld) -> None:
    rules = ["--bandwidth", "20Mbit@08:00-18:00", "--bandwidth", "100Mbit"]
    assert asr("policy", "create", "slow", *rules)[0] == 0
    shown = asr("policy", "show", "slow")[1]["bandwidth"]
    assert [rule["rate"] for rule in shown] == [2.5e6, 12.5e6]
    assert "bandwidth 20 Mbit/s 08:00-18:00, 100 Mbit/s always" in asr("policy", "show", "slow", as_json=False)[1]
    assert "unlimited" in asr("policy", "list", as_json=False)[1]


def test_a_job_is_shown_and_cancelled_by_its_first_characters(asr: Asr, sites: MemoryWorld, tmp_path: Path) -> None:
    asr("protect", "web", "--from", "a", "--to", "b", "--policy", "gold")
    with Vault.open(str(tmp_path / "vault.db")) as vault:
        queued = enqueue(vault, "replicate", vault.protection("web"), Arguments(), now=1.0)
        assert asr("job", "show", queued.id[:-2])[1]["state"] == "queued"
        assert asr("job", "cancel", queued.id[:-2])[1]["id"] == queued.id
        assert vault.cancel_requested(queued.id)
    assert asr("job", "list", "--limit", "1")[1][0]["id"] == queued.id


def test_an_error_for_people_has_cause_and_next_action(asr: Asr, sites: MemoryWorld) -> None:
    code, said = asr("policy", "show", "none", as_json=False)
    assert code == 3
    assert said.splitlines()[0].startswith("error [not-found]")
    assert "cause:" in said
    assert "next:" in said


def test_wrong_order_names_what_is_possible(asr: Asr, sites: MemoryWorld) -> None:
    asr("protect", "web", "--from", "a", "--to", "b", "--policy", "gold")
    code, document = asr("failover", "commit", "web")
    assert (code, document["error"]["code"]) == (4, "wrong-state")
    assert "fail over" in document["error"]["action"]


LISTS = ["status", "point list web", "job list", "site list", "policy list", "event list", "driver list", "server list"]


@pytest.mark.parametrize("verb", LISTS)
def test_tables_for_people(asr: Asr, sites: MemoryWorld, verb: str) -> None:
    asr("protect", "web", "--from", "a", "--to", "b", "--policy", "gold")
    code, said = asr(*verb.split(), as_json=False)
    assert code == 0
    assert said.strip()
    assert "Traceback" not in said


def test_the_vault_may_be_named_anywhere() -> None:
    assert _hoisted(["status", "--vault", "x", "--json"]) == (["--vault", "x"], ["status", "--json"])
    assert _hoisted(["status", "--vault=x"]) == (["--vault=x"], ["status"])
    assert _hoisted(["status", "--vault"]) == (["--vault"], ["status"])


def test_settings_that_are_secret_are_not_shown(asr: Asr, sites: MemoryWorld) -> None:
    MemoryWorld("locked").configure(key="sesame")
    assert asr("site", "add", "c", "--driver", "memory", "--set", "world=locked", "--set", "key=sesame")[0] == 0
    for words in (["site", "list"], ["site", "show", "c"]):
        assert "sesame" not in json.dumps(asr(*words)[1])
        assert "sesame" not in asr(*words, as_json=False)[1]


def test_a_site_with_nothing_left_over_is_swept(asr: Asr, sites: MemoryWorld) -> None:
    assert asr("site", "sweep", "b") == (0, {"removed": []})


def test_a_driver_that_cannot_be_tried_says_so(asr: Asr) -> None:
    code, document = asr("driver", "check", "memory")
    assert code == 5
    assert document["error"]["code"] == "unsupported-operation"


@pytest.mark.parametrize(
    "words", [("status", "a\udcff"), ("protect", "\udcfe", "--from", "a"), ("--vault", "\udcff", "status")]
)
def test_words_that_are_no_text_are_refused(words: tuple[str, ...], asr: Asr, sites: MemoryWorld) -> None:
    code, document = asr(*words)
    assert (code, document["error"]["code"]) == (2, "invalid-value")
