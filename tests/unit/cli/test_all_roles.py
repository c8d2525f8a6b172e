"""All roles in one process, each active: its listeners are used, and its machines are replicated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from asrcore.pki.enrolment import fetch_text
from asrcore.remote import RemoteDriver
from asrcore.wire.tls import Identity
from tests.postgres import Cluster
from tests.unit.cli.cli_runner import CliRunner
from tests.unit.service.waiting import wait_until


@pytest.mark.once
@pytest.mark.parametrize("database", ["file", "server"])
def test_all_roles_in_one_process(tmp_path: Path, database: str, postgres: Cluster) -> None:
    url = postgres.create() if database == "server" else str(tmp_path / "vault.db")
    desk = CliRunner(tmp_path, url)
    desk.asr("init")
    own = desk.authority()
    target, engine, ann = (tmp_path / name for name in ("target", "engine", "ann"))
    # The first configuration server issues what the other roles need; then all roles run in one process.
    with desk.service("config-server", "--listen", "127.0.0.1:0", "--identity", str(own), says=r"(https://\S+);") as (
        _,
        found,
    ):
        (tmp_path / "ca" / "url").write_text(found[1])
        for role, identity in (("master-target", target), ("process-server", engine), ("operator", ann)):
            token = desk.asked("ca", "token", role, identity.name, "--address", "127.0.0.1")["token"]
            desk.asr("join", "-", "--identity", str(identity), given=token)
    words = ["serve", "--roles", "config-server,process-server,master-target", "--listen", "127.0.0.1:0"]
    words += ["--identity", str(own), "--name", "one", "--target-listen", "127.0.0.1:0"]
    words += ["--target-identity", str(target), *desk.site(desk.away)]
    with desk.service(*words, says=r"process server one|replicating with") as (service, _):
        served = service.wait_for(r"master-target target serves memory at (\S+)")[1]
        office = service.wait_for(r"configuration server at (\S+)")[1]
        with RemoteDriver().connect("there", {"address": served, "identity": str(engine)}) as site:
            assert site.target.replicas() == []
        desk.asr("site", "add", "a", *desk.site(desk.home))
        settings = ["--set", f"address={served}", "--set", f"identity={engine}"]
        desk.asr("site", "add", "b", "--driver", "remote", *settings)
        desk.asr("policy", "create", "gold", "--interval", "5s", "--resync-window", "always")
        desk.machine.write("vda", 0, b"an order")
        desk.asr("protect", "web", "--from", "a", "--to", "b", "--policy", "gold")

        def seen() -> list[dict[str, object]]:
            shown: list[dict[str, object]] = json.loads(fetch_text(Identity(ann), office, "GET", "/v1/machines"))
            return shown

        assert [(item["machine"], item["state"]) for item in seen()] == [("web", "protected")]

        def newest() -> str:
            return str(desk.asked("point", "list", "web")[-1]["id"])

        # Not the number of points: from the second cycle on, a cycle replaces the last point that was not kept.
        copied = newest()
        wait_until(lambda: newest() != copied, "it is replicated by the schedule")
        servers = {item["role"] for item in desk.asked("server", "list")}
        assert servers == {"process-server" if database == "server" else "engine", "master-target"}
        with RemoteDriver().connect("there", {"address": served, "identity": str(engine)}) as site:
            (replica,) = site.target.replicas()
            data = bytearray(8)
            with site.target.replica(replica).reader("vda") as reader:
                reader.read_into(0, memoryview(data))
        assert bytes(data) == b"an order"
    if database == "server":
        postgres.drop(url)
