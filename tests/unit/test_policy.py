"""Decisions: identity, deletion, waiting."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archiver import policy
from archiver.model import UNKNOWN_SIZE, DeletePolicy, PollReport, SightingKey
from archiver.policy import NextPoll, Setbacks

NOW = datetime(2024, 2, 29, 12, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Listed:
    uidl: bytes | None
    size: int | None


def lowest(low: float, _high: float) -> float:
    return low


def highest(_low: float, high: float) -> float:
    return high


def report(outcome: str = "ok", **others: object) -> PollReport:
    return PollReport("a", outcome, **others)


# Identity.


def test_an_id_that_stands_once_identifies_and_another_does_not() -> None:
    entries = [Listed(b"a", 1), Listed(b"twice", 2), Listed(b"twice", 3), Listed(None, 4), Listed(b"b", None)]
    found = policy.identify(entries)
    assert [item.certain for item in found] == [True, False, False, False, True]
    assert found[0].sighting == SightingKey(b"a", 1, b"")
    assert found[3].sighting == SightingKey(b"", 4, b"")
    assert found[4].sighting.size == UNKNOWN_SIZE
    assert [item.entry for item in found] == entries


@given(st.lists(st.tuples(st.none() | st.binary(max_size=2), st.none() | st.integers(0, 3))))
def test_certain_sightings_are_never_shared(pairs: list[tuple[bytes | None, int | None]]) -> None:
    found = policy.identify([Listed(uidl, size) for uidl, size in pairs])
    certain = [item.sighting.uidl for item in found if item.certain]
    assert len(set(certain)) == len(certain)
    others = {item.entry.uidl for item in found if not item.certain}
    assert not others & set(certain)


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
            report(listed=3, known=3), setbacks=Setbacks(4, 2), interval_seconds=300.0, uniform=uniform
        )
        assert following == NextPoll(pytest.approx(seconds), Setbacks())


def test_what_is_left_is_fetched_at_once() -> None:
    following = policy.next_poll(
        report(listed=9, new=3), setbacks=Setbacks(), interval_seconds=300.0, uniform=highest
    )
    assert following.after_seconds == 0.0


@pytest.mark.parametrize("interval_seconds", [1e12, float("inf")])
def test_no_interval_is_longer_than_a_month(interval_seconds: float) -> None:
    following = policy.next_poll(
        report(), setbacks=Setbacks(), interval_seconds=interval_seconds, uniform=highest
    )
    assert following.after_seconds == pytest.approx(1.1 * policy.LONGEST_WAIT_SECONDS)


def test_passing_trouble_is_backed_off_with_full_jitter_up_to_an_hour() -> None:
    waits = []
    setbacks = Setbacks()
    for _ in range(9):
        following = policy.next_poll(
            report("try_later"), setbacks=setbacks, interval_seconds=300.0, uniform=highest
        )
        waits.append(following.after_seconds)
        setbacks = following.setbacks
    assert waits == [30, 60, 120, 240, 480, 960, 1920, 3600, 3600]
    assert setbacks == Setbacks(failures=9)
    following = policy.next_poll(
        report("try_later"), setbacks=Setbacks(10_000), interval_seconds=300.0, uniform=lowest
    )
    assert following.after_seconds == 0.0


@pytest.mark.parametrize("outcome", ["ok", "try_later", "operator_needed"])
def test_what_the_server_asked_for_is_kept(outcome: str) -> None:
    following = policy.next_poll(
        report(outcome, wait_seconds=9000.0), setbacks=Setbacks(), interval_seconds=300.0, uniform=lowest
    )
    assert following.after_seconds == 9000.0


def test_the_fourth_refusal_waits_for_an_operator() -> None:
    setbacks = Setbacks(failures=7)
    waits = []
    for _ in range(4):
        following = policy.next_poll(
            report("operator_needed", error="wrong password"),
            setbacks=setbacks,
            interval_seconds=300.0,
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
        interval_seconds=300.0,
        uniform=lowest,
    )
    assert (following.after_seconds, following.pause_reason) == (None, "it differs")


@pytest.mark.parametrize("others", [{"listed": 0}, {"journal_uncertain": True}])
def test_an_operator_needed_for_the_service_pauses_no_account(others: dict[str, object]) -> None:
    following = policy.next_poll(
        report("operator_needed", error="access denied", **others),
        setbacks=Setbacks(refusals=3),
        interval_seconds=300.0,
        uniform=highest,
    )
    assert following == NextPoll(30.0, Setbacks(1, 3))


# What the server announced.


@pytest.mark.parametrize("outcome", ["ok", "try_later", "lease_lost", "operator_needed"])
def test_a_login_delay_is_a_lower_bound_whatever_happened(outcome: str) -> None:
    following = policy.next_poll(
        report(outcome, login_delay_seconds=9000.0, listed=3, new=1),
        setbacks=Setbacks(),
        interval_seconds=300.0,
        uniform=lowest,
    )
    assert following.after_seconds == 9000.0 + policy.LOGIN_DELAY_MARGIN_SECONDS


@pytest.mark.parametrize("login_delay_seconds", [None, 0.0, 100.0])
def test_a_login_delay_shorter_than_the_interval_changes_nothing(login_delay_seconds: float | None) -> None:
    following = policy.next_poll(
        report(login_delay_seconds=login_delay_seconds),
        setbacks=Setbacks(),
        interval_seconds=300.0,
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
