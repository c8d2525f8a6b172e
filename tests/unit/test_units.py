"""Sizes, durations and times, as people write them."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asrcore import units
from asrcore.errors import InvalidValue
from asrcore.units import GiB, KiB, MiB, TiB


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("64b", 64),
        ("1k", KiB),
        ("64MiB", 64 * MiB),
        (" 10 g ", 10 * GiB),
        ("1.5GiB", 3 * GiB // 2),
        ("2tib", 2 * TiB),
    ],
)
def test_parse_size(text: str, size: int) -> None:
    assert units.parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 30),
        ("5s", 5),
        ("15min", 900),
        ("15m", 900),
        ("24h", 86400),
        ("7d", 604800),
        ("1.5h", 5400),
        ("1w", 604800),
    ],
)
def test_parse_duration(text: str, seconds: float) -> None:
    assert units.parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "rate", "shown"),
    [
        ("20Mbit", 2.5e6, "20 Mbit/s"),
        ("1.5 gbit", 187.5e6, "1.5 Gbit/s"),
        ("512kbit", 64e3, "512 kbit/s"),
        ("1000kbit", 125e3, "1 Mbit/s"),
        ("1000Mbit", 125e6, "1 Gbit/s"),
    ],
)
def test_rates(text: str, rate: float, shown: str) -> None:
    assert units.parse_rate(text) == rate
    assert units.format_rate(rate) == shown


@pytest.mark.parametrize("text", ["20", "20MB", "20 Mbit/h", "fast", "-1Mbit", "1e9Mbit"])
def test_bad_rates_are_invalid_values(text: str) -> None:
    with pytest.raises(InvalidValue, match=re.escape("bandwidth: ")):
        units.parse_rate(text, "bandwidth")


BAD = ["", " ", "-5s", "5 5", "s", "5x", "1e3", "inf", "nan", "1,5h", "5s;", "9" * 400, "0x10", "5\ns\n5"]


@pytest.mark.parametrize("text", BAD)
def test_bad_numbers_are_invalid_values(text: str) -> None:
    for parse in (units.parse_size, units.parse_duration):
        with pytest.raises(InvalidValue, match=re.escape("interval: ")):
            parse(text, "interval")


@given(st.text(max_size=20))
def test_any_text_gives_a_number_or_a_catalogued_error(text: str) -> None:
    for parse in (units.parse_size, units.parse_duration, units.parse_time):
        try:
            value = parse(text)
        except InvalidValue:
            continue
        assert math.isfinite(value)


@given(st.floats(0, 1e18))
def test_formatted_size_is_within_its_last_digit(size: float) -> None:
    text = units.format_size(size)
    number, unit = text.split()
    step = {"B": 1, "KiB": KiB, "MiB": MiB, "GiB": GiB, "TiB": TiB}[unit]
    assert abs(float(number) * step - size) <= (0.5 if unit == "B" else 0.05) * step * 1.01


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1610612736, "1.5 GiB"),
        (5000 * TiB, "5000.0 TiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_format_size(size: float, text: str) -> None:
    assert units.format_size(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0s"),
        (4.24, "4.2s"),
        (42, "42s"),
        (185, "3m 05s"),
        (7800, "2h 10m"),
        (47 * 3600, "47h 00m"),
        (76 * 3600, "3d 4h"),
        (-185, "-3m 05s"),
        (math.inf, "infs"),
        (math.nan, "nans"),
    ],
)
def test_format_duration(seconds: float, text: str) -> None:
    assert units.format_duration(seconds) == text


@given(st.floats(0, 1e9))
def test_formatted_duration_has_no_unit_that_overflows(seconds: float) -> None:
    text = units.format_duration(seconds)
    for number, unit in re.findall(r"([\d.]+)([smh])", text):
        assert float(number) < {"s": 60.05, "m": 60, "h": 48}[unit], text


@pytest.mark.parametrize("text", ["1970-01-01T00:00:00Z", "1970-01-01T01:00:00+01:00", "1970-01-01 00:00+00:00"])
def test_times_with_an_offset(text: str) -> None:
    assert units.parse_time(text) == 0


@pytest.mark.parametrize("text", ["", "yesterday", "2026-13-01", "2026-02-30T00:00Z", "12:00"])
def test_bad_times_are_invalid_values(text: str) -> None:
    with pytest.raises(InvalidValue, match="is not accepted"):
        units.parse_time(text)


@given(st.integers(0, 4_000_000_000_000))
def test_time_round_trip_to_the_millisecond(milliseconds: int) -> None:
    at = milliseconds / 1000
    assert units.parse_time(units.format_time(at)) == pytest.approx(at, abs=0.0011)
