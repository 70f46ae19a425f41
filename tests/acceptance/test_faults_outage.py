"""The database, the store or the mail server is away, and the service is told to end in the midst of it.

An outage here takes seconds: ``OUTAGE_SECONDS=3600`` makes it the hour that
operators know. What does not shrink with it, the backoff of minutes, is told
in its own time: due times are read, and each account is polled when its comes,
which in an hour's outage is waited for and else is made to come at once.
"""

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from archiver.demo import processes
from archiver.demo.corpus import corpus as generate_corpus
from archiver.demo.dovecot import Dovecot
from tests.acceptance.test_service import Asking
from tests.conftest import Mailbox, require
from tests.harness import postgres as harness_postgres
from tests.harness.archive import Archive, Directory, sessions
from tests.harness.cli import Running
from tests.harness.cli import cli as start_cli
from tests.harness.cli import wait_for as look_for
from tests.harness.postgres import Postgres
from tests.harness.proxy import Proxy

pytestmark = [pytest.mark.slow, pytest.mark.postgres]

wait_for = partial(look_for, every_seconds=0.1)
"""Many of the looks cost a connection to the database."""

OUTAGE_SECONDS = float(os.environ.get("OUTAGE_SECONDS", "6"))
HOUR_SECONDS = 3600.0
DRAIN_SECONDS = 4.0
NOISE_SECONDS = 6.0
"""What a busy machine may add before a process is gone."""

GROWTH_BYTES = 16 * 1024 * 1024
"""Memory that an outage may cost, however long it is."""

BATCH = 10
LATENCY_SECONDS = 0.02


@pytest.fixture(scope="module")
def server(server_directory: Path) -> Iterator[Postgres]:
    """A server of these tests' own: they stop it."""
    require(harness_postgres.unavailable())
    with harness_postgres.postgres(server_directory / "postgres of outages") as made:
        yield made


@pytest.fixture
def archive(server: Postgres, _numbers: Iterator[int], tmp_path: Path) -> Iterator[Archive]:
    """PostgreSQL, and a directory, which goes away when it is renamed."""
    url = server.create_database(f"outage{next(_numbers)}")
    environment = {
        "ARCHIVER_DATABASE_URL": url,
        "ARCHIVER_STORE_URL": f"file:{tmp_path / 'store'}",
        "ARCHIVER_BATCH_MESSAGES": str(BATCH),
        "ARCHIVER_INTERVAL_SECONDS": "1",
        "ARCHIVER_LEASE_SECONDS": "5",
        "ARCHIVER_DRAIN_SECONDS": str(DRAIN_SECONDS),
    }
    with start_cli(tmp_path / "work", environment) as cli:
        cli.do("db", "upgrade")
        yield Archive(cli, Directory(tmp_path / "store"), url)


def serve(archive: Archive, boxes: list[Mailbox], *, port: int | None = None, **settings: str) -> Running:
    file = archive.accounts_file(boxes, port=port, more='delete = "after-archived"')
    return archive.cli.start("run", environment={"ARCHIVER_ACCOUNTS_FILE": str(file), **settings})


def end(service: Running) -> list[dict[str, Any]]:
    """SIGTERM; the end comes within what was set, and its log says so."""
    service.terminate()
    assert service.wait(DRAIN_SECONDS + NOISE_SECONDS).code == 0
    [draining] = service.log("service.draining")
    [stopped] = service.log("service.stopped")
    assert draining["seconds"] == DRAIN_SECONDS
    assert service.log("poll.crashed") == []
    return [stopped]


def has_emptied(archive: Archive, boxes: list[Mailbox]) -> bool:
    archive.fall_due()
    return not any(box.messages() for box in boxes)


def logins(dovecot: Dovecot, box: Mailbox) -> int:
    return dovecot.log_file.read_text().count(f"Login: user=<{box.user}>")


def test_a_database_that_is_away(
    archive: Archive, server: Postgres, dovecot: Dovecot, mailbox: Callable[..., Mailbox]
) -> None:
    (port,) = processes.free_ports(1)
    ask = Asking(f"http://127.0.0.1:{port}")
    mail = list(generate_corpus(80, seed=71, scale=0.1))
    box = mailbox(mail[:40])
    with Proxy(dovecot.pop3s_port, latency_seconds=LATENCY_SECONDS) as line:
        service = serve(archive, [box], port=line.port, ARCHIVER_HTTP_LISTEN=f"127.0.0.1:{port}")
        wait_for(lambda: len(archive.captured()) >= BATCH, "a poll goes on")
        server.kill()
        box.deliver(mail[40:])
        wait_for(lambda: ask("/readyz")[0] == 503, "it is not ready", seconds=90)
        assert ask("/livez")[0] == 200
        wait_for(lambda: service.log("claim.failed"), "it cannot claim", seconds=90)
        before, memory = logins(dovecot, box), service.peak_resident_bytes()
        time.sleep(OUTAGE_SECONDS)

        # Who cannot claim asks no mail server; and it neither grows nor dies.
        assert logins(dovecot, box) == before
        assert ask("/livez")[0] == 200
        peak = service.peak_resident_bytes()
        assert memory is not None
        assert peak is not None
        assert peak - memory < GROWTH_BYTES
        server.start()
        archive.expect_none_lost(mail, box.messages())
        wait_for(lambda: ask("/readyz")[0] == 200, "it is ready again")
        wait_for(partial(has_emptied, archive, [box]), "it goes on by itself", seconds=90)
        assert end(service)[0]["unfinished"] == 0
    archive.expect_each_once(mail)


def test_a_store_that_is_away_for_an_hour(
    archive: Archive, dovecot: Dovecot, mailbox: Callable[..., Mailbox], tmp_path: Path
) -> None:
    mail = list(generate_corpus(3 * BATCH, seed=72, scale=0.1))
    box = mailbox()
    service = serve(archive, [box])
    wait_for(lambda: service.log("poll.ended"), "an empty mailbox is polled")
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    box.deliver(mail)
    wait_for(partial(has_failed, service, 1), "the store is missed")
    memory = service.peak_resident_bytes()

    # Each wait is read from where the service reads it.
    waited_seconds, polls = 0.0, 1
    while waited_seconds < HOUR_SECONDS:
        seconds = backed_off_seconds(archive)
        waited_seconds += seconds
        if OUTAGE_SECONDS < HOUR_SECONDS:
            archive.fall_due()
        else:
            time.sleep(seconds)
        polls += 1
        wait_for(partial(has_failed, service, polls), "another poll fails")

    # An hour of 1-second polls would be 3600 logins. Full jitter: some waits are short, few are.
    assert polls <= 40
    # A poll looks at the store before it fetches, so nothing is fetched for nothing.
    assert [session.retr for session in sessions(box, 1) if session.retr] == []
    assert box.messages() == mail
    assert archive.captured() == []
    peak = service.peak_resident_bytes()
    assert memory is not None
    assert peak is not None
    assert peak - memory < GROWTH_BYTES
    (tmp_path / "elsewhere").rename(tmp_path / "store")
    wait_for(partial(has_emptied, archive, [box]), "it goes on by itself", seconds=90)
    assert end(service)[0]["unfinished"] == 0
    archive.expect_each_once(mail)


def has_failed(service: Running, polls: int) -> bool:
    failed = [line for line in service.log("poll.ended") if line["outcome"] != "ok"]
    return len(failed) >= polls


def backed_off_seconds(archive: Archive) -> float:
    """How long the one account is left in peace, once its poll has given it back."""

    def asleep() -> list[tuple[Any, ...]]:
        return archive.rows("SELECT extract(epoch FROM due_at - now()) FROM lease WHERE owner IS NULL")

    [(seconds,)] = wait_for(asleep, "the poll gives the account back")
    return max(0.0, float(seconds))


def test_sigterm_in_the_middle_of_a_large_mailbox(
    archive: Archive, dovecot: Dovecot, mailbox: Callable[..., Mailbox]
) -> None:
    mail = list(generate_corpus(600, seed=73, scale=0.05))
    boxes = [mailbox(mail[:500]), mailbox(mail[500:])]
    with Proxy(dovecot.pop3s_port, latency_seconds=LATENCY_SECONDS, bytes_per_second=300_000) as line:
        service = serve(archive, boxes, port=line.port, ARCHIVER_WORKERS="1")
        wait_for(lambda: len(archive.captured()) >= 2 * BATCH, "a poll goes on")

        assert end(service)[0]["unfinished"] == 0

    # The messages that were asked for are recorded, QUIT was said, the lease given back; no other claimed.
    [poll] = service.log("poll.ended")
    assert (poll["outcome"], poll["to_come"]) == ("ok", poll["listed"] - poll["new"])
    assert 2 * BATCH <= poll["new"] < 500
    assert len(archive.captured()) == poll["new"]
    polled = next(box for box in boxes if box.user == poll["account"])
    [session] = sessions(polled, 1)
    assert (session.quit, session.retr) == (True, poll["new"])
    assert archive.rows("SELECT count(*) FROM lease WHERE owner IS NOT NULL") == [(0,)]
    archive.expect_none_lost(mail, [message for box in boxes for message in box.messages()])

    again = serve(archive, boxes)
    wait_for(partial(has_emptied, archive, boxes), "the next process does the rest", seconds=90)
    end(again)
    archive.expect_each_once(mail)


def test_sigterm_while_the_mail_server_says_nothing(
    archive: Archive, dovecot: Dovecot, mailbox: Callable[..., Mailbox]
) -> None:
    mail = list(generate_corpus(60, seed=74, scale=0.2))
    box = mailbox(mail)
    with Proxy(dovecot.pop3s_port, latency_seconds=LATENCY_SECONDS, bytes_per_second=200_000) as line:
        service = serve(archive, [box], port=line.port)
        wait_for(lambda: len(archive.captured()) >= BATCH, "a poll goes on")
        line.break_now("stall")

        # The poll waits for up to a minute; the process does not.
        assert end(service)[0]["unfinished"] == 1

        archive.expect_none_lost(mail, box.messages())
        assert len(box.messages()) == len(mail)
    again = serve(archive, [box])
    wait_for(partial(has_emptied, archive, [box]), "the next process does it", seconds=90)
    end(again)
    archive.expect_each_once(mail)


def test_sigterm_while_the_database_is_away(
    archive: Archive, server: Postgres, dovecot: Dovecot, mailbox: Callable[..., Mailbox]
) -> None:
    mail = list(generate_corpus(60, seed=75, scale=0.1))
    box = mailbox(mail)
    with Proxy(dovecot.pop3s_port, latency_seconds=LATENCY_SECONDS, bytes_per_second=200_000) as line:
        service = serve(archive, [box], port=line.port)
        wait_for(lambda: len(archive.captured()) >= BATCH, "a poll goes on")
        server.kill()
        try:
            end(service)
        finally:
            server.start()
        archive.expect_none_lost(mail, box.messages())
        assert len(box.messages()) == len(mail)
    again = serve(archive, [box])
    wait_for(partial(has_emptied, archive, [box]), "the next process does it", seconds=90)
    end(again)
    archive.expect_each_once(mail)
