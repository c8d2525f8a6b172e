"""A host that loses power or its network: the other side notices within 30 seconds, so that its locks end."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from sqlalchemy import create_engine

from asrcore.vault import Vault
from asrcore.vault._place import Place
from tests.postgres import Cluster, cluster

BOUND = 30


@pytest.fixture(scope="module")
def over_tcp() -> Iterator[Cluster]:
    with cluster(tcp=True) as server:
        yield server


@pytest.fixture
def url(over_tcp: Cluster) -> Iterator[str]:
    made = over_tcp.create()
    yield over_tcp.tcp_url(over_tcp.name(made))
    over_tcp.drop(made)


@pytest.mark.parametrize("of_jobs", [False, True], ids=["vault", "jobs"])
def test_both_sides_look_whether_the_other_still_answers(url: str, of_jobs: bool) -> None:
    """As the kernel has it, at the client, and as the server read it back from its own."""
    with Vault.create(url) as vault:
        engine = create_engine(vault.jobs_url)  # as DBOS has it
        with (engine if of_jobs else vault._engine).connect() as connection:

            def shown(name: str) -> str:
                return str(connection.exec_driver_sql(f"SHOW {name}").scalar())

            idle, every, times = (int(shown(f"tcp_keepalives_{name}")) for name in ("idle", "interval", "count"))
            assert 0 < idle + every * times < BOUND
            assert shown("tcp_user_timeout") == "20000"
            assert shown("idle_in_transaction_session_timeout") == "10s"
            driver = connection.connection.driver_connection
            assert driver is not None
            with socket.socket(fileno=socket.dup(driver.fileno())) as mine:
                assert mine.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
                names = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
                idle, every, times = (mine.getsockopt(socket.IPPROTO_TCP, name) for name in names)
                assert 0 < idle + every * times < BOUND
                assert 0 < mine.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) < BOUND * 1000
        engine.dispose()


def test_what_the_url_says_comes_first(url: str) -> None:
    own = "?keepalives_idle=60&options=-c%20tcp_user_timeout%3D7s"
    with Vault.create(url + own) as vault, vault._engine.connect() as connection:
        assert connection.exec_driver_sql("SHOW tcp_user_timeout").scalar() == "7000"
    place = Place.of(url + own)
    assert place.url.query["keepalives_idle"] == "60"
    assert place.url.query["keepalives_interval"] == "5"
    assert place.shown == url + own
