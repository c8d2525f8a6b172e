"""The probe passes, reports, and leaves nothing behind, however it ends."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from asr_driver_azure.check import check
from asr_driver_azure.check.recorder import without_secrets
from asr_driver_azure.cleanup import probes
from asr_driver_azure.cloud.arm import Arm
from asr_driver_azure.settings import PROBES
from asrcore.driver import Check
from asrcore.errors import DriverFailed, InvalidSetting
from drivers.azure.tests.failover.rig import FailoverRig

MACHINE = "create a disk by upload, and start a machine in an isolated network"
ROOT = Path(__file__).parents[4]
# In a shell without job control, as in some CIs, background processes ignore Ctrl-C, and so do their children.
ASR = """
import signal
from asrcore.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""
KILLED = """
import json, sys
from asr_driver_azure.driver import AzureDriver
for check in AzureDriver().check(json.loads(sys.stdin.readline())):
    print(check.name, check.passed, check.told, flush=True)
"""


def containers(rig: FailoverRig) -> list[str]:
    return [item.name for item in rig.storage.direct.list_containers() if item.name.startswith(PROBES)]


def failed(checks: list[Check]) -> list[str]:
    return [item.name for item in checks if not item.passed]


@pytest.fixture(autouse=True)
def _clean(rig: FailoverRig) -> None:
    rig.target_site.account.make_container()
    assert rig.cloud.names() == []
    assert containers(rig) == []


def test_it_passes_and_leaves_nothing(rig: FailoverRig) -> None:
    checks = list(rig._driver.check(rig.settings))
    assert failed(checks) == []
    assert len(checks) == 12
    assert rig.cloud.names() == []
    assert containers(rig) == []


def test_what_azure_answered_is_kept_without_secrets(rig: FailoverRig, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    given = rig.cloud.content.granted_count
    checks = list(rig._driver.check(rig.settings, path))
    assert failed(checks) == []
    text = path.read_text()
    reported: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    asked = {(item["method"], item["url"].partition("?")[0].rpartition("/")[2], item["status"]) for item in reported}
    assert ("POST", "beginGetAccess", 202) in asked
    assert {404, 409} <= {item["status"] for item in reported}, "refusals are the most useful records"
    assert any(item["headers"].get("x-ms-error-code") == "BlobNotFound" for item in reported)
    assert any("PageList" in (item["body"] or "") for item in reported)
    assert any('"diskState"' in (item["body"] or "") for item in reported)
    assert any("Azure-AsyncOperation" in item["headers"] for item in reported)
    for secret in (*rig.cloud._tokens, rig.storage.key, rig.cloud.secret, *rig.cloud.content.tokens):
        assert secret not in text
    assert rig.cloud.content.granted_count > given
    assert len(rig.cloud.content.tokens) > 0


def test_queries_of_any_url_are_bare() -> None:
    text = '{"accessSAS": "https://md-x.z1.blob.storage.azure.net/a/b?sv=1&sig=abc", "location": "https://m/o/1?api-version=2&s=xyz"}'
    bare = without_secrets(text)
    assert "abc" not in bare
    assert "xyz" not in bare
    assert "api-version=2" in bare
    assert json.loads(bare)["accessSAS"] == "..."


def test_one_that_fails_cleans_up(rig: FailoverRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.cloud, "deny", r"PUT .*/virtualMachines/")
    assert failed(list(rig._driver.check(rig.settings))) == [MACHINE]
    assert rig.cloud.names() == []
    assert containers(rig) == []


@pytest.mark.parametrize("problem", [KeyboardInterrupt, RuntimeError("nobody thought of this")])
def test_one_that_is_interrupted_cleans_up(
    rig: FailoverRig, monkeypatch: pytest.MonkeyPatch, problem: BaseException | type[BaseException]
) -> None:
    """While a machine that costs money runs."""

    def broken(self: check._Probe) -> str:
        assert [item["name"] for item in rig.cloud.all("virtualMachines")]
        raise problem

    monkeypatch.setattr(check._Probe, "_home", broken)
    if isinstance(problem, Exception):
        assert failed(list(rig._driver.check(rig.settings))) == ["read the disk by two snapshots and their diff"]
    else:
        with pytest.raises(KeyboardInterrupt):
            list(rig._driver.check(rig.settings))
    assert rig.cloud.names() == []
    assert containers(rig) == []


def test_one_that_nobody_listens_to_any_more_cleans_up(rig: FailoverRig) -> None:
    with closing(rig._driver.check(rig.settings)) as checks:
        while next(checks).name != MACHINE:
            pass
        assert rig.cloud.all("virtualMachines") != []
    assert rig.cloud.names() == []
    assert containers(rig) == []


def test_what_cannot_be_removed_keeps_nothing_else(rig: FailoverRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found by the next one."""
    delete, refused = Arm.delete, []

    def broken(self: Arm, kind: str, name: str) -> None:
        if kind == "snapshots":
            refused.append(name)
            raise DriverFailed(operation=f"deleting {kind}/{name}", site="check", detail="not today")
        delete(self, kind, name)

    with monkeypatch.context() as patch:
        patch.setattr(Arm, "delete", broken)
        checks = list(rig._driver.check(rig.settings))
    assert failed(checks) == ["delete everything created"]
    assert "not today" in checks[-1].told
    assert set(rig.cloud.names()) == {f"snapshots/{name}" for name in refused}
    (left,) = containers(rig)
    monkeypatch.setattr(probes, "ABANDONED", -1.0)
    first = next(iter(rig._driver.check(rig.settings)))
    assert left in first.told
    assert rig.cloud.names() == []
    assert containers(rig) == []


@pytest.mark.parametrize("ahead", [7 * 3600.0, 3 * 365 * 86400.0])
def test_a_clock_that_is_ahead_deletes_no_probe_of_another_host(
    rig: FailoverRig, monkeypatch: pytest.MonkeyPatch, ahead: float
) -> None:
    """It is compared with the cloud's own time."""
    running = rig.storage.direct.get_container_client(f"{PROBES}still-running")
    running.create_container()
    real = time.time
    with monkeypatch.context() as patch:
        patch.setattr(probes, "time", SimpleNamespace(time=lambda: real() + ahead), raising=False)
        assert rig.target_site.sweep() == []
    assert running.exists()
    running.delete_container()


def test_a_container_of_somebody_else_stays_whatever_its_name(
    rig: FailoverRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "ABANDONED", -1.0)
    theirs = rig.storage.direct.get_container_client(f"{PROBES}of-theirs")
    theirs.create_container()
    theirs.upload_blob("replicas/r1/replica.json", b"{}")
    assert rig.target_site.sweep() == []
    assert theirs.exists()
    theirs.delete_container()
    with pytest.raises(InvalidSetting, match="reserved for probes"):
        rig._driver.connect("azure", rig.settings | {"container": f"{PROBES}of-ours"})


def test_ctrl_c_at_the_command_line(rig: FailoverRig, tmp_path: Path) -> None:
    """While a machine runs; the answers recorded so far are kept."""
    answers = tmp_path / "answers.jsonl"
    command = [sys.executable, "-c", ASR, "driver", "check", "azure"]
    command += ["--record", str(answers), *(f"--set={name}={value}" for name, value in rig.settings.items())]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as probe:
        wait_for_machine(rig, probe)
        os.kill(probe.pid, signal.SIGINT)
        reported, _ = probe.communicate(timeout=120)
    assert probe.returncode == 130, reported
    assert "sign in and see the storage account" in reported
    assert rig.cloud.names() == [], reported
    assert containers(rig) == []
    assert "beginGetAccess" in answers.read_text()


def wait_for_machine(rig: FailoverRig, probe: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not rig.cloud.all("virtualMachines"):
        assert time.monotonic() < end
        assert probe.poll() is None
        time.sleep(0.01)


@pytest.mark.parametrize("by", ["probe", "sweep"])
def test_one_that_was_killed_is_cleaned_up_later(rig: FailoverRig, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", KILLED], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as probe:
        assert probe.stdin is not None
        probe.stdin.write(json.dumps(rig.settings) + "\n")
        probe.stdin.flush()
        wait_for_machine(rig, probe)
        os.kill(probe.pid, signal.SIGKILL)
    assert "virtualMachines/" in repr(rig.cloud.names())
    assert rig.target_site.sweep() == [], "it may still be running"
    monkeypatch.setattr(probes, "ABANDONED", -1.0)
    (left,) = containers(rig)
    if by == "sweep":
        assert rig.target_site.sweep() == [left]
    else:
        assert next(iter(rig._driver.check(rig.settings))).told == left
    assert rig.cloud.names() == []
    assert containers(rig) == []
