"""PostgreSQL dies, fails over, refuses, or is shared through PgBouncer, while the service polls."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import psycopg
import pytest

from archiver.demo.corpus import corpus as generate_corpus
from archiver.demo.dovecot import Dovecot
from tests.conftest import Mailbox, require
from tests.harness import pgbouncer as harness_pgbouncer
from tests.harness import postgres as harness_postgres
from tests.harness.archive import Archive, Directory
from tests.harness.cli import Running
from tests.harness.cli import cli as start_cli
from tests.harness.cli import wait_for as look_for
from tests.harness.postgres import Postgres
from tests.harness.proxy import Proxy

pytestmark = [pytest.mark.slow, pytest.mark.postgres]

wait_for = partial(look_for, every_seconds=0.1)
"""Many of the looks cost a connection to the database."""

ACCOUNTS, MESSAGES = 6, 12
LATENCY_SECONDS = 0.02
"""Each way, between archiver and mail server, so that a poll takes a while."""

CONNECTIONS = 25

ENVIRONMENT = {
    "ARCHIVER_BATCH_MESSAGES": "4",
    "ARCHIVER_INTERVAL_SECONDS": "1",
    "ARCHIVER_LEASE_SECONDS": "5",
}


@pytest.fixture(scope="module")
def server(server_directory: Path) -> Iterator[Postgres]:
    """A server of these tests' own: they stop it."""
    require(harness_postgres.unavailable())
    made = Postgres(server_directory / "postgres of faults", {"max_connections": str(CONNECTIONS)})
    made.start()
    yield made
    made.stop()


@contextmanager
def archive_at(url: str, directory: Path) -> Iterator[Archive]:
    environment = {"ARCHIVER_DATABASE_URL": url, "ARCHIVER_STORE_URL": f"file:{directory / 'store'}"}
    with start_cli(directory / "work", environment | ENVIRONMENT) as cli:
        cli.do("db", "upgrade")
        yield Archive(cli, Directory(directory / "store"), url)


@pytest.fixture
def archive(server: Postgres, _numbers: Iterator[int], tmp_path: Path) -> Iterator[Archive]:
    with archive_at(server.create_database(f"faults{next(_numbers)}"), tmp_path) as made:
        yield made


def serve(archive: Archive, boxes: list[Mailbox], port: int) -> Running:
    """The service, with deletion on."""
    file = archive.accounts_file(boxes, port=port, more='delete = "after-archived"')
    return archive.cli.start("run", environment={"ARCHIVER_ACCOUNTS_FILE": str(file)})


def expect_all_done(archive: Archive, boxes: list[Mailbox], mail: list[bytes], *services: Running) -> None:
    """It goes on by itself until all is archived and gone; no poll was ended by a mistake of ours."""

    def done() -> bool:
        archive.fall_due()
        return not any(box.messages() for box in boxes)

    wait_for(done, "all mailboxes are worked off", seconds=90)
    for service in services:
        service.terminate()
        assert service.wait(30).code == 0
        assert service.log("poll.crashed") == []
        assert {line["outcome"] for line in service.log("poll.ended")} <= {"ok", "try_later", "lease_lost"}
    archive.expect_each_once(mail)


def deal(
    mailbox: Callable[..., Mailbox], accounts: int, messages: int, seed: int
) -> tuple[list[Mailbox], list[bytes]]:
    """So many mailboxes with so many messages each."""
    mail = list(generate_corpus(accounts * messages, seed, scale=0.1))
    return [mailbox(mail[number::accounts]) for number in range(accounts)], mail


def has_captured(archive: Archive, messages: int) -> bool:
    return len(archive.captured()) >= messages


def on_servers(boxes: list[Mailbox]) -> list[bytes]:
    return [message for box in boxes for message in box.messages()]


def test_crashes_of_the_database_during_polls(
    archive: Archive, server: Postgres, dovecot: Dovecot, mailbox: Callable[..., Mailbox]
) -> None:
    boxes, mail = deal(mailbox, ACCOUNTS, MESSAGES, seed=61)
    with Proxy(dovecot.pop3s_port, latency_seconds=LATENCY_SECONDS) as line:
        service = serve(archive, boxes, line.port)
        for captures in (1, 20, 40):
            wait_for(partial(has_captured, archive, captures), "polls go on")
            server.kill()
            server.start()
            archive.expect_none_lost(mail, on_servers(boxes))
            archive.fall_due()
        expect_all_done(archive, boxes, mail, service)


def test_a_connection_that_is_cut_while_it_records(
    archive: Archive, server: Postgres, mailbox: Callable[..., Mailbox], corpus: list[bytes]
) -> None:
    box = mailbox(corpus[:4])
    with archive.nothing_can_be_recorded():
        poll = archive.cli.start(
            "sync", box.url, *archive.access(box), "--delete", "after-archived", "--json"
        )
        waiting = "FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND application_name = 'archiver'"
        wait_for(lambda: server.execute(f"SELECT 1 {waiting}"), "it waits to record")
        # The row that it wants is locked: no more than a part of the transaction was done.
        assert server.execute(f"SELECT pg_terminate_backend(pid) {waiting}") == [(True,)]
        wait_for(lambda: server.execute(f"SELECT 1 {waiting}"), "it tries the whole transaction again")
        assert len(box.messages()) == 4

    ended = poll.wait()

    assert (ended.code, [report["outcome"] for report in ended.json]) == (0, ["ok"])
    assert box.messages() == []
    archive.expect_each_once(corpus[:4])


def test_no_connection_is_free(
    archive: Archive, server: Postgres, mailbox: Callable[..., Mailbox], corpus: list[bytes]
) -> None:
    box = mailbox(corpus[:4])
    sync = ("sync", box.url, *archive.access(box), "--delete", "after-archived")
    with ExitStack() as held:
        with suppress(psycopg.OperationalError):
            for _ in range(CONNECTIONS):
                held.enter_context(psycopg.connect(server.url))
        refused = archive.cli.run(*sync)
    assert refused.code == 1
    assert "too many clients" in refused.err
    assert len(box.messages()) == 4

    archive.cli.run(*sync)
    assert box.messages() == []
    archive.expect_each_once(corpus[:4])


def test_a_failover_to_a_standby_that_has_all(
    dovecot: Dovecot,
    mailbox: Callable[..., Mailbox],
    server_directory: Path,
    tmp_path: Path,
) -> None:
    boxes, mail = deal(mailbox, ACCOUNTS, MESSAGES, seed=62)
    with failing_over(server_directory / "failover") as (primary, standby):
        primary.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
        primary.execute("SELECT pg_reload_conf()")
        primary.create_database("archive")
        with (
            archive_at(either(primary, standby, "archive"), tmp_path) as archive,
            Proxy(dovecot.pop3s_port, latency_seconds=LATENCY_SECONDS) as line,
        ):
            service = serve(archive, boxes, line.port)
            wait_for(lambda: len(archive.captured()) >= 10, "polls go on")
            primary.kill()
            standby.lead()
            archive.expect_none_lost(mail, on_servers(boxes))
            expect_all_done(archive, boxes, mail, service)


def test_a_failover_to_a_standby_that_lagged_behind(
    dovecot: Dovecot,
    mailbox: Callable[..., Mailbox],
    server_directory: Path,
    tmp_path: Path,
    corpus: list[bytes],
) -> None:
    box = mailbox(corpus[:4])
    sync = ("sync", box.url, "--delete", "after-archived", "--json")
    with failing_over(server_directory / "lag") as (primary, standby):
        primary.create_database("archive")
        with archive_at(either(primary, standby, "archive"), tmp_path) as archive:
            access = archive.access(box)
            assert archive.cli.do(*sync, *access).json[0]["new"] == 4
            [(position,)] = primary.execute("SELECT pg_current_wal_lsn()::text")
            behind = f"SELECT pg_wal_lsn_diff('{position}', pg_last_wal_replay_lsn()) <= 0"
            wait_for(lambda: standby.execute(behind) == [(True,)], "the standby has what was done so far")
            standby.stop()
            box.deliver(corpus[4:8])
            assert archive.cli.do(*sync, *access).json[0]["new"] == 4
            assert box.messages() == []
            primary.kill()
            standby.start()

            # It takes no writes yet, and whoever asks for none of it finds out.
            alone = {"ARCHIVER_DATABASE_URL": standby.database_url("archive")}
            refused = archive.cli.run(*sync, *access, environment=alone)
            assert refused.code == 1
            assert "read-only transaction" in refused.err
            standby.lead()

            # The database forgot four messages that are on no mail server any more; the journal did not.
            assert len(archive.captured()) == 4
            verdict = archive.cli.run("verify", "--json")
            [found] = verdict.json
            assert (verdict.code, found["missing"], found["unrecorded"] > 0) == (1, 0, True)
            box.deliver(corpus[8:10])
            archive.cli.run(*sync, *access)
            assert archive.cli.do(*sync, *access).json[0]["outcome"] == "ok"
            assert box.messages() == []
            archive.expect_each_once(corpus[:10])


@pytest.mark.pgbouncer
def test_two_processes_behind_pgbouncer_share_fifty_accounts(
    archive: Archive,
    server: Postgres,
    dovecot: Dovecot,
    mailbox: Callable[..., Mailbox],
    server_directory: Path,
) -> None:
    require(harness_pgbouncer.unavailable())
    boxes, mail = deal(mailbox, 50, 3, seed=63)
    with (
        harness_pgbouncer.pgbouncer(server_directory / "pgbouncer", server) as port,
        Proxy(dovecot.pop3s_port, latency_seconds=LATENCY_SECONDS) as line,
    ):
        name = archive.database_url.rpartition("/")[2]
        archive.cli.environment["ARCHIVER_DATABASE_URL"] = f"postgresql://postgres@127.0.0.1:{port}/{name}"
        services = [serve(archive, boxes, line.port) for _ in range(2)]
        wait_for(
            lambda: all(len(service.log("poll.ended")) > 10 for service in services),
            "both have their share",
            seconds=60,
        )
        expect_all_done(archive, boxes, mail, *services)
    assert {one["outcome"] for service in services for one in service.log("poll.ended")} == {"ok"}
    assert [line for service in services for line in service.log() if line["level"] == "error"] == []


@contextmanager
def failing_over(directory: Path) -> Iterator[tuple[Postgres, Postgres]]:
    """A server, and one that follows it; both run."""
    primary = Postgres(directory / "primary")
    primary.start()
    try:
        standby = primary.standby(directory / "standby")
        standby.start()
        try:
            yield primary, standby
        finally:
            standby.kill()
    finally:
        primary.kill()


def either(one: Postgres, other: Postgres, name: str) -> str:
    """The URL of a database at whichever of the two takes writes."""
    hosts = f"host=127.0.0.1,127.0.0.1&port={one.port},{other.port}"
    return f"postgresql://postgres@/{name}?{hosts}&target_session_attrs=read-write"
