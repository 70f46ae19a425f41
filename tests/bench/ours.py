"""The archiver's own parts as clients to be measured: whole polls, the POP3 client, the PUT, the rows.

Each is a child process (``machine.serve``) that opens what it needs, says that
it is ready, and works when told. Settings come from the environment, as an
operator's do; nothing is set that an operator would not.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from archiver import observe, pop3
from archiver.bootstrap import App
from archiver.db import accounts, captures, claims, later, migrate, record
from archiver.db.tables import account as account_table
from archiver.db.tables import journal as journal_table
from archiver.db.tables import lease as lease_table
from archiver.db.tables import mailbox as mailbox_table
from archiver.evidence import journal
from archiver.model import (
    NO_DIGEST,
    Account,
    Claim,
    PollReport,
    Resolved,
    Segment,
    ServerRecord,
    SightingKey,
    What,
    new_account_id,
    segment_key,
)
from archiver.poll.ports import Unwatched
from archiver.settings import load
from archiver.store import open_store
from archiver.store.spool import BytesBody, Spool
from tests.bench.machine import Work, serve

_HOST = "127.0.0.1"
_LEASE_SECONDS = 600.0
_MUCH_MEMORY_BYTES = 1024**3
_DUE_PARTS = 300  # how finely due times are spread
_BATCHES_TO_COUNT = (10, 100, 500)
_AT = datetime(2026, 1, 1, tzinfo=UTC)
_SERVER = ServerRecord(_HOST, 995, "+OK", "PLAIN", "TLSv1.3", "TLS_AES_256_GCM_SHA384", "00" * 32)


@contextmanager
def _opened() -> Iterator[App]:
    observe.log_quietly()
    with App(load()) as app:
        if not app.raw_database.is_sqlite:
            migrate.upgrade(app.raw_database)
        app.open_archive()
        yield app


@contextmanager
def poll(*, port: int, ca_file: str, password: str, users: list[str]) -> Iterator[Work]:
    """A poll of each mailbox, as by ``archiver sync``: it lists what looks unchanged, too.

    A mailbox that no account archives yet gets a new one.
    """
    with _opened() as app:

        def chosen(connection: Connection) -> list[Account]:
            found = []
            for user in users:
                url = f"pop3s://{user}@{_HOST}:{port}"
                known = accounts.by_name(connection, user)
                if known is None:
                    new = Account(new_account_id(), user, url, "implicit", "prompt:", ca_file=ca_file)
                    known = accounts.add(connection, new, app.now())
                elif known.url != url or known.ca_file != ca_file:
                    # The same mailbox behind another port: a line is between, or the server was started anew.
                    known = replace(known, url=url, ca_file=ca_file)
                    accounts.change(connection, known, app.now())
                found.append(known)
            return found

        chosen_accounts = app.database.transact(chosen)
        app.passwords.update({account.id: password for account in chosen_accounts})
        worker = app.worker
        worker.start_clock(claim=False)

        def work() -> dict[str, Any]:
            return _sum(worker.poll_now(chosen_accounts, lambda _: Unwatched()))

        yield work


def _sum(reports: list[PollReport]) -> dict[str, Any]:
    failed = [report for report in reports if report.outcome != "ok"]
    if failed:
        raise RuntimeError(f"{len(failed)} polls failed: {failed[0].error}")
    return {
        "polls": len(reports),
        "count": sum(report.counts.new for report in reports),
        "known": sum(report.counts.known for report in reports),
        "octets": sum(report.counts.fetched_bytes for report in reports),
    }


class _Hash:
    """A sink that keeps a digest and a length."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self.octets = 0

    def write(self, data: bytes) -> None:
        self._digest.update(data)
        self.octets += len(data)


@contextmanager
def client(*, port: int, ca_file: str, password: str, user: str, window: int | None = None) -> Iterator[Work]:
    """The POP3 client alone: every message of a mailbox, hashed and thrown away."""
    limits = pop3.Limits() if window is None else pop3.Limits(window=window)
    endpoint = pop3.parse_url(f"pop3s://{user}@{_HOST}:{port}")
    trust = pop3.TlsSettings(ca_file=Path(ca_file))

    def work() -> dict[str, Any]:
        count = octets = 0
        with pop3.connect(endpoint, tls_settings=trust, limits=limits) as mailbox:
            mailbox.login(password)
            for outcome in mailbox.retrieve(mailbox.list().entries, lambda _: _Hash()):
                if not isinstance(outcome, pop3.Retrieved):
                    raise outcome.error
                count += 1
                octets += outcome.sink.octets
            mailbox.quit()
        return {"count": count, "octets": octets}

    yield work


@contextmanager
def put(*, directory: str, count: int, threads: int, prefix: str) -> Iterator[Work]:
    """The store's own PUT, from the spool, with checksum, condition and retries."""
    import threading
    from concurrent.futures import ThreadPoolExecutor

    settings = load()
    store = open_store(settings.store_url, s3_endpoint_url=settings.s3_endpoint_url, max_connections=threads)
    spool = Spool(None, _MUCH_MEMORY_BYTES, _MUCH_MEMORY_BYTES)
    bodies = []
    for path in sorted(Path(directory).iterdir())[:count]:
        body = spool.create()
        body.write(path.read_bytes())
        body.seal()
        bodies.append(body)
    together = threading.Barrier(threads)

    def warm(number: int) -> None:
        together.wait()
        with spool.create() as body:
            body.write(b"warm %d" % number)
            body.seal()
            store.put(f"warm-{prefix}/{number}", body)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(warm, range(threads)))

        def work() -> dict[str, Any]:
            names = [f"{prefix}/{body.sha256.hex()}.eml" for body in bodies]
            created = [result.created for result in pool.map(store.put, names, bodies)]
            return {"count": sum(created), "octets": sum(body.size for body in bodies)}

        yield work


@contextmanager
def record_batches(*, batches: int, size: int) -> Iterator[Work]:
    """What a backfill asks of the database for each batch: what is held, and the segment's rows."""
    with _opened() as app:
        account, claim = _claimed(app)
        statements = _Statements(app.database.engine)
        sequence, counted = 0, {}
        for each in _BATCHES_TO_COUNT:
            sequence += 1
            with statements.counted() as count:
                _take_in(app, claim, _segment(account, claim, sequence, each))
            counted[each] = count[0]
        segments = [
            _segment(account, claim, number, size) for number in range(sequence + 1, sequence + batches + 1)
        ]

        def work() -> dict[str, Any]:
            for segment in segments:
                _take_in(app, claim, segment)
            with app.database.reading() as connection:
                rows = connection.execute(sa.text("SELECT count(*) FROM capture")).scalar_one()
            return {"count": rows - sum(_BATCHES_TO_COUNT), "statements": counted}

        yield work


def _claimed(app: App, name: str = "bench") -> tuple[Account, Claim]:
    account = Account(new_account_id(), name, f"pop3s://{name}@{_HOST}:995", "implicit", "prompt:")
    app.database.transact(lambda connection: accounts.add(connection, account, app.now()))
    claim = app.database.transact(
        partial(claims.claim_account, account_id=account.id, owner="bench", lease_seconds=_LEASE_SECONDS)
    )
    if claim is None:
        raise RuntimeError("nobody else is here to hold the lease")
    return account, claim


def _digest_of(sequence: int) -> bytes:
    return hashlib.sha256(b"segment %d" % sequence).digest() if sequence else NO_DIGEST


def _segment(
    account: Account, claim: Claim, sequence: int, size: int, sightings: list[SightingKey] | None = None
) -> Segment:
    keys = sightings or [SightingKey(b"%06d-%04d" % (sequence, number), 16_000) for number in range(size)]
    lines = [
        Resolved(
            What.CAPTURED,
            key,
            _AT + timedelta(seconds=sequence, milliseconds=number),
            sha256=hashlib.sha256(key.uidl).digest(),
            size=key.size,
        )
        for number, key in enumerate(keys)
    ]
    return Segment(
        account_id=account.id,
        account_name=account.name,
        account_url=account.url,
        epoch=account.epoch,
        sequence=sequence,
        previous=_digest_of(sequence - 1),
        token=claim.token,
        written_at=_AT,
        server=_SERVER,
        listing_count=size,
        listing_digest=NO_DIGEST,
        lines=tuple(lines),
    )


def _take_in(app: App, claim: Claim, segment: Segment) -> None:
    digests = [line.sha256 for line in segment.lines if line.sha256 is not None]
    with app.database.reading() as connection:
        captures.contents(connection, segment.account_id, digests)
    app.database.transact(
        lambda connection: record.segment(connection, claim, segment, _digest_of(segment.sequence))
    )


def _write(app: App, claim: Claim, segment: Segment) -> bytes:
    """Into the store and the database, as a poll does; returns the segment's digest."""
    body = BytesBody(journal.encode(segment))
    app.store.put(segment_key(segment.account_id, segment.sequence), body)
    app.database.transact(lambda connection: record.segment(connection, claim, segment, body.sha256))
    return body.sha256


class _Statements:
    """Counts what is sent to the database. An executemany is one."""

    def __init__(self, engine: sa.Engine) -> None:
        self._count = 0
        sa.event.listen(engine, "before_cursor_execute", self._saw)

    def _saw(self, *_: object) -> None:
        self._count += 1

    @contextmanager
    def counted(self) -> Iterator[list[int]]:
        """A list whose one number is, after the block, how many there were in it."""
        before, found = self._count, [0]
        yield found
        found[0] = self._count - before


@contextmanager
def know(*, port: int, ca_file: str, password: str, user: str) -> Iterator[Work]:
    """An account that has captured all that its mailbox shows: the rows, without the objects."""
    with _opened() as app:
        account = Account(
            new_account_id(), user, f"pop3s://{user}@{_HOST}:{port}", "implicit", "prompt:", ca_file=ca_file
        )
        endpoint = pop3.parse_url(account.url)

        def work() -> dict[str, Any]:
            app.database.transact(lambda connection: accounts.add(connection, account, app.now()))
            claim = app.database.transact(
                partial(
                    claims.claim_account,
                    account_id=account.id,
                    owner="bench",
                    lease_seconds=_LEASE_SECONDS,
                )
            )
            if claim is None:
                raise RuntimeError("nobody else is here to hold the lease")
            with pop3.connect(endpoint, tls_settings=pop3.TlsSettings(ca_file=Path(ca_file))) as mailbox:
                mailbox.login(password)
                entries = list(mailbox.list().entries)
            keys = [SightingKey(entry.uidl or b"", entry.size or 0) for entry in entries]
            step, previous = 5_000, NO_DIGEST
            for index in range(0, len(keys), step):
                some = keys[index : index + step]
                segment = _segment(account, claim, index // step + 1, len(some), some)
                previous = _write(app, claim, replace(segment, previous=previous))
            # The next poll is nobody's who left something half done.
            app.database.transact(
                lambda connection: connection.execute(
                    sa.update(lease_table)
                    .where(lease_table.c.account_id == account.id)
                    .values(owner=None, slot=None, expires_at=None, recover=False)
                )
            )
            return {"count": len(keys)}

        yield work


@contextmanager
def fill(
    *,
    accounts_count: int,
    urls: list[str],
    interval_seconds: float,
    due_after_seconds: float,
    due_over_seconds: float,
    secret_reference: str,
) -> Iterator[Work]:
    """So many accounts at once, which fall due after so many seconds, one after the other over so many."""
    with _opened() as app:
        first = Account(
            new_account_id(),
            "account-0",
            urls[0].format(0),
            "none",
            secret_reference,
            interval_seconds=interval_seconds,
        )

        def fill_in(connection: Connection) -> None:
            accounts.add(connection, first, app.now())
            ids = _multiply(connection, first, accounts_count, urls)
            for part in range(_DUE_PARTS):
                due_at = later(connection, due_after_seconds + due_over_seconds * part / _DUE_PARTS)
                some = lease_table.c.account_id.in_(ids[part::_DUE_PARTS])
                connection.execute(sa.update(lease_table).where(some).values(due_at=due_at))

        def work() -> dict[str, Any]:
            app.database.transact(fill_in)
            return {"count": accounts_count}

        yield work


def _multiply(connection: Connection, first: Account, count: int, urls: list[str]) -> list[str]:
    """The rows of one account, which was added as always, are the model for all others'; returns the ids."""
    ids = [first.id, *(new_account_id() for _ in range(count - 1))]
    for table, key in (
        (account_table, "id"),
        (lease_table, "account_id"),
        (mailbox_table, "account_id"),
        (journal_table, "account_id"),
    ):
        model = connection.execute(sa.select(table).where(table.c[key] == first.id)).one()
        values = dict(zip(table.c.keys(), model, strict=True))
        rows = [values | {key: each} for each in ids[1:]]
        if table is account_table:
            for number, row in enumerate(rows, start=1):
                row["name"] = f"account-{number}"
                row["url"] = urls[number % len(urls)].format(number)
        connection.execute(sa.insert(table), rows)
    return ids


if __name__ == "__main__":
    serve(
        {
            "poll": poll,
            "client": client,
            "put": put,
            "record": record_batches,
            "know": know,
            "fill": fill,
        }
    )
