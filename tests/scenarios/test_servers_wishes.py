"""What a server announces, and what a poll makes of it: delays between logins, expiry, its name."""

import itertools
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from structlog.testing import capture_logs

from archiver import policy
from archiver.db.tables import lease
from archiver.model import Account, PollReport
from tests.harness.scripted_pop3 import CAPABILITIES, MailboxPlay, ScriptedPop3, Send
from tests.scenarios.story import Archive, message

DELAY_SECONDS = 7200.0


@pytest.fixture
def archive(sqlite_url: str, tmp_path: Path) -> Iterator[Archive]:
    with Archive(sqlite_url, tmp_path) as archive:
        yield archive


def mailbox(*capabilities: str, **settings: Any) -> MailboxPlay:
    return MailboxPlay([(b"a", message("a"))], capabilities=(*CAPABILITIES, *capabilities), **settings)


def wait_seconds(archive: Archive, account: Account) -> float:
    """How long the account is left alone from now on, by the database."""
    with archive.database.reading() as connection:
        row = connection.execute(sa.select(lease.c.due_at).where(lease.c.account_id == account.id)).one()
    due_at: datetime = row.due_at
    return (due_at - datetime.now(due_at.tzinfo)).total_seconds()


@pytest.mark.parametrize(
    ("settings", "outcome"),
    [
        ({}, "ok"),
        ({"faults": {"UIDL": Send(b"-ERR [SYS/TEMP] disk\r\n")}}, "try_later"),
        ({"password": "another"}, "operator_needed"),
    ],
    ids=["ok", "failed", "login refused"],
)
def test_no_poll_comes_sooner_than_the_server_wants(
    archive: Archive, settings: dict[str, Any], outcome: str
) -> None:
    account = archive.add(archive.serve(mailbox("LOGIN-DELAY 7200 USER", **settings)), interval_seconds=10.0)
    report = archive.sync(account)
    assert (report.outcome, report.login_delay_seconds) == (outcome, DELAY_SECONDS)
    least = DELAY_SECONDS + policy.LOGIN_DELAY_MARGIN_SECONDS - 60.0  # what this test may take
    assert wait_seconds(archive, account) >= least


def test_an_interval_that_is_longer_stays(archive: Archive) -> None:
    account = archive.add(archive.serve(mailbox("LOGIN-DELAY 10")), interval_seconds=1000.0)
    assert archive.sync(account).login_delay_seconds == 10.0
    assert wait_seconds(archive, account) > 800.0


def sync_by_halves(archive: Archive, server: ScriptedPop3) -> PollReport:
    """Each poll makes room for others after a few messages: each look at the clock is a tenth of a second."""
    looks = itertools.count()
    ports = archive.ports(monotonic=lambda: next(looks) / 10, session_seconds=4.0)
    return archive.sync(archive.add(server), ports)


def test_a_mailbox_is_not_worked_off_where_the_next_login_would_be_refused(archive: Archive) -> None:
    messages = [(b"%d" % number, message(str(number))) for number in range(40)]
    capabilities = tuple(each for each in CAPABILITIES if each != "PIPELINING")
    patient = archive.serve(MailboxPlay(list(messages), capabilities=capabilities))
    report = sync_by_halves(archive, patient)
    assert (report.counts.new, report.to_come) == (40, 0)
    assert patient.connections > 1
    strict = archive.serve(MailboxPlay(list(messages), capabilities=(*capabilities, "LOGIN-DELAY 7200")))
    report = sync_by_halves(archive, strict)
    assert (report.outcome, strict.connections) == ("ok", 1)
    assert report.to_come


def test_the_polls_line_says_who_answered_and_what_is_wrong_there(archive: Archive) -> None:
    account = archive.add(archive.serve(mailbox("EXPIRE 0")))
    with capture_logs() as lines:
        report = archive.sync(account)
    [line] = [line for line in lines if line["event"] == "poll.ended"]
    assert (report.outcome, line["log_level"], line["implementation"]) == ("ok", "warning", "scripted")
    assert line["warnings"] == list(report.warnings)
    assert "EXPIRE 0" in report.warnings[0]


def test_a_poll_that_ends_by_a_limit_says_which_to_raise(archive: Archive) -> None:
    account = archive.add(archive.serve(mailbox()))
    ports = archive.ports(connect=lambda account: archive.connect(account, listing_bytes=1))
    with capture_logs() as lines:
        report = archive.sync(account, ports)
    assert (report.outcome, report.listed) == ("try_later", None)
    assert report.hint == "if that is right for this server, raise ARCHIVER_LISTING_BYTES"
    [line] = [line for line in lines if line["event"] == "poll.ended"]
    assert line["hint"] == report.hint
