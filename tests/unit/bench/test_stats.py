"""Rounds become medians, ratios and build/bench.json."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise, permutations
from xml.etree import ElementTree

import pytest

from tests.bench._report import AIMS, plot
from tests.bench._stats import OURS, TIDIED, Measured, Result, document, median, order, ratio, sealed

ROUNDS = {
    OURS: [Measured(2.0, 1.5, 64, {"job_seconds": 4.0}), Measured(1.0), Measured(9.0)],
    "peer <1>": [Measured(6.0), Measured(3.0), Measured(5.0)],
}


def test_a_ratio_is_of_medians_and_more_is_better() -> None:
    assert median(ROUNDS[OURS]) == 2.0
    assert ratio(ROUNDS, "peer <1>") == 2.5


def test_a_median_of_another_number() -> None:
    rounds = [Measured(1.0, more={"bytes": value}) for value in (7.0, 3.0, 5.0)]
    assert median(rounds, "bytes") == 5.0
    with pytest.raises(KeyError):
        median(rounds, "nothing")


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, ["a", "b", "c"]),
        (1, ["c", "b", "a"]),
        (2, ["b", "c", "a"]),
        (3, ["a", "c", "b"]),
        (4, ["c", "a", "b"]),
        (5, ["b", "a", "c"]),
        (6, ["a", "b", "c"]),
    ],
)
def test_each_contender_is_first_in_turn(number: int, expected: list[str]) -> None:
    assert order(["a", "b", "c"], number) == expected
    assert order([], number) == []


def test_each_contender_comes_as_often_before_another_as_after_it() -> None:
    rounds = [order(["a", "b", "c"], number) for number in range(6)]
    followed = Counter(pair for turn in rounds for pair in pairwise(turn))
    assert followed == dict.fromkeys(permutations("abc", 2), 2)


def test_document_has_figures_rounds_machine_and_what_is_missing() -> None:
    results = [
        Result("initial", "Copy", ROUNDS, {"initial_copy_vs_nbdcopy": 1.23456}),
        Result("secure", "Secure", {"pipe": [Measured(7.0)]}, missing=["ours: not there"]),
    ]
    found = json.loads(json.dumps(document(results, {"cores": 2})))
    assert found["figures"] == {"initial_copy_vs_nbdcopy": 1.235}
    assert found["machine"] == {"cores": 2}
    assert found["not_measured"] == ["secure: ours: not there"]
    assert found["rounds"]["secure"]["pipe"][0]["seconds"] == 7.0
    assert found["rounds"]["initial"][OURS][0] == {
        "seconds": 2.0,
        "cpu_seconds": 1.5,
        "peak_rss_bytes": 64,
        "job_seconds": 4.0,
    }


def test_plot_is_an_svg_with_a_bar_for_each_contender() -> None:
    picture = ElementTree.fromstring(plot([Result("initial", "Copy & more", ROUNDS), Result("none", "None", {})]))
    bars = [element for element in picture.iter("{http://www.w3.org/2000/svg}rect") if element.get("x")]
    assert len(bars) == 2
    assert float(bars[1].get("width", 0)) == pytest.approx(2.5 * float(bars[0].get("width", 0)), rel=0.01)
    words = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"Copy & more", OURS, "peer <1>", "2 s", "5 s"} <= set(words)


def test_keys_of_the_figures() -> None:
    assert len(AIMS) == 18


def test_ours_ends_with_the_point_and_stands_there_with_its_tidying_too() -> None:
    rounds = {OURS: [Measured(3.0, more={"sealed_seconds": 1.0})], "peer": [Measured(2.0)]}
    found = sealed(rounds)
    assert list(found) == [OURS, TIDIED, "peer"]
    assert (found[OURS][0].seconds, found[TIDIED][0].seconds) == (1.0, 3.0)
    assert ratio(found, "peer") == 2.0
