"""What the hot statements cost at a hundred thousand accounts: by index, whatever else is in the table."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from archiver.db import Database, migrate, schedule
from archiver.db.schedule import HostSessions

ACCOUNTS = 100_000
OF_FULL_HOST = 50_000
CAP = 20
ROWS_AT_MOST = 2_000
"""That one claim may look at: a few times what it takes, and nothing like what is there."""


@pytest.fixture(scope="module")
def database(postgres: Any) -> Iterator[Database]:
    """Half of the accounts are of one host, and due; it is full. The others are due within the hour."""
    database = Database(postgres.create_database("plans"))
    migrate.upgrade(database)
    database.transact(_fill)
    with database.engine.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT").execute(sa.text("VACUUM ANALYZE lease"))
    yield database
    database.close()
    postgres.drop_database("plans")


def _fill(connection: Connection) -> None:
    connection.execute(
        sa.text(
            "INSERT INTO account (id, name, url, tls, secret, delete_policy, interval_seconds, pipelining, "
            "epoch, tls_pins, tls_minimum, created_at) "
            "SELECT lpad(to_hex(n), 16, '0'), 'a' || n, 'pop3s://u' || n || '@h', 'implicit', 'env:X', "
            "'never', 300, true, 1, '', '1.2', now() FROM generate_series(1, :accounts) AS n"
        ),
        {"accounts": ACCOUNTS},
    )
    connection.execute(
        sa.text(
            "INSERT INTO lease (account_id, due_at, token, recover, failures, refusals, host, slot, owner, "
            "expires_at) SELECT lpad(to_hex(n), 16, '0'), CASE WHEN n <= :cap THEN now() + interval '1 hour' "
            "WHEN n <= :full THEN now() - interval '1 day' + n * interval '1 ms' "
            "ELSE now() + interval '1 hour' - n * interval '36 ms' END, 0, false, 0, 0, "
            "CASE WHEN n <= :full THEN 'full.example' ELSE 'h' || n % 500 || '.example' END, "
            "CASE WHEN n <= :cap THEN n END, CASE WHEN n <= :cap THEN 'w' END, "
            "CASE WHEN n <= :cap THEN now() + interval '1 hour' END FROM generate_series(1, :accounts) AS n"
        ),
        {"accounts": ACCOUNTS, "full": OF_FULL_HOST, "cap": CAP},
    )


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for inner in plan.get("Plans", ()):
        yield from _nodes(inner)


def _looked_at(connection: Connection, statement: sa.TextClause, values: dict[str, Any]) -> int:
    """Run it, and see that it went by index only; returns the rows of lease that it looked at."""
    explain = sa.text(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement.text}")
    found = connection.execute(explain, values).scalar_one()
    plan = (json.loads(found) if isinstance(found, str) else found)[0]["Plan"]
    rows = 0
    for node in _nodes(plan):
        if node.get("Relation Name") != "lease" or node["Node Type"] == "ModifyTable":
            continue
        assert "Index" in node["Node Type"] or node["Node Type"] == "Bitmap Heap Scan", node
        passed = node["Actual Rows"] + node.get("Rows Removed by Filter", 0)
        rows += passed * node["Actual Loops"]
    return rows


def test_a_claim_costs_the_same_behind_a_full_host(database: Database) -> None:
    sessions = HostSessions(CAP)
    statement_text = schedule._TIGHT + schedule._CHOSEN + schedule._CLAIM
    values: dict[str, Any] = {
        "owner": "w",
        "lease_seconds": 45.0,
        "most_of_all": CAP,
        **schedule._limits(50, 25),
        **schedule._values(sessions),
    }
    # What waits for the full host is put in line, some thousand at a time.
    while database.transact(lambda connection: schedule.tidy(connection, sessions=sessions)):
        pass
    with database.engine.connect() as connection:
        in_line = connection.execute(sa.text("SELECT count(*) FROM lease WHERE in_line")).scalar_one()
        assert in_line == OF_FULL_HOST - CAP
        statement = schedule._worded(connection, statement_text, sessions)
        assert _looked_at(connection, statement, values) < ROWS_AT_MOST
        connection.rollback()
        # The full host has room again: its longest overdue come, and nothing else of its line is looked at.
        connection.execute(sa.text("UPDATE lease SET slot = NULL, owner = NULL WHERE slot <= 10"))
        assert _looked_at(connection, statement, values) < ROWS_AT_MOST
        connection.rollback()


def test_a_claim_is_by_index_before_anybody_was_put_in_line(database: Database) -> None:
    sessions = HostSessions(CAP)
    with database.engine.connect() as connection:
        connection.execute(sa.text("UPDATE lease SET in_line = false WHERE in_line"))
        connection.execute(sa.text("ANALYZE lease"))
        statement = schedule._worded(connection, schedule._TIGHT + schedule._LINE_UP, sessions)
        values = {"lined_up": 100, **schedule._values(sessions)}
        assert _looked_at(connection, statement, values) < ROWS_AT_MOST
        connection.rollback()
