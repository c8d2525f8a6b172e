"""The planner of process servers: machines stay, orphans are spread, pins are honoured, and the plan converges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asrcore.model.server import Placement, Server
from asrcore.service.assign import assign


def server(name: str, *sites: str, alive: bool = True) -> Server:
    return Server(name, f"s-{name}", "host", frozenset(sites) if sites else None, alive, 0.0)


def machine(number: int, session: str | None = None, *, source: str = "a", busy: bool = False) -> Placement:
    return Placement(f"m{number:03}", source, "z", session, busy)


def applied(machines: Sequence[Placement], changes: Mapping[str, str]) -> list[Placement]:
    return [attrs.evolve(item, session=changes.get(item.machine, item.session)) for item in machines]


def load(machines: Sequence[Placement]) -> Counter[str | None]:
    return Counter(item.session for item in machines)


def test_where_the_target_suffices_one_that_reaches_it_is_enough_if_none_reaches_both() -> None:
    """An unplanned failover, with the primary site and the servers that reach it lost."""
    wanted = attrs.evolve(machine(1, "s-gone"), target_suffices=True)
    here, both = server("here", "z"), server("both", "a", "z")
    assert assign([here], [wanted]) == {"m001": "s-here"}
    assert assign([here], [machine(1, "s-gone")]) == {}
    assert assign([here, both], [wanted]) == {"m001": "s-both"}
    assert assign([here, attrs.evolve(both, alive=False)], [wanted]) == {"m001": "s-here"}
    assert assign([here], [attrs.evolve(wanted, session="s-here")]) == {}, "it stays"


def test_new_machines_are_spread_evenly() -> None:
    machines = [machine(number) for number in range(200)]
    changes = assign([server("one"), server("two"), server("three", alive=False)], machines)
    assert load(applied(machines, changes)) == {"s-one": 100, "s-two": 100}


def test_those_of_a_dead_server_go_to_the_living_and_no_other_moves() -> None:
    machines = [machine(number, f"s-{('one', 'two', 'three')[number % 3]}") for number in range(90)]
    changes = assign([server("one"), server("two", alive=False), server("three")], machines)
    assert set(changes) == {item.machine for item in machines if item.session == "s-two"}
    assert load(applied(machines, changes)) == {"s-one": 45, "s-three": 45}


def test_a_session_that_is_not_registered_any_more_is_a_dead_one() -> None:
    assert assign([server("one")], [machine(1, "s-of-yesterday")]) == {"m001": "s-one"}


def test_a_new_server_gets_its_share_of_machines_at_rest() -> None:
    machines = [machine(number, "s-one", busy=number < 30) for number in range(100)]
    changes = assign([server("one"), server("two")], machines)
    assert not set(changes) & {item.machine for item in machines if item.busy}
    assert abs(load(applied(machines, changes))["s-two"] - 50) <= 5


@pytest.mark.parametrize(("one", "two"), [(1, 0), (50, 46), (100, 91)])
def test_a_small_difference_is_left(one: int, two: int) -> None:
    machines = [machine(number, "s-one" if number < one else "s-two") for number in range(one + two)]
    assert assign([server("one"), server("two")], machines) == {}


def test_pinned_sites_are_served_by_those_who_reach_them() -> None:
    machines = [machine(number, source="a" if number % 2 else "b") for number in range(20)]
    changes = assign([server("one", "a", "z"), server("two", "b", "z")], machines)
    assert all(changes[item.machine] == ("s-one" if item.source_site == "a" else "s-two") for item in machines)


def test_a_machine_that_nobody_can_take_is_left_as_it_is() -> None:
    machines = [machine(1, "s-gone", source="b"), machine(2, None, source="b")]
    assert assign([server("one", "a", "z")], machines) == {}
    assert assign([], machines) == {}


def test_a_server_whose_pins_were_changed_gives_machines_up() -> None:
    assert assign([server("one", "a", "z"), server("two")], [machine(1, "s-one", source="b")]) == {"m001": "s-two"}


names = st.sampled_from(["one", "two", "three", "four"])
servers = st.lists(
    st.builds(
        lambda name, sites, alive: server(name, *sites, alive=alive),
        names,
        st.sampled_from([(), ("a", "z"), ("b", "z"), ("a", "b", "z")]),
        st.booleans(),
    ),
    unique_by=lambda item: item.name,
    max_size=4,
)
machines = st.lists(
    st.tuples(st.sampled_from(["a", "b"]), st.none() | names.map("s-{}".format), st.booleans()), max_size=40
).map(
    lambda rows: [
        machine(number, session, source=source, busy=busy) for number, (source, session, busy) in enumerate(rows)
    ]
)


@given(servers=servers, machines=machines)
def test_any_plan_is_possible_complete_and_at_rest(servers: list[Server], machines: list[Placement]) -> None:
    after = applied(machines, changes := assign(servers, machines))
    by_session = {item.session: item for item in servers if item.alive}
    for before, now in zip(machines, after, strict=True):
        able = [item for item in by_session.values() if item.reaches(now.source_site, now.target_site)]
        if able:
            assert by_session[str(now.session)] in able
        else:
            assert now.session == before.session
        if before.session in {item.session for item in able} and before.busy:
            assert now.session == before.session
    assert all(changes[item.machine] != item.session for item in machines if item.machine in changes)
    assert assign(servers, after) == {}, "the same plan again changes nothing"
