"""What is remembered of a server that trips, and for how long."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from archiver.errors import Outcome
from archiver.model import Account, PollReport
from archiver.policy import AVOID_DAYS, avoided, quirks, remembered
from archiver.pop3 import AVOIDABLE

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
ACCOUNT = Account("id", "name", "pop3s://me@host", "implicit", "prompt")


def after(
    before: tuple[str, ...],
    *,
    avoid: tuple[str, ...] = (),
    suspect: tuple[str, ...] = (),
    outcome: Outcome = "try_later",
    days: float = 0,
) -> tuple[str, ...]:
    report = PollReport("name", outcome, avoid=avoid, suspect=suspect)
    return remembered(before, report, NOW + timedelta(days=days))


def names(avoids: tuple[str, ...], days: float = 0) -> frozenset[str]:
    return avoided(replace(ACCOUNT, avoids=avoids), NOW + timedelta(days=days))


def test_what_is_beyond_doubt_is_avoided_at_once() -> None:
    kept = after((), avoid=("PIPELINING",))
    assert kept == ("PIPELINING@2026-03-01",)
    assert names(kept) == {"PIPELINING"}


def test_what_may_be_chance_is_avoided_the_second_time() -> None:
    once = after((), suspect=("CAPA", "UIDL"))
    assert names(once) == frozenset()
    assert names(after(once, suspect=("CAPA",))) == {"CAPA"}


def test_a_poll_that_works_in_between_shows_that_it_was_chance() -> None:
    once = after((), suspect=("PIPELINING",))
    assert after(once, outcome="ok") == ()


def test_a_poll_that_fails_for_another_reason_shows_nothing() -> None:
    once = after((), suspect=("PIPELINING",))
    assert names(after(after(once), suspect=("PIPELINING",))) == {"PIPELINING"}


def test_a_poll_may_work_because_it_did_without() -> None:
    once = after((), suspect=("CAPA",), outcome="ok")
    assert names(after(once, suspect=("CAPA",), outcome="ok")) == {"CAPA"}


def test_it_is_tried_again_after_a_month() -> None:
    kept = after((), avoid=("PIPELINING",))
    assert after(kept, outcome="ok", days=AVOID_DAYS - 1) == kept
    assert names(kept, days=AVOID_DAYS + 1) == frozenset()
    assert after(kept, outcome="ok", days=AVOID_DAYS + 1) == ()


@pytest.mark.parametrize("name", AVOIDABLE)
def test_each_has_a_reason_for_people(name: str) -> None:
    (quirk,) = quirks(after((), avoid=(name,)))
    assert len(quirk.reason) > 20
    assert quirk.until == (NOW + timedelta(days=AVOID_DAYS)).date()
