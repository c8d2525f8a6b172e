"""Marks, the names of checkpoints, and the resulting tracking of each disk."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asr_driver_libvirt.source.backup_jobs import Notes
from asr_driver_libvirt.source.tracking import DiskPlan, plan_tracking
from asr_driver_libvirt.xml.domain import DiskKind, DomainDisk
from asr_driver_libvirt.xml.mark import CheckpointName, LibvirtMark, MarkedDisk, is_ours, view_key
from asrcore.driver import Tracking
from asrcore.model.point import Consistency, Mark

NAME = str(CheckpointName.make("view", 1700000000.5, Consistency.CRASH, "0af3"))
times = st.floats(0, 2**40).map(lambda seconds: int(seconds * 1000) / 1000)


@given(view=st.text(), taken_at=times, how=st.sampled_from(Consistency), owner=st.sampled_from(["", "a", "0" * 16]))
def test_a_checkpoint_name_says_its_view_time_consistency_and_vault(
    view: str, taken_at: float, how: Consistency, owner: str
) -> None:
    name = CheckpointName.make(view, taken_at, how, owner)
    text = str(name)
    assert CheckpointName.parse(text) == name
    assert (name.view, name.consistency) == (view_key(view), how)
    assert abs(name.taken_at - taken_at) < 0.002
    assert is_ours(text, owner)
    assert "/" not in text
    assert len(text) < 128


@pytest.mark.parametrize(
    "text",
    ["", "asr-", "asr-x", "asr-x.c", "backup.1c", "asr-x.1c\n", "asr-a/b.1c", "ASR-x.1c", "asr-x.1c.", "asr-x.1c.A"],
)
def test_other_names_are_not_ours(text: str) -> None:
    assert not is_ours(text, "")


def test_a_checkpoint_of_another_vault_is_not_ours() -> None:
    for owner, other in (("a", "b"), ("a", ""), ("", "a")):
        name = str(CheckpointName.make("view", 1.0, Consistency.CRASH, owner))
        assert is_ours(name, owner)
        assert not is_ours(name, other)


def test_different_views_have_different_keys() -> None:
    assert len({view_key(view) for view in ("a", "a/b", "a:b", "", "x" * 200, "x" * 201)}) == 6


marked = st.builds(MarkedDisk, path=st.text(), size=st.integers(0, 2**60), tracked=st.booleans(), stamp=st.text())
marks = st.builds(
    LibvirtMark,
    checkpoint=st.sampled_from(["", NAME]),
    disks=st.dictionaries(st.text(), marked, max_size=4),
    shut_down=st.booleans(),
)


@given(marks)
def test_a_mark_is_read_as_it_was_written(mark: LibvirtMark) -> None:
    assert LibvirtMark.parse(mark.token()) == mark
    assert LibvirtMark.parse(mark.token()).token() == mark.token()  # type: ignore[union-attr]


def test_equal_marks_have_equal_tokens_whatever_the_order_of_disks() -> None:
    one, two = MarkedDisk("/a", 1, True), MarkedDisk("/b", 2, False)
    assert LibvirtMark(NAME, {"a": one, "b": two}).token() == LibvirtMark(NAME, {"b": two, "a": one}).token()


@given(st.text() | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps))
def test_any_other_token_is_no_mark(text: str) -> None:
    assert LibvirtMark.parse(Mark(text)) is None


def test_a_mark_naming_a_checkpoint_of_others_is_no_mark() -> None:
    text = LibvirtMark(NAME, {}).token().token.replace(NAME, "theirs")
    assert LibvirtMark.parse(Mark(text)) is None


def test_notes_are_read_as_they_were_written_and_nothing_else_is() -> None:
    plans = {"vda": DiskPlan(Tracking.CHANGED, base=NAME), "vdb": DiskPlan(Tracking.NONE, "raw")}
    mark = LibvirtMark(NAME, {"vda": MarkedDisk("/a", 1, True)})
    assert Notes.read(Notes.write(mark, "since", plans)) == (mark.token().token, "since", plans)
    for text in ("", "{}", "[]", '{"mark":"","since":"","disks":{"vda":["odd","",""]}}', "somebody's own text"):
        assert Notes.read(text) is None


# -- tracking ------------------------------------------------------------------------------------------------------


def disk(disk_id: str = "vda", path: str = "/a", fmt: str = "qcow2") -> DomainDisk:
    return DomainDisk(disk_id, "disk", DiskKind.FILE, "file", path, fmt, "virtio")


def plan(
    of: DomainDisk,
    since: LibvirtMark | None = None,
    *,
    given: bool = True,
    whole: frozenset[str] = frozenset(),
    stamp: str = "",
) -> DiskPlan:
    return plan_tracking([of], given=given, since=since, whole=whole, stamps={of.id: stamp})[of.id]


def since(path: str = "/a", *, tracked: bool = True, stamp: str = "") -> LibvirtMark:
    return LibvirtMark(NAME, {"vda": MarkedDisk(path, 10, tracked, stamp)})


WHOLE = frozenset({"vda"})


@pytest.mark.parametrize(
    ("found", "tracking", "words"),
    [
        (plan(disk(), given=False), Tracking.NONE, "no mark"),
        (plan(disk(fmt="raw"), given=False), Tracking.NONE, "raw"),
        (plan(disk(), None), Tracking.LOST, "cannot be read"),
        (plan(disk("vdb"), since()), Tracking.NEW, "added"),
        (plan(disk(), since(), whole=WHOLE), Tracking.CHANGED, ""),
        (plan(disk(), since()), Tracking.LOST, "inconsistent"),
        (plan(disk(path="/b"), since()), Tracking.NEW, "replaced"),
        (plan(disk(path="/b"), since(), whole=WHOLE), Tracking.CHANGED, ""),
        (plan(disk(), since(tracked=False)), Tracking.LOST, "not tracked"),
        (plan(disk(), since(tracked=False), whole=WHOLE), Tracking.LOST, "not tracked"),
        (plan(disk(fmt="raw"), since(tracked=False)), Tracking.NONE, "raw"),
        (plan(disk(), since(stamp="s"), stamp="s"), Tracking.CHANGED, ""),
        (plan(disk(fmt="raw"), since(tracked=False, stamp="s"), stamp="s"), Tracking.CHANGED, ""),
        (plan(disk(), since(stamp="s"), stamp="t"), Tracking.LOST, "inconsistent"),
        (plan(disk(path="/b"), since(stamp="s"), stamp="s"), Tracking.NEW, "replaced"),
        (plan(disk(), since(stamp=""), stamp=""), Tracking.LOST, "inconsistent"),
    ],
)
def test_what_is_known_of_a_disk(found: DiskPlan, tracking: Tracking, words: str) -> None:
    assert found.tracking is tracking
    assert words in found.reason


@given(
    given_=st.booleans(),
    mark=st.none() | st.just(since()) | st.just(since(tracked=False)) | st.just(since(stamp="s")),
    whole=st.sampled_from([frozenset[str](), WHOLE]),
    stamp=st.sampled_from(["", "s", "t"]),
    path=st.sampled_from(["/a", "/b"]),
    fmt=st.sampled_from(["qcow2", "raw"]),
)
def test_a_delta_is_never_blind(
    given_: bool, mark: LibvirtMark | None, whole: frozenset[str], stamp: str, path: str, fmt: str
) -> None:
    found = plan(disk(path=path, fmt=fmt), mark, given=given_, whole=whole, stamp=stamp)
    if found.tracking is Tracking.CHANGED:
        assert given_
        assert mark is not None
        assert found.unchanged or (found.base == NAME and whole and fmt == "qcow2")
        assert not found.unchanged or stamp == "s"
    else:
        assert found.reason
        assert not found.base


def test_a_plan_whose_bitmap_broke_is_lost() -> None:
    assert plan(disk(), since(), whole=WHOLE).lost("broke") == DiskPlan(Tracking.LOST, "broke")
    new = plan(disk("vdb"), since())
    assert new.lost("broke") is new
