"""The table of transitions has no holes, no dead ends and no surprises."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asrcore.errors import WrongState
from asrcore.model import state as module
from asrcore.model.state import TRANSITIONS, Event, State, allowed, possible_events

every_state = pytest.mark.parametrize("state", State, ids=lambda state: state.value)
every_event = pytest.mark.parametrize("event", Event, ids=lambda event: event.name.lower())

# States that a killed process leaves behind: each must allow the work to be resumed or abandoned.
UNDER_WAY = (State.RESYNCING, State.FAILING_OVER, State.UNDOING, State.COMMITTING, State.REVERSING, State.DISABLING)


def reachable(start: State, without: Iterable[Event] = ()) -> set[State]:
    seen, ahead = {start}, [start]
    while ahead:
        here = ahead.pop()
        for row in TRANSITIONS:
            if row.source is here and row.event not in without and row.target not in seen:
                seen.add(row.target)
                ahead.append(row.target)
    return seen


@every_state
def test_every_state_is_reached_from_the_start(state: State) -> None:
    assert state in reachable(State.ENABLING)


@every_state
def test_protection_can_be_ended_from_everywhere_in_the_end(state: State) -> None:
    assert State.DISABLING in reachable(state)


@every_state
def test_every_state_can_become_protected_but_the_last(state: State) -> None:
    assert (State.PROTECTED in reachable(state)) is (state is not State.DISABLING)


@every_event
def test_every_event_is_used(event: Event) -> None:
    assert any(row.event is event for row in TRANSITIONS)


def test_a_state_and_an_event_have_one_outcome() -> None:
    keys = [(row.source, row.event) for row in TRANSITIONS]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("state", UNDER_WAY, ids=lambda state: state.value)
def test_work_that_was_killed_can_be_repeated_or_finished(state: State) -> None:
    assert any(row.target is state for row in TRANSITIONS if row.source is state), "the same event again"


def test_workload_is_never_at_two_places_without_a_commit_or_an_undo() -> None:
    decided = (Event.COMMIT, Event.UNDO, Event.ABORT_FAILOVER)
    assert State.PROTECTED not in reachable(State.FAILED_OVER, without=decided)
    assert State.DISABLING not in reachable(State.FAILED_OVER, without=decided)


def test_failover_needs_a_sealed_point() -> None:
    before_points = (State.ENABLING, State.INITIAL_COPY, State.REVERSING)
    assert not any(row.event in (Event.FAIL_OVER, Event.TEST) and row.source in before_points for row in TRANSITIONS)


def test_test_failover_changes_no_state() -> None:
    assert all(row.source is row.target for row in TRANSITIONS if row.event is Event.TEST)


@every_state
def test_state_is_documented(state: State) -> None:
    lines = [line.strip() for line in inspect.getsource(module).splitlines()]
    at = next(i for i, line in enumerate(lines) if line == f'{state.name} = "{state.value}"')
    assert lines[at + 1].startswith('"""')
    assert lines[at + 1].endswith('."""')


def test_every_transition_has_its_reason() -> None:
    assert all(len(row.reason) > 10 for row in TRANSITIONS)


@given(st.sampled_from(State), st.sampled_from(Event))
def test_allowed_is_the_table_and_else_says_what_is_possible(state: State, event: Event) -> None:
    rows = [row for row in TRANSITIONS if (row.source, row.event) == (state, event)]
    if rows:
        assert [allowed("web", state, event)] == rows
        assert event in possible_events(state)
        return
    with pytest.raises(WrongState) as caught:
        allowed("web", state, event)
    assert caught.value.attributes["machine"] == "web"
    assert str(caught.value) == f"'web' cannot {event.value} while it is {state.value}"
    assert all(other.name.lower().replace("_", " ") in caught.value.action_text for other in possible_events(state))


@given(st.lists(st.sampled_from(Event), max_size=40))
def test_any_run_of_events_stays_in_the_table(events: list[Event]) -> None:
    state = State.ENABLING
    for event in events:
        if event in possible_events(state):
            state = allowed("web", state, event).target
        else:
            with pytest.raises(WrongState):
                allowed("web", state, event)
    assert possible_events(state)
