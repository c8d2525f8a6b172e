"""Several threads, several processes, one engine."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from asrcore.errors import MachineBusy, VaultInUse
from asrcore.vault import Job, Vault
from tests.unit.service.waiting import wait_until
from tests.unit.vault import samples


def add(vault: Vault, times: int) -> None:
    """Read-modify-write, where a lost update would show."""
    for _ in range(times):
        with vault._write("test") as connection:
            before = vault._protection(connection, "id-1").attempt
            connection.exec_driver_sql(f"UPDATE protections SET attempt={before + 1}")


def test_threads_lose_no_change(vault: Vault) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: add(vault, 20), range(8)))
    assert vault.protection("id-1").attempt == 160


def test_processes_lose_no_change(vault: Vault, place: str) -> None:
    code = """
    from tests.unit.vault.test_concurrency import add
    with Vault.open(sys.argv[1]) as vault:
        print("ready", flush=True)
        sys.stdin.readline()
        add(vault, 50)
    """
    children = [samples.child(code, place) for _ in range(2)]
    for process in children:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in children:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    add(vault, 50)
    said = [process.communicate(timeout=60) for process in children]
    assert vault.protection("id-1").attempt == 150, said


def test_machines_replicate_at_once(vault: Vault) -> None:
    for number in range(2, 9):
        vault.add_protection(samples.machine(number))

    def work(number: int) -> list[str]:
        for turn in range(10):
            samples.record(vault, turn, kept=True, protection_id=f"id-{number}")
        return [item.id for item in vault.points(f"id-{number}")]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(1, 9))) == [[f"p{turn}" for turn in range(10)]] * 8


def test_a_reader_does_not_wait_for_the_writer(vault: Vault) -> None:
    written, seen = threading.Event(), threading.Event()

    def write() -> None:
        with vault._write("test") as connection:
            connection.exec_driver_sql("UPDATE protections SET attempt=7")
            written.set()
            assert seen.wait(20), "the reader had to wait"

    writer = threading.Thread(target=write)
    writer.start()
    assert written.wait(20)
    assert vault.protection("id-1").attempt == 0
    seen.set()
    writer.join()
    assert vault.protection("id-1").attempt == 7


def test_a_listing_shows_one_moment(vault: Vault) -> None:
    """A point and its pending cycle are never visible together, in any order of the threads."""
    stop = threading.Event()
    odd: list[object] = []

    def watch() -> None:
        while not stop.is_set():
            found = vault.protections()[0]
            if found.pending is not None and found.pending.point_id == found.head_point:
                odd.append(found)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for number in range(60):
        samples.record(vault, number)
    stop.set()
    watcher.join()
    assert odd == []


def test_of_two_jobs_at_once_one_is_refused(vault: Vault) -> None:
    def ask(number: int) -> bool:
        try:
            vault.add_job(Job(f"j{number}", "failover", "web-1"), exclusive=True)
        except MachineBusy:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(ask, range(8))) == 1


def test_two_engines_one_vault(vault: Vault, place: str) -> None:
    assert vault.engine_holder() is None
    with vault.engine_lock("asr run", since=0.0):
        holder = vault.engine_holder()
        assert holder is not None
        assert holder.startswith(f"asr run (pid {os.getpid()} on ")
        assert holder.endswith("since 1970-01-01T00:00:00.000Z)")
        with Vault.open(place) as second, pytest.raises(VaultInUse, match=r"asr run \(pid"), second.engine_lock("x"):
            pass
    assert vault.engine_holder() is None
    with vault.engine_lock("again"):
        assert str(vault.engine_holder()).startswith("again")


def test_the_first_error_comes_through_the_lock(vault: Vault) -> None:
    with pytest.raises(OSError, match="mine"), vault.engine_lock("x"):
        raise OSError("mine")
    assert vault.engine_holder() is None


def test_a_killed_engine_lets_go(vault: Vault, place: str) -> None:
    code = """
    with Vault.open(sys.argv[1]) as vault, vault.engine_lock("the other"):
        print("locked", flush=True)
        sys.stdin.readline()
    """
    with samples.child(code, place) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        assert str(vault.engine_holder()).startswith(f"the other (pid {other.pid}")
        with pytest.raises(VaultInUse, match="the other"), vault.engine_lock("me"):
            pass
        other.send_signal(signal.SIGKILL)
        other.wait(20)
    wait_until(lambda: vault.engine_holder() is None, "the database server has noticed its end")
    with vault.engine_lock("me"):
        assert str(vault.engine_holder()).startswith("me")


def test_asking_for_the_holder_keeps_no_engine_out(vault: Vault) -> None:
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            vault.engine_holder()

    askers = [threading.Thread(target=ask) for _ in range(2)]
    for asker in askers:
        asker.start()
    try:
        for _ in range(50):
            with vault.engine_lock("me"):
                pass
    finally:
        stop.set()
        for asker in askers:
            asker.join()


def test_two_handles_of_a_process_keep_what_others_write_beside_them(path: Path) -> None:
    """Opening a file and closing it again drops SQLite's locks on it: what is in the journal would be lost."""
    with Vault.open(path) as first:
        first.add_event(0, "", "x", "before")
        with Vault.open(path) as second:
            code, said = samples.run('Vault.open(sys.argv[1]).add_event(0, "", "x", "other")', path)
            assert code == 0, said
            second.add_event(0, "", "x", "second")
            code, said = samples.run("Vault.open(sys.argv[1]).close()", path)
            first.add_event(0, "", "x", "first")
            code, said = samples.run("print([item.text for item in Vault.open(sys.argv[1]).events()])", path)
    assert said == "['before', 'other', 'second', 'first']\n"
