"""The journal: later records win, a torn tail is cut off, indexed records are durable."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asr_storage.replica.journal import Change, Cycle, Journal, Kind, file_stem, resolve
from asrcore.model.extent import Extent

changes = st.builds(Change, st.integers(0, 60), st.integers(0, 30), st.sampled_from(Kind))


@settings(deadline=None)
@given(st.lists(changes, max_size=15))
def test_resolve_is_painting_in_order(items: list[Change]) -> None:
    painted: list[Kind | None] = [None] * 100
    for item in items:
        painted[item.offset : item.end] = [item.kind] * item.length
    result = resolve(items)
    shown: list[Kind | None] = [None] * 100
    for item in result:
        assert item.length > 0
        shown[item.offset : item.end] = [item.kind] * item.length
    assert shown == painted
    for one, two in itertools.pairwise(result):
        assert one.end < two.offset or (one.end == two.offset and one.kind is not two.kind)


def journal(directory: Path, cycle_id: str = "c1") -> Journal:
    return Journal.create(directory, Cycle(cycle_id, 1, "p0", {"vda": 4096, "sda": 4096}, ("vda", "sda")))


def test_what_is_flushed_is_done_after_a_restart(tmp_path: Path) -> None:
    first = journal(tmp_path)
    first.write("vda", 512, memoryview(b"x" * 512))
    first.note("sda", 0, 1024, Kind.ZERO)
    first.note("sda", 2048, 1024, Kind.SAME)
    first.flush()
    first.write("vda", 2048, memoryview(b"y" * 512))
    first.close()
    again = Journal.load(tmp_path)
    assert again is not None
    assert again.cycle == first.cycle
    assert again.done("vda") == [Extent(512, 512)]
    assert again.done("sda") == [Extent(0, 1024), Extent(2048, 1024)]
    assert again.data_path("vda").read_bytes()[512:1024] == b"x" * 512
    again.close()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 23), st.binary(max_size=40))
def test_torn_tail_is_ignored_and_written_over(
    tmp_path_factory: pytest.TempPathFactory, torn: int, garbage: bytes
) -> None:
    tmp_path = tmp_path_factory.mktemp("journal")
    first = journal(tmp_path)
    for offset in (0, 1024, 2048):
        first.write("vda", offset, memoryview(b"x" * 512))
        first.flush()
    first.close()
    index = tmp_path / "journal" / "index"
    whole = index.read_bytes()
    assert len(whole) == 3 * 24
    index.write_bytes(whole[: 2 * 24 + torn] + garbage[: 24 - torn - 1 if torn < 23 else 0])
    again = Journal.load(tmp_path)
    assert again is not None
    assert again.done("vda") == [Extent(0, 512), Extent(1024, 512)]
    again.note("sda", 0, 512, Kind.ZERO)
    again.flush()
    again.close()
    last = Journal.load(tmp_path)
    assert last is not None
    assert last.done("vda") == [Extent(0, 512), Extent(1024, 512)]
    assert last.done("sda") == [Extent(0, 512)]


def test_records_of_another_cycle_do_not_count(tmp_path: Path) -> None:
    one = journal(tmp_path)
    one.note("vda", 0, 512, Kind.ZERO)
    one.flush()
    records = (tmp_path / "journal" / "index").read_bytes()
    one.remove()
    assert Journal.load(tmp_path) is None
    two = journal(tmp_path, "c2")
    (tmp_path / "journal" / "index").write_bytes(records)
    two.close()
    again = Journal.load(tmp_path)
    assert again is not None
    assert again.done("vda") == []


def test_disk_ids_make_plain_file_names() -> None:
    assert file_stem("vda") == "vda"
    for odd in ("../../etc/passwd", "scsi0:1", "..", ".", "a b", "nbd:x", "ü"):
        stem = file_stem(odd)
        assert "/" not in stem
        assert ":" not in stem
        assert not stem.startswith(".")
