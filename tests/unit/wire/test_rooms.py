"""Places in a room: who is dropped for whom."""

from __future__ import annotations

import attrs
import pytest

from asrcore.wire.rooms import Full, Room


@attrs.define(eq=False)
class Guest:
    since: float | None

    def idle_since(self) -> float | None:
        return self.since


def test_the_longest_idle_of_the_own_group_is_dropped_first() -> None:
    room: Room[Guest] = Room(10, 2)
    other, first, second, third = Guest(0.0), Guest(2.0), Guest(1.0), Guest(3.0)
    assert room.enter(other, "b") is None
    assert room.enter(first, "a") is None
    assert room.enter(second, "a") is None
    assert room.enter(third, "a") is second
    assert [guest in room for guest in (other, first, second, third)] == [True, True, False, True]


def test_in_a_full_room_the_largest_group_loses_a_place() -> None:
    room: Room[Guest] = Room(4, 4)
    crowd = [Guest(5.0), Guest(4.0), Guest(6.0)]
    for guest in crowd:
        room.enter(guest, "crowd")
    single = Guest(0.0)
    room.enter(single, "single")
    assert room.enter(Guest(9.0), "new") is crowd[1]
    assert single in room
    assert len(room) == 4


def test_who_is_at_work_is_never_dropped() -> None:
    room: Room[Guest] = Room(3, 2)
    room.enter(Guest(None), "a")
    idle = Guest(0.0)
    room.enter(idle, "a")
    assert room.enter(Guest(None), "a") is idle
    with pytest.raises(Full):
        room.enter(Guest(1.0), "a")
    room.enter(Guest(None), "b")
    with pytest.raises(Full):
        room.enter(Guest(1.0), "c")
    assert len(room) == 3


def test_a_place_that_was_given_back_is_free() -> None:
    room: Room[Guest] = Room(1, 1)
    first, second = Guest(None), Guest(None)
    room.enter(first, "a")
    assert room.leave(first)
    assert not room.leave(first)
    assert room.enter(second, "b") is None
    assert room.next_to_drop() is None


def test_who_has_just_come_is_not_dropped() -> None:
    room: Room[Guest] = Room(2, 2)
    first, second = Guest(1.0), Guest(2.0)
    room.enter(first, "a")
    room.enter(second, "b")
    with pytest.raises(Full):
        room.enter(Guest(3.0), "c", before=1.0)
    assert room.enter(Guest(3.0), "c", before=1.5) is first
