"""What the hot statements cost at a hundred thousand accounts: by index, whatever else is in the table.

The functions that polls and people call are run, and each of their statements
is explained on its way (see ``plans``).
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from archiver.db import (
    Database,
    accounts,
    before,
    captures,
    claims,
    endings,
    events,
    history,
    leases,
    migrate,
    overview,
    record,
    schedule,
    sightings,
)
from archiver.db.endings import Ending
from archiver.db.hosts import HostSessions
from archiver.model import Claim, LastLook, Resolved, Segment, ServerRecord, SightingKey, What
from archiver.timetable import Timetable
from tests.harness.reports import poll_report
from tests.scenarios.plans import Plans, explained, nodes
from tests.scenarios.story import middle

pytestmark = pytest.mark.xdist_group("plans")

ACCOUNTS = 100_000
OF_FULL_HOST = 50_000
CAP = 20
SESSIONS = HostSessions(CAP)
ROWS_AT_MOST = 2_000
"""That one claim may look at: a few times what it takes, and nothing like what is there."""

OF_LARGE, OF_NEIGHBOUR = 3_000, 60
"""Messages of the first account, and of those in its part of the table; half of them are absent."""

ONE, OTHER = f"{1:016x}", f"{ACCOUNTS // 2 + 7:016x}"
DAYS = 30
NOW = datetime.now(UTC)


@pytest.fixture(scope="module")
def database(postgres: Any) -> Iterator[Database]:
    """Half of the accounts are of one host, and due; it is full. The others are due within the hour."""
    with closing(Database(postgres.create_database("plans"))) as database:
        migrate.upgrade(database)
        database.transact(_fill)
        # What waits for the full host is put in line, some thousand at a time.
        while database.transact(lambda connection: claims.queue_at_hosts(connection, sessions=SESSIONS)):
            pass
        with database.engine.connect() as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT").exec_driver_sql("VACUUM ANALYZE")
        yield database
    postgres.drop_database("plans")


def _fill(connection: Connection) -> None:
    ids = "lpad(to_hex(n), 16, '0')"
    every = f"FROM generate_series(1, {ACCOUNTS}) AS n"
    for statement in (
        # What is filled in here refers to what is there: no need to look at every row's account.
        "SET LOCAL session_replication_role = replica",
        (
            "INSERT INTO account (id, name, url, tls, secret, delete_policy, interval_seconds, "
            "epoch, tls_pins, tls_minimum, created_at) "
            f"SELECT {ids}, 'a' || n, 'pop3s://u' || n || '@h', 'implicit', 'env:X', "
            f"'never', 300, 1, '', '1.2', now() {every}"
        ),
        (
            "INSERT INTO lease (account_id, due_at, token, recover, failures, refusals, host, slot, owner, "
            f"expires_at, late_at) SELECT {ids}, CASE WHEN n <= {CAP} THEN now() + interval '1 hour' "
            f"WHEN n <= {OF_FULL_HOST} THEN now() - interval '1 day' + n * interval '1 ms' "
            "ELSE now() + interval '1 hour' - n * interval '36 ms' END, 0, false, 0, 0, "
            f"CASE WHEN n <= {OF_FULL_HOST} THEN 'full.example' ELSE 'h' || mod(n, 500) || '.example' END, "
            f"CASE WHEN n <= {CAP} THEN n END, CASE WHEN n <= {CAP} THEN 'w' END, "
            f"CASE WHEN n <= {CAP} THEN now() + interval '1 hour' END, now() + interval '1 hour' {every}"
        ),
        f"INSERT INTO journal (account_id, sequence, digest, written_at) SELECT {ids}, 0, '', now() {every}",
        (
            "INSERT INTO mailbox (account_id, captures, captured_bytes, quarantined, to_come, day_bytes, "
            f"counted) SELECT {ids}, 2, 18, 0, 0, 0, 2 {every}"
        ),
        (
            "INSERT INTO poll (account_id, token, ended_at, seconds, outcome, listed, new, known, "
            "quarantined, "
            "to_come, delete_requested, fetched_bytes, lost) "
            f"SELECT {ids}, m, now() - interval '{DAYS} days' * (1 - (m - random()) / 3), 1, 'ok', 2, 0, "
            f"2, 0, 0, 0, 0, "
            f"CASE WHEN mod(n, 1000) = m THEN 1 ELSE 0 END {every} CROSS JOIN generate_series(1, 3) AS m"
        ),
        (
            "INSERT INTO poll_day (account_id, day, polls, failed, looks, new, delete_requested, deleted, "
            "gone, lost, fetched_bytes, seconds) "
            f"SELECT {ids}, current_date - m - mod(n, {DAYS - 2}), 1, 0, 1, 0, 0, 0, 0, "
            f"CASE WHEN mod(n, 1000) = 1 THEN 1 ELSE 0 END, 0, 1 {every} CROSS JOIN generate_series(1, 2) "
            f"AS m"
        ),
        (
            "INSERT INTO gap (account_id, began_at, ended_at) SELECT "
            f"{ids}, now() - random() * interval '{DAYS} days' - interval '1 hour', now() {every}"
        ),
        "UPDATE gap SET ended_at = began_at + interval '1 hour'",
        f"INSERT INTO event (kind, account_id, at, body) SELECT 'captured', {ids}, now(), '{{}}' {every}",
        (
            "INSERT INTO host (name, failures, failing_since) SELECT 'down' || n, 1, now() "
            "FROM generate_series(1, 5) AS n"
        ),
        _SIGHTINGS.format(f"(SELECT {ids} AS account_id {every}) AS all_accounts", 1, 2),
    ):
        connection.exec_driver_sql(statement)
    part = connection.exec_driver_sql(
        f"SELECT tableoid::regclass FROM sighting WHERE account_id = '{ONE}'"
    ).scalar()
    many = f"CASE WHEN account_id = '{ONE}' THEN {OF_LARGE} ELSE {OF_NEIGHBOUR} END"
    for statement in (
        _SIGHTINGS.format(f"(SELECT DISTINCT account_id FROM {part}) AS neighbours", 3, many),
        (
            "INSERT INTO capture (account_id, sha256, size, epoch, uidl, captured_at, token, sequence) "
            "SELECT account_id, sha256, 9, 1, uidl, now() - random() * interval '30 days', 1, 0 FROM sighting"
        ),
    ):
        connection.exec_driver_sql(statement)


_SIGHTINGS = (
    "INSERT INTO sighting (account_id, epoch, uidl, size, content, state, sha256, first_seen_at, attempts, "
    "absent_at) SELECT account_id, 1, m::text::bytea, 9, '', "
    "CASE WHEN mod(m, 500) = 4 THEN 'quarantined' ELSE 'captured' END, sha256(m::text::bytea), now(), 0, "
    "CASE WHEN mod(m, 2) = 0 THEN now() END "
    "FROM {} CROSS JOIN generate_series({}, {}) AS m ORDER BY m"
)


# What must be by index.

CLAIM = Claim(ONE, 0, recover=False, host="full.example")
OTHER_CLAIM = Claim(OTHER, 0, recover=False, host="h7.example")
SEEN = [SightingKey(str(number).encode(), 9) for number in range(1, 301)]
SEEN_UIDLS = [key.uidl for key in SEEN]
SERVER = ServerRecord("h", 995, "+OK", "PLAIN", "TLSv1.3", None, None)
NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Hot:
    """A function, and the indexes that its statements cannot do without.

    ``parts`` are those of a partitioned table that one statement may look into:
    as many as there are accounts in it. ``whole`` names tables of which all rows
    may be looked at, with the reason. ``each`` names what every row of a
    partitioned table is looked for by, however many its account has there.
    """

    run: Callable[[Connection], object]
    by: str
    parts: int = 1
    whole: Mapping[str, str] = field(default_factory=lambda: NOTHING)
    each: str = ""


def _segment(connection: Connection) -> None:
    whats = (What.CAPTURED, What.KNOWN, What.QUARANTINED, What.DELETED, What.GONE)
    lines = tuple(
        Resolved(what, SightingKey(b"%d" % number, 9), NOW, sha256=b"%032d" % number, size=9)
        for number, what in enumerate(whats * 3)
    )
    for sequence, epoch, previous, digest in ((1, 1, b"", b"1"), (2, 2, b"1", b"2")):
        written = Segment(ONE, "a1", "pop3s://u1@h", epoch, sequence, previous, 0, NOW, SERVER, 2, b"", lines)
        record.segment(connection, CLAIM, written, digest)


def _endings(connection: Connection) -> None:
    look = LastLook(2, 18, 2, b"2", NOW)

    def ending(claim: Claim, outcome: Any, **what: Any) -> Ending:
        report = poll_report("a", outcome, seconds=1.0, **what)
        return Ending(claim, report, NOW + timedelta(hours=9), Timetable(300.0), ("CAPA",))

    listed = {
        "listed": 2,
        "known": 2,
        "fetched_bytes": 9,
        "delete_requested": 1,
        "reached": True,
        "last_look": look,
    }
    endings.write(
        connection,
        [
            ending(CLAIM, "ok", **listed),
            ending(OTHER_CLAIM, "try_later", glanced=True, reached=False, error="down"),
            ending(Claim(f"{3:016x}", 9, recover=False), "lease_lost"),
        ],
        uniform=middle,
    )


PASS = "one pass over rows of which each account has one"
OF_ALL_ACCOUNTS = {"account": PASS, "lease": PASS, "mailbox": PASS}

HOT = {
    # A poll, from its claim to its end.
    "leases.renew": Hot(lambda c: leases.renew(c, [CLAIM, OTHER_CLAIM], lease_seconds=45), "pk_lease"),
    "leases.put_off": Hot(lambda c: leases.put_off(c, CLAIM, 60), "pk_lease"),
    "schedule.ask": Hot(lambda c: schedule.ask(c, [ONE]), "pk_lease"),
    "claims.claim_account": Hot(
        lambda c: claims.claim_account(c, OTHER, owner="w", lease_seconds=45), "pk_lease uq_lease_host_slot"
    ),
    "claims.queue_at_hosts": Hot(
        claims.queue_at_hosts,
        "uq_lease_host_slot ix_lease_due_well ix_lease_due_failing",
        whole={"lease": "five thousand at once: of a hundred thousand, a good part"},
    ),
    "claims.claim_due": Hot(
        lambda c: claims.claim_due(c, owner="w", lease_seconds=45, limit=50),
        "pk_lease uq_lease_host_slot ix_lease_due_well ix_lease_due_failing ix_lease_queued_well "
        "ix_lease_queued_failing",
    ),
    "claims.count_due": Hot(
        lambda c: claims.count_due(c, limit=50), "uq_lease_host_slot ix_lease_due_well ix_lease_due_failing"
    ),
    "claims.hosts_with_queues": Hot(
        lambda c: claims.hosts_with_queues(c, ["h7.example"]), "ix_lease_queued_well ix_lease_queued_failing"
    ),
    "leases.holder": Hot(lambda c: leases.holder(c, ONE), "pk_lease"),
    "schedule.reconsider": Hot(lambda c: schedule.reconsider(c, ONE, "pop3s://u@h", None), "pk_lease"),
    "accounts.by_name": Hot(lambda c: accounts.by_name(c, "a77"), "uq_account_name"),
    "accounts.by_url": Hot(lambda c: accounts.by_url(c, "pop3s://u77@h"), "ix_account_url"),
    "accounts.page": Hot(lambda c: accounts.page(c, "a5", 100), "uq_account_name"),
    "before.before_polls": Hot(
        lambda c: before.before_polls(c, [ONE, OTHER]), "pk_account pk_journal pk_mailbox"
    ),
    "sightings.present": Hot(lambda c: list(sightings.present(c, ONE, 1)), "ix_sighting_by_uidl"),
    "sightings.present of a small one": Hot(
        lambda c: list(sightings.present(c, OTHER, 1)), "ix_sighting_by_uidl"
    ),
    "sightings.present after": Hot(
        lambda c: list(sightings.present(c, ONE, 1, after=SEEN[100])), "ix_sighting_by_uidl"
    ),
    "sightings.absent_quarantined": Hot(
        lambda c: sightings.absent_quarantined(c, ONE, 1), "ix_sighting_quarantined"
    ),
    "sightings.provable": Hot(
        lambda c: sightings.provable(c, ONE, 1, SEEN_UIDLS), "pk_capture", each="uidl sha256"
    ),
    "captures.contents": Hot(
        lambda c: captures.contents(c, ONE, [b"%032d" % n for n in range(300)]),
        "pk_capture",
        each="sha256",
    ),
    "record.segment": Hot(_segment, "pk_lease pk_journal pk_account pk_mailbox pk_sighting"),
    "sightings.listed_again": Hot(
        lambda c: sightings.listed_again(c, CLAIM, 1, SEEN, NOW), "pk_lease pk_sighting", each="uidl"
    ),
    "sightings.deletions_requested": Hot(
        lambda c: sightings.deletions_requested(c, CLAIM, 1, SEEN, NOW), "pk_lease pk_sighting", each="uidl"
    ),
    "sightings.died_in_transit": Hot(
        lambda c: sightings.died_in_transit(c, CLAIM, 1, SEEN[0], attempts=1, at=NOW), "pk_lease"
    ),
    "endings.write": Hot(_endings, "pk_lease pk_account pk_mailbox pk_poll ix_sighting_by_uidl"),
    # What people and programs ask.
    "events.read": Hot(lambda c: events.read(c, after=ACCOUNTS // 2, limit=500), "pk_event"),
    "events.read at the end": Hot(lambda c: events.read(c, after=ACCOUNTS, limit=500), "pk_event"),
    "captures.listed": Hot(
        lambda c: list(captures.listed(c, account_id=ONE, limit=50, newest=True)),
        "ix_capture_account_id_captured_at",
    ),
    "captures.find": Hot(
        lambda c: captures.find(c, sha256_from=b"\1" * 32, sha256_to=b"\1" * 31 + b"\2", account_id=None),
        "ix_capture_sha256",
        # People name a capture by its digest alone.
        parts=32,
    ),
    "overview.quarantined": Hot(lambda c: overview.quarantined(c, ONE), "ix_sighting_quarantined"),
    "overview.polls": Hot(lambda c: overview.polls(c, ONE, 10), "pk_poll"),
    "overview.account_states": Hot(
        lambda c: overview.account_states(c, [ONE, OTHER]), "pk_account pk_lease pk_mailbox pk_poll"
    ),
    "overview.overview": Hot(lambda c: overview.overview(c, NOW), "", whole=OF_ALL_ACCOUNTS),
    "overview.need_attention": Hot(
        lambda c: overview.need_attention(c, NOW, lost=[ONE], limit=20), "pk_poll", whole=OF_ALL_ACCOUNTS
    ),
    "history.losses": Hot(
        lambda c: history.losses(c, NOW.date() - timedelta(days=7)), "ix_poll_lost ix_poll_day_lost"
    ),
    "history.lost": Hot(lambda c: history.lost(c, ONE), "pk_poll pk_poll_day"),
    "history.ended_gaps": Hot(lambda c: history.ended_gaps(c, NOW - timedelta(days=1)), "ix_gap_ended_at"),
    "history.gaps": Hot(lambda c: history.gaps(c, ONE, NOW - timedelta(days=7), NOW), "pk_gap"),
    "history.days": Hot(
        lambda c: history.days(c, ONE, NOW.date() - timedelta(days=7), NOW.date()), "pk_poll pk_poll_day"
    ),
    "history.days_of_all": Hot(
        lambda c: history.days_of_all(c, NOW.date() - timedelta(days=1), NOW.date()),
        "ix_poll_ended_at ix_poll_day_day",
        whole={"mailbox": PASS} | dict.fromkeys(("poll", "poll_day"), "of all accounts, a good part of them"),
    ),
    # Housekeeping.
    "history.add_up": Hot(lambda c: history.add_up(c, "", history.BOUNDS), "pk_mailbox pk_poll"),
    "history.remove_ended": Hot(
        lambda c: history.remove_ended(
            c, datetime.min.replace(tzinfo=UTC), NOW - timedelta(days=DAYS - 1), history.BOUNDS.polls
        ),
        "ix_poll_ended_at pk_mailbox pk_poll",
    ),
}


def _of(database: Database, hot: Hot) -> Plans:
    """Its plans; what it changed is taken back."""
    with database.engine.connect() as connection:
        with explained(connection) as plans:
            hot.run(connection)
        connection.rollback()
    return plans


def _wrong(hot: Hot, plans: Plans) -> dict[str, object]:
    found = {
        # Only hosts in trouble have a row.
        "all rows": plans.whole - set(hot.whole) - {"host"},
        "parts": {table: len(parts) for table, parts in plans.parts.items() if len(parts) > hot.parts},
        "not each": {
            condition
            for condition in plans.conditions_when_prepared
            if hot.each and not any(column in condition for column in hot.each.split())
        },
        "not by": set(hot.by.split()) - (plans.indexes & plans.indexes_when_prepared),
    }
    return {what: which for what, which in found.items() if which}


@pytest.mark.parametrize("name", list(HOT))
def test_a_hot_statement_goes_by_index_and_into_its_accounts_part_alone(
    database: Database, name: str
) -> None:
    plans = _of(database, HOT[name])
    assert plans.statements > 0
    assert _wrong(HOT[name], plans) == {}


def test_there_is_no_index_that_no_hot_statement_needs(database: Database) -> None:
    """Each costs every writer something."""
    with database.reading() as connection:
        there = set(
            connection.exec_driver_sql(
                "SELECT c.relname FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid "
                "WHERE NOT c.relispartition AND c.relnamespace = 'public'::regnamespace"
            ).scalars()
        )
    # Of what is small: hosts in trouble, and the schema's version.
    there -= {"pk_host", "pk_archive", "alembic_version_pkc"}
    assert there == {index for hot in HOT.values() for index in hot.by.split()}


# What a claim looks at.


def _looked_at(connection: Connection, statement: sa.TextClause, values: dict[str, Any]) -> int:
    """Run it, and see that it went by index only; returns the rows of lease that it looked at."""
    explain = sa.text(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement.text}")
    found = connection.execute(explain, values).scalar_one()
    plan = (json.loads(found) if isinstance(found, str) else found)[0]["Plan"]
    rows = 0
    for node in nodes(plan):
        if node.get("Relation Name") != "lease" or node["Node Type"] == "ModifyTable":
            continue
        assert "Index" in node["Node Type"] or node["Node Type"] == "Bitmap Heap Scan", node
        passed = node["Actual Rows"] + node.get("Rows Removed by Filter", 0)
        rows += passed * node["Actual Loops"]
    return rows


OF_HOSTS = {"others": SESSIONS.others, "named": json.dumps(dict(SESSIONS.named))}


def test_a_claim_costs_the_same_behind_a_full_host(database: Database) -> None:
    values: dict[str, Any] = {
        "owner": "w",
        "lease_seconds": 45.0,
        "most_of_all": CAP,
        "limit": 50,
        "failing_limit": 25,
        "looked_at": 50 * claims.LOOK_AHEAD,
        **OF_HOSTS,
    }
    statement = claims.statements("postgresql")["claim_due"]
    with database.engine.connect() as connection:
        queued = connection.execute(sa.text("SELECT count(*) FROM lease WHERE queued")).scalar_one()
        assert queued == OF_FULL_HOST - CAP
        claims.take_turn(connection)
        assert _looked_at(connection, statement, values) < ROWS_AT_MOST
        connection.rollback()
        # The full host has room again: its longest overdue come, and the rest of its queue is not looked at.
        claims.take_turn(connection)
        connection.execute(sa.text("UPDATE lease SET slot = NULL, owner = NULL WHERE slot <= 10"))
        assert _looked_at(connection, statement, values) < ROWS_AT_MOST
        connection.rollback()


def test_queueing_goes_by_index_while_nothing_is_queued_yet(database: Database) -> None:
    with database.engine.connect() as connection:
        connection.execute(sa.text("UPDATE lease SET queued = false WHERE queued"))
        connection.execute(sa.text("ANALYZE lease"))
        statement = claims.statements("postgresql")["queue_at_hosts"]
        assert _looked_at(connection, statement, {"looked_at": 100, **OF_HOSTS}) < ROWS_AT_MOST
        connection.rollback()


@pytest.mark.parametrize("dialect", ["postgresql", "sqlite"])
def test_what_is_counted_as_due_is_what_would_be_claimed(dialect: str) -> None:
    """Both statements are whole, so that they can be read; what they choose is worded the same."""
    chosen, _, _ = claims.statements(dialect)["claim_due"].text.partition(",\nnumber(n) AS")
    counted, _, _ = claims.statements(dialect)["count_due"].text.rpartition("SELECT count(*)")
    assert counted.strip() == chosen.strip()
    of_hosts, _, _ = chosen.partition("queued_well(host)" if dialect == "postgresql" else "candidates AS")
    assert claims.statements(dialect)["queue_at_hosts"].text.startswith(of_hosts)


# In SQLite, which has no index by digest alone.


def test_sqlite_looks_for_a_digest_by_the_key_of_each_accounts_captures(tmp_path: Path) -> None:
    with closing(Database(f"sqlite:///{tmp_path / 'archiver.db'}")) as database:
        migrate.upgrade(database)
        with database.reading() as connection:
            said: list[str] = []

            def explain(_: Any, __: Any, statement: str, values: Any, *___: Any) -> None:
                driver: Any = connection.connection.driver_connection
                said.extend(row[3] for row in driver.execute(f"EXPLAIN QUERY PLAN {statement}", values))

            sa.event.listen(database.engine, "before_cursor_execute", explain)
            digests = {"sha256_from": b"\1" * 32, "sha256_to": b"\1" * 31 + b"\2"}
            assert captures.find(connection, **digests, account_id=None) == []
    of_captures = [step for step in said if "capture" in step]
    assert of_captures == ["SEARCH capture USING PRIMARY KEY (account_id=? AND sha256>? AND sha256<?)"]
