"""Calendars: intervals that adapt, cron expressions, blackouts, and clocks that jump."""

from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archiver.model import Account
from archiver.timetable import Timetable, check_cron, next_moment, parse_blackout, parse_zone

DAY = st.integers(0, 6)
ACCOUNT = Account(id="0", name="a", url="pop3s://a@host", tls="implicit", secret_reference="")
BERLIN = "Europe/Berlin"
"""Summer time begins on 30 March 2025 at 01:00 UTC, and ends on 26 October at 01:00 UTC."""


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def timetable(**settings: Any) -> Timetable:
    return Timetable.of(replace(ACCOUNT, **settings))


# Cron.


def fires(expression: str, zone: str, after: str, count: int) -> list[str]:
    table = timetable(cron=expression, time_zone=zone)
    found, moment = [], at(after)
    for _ in range(count):
        moment = table.next_cron(moment) or moment
        found.append(f"{moment:%m-%d %H:%M}")
    return found


def test_cron_counts_its_days_from_sunday() -> None:
    # 2025-01-05 is a Sunday.
    for sunday in ("0", "7", "sun"):
        assert fires(f"0 6 * * {sunday}", "UTC", "2025-01-01", 2) == ["01-05 06:00", "01-12 06:00"]
    assert fires("0 6 * * 1-5/2", "UTC", "2025-01-04", 4) == [
        f"01-{day} 06:00" for day in ("06", "08", "10", "13")
    ]
    assert fires("0 6 * * 5-7", "UTC", "2025-01-01", 4) == [
        f"01-{day} 06:00" for day in ("03", "04", "05", "10")
    ]


def test_days_of_the_month_and_of_the_week_are_either_or() -> None:
    # As in Debian's cron: the 13th, and every Friday. 2025-06-13 is a Friday.
    assert fires("0 6 13 * fri", "UTC", "2025-06-01", 4) == [
        f"06-{day} 06:00" for day in ("06", "13", "20", "27")
    ]
    assert fires("0 6 13 * mon", "UTC", "2025-06-10", 2) == ["06-13 06:00", "06-16 06:00"]
    assert fires("0 6 */2 * mon", "UTC", "2025-06-01", 2) == ["06-09 06:00", "06-23 06:00"]


def test_a_moment_that_the_clock_skips_comes_right_after_the_jump() -> None:
    assert fires("30 2 * * *", BERLIN, "2025-03-28T12:00", 3) == ["03-29 01:30", "03-30 01:00", "03-31 00:30"]
    assert fires("15,45 2 * * *", BERLIN, "2025-03-29T12:00", 3) == [
        "03-30 01:00",
        "03-31 00:15",
        "03-31 00:45",
    ]


def test_a_fixed_time_in_an_hour_that_comes_twice_is_used_once() -> None:
    assert fires("30 2 * * *", BERLIN, "2025-10-25T12:00", 2) == ["10-26 00:30", "10-27 01:30"]
    # Also if the question is asked in the second of the two hours.
    assert fires("30 2 * * *", BERLIN, "2025-10-26T01:10", 1) == ["10-27 01:30"]
    assert fires("45 2 * * *", BERLIN, "2025-10-26T01:50", 1) == ["10-27 01:45"]


def test_an_expression_with_a_star_follows_real_time() -> None:
    assert fires("0 * * * *", BERLIN, "2025-10-25T23:30", 4) == [
        *("10-26 00:00", "10-26 01:00", "10-26 02:00", "10-26 03:00")
    ]
    assert fires("*/30 * * * *", BERLIN, "2025-03-30T00:30", 2) == ["03-30 01:00", "03-30 01:30"]


MINUTES = st.sampled_from(["0", "30", "*/20", "5,55", "10-12"])
HOURS = st.sampled_from(["*", "2", "0-3", "*/6", "23"])
DAYS = st.sampled_from([("*", "*"), ("1", "*"), ("*", "1-5"), ("13", "fri"), ("*", "7"), ("L", "*")])


@given(MINUTES, HOURS, DAYS, st.sampled_from(["UTC", BERLIN]), st.integers(0, 366 * 24 * 3600))
def test_the_next_moment_is_later_and_every_moment_between_gives_the_same(
    minute: str, hour: str, days: tuple[str, str], zone: str, second: int
) -> None:
    cron = check_cron(f"{minute} {hour} {days[0]} * {days[1]}")
    after = at("2025-01-01") + timedelta(seconds=second)
    found = next_moment(cron, parse_zone(zone), after)
    assert found > after
    assert next_moment(cron, parse_zone(zone), found - timedelta(seconds=1)) == found
    assert next_moment(cron, parse_zone(zone), after + (found - after) / 2) == found


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "five fields"),
        ("0 6 * *", "five fields"),
        ("0 6 * * * *", "five fields"),
        ("61 6 * * *", "bad minute"),
        ("0 6 * * 8", "bad day-of-week"),
        ("0 6 * * 1/0", "bad day-of-week"),
        ("0 6 * * fri-mon", "bad day-of-week"),
        ("0 0 30 2 *", "bad day-of-month"),
        ("0 0 */31 2 mon#5", "never comes"),
        ("a b c d e", "bad minute"),
        ("@daily", "five fields"),
    ],
)
def test_an_expression_that_is_wrong_is_refused_with_the_field(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_cron(text)


@given(st.lists(st.text("0123456789*/,-#LWmonfrijan", max_size=6), min_size=5, max_size=5))
def test_any_expression_is_either_refused_or_comes(fields: list[str]) -> None:
    text = " ".join(fields)
    with suppress(ValueError):
        assert next_moment(check_cron(text), UTC, at("2025-01-01")) > at("2025-01-01")


@pytest.mark.parametrize("name", ["", "Europe/Atlantis", "../../etc/passwd", "/etc/passwd", "\x00"])
def test_what_is_no_time_zone_is_said(name: str) -> None:
    with pytest.raises(ValueError, match="unknown time zone"):
        parse_zone(name)


# Blackouts.


def test_office_hours_end_in_the_evening_and_a_weekend_night_in_the_morning() -> None:
    table = timetable(blackout="Mon-Fri 08:00-18:00, Sat 22:00-02:00")
    # 2025-01-06 is a Monday.
    assert table.blackout_ends(at("2025-01-06T07:59:59")) is None
    assert table.blackout_begins(at("2025-01-06T07:59:59")) == at("2025-01-06T08:00")
    assert table.blackout_ends(at("2025-01-06T08:00")) == at("2025-01-06T18:00")
    assert table.blackout_ends(at("2025-01-06T18:00")) is None
    assert table.blackout_ends(at("2025-01-11T12:00")) is None
    assert table.blackout_ends(at("2025-01-12T01:00")) == at("2025-01-12T02:00")
    assert table.blackout_begins(at("2025-01-12T02:00")) == at("2025-01-13T08:00")


def test_windows_that_touch_are_one() -> None:
    table = timetable(blackout="22:00-24:00, 00:00-06:00")
    assert table.blackout_ends(at("2025-01-06T23:00")) == at("2025-01-07T06:00")


def test_a_weekend_wraps_around_the_week() -> None:
    table = timetable(blackout="Sat-Mon 00:00-24:00")
    assert table.blackout_ends(at("2025-01-11T12:00")) == at("2025-01-14")


def test_without_a_blackout_polling_is_always_allowed() -> None:
    assert timetable().blackout_ends(at("2025-01-01")) is None
    assert timetable().blackout_begins(at("2025-01-01")) is None


def test_a_blackout_follows_its_zone_through_the_year() -> None:
    table = timetable(blackout="08:00-18:00", time_zone=BERLIN)
    assert table.blackout_ends(at("2025-01-06T08:00")) == at("2025-01-06T17:00")
    assert table.blackout_ends(at("2025-07-07T08:00")) == at("2025-07-07T16:00")


def test_of_an_hour_that_comes_twice_a_blackout_takes_both() -> None:
    table = timetable(blackout="02:00-02:30", time_zone=BERLIN)
    assert table.blackout_ends(at("2025-10-26T00:00")) == at("2025-10-26T01:30")


def test_a_blackout_in_an_hour_that_does_not_exist_has_its_length() -> None:
    table = timetable(blackout="02:15-02:45", time_zone=BERLIN)
    begins = table.blackout_begins(at("2025-03-30T00:00"))
    assert begins == at("2025-03-30T01:15")
    assert table.blackout_ends(begins) == at("2025-03-30T01:45")


@given(
    st.lists(
        st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 1439), st.integers(1, 1440)),
        max_size=4,
    ),
    st.integers(0, 14 * 1440),
)
def test_a_blackout_covers_what_it_says_and_no_other_minute(
    windows: list[tuple[int, int, int, int]], minute: int
) -> None:
    names = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
    parts, covered = [], set()
    for first, last, start, end in windows:
        if start == end:
            continue
        parts.append(
            f"{names[first]}-{names[last]} {start // 60:02}:{start % 60:02}-{end // 60:02}:{end % 60:02}"
        )
        for offset in range((last - first) % 7 + 1):
            day = (first + offset) % 7
            until = end if end > start else end + 1440
            covered |= {(day * 1440 + covers) % (7 * 1440) for covers in range(start, until)}
    if len(covered) == 7 * 1440:
        with pytest.raises(ValueError, match="no time"):
            parse_blackout(", ".join(parts))
        return
    table = timetable(blackout=", ".join(parts))
    monday = at("2025-01-06")
    ends_at = table.blackout_ends(monday + timedelta(minutes=minute))
    assert (ends_at is not None) == (minute % (7 * 1440) in covered)
    if ends_at is not None:
        assert int((ends_at - monday) / timedelta(minutes=1)) % (7 * 1440) not in covered


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("weekdays", "not a blackout"),
        ("8-18", "not a blackout"),
        ("08:00-18:00,", "not a blackout"),
        ("Fry 08:00-18:00", "not a day"),
        ("08:00-24:01", "not a time of day"),
        ("08:60-09:00", "not a time of day"),
        ("08:00-08:00", "no length"),
        ("24:00-08:00", "no length"),
        ("00:00-24:00", "leaves no time"),
        ("Mon-Sat 00:00-24:00, Sun 00:00-12:00, Sun 12:00-24:00", "leaves no time"),
    ],
)
def test_what_is_no_blackout_is_said(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_blackout(text)


# Intervals that adapt.


def test_an_interval_grows_while_nothing_comes_and_falls_when_mail_does() -> None:
    table = timetable(interval_seconds=60.0, interval_max_seconds=300.0)
    stands_at, seen = None, []
    for news in (False, False, False, False, False, False, True, False):
        stands_at = table.adapted_seconds(stands_at, news=news)
        seen.append(stands_at)
    assert seen == [60, 90, 135, 202.5, 300, 300, 60, 90]
    assert timetable().adapted_seconds(60.0, news=False) is None


def test_an_interval_whose_limits_were_changed_stays_within_them() -> None:
    table = timetable(interval_seconds=60.0, interval_max_seconds=100.0)
    assert table.adapted_seconds(5000.0, news=False) == 100.0
    assert table.adapted_seconds(1.0, news=False) == 90.0
    with pytest.raises(ValueError, match="shorter"):
        timetable(interval_seconds=60.0, interval_max_seconds=59.0)
