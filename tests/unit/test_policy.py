"""Decisions: identity, deletion, waiting."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from archiver import policy
from archiver.errors import Outcome
from archiver.model import DeletePolicy, PollReport
from archiver.policy import NextPoll, Setbacks
from archiver.timetable import LONGEST_WAIT_SECONDS, Timetable, check_cron, parse_blackout
from tests.harness.reports import poll_report

NOW = datetime(2024, 2, 29, 12, tzinfo=UTC)


def lowest(low: float, _high: float) -> float:
    return low


def highest(_low: float, high: float) -> float:
    return high


def report(outcome: Outcome = "ok", **others: Any) -> PollReport:
    return poll_report("a", outcome, **others)


# Deletion.


@pytest.mark.parametrize(
    ("text", "after_days"),
    [("never", None), ("after-archived", 0.0), ("after-days=30", 30.0), ("after-days=1234567", 1234567.0)],
)
def test_deletion_policies_are_written_as_they_are_read(text: str, after_days: float | None) -> None:
    parsed = DeletePolicy.parse(text)
    assert parsed.after_days == after_days
    assert str(parsed) == text
    assert DeletePolicy.parse(str(parsed)) == parsed


@pytest.mark.parametrize(
    "text",
    ["", "always", "after-days", "after-days=", "after-days=-1", "after-days=1.5", "after-days=²", "NEVER"],
)
def test_other_words_are_no_deletion_policy(text: str) -> None:
    with pytest.raises(ValueError, match="use never, after-archived or after-days=N"):
        DeletePolicy.parse(text)


def test_a_message_goes_when_its_days_are_over_and_not_before() -> None:
    week = DeletePolicy(7.0)
    assert not policy.may_delete(week, NOW - timedelta(days=7) + timedelta(microseconds=1), NOW)
    assert policy.may_delete(week, NOW - timedelta(days=7), NOW)
    assert policy.may_delete(DeletePolicy(0.0), NOW, NOW)
    # A clock that was set back.
    assert not policy.may_delete(DeletePolicy(0.0), NOW + timedelta(seconds=1), NOW)
    assert not policy.may_delete(DeletePolicy(None), datetime.min.replace(tzinfo=UTC), NOW)
    assert not policy.may_delete(DeletePolicy(1e30), datetime.min.replace(tzinfo=UTC), NOW)


# Quarantine.


def test_a_set_aside_message_is_tried_ever_more_rarely() -> None:
    hours = [policy.quarantine_retry_seconds(attempts) / 3600 for attempts in (1, 2, 3, 8, 9, 500)]
    assert hours == [1, 2, 4, 128, 168, 168]


def test_the_third_connection_is_the_last() -> None:
    assert [policy.is_fatal(attempts) for attempts in (1, 2, 3, 4)] == [False, False, True, True]


# When to poll again.


def test_an_interval_is_spread_by_a_tenth() -> None:
    for uniform, seconds in ((lowest, 270.0), (highest, 330.0)):
        following = policy.next_poll(
            report(listed=3, known=3),
            setbacks=Setbacks(4, 2),
            timetable=Timetable(300.0),
            now=NOW,
            uniform=uniform,
        )
        assert following == NextPoll(following.after_seconds, Setbacks())
        assert following.after_seconds == pytest.approx(seconds)


def test_what_is_left_is_fetched_at_once() -> None:
    following = policy.next_poll(
        report(listed=9, new=3), setbacks=Setbacks(), timetable=Timetable(300.0), now=NOW, uniform=highest
    )
    assert following.after_seconds == 0.0


@pytest.mark.parametrize("interval_seconds", [1e12, float("inf")])
def test_no_interval_is_longer_than_a_month(interval_seconds: float) -> None:
    following = policy.next_poll(
        report(), setbacks=Setbacks(), timetable=Timetable(interval_seconds), now=NOW, uniform=highest
    )
    assert following.after_seconds == pytest.approx(1.1 * LONGEST_WAIT_SECONDS)


def test_passing_trouble_is_backed_off_with_full_jitter_up_to_an_hour() -> None:
    waits = []
    setbacks = Setbacks()
    for _ in range(9):
        following = policy.next_poll(
            report("try_later"), setbacks=setbacks, timetable=Timetable(300.0), now=NOW, uniform=highest
        )
        waits.append(following.after_seconds)
        setbacks = following.setbacks
    assert waits == [30, 60, 120, 240, 480, 960, 1920, 3600, 3600]
    assert setbacks == Setbacks(failures=9)
    following = policy.next_poll(
        report("try_later"), setbacks=Setbacks(10_000), timetable=Timetable(300.0), now=NOW, uniform=lowest
    )
    assert following.after_seconds == 0.0


@pytest.mark.parametrize(
    "progress",
    [
        {"new": 1},
        {"new": 20, "segments": 1},
        {"quarantined": 1, "segments": 1},
        {"deleted": 3, "segments": 1},
    ],
    ids=["one", "some", "quarantine", "deletion"],
)
def test_progress_is_no_failure(progress: dict[str, int]) -> None:
    setbacks = Setbacks(failures=5, refusals=1)
    for _ in range(20):
        following = policy.next_poll(
            report("try_later", listed=200, **progress),
            setbacks=setbacks,
            timetable=Timetable(300.0),
            now=NOW,
            uniform=highest,
        )
        assert following == NextPoll(policy.BACKOFF_BASE_SECONDS, Setbacks())
        setbacks = following.setbacks


@pytest.mark.parametrize(
    ("outcome", "what"),
    [
        ("try_later", {"known": 50}),
        ("try_later", {"quarantined": 2}),
        ("try_later", {"delete_requested": 9}),
        ("lease_lost", {"new": 20, "segments": 1}),
        ("operator_needed", {"new": 20, "segments": 1}),
    ],
)
def test_what_is_no_progress_counts_as_a_failure(outcome: Outcome, what: dict[str, int]) -> None:
    following = policy.next_poll(
        report(outcome, listed=200, **what),
        setbacks=Setbacks(failures=1),
        timetable=Timetable(300.0),
        now=NOW,
        uniform=highest,
    )
    assert following.setbacks == Setbacks(failures=2)


def test_progress_still_waits_as_long_as_the_server_asks() -> None:
    following = policy.next_poll(
        report("try_later", new=20, wait_seconds=900.0),
        setbacks=Setbacks(),
        timetable=Timetable(300.0),
        now=NOW,
        uniform=highest,
    )
    assert following.after_seconds == 900.0


@pytest.mark.parametrize("outcome", ["ok", "try_later", "operator_needed"])
def test_what_the_server_asked_for_is_kept(outcome: Outcome) -> None:
    following = policy.next_poll(
        report(outcome, wait_seconds=9000.0),
        setbacks=Setbacks(),
        timetable=Timetable(300.0),
        now=NOW,
        uniform=lowest,
    )
    assert following.after_seconds == 9000.0


def test_the_fourth_refusal_waits_for_an_operator() -> None:
    setbacks = Setbacks(failures=7)
    waits = []
    for _ in range(4):
        following = policy.next_poll(
            report("operator_needed", error="wrong password"),
            setbacks=setbacks,
            timetable=Timetable(300.0),
            now=NOW,
            uniform=lowest,
        )
        waits.append(following.after_seconds)
        setbacks = following.setbacks
    assert waits == [300.0, 1800.0, 7200.0, None]
    assert following.pause_reason == "wrong password"
    # Trouble of another kind is counted apart.
    assert setbacks == Setbacks(7, 4)


def test_damage_stops_at_once() -> None:
    following = policy.next_poll(
        report("integrity", listed=5, error="it differs"),
        setbacks=Setbacks(),
        timetable=Timetable(300.0),
        now=NOW,
        uniform=lowest,
    )
    assert (following.after_seconds, following.pause_reason) == (None, "it differs")


@pytest.mark.parametrize("others", [{"listed": 0}, {"journal_uncertain": True}])
def test_an_operator_needed_for_the_service_pauses_no_account(others: dict[str, object]) -> None:
    following = policy.next_poll(
        report("operator_needed", error="access denied", **others),
        setbacks=Setbacks(refusals=3),
        timetable=Timetable(300.0),
        now=NOW,
        uniform=highest,
    )
    assert following == NextPoll(30.0, Setbacks(1, 3))


# What the server announced.


@pytest.mark.parametrize("outcome", ["ok", "try_later", "lease_lost", "operator_needed"])
def test_a_login_delay_is_a_lower_bound_whatever_happened(outcome: Outcome) -> None:
    following = policy.next_poll(
        report(outcome, login_delay_seconds=9000.0, listed=3, new=1),
        setbacks=Setbacks(),
        timetable=Timetable(300.0),
        now=NOW,
        uniform=lowest,
    )
    assert following.after_seconds == 9000.0 + policy.LOGIN_DELAY_MARGIN_SECONDS


@pytest.mark.parametrize("login_delay_seconds", [None, 0.0, 100.0])
def test_a_login_delay_shorter_than_the_interval_changes_nothing(login_delay_seconds: float | None) -> None:
    following = policy.next_poll(
        report(login_delay_seconds=login_delay_seconds),
        setbacks=Setbacks(),
        timetable=Timetable(300.0),
        now=NOW,
        uniform=lowest,
    )
    assert following.after_seconds == pytest.approx(270.0)


@pytest.mark.parametrize(
    ("login_delay_seconds", "seconds", "too_early"),
    [(None, 0.0, False), (0.0, 0.0, False), (10.0, 14.9, True), (10.0, 15.0, False)],
)
def test_when_another_login_would_be_refused(
    login_delay_seconds: float | None, seconds: float, *, too_early: bool
) -> None:
    found = policy.is_too_early(report(login_delay_seconds=login_delay_seconds, seconds=seconds))
    assert found is too_early


# Calendars and budgets.


def test_a_cron_expression_goes_before_the_interval_and_is_not_spread() -> None:
    noon = Timetable(300.0, cron=check_cron("30 13 * * *"))
    following = policy.next_poll(report(), setbacks=Setbacks(), timetable=noon, now=NOW, uniform=highest)
    assert following.after_seconds == 90 * 60.0
    # After trouble it is not the next day that is waited for.
    following = policy.next_poll(
        report("try_later"), setbacks=Setbacks(), timetable=noon, now=NOW, uniform=highest
    )
    assert following.after_seconds == 30.0


@pytest.mark.parametrize("outcome", ["ok", "try_later", "operator_needed"])
def test_a_blackout_puts_off_whatever_is_decided(outcome: Outcome) -> None:
    office = Timetable(300.0, blackout=parse_blackout("12:00-18:00"))
    following = policy.next_poll(
        report(outcome, error="no"), setbacks=Setbacks(), timetable=office, now=NOW, uniform=lowest
    )
    assert following.after_seconds == 6 * 3600.0


def test_what_is_left_when_the_day_is_spent_waits_for_the_next() -> None:
    left = report(listed=9, new=3, stopped_by="day")
    evening = NOW.replace(hour=23, minute=50)
    # Until then the mailbox is listed at its interval, so that what waits is known.
    for moment, seconds in ((NOW, 330.0), (evening, 330.0)):
        following = policy.next_poll(
            left, setbacks=Setbacks(), timetable=Timetable(300.0), now=moment, uniform=highest
        )
        assert following.after_seconds == pytest.approx(seconds)
    following = policy.next_poll(
        left, setbacks=Setbacks(), timetable=Timetable(86400.0), now=evening, uniform=highest
    )
    assert following.after_seconds == 600.0 + 60.0 + policy.MIDNIGHT_SPREAD_SECONDS


@pytest.mark.parametrize("stopped_by", ["session", "room", None])
def test_what_is_left_for_another_reason_is_fetched_at_once(stopped_by: str | None) -> None:
    left = report(listed=9, new=3, stopped_by=stopped_by)
    following = policy.next_poll(
        left, setbacks=Setbacks(), timetable=Timetable(300.0), now=NOW, uniform=highest
    )
    assert following.after_seconds == 0.0


def test_an_adaptive_interval_is_remembered_through_trouble() -> None:
    adaptive = Timetable(60.0, interval_max_seconds=600.0)
    following = policy.next_poll(
        report(), setbacks=Setbacks(), timetable=adaptive, now=NOW, uniform=lowest, stands_at=100.0
    )
    assert following.interval_seconds == 150.0
    assert following.after_seconds == pytest.approx(135.0)
    following = policy.next_poll(
        report("try_later"), setbacks=Setbacks(), timetable=adaptive, now=NOW, uniform=lowest, stands_at=150.0
    )
    assert following.interval_seconds == 150.0


def test_not_even_who_asks_may_be_too_early() -> None:
    following = policy.next_poll(
        report(login_delay_seconds=900.0),
        setbacks=Setbacks(),
        timetable=Timetable(3600.0),
        now=NOW,
        uniform=lowest,
    )
    assert following.least_seconds == 905.0


# Hosts and threads.


def test_a_host_is_closed_after_five_and_for_a_quarter_of_an_hour_at_most() -> None:
    assert [policy.host_retry_seconds(failures, highest) for failures in (1, 4, 5, 6, 9, 10, 9999)] == [
        *(None, None, 30.0, 60.0),
        *(480.0, 900.0, 900.0),
    ]
    assert policy.host_retry_seconds(9999, lowest) == policy.HOST_LEAST_SECONDS


def test_half_of_the_threads_stay_for_those_that_work() -> None:
    assert [policy.threads_for_failing(workers) for workers in (1, 2, 3, 16)] == [1, 1, 1, 8]


def test_polls_begin_with_one_and_grow_to_all() -> None:
    assert [policy.ramped_up(16, seconds, 8.0) for seconds in (0.0, 0.4, 1.0, 4.0, 7.9, 8.0, 99.0)] == [
        *(1, 1, 2, 8, 15, 16, 16),
    ]
    assert policy.ramped_up(16, 0.0, 0.0) == 16


# Renumbering, and trust.


@pytest.mark.parametrize(
    ("known", "found", "unknown", "suspicious"),
    [
        (1000, 0, 1000, True),
        (1000, 20, 500, True),
        (10, 0, 5, True),
        (9, 0, 9, False),  # a small mailbox, emptied and filled within a day
        (1000, 21, 1000, False),
        (1000, 0, 499, False),  # emptied, with new mail
        (1000, 1000, 5000, False),
        (0, 0, 100, False),
    ],
)
def test_a_renumbering_is_suspected(known: int, found: int, unknown: int, suspicious: bool) -> None:
    assert policy.may_be_renumbered(known=known, found=found, unknown=unknown) is suspicious


@pytest.mark.parametrize(("fetched", "known", "sure"), [(0, 0, False), (4, 2, True), (4, 1, False)])
def test_a_suspicion_is_judged_by_contents(fetched: int, known: int, sure: bool) -> None:
    assert policy.is_renumbered(fetched=fetched, known=known) is sure


def test_trust_ends_with_the_first_thing_that_is_due() -> None:
    hour = timedelta(hours=1)
    assert policy.trusted_until(NOW, 14_400, [None, None], lowest) == NOW + 4 * hour
    assert policy.trusted_until(NOW, 14_400, [], highest) == NOW + 3 * hour
    assert policy.trusted_until(NOW, 14_400, [NOW + 9 * hour, NOW + hour], lowest) == NOW + hour
    assert policy.trusted_until(NOW, 14_400, [NOW], lowest) is None
    assert policy.trusted_until(NOW, 0, [], lowest) is None
    assert policy.trusted_until(NOW, 1e300, [], lowest) is not None


def test_what_is_remembered_is_trusted_no_longer_than_anything_is() -> None:
    hour = timedelta(hours=1)
    untils = (NOW - hour, NOW, NOW + hour, NOW + 4 * hour, NOW + 5 * hour)
    assert [policy.is_trusted(until, NOW, 14_400) for until in untils] == [False, False, True, True, False]
    assert not policy.is_trusted(NOW + hour, NOW, 0)
    assert policy.is_trusted(NOW + hour, NOW, 1e300)


@pytest.mark.parametrize(
    ("listed", "new", "pipelining", "worth"),
    [
        (100, 1, True, True),
        (100, 1, False, True),
        (99, 1, True, False),
        (100, 0, True, False),
        (100, -1, True, False),
        (199, 2, False, False),
        (200, 2, False, True),
        (300, 3, False, False),
        (1_600, 16, True, True),
        (100_000, 17, True, False),
    ],
)
def test_new_messages_are_asked_for_singly_where_that_spares_a_long_listing(
    listed: int, new: int, pipelining: bool, worth: bool
) -> None:
    asked = policy.is_worth_increment(listed=listed, new=new, spared_lines=100, pipelining=pipelining)
    assert asked is worth


def test_a_message_falls_due_when_its_days_are_over() -> None:
    assert policy.deletable_at(DeletePolicy(2.0), NOW) == NOW + timedelta(days=2)
    assert policy.deletable_at(DeletePolicy(None), NOW) is None
    assert policy.deletable_at(DeletePolicy(1e30), NOW) is None


def test_a_hold_and_a_ban_go_before_the_policy() -> None:
    wanted = DeletePolicy(0.0)
    assert policy.delete_in_force(wanted, suspended=None, forbidden=False) == wanted
    assert policy.delete_in_force(wanted, suspended="renumbered", forbidden=False) == DeletePolicy(None)
    assert policy.delete_in_force(wanted, suspended=None, forbidden=True) == DeletePolicy(None)
