"""An archive of real parts, in this process, whose time and whose deaths a test decides.

Owns a database, a directory as the store, and a clock that only moves when it
is told to. A ``Fuse`` kills the process at any call of any port, before or
after the call did its work: what a killed process leaves is what a poll that
stops there leaves, with its lease in its hand.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import sqlalchemy as sa

from archiver import policy, pop3
from archiver.db import Database, accounts, before, captures, claims, migrate
from archiver.db.tables import event, lease, mailbox, poll, sighting
from archiver.evidence import journal
from archiver.evidence.verify import Findings, verify
from archiver.model import Account, PollReport, Resolved, Segment, new_account_id
from archiver.poll import finish
from archiver.poll import poll as tell_poll
from archiver.poll.ports import BatchLimits, Ports, Unwatched
from archiver.store.filesystem import FilesystemStore
from archiver.store.spool import Spool
from archiver.worker import Terms, Worker
from archiver.worker.leases import ActiveLease
from tests.harness.scripted_pop3 import MailboxPlay, ScriptedPop3
from tests.machine.process import GatedDatabase, GatedSession, GatedStore, Uploads

T = TypeVar("T")

LEASE_SECONDS = 60.0
LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)


def message(text: str) -> bytes:
    """A small message, its own for each text."""
    return f"Subject: {text}\r\n\r\nThis is {text}.\r\n".encode()


def poll_claimed(worker: Worker, lease: ActiveLease) -> PollReport:
    """Poll an account that is claimed, as the service does, until its end is written."""
    [ended] = worker.changeovers.begin([lease])
    return ended.result()


def middle(low: float, high: float) -> float:
    """In place of chance."""
    return (low + high) / 2


def rest(_seconds: float) -> None:
    """In place of a longer pause: whoever waits for another thread looks again at once."""
    threading.Event().wait(0.01)


class Clock:
    """Time that stands still unless it is told to go on."""

    def __init__(self) -> None:
        self._monotonic = 1000.0
        self._began = datetime.now(UTC)

    def monotonic(self) -> float:
        return self._monotonic

    def now(self) -> datetime:
        return self._began + timedelta(seconds=self._monotonic - 1000.0)

    def advance(self, seconds: float) -> None:
        self._monotonic += seconds


class Death(Exception):
    """The process was killed here."""


class Fuse:
    """A gate that counts calls: at the chosen one the process dies, and so does every later call.

    A reading counts for nothing: a death at one leaves what a death at the next call leaves.
    """

    def __init__(self, at: int | None = None, *, after: bool = False) -> None:
        self.calls: list[str] = []
        self._at = at
        self._after = after
        self._dead = False
        self._lock = threading.Lock()

    def repeats(self, name: str) -> bool:
        return False

    @contextmanager
    def passing(self, name: str, *, may_freeze: bool = True) -> Iterator[None]:
        with self._lock:
            if self._dead:
                raise Death(name)
            chosen = name != "db.reading" and len(self.calls) == self._at
            if name != "db.reading":
                self.calls.append(name)
            if chosen and not self._after:
                self._dead = True
                raise Death(name)
        yield
        if chosen:
            self._dead = True
            raise Death(f"after {name}")


class Intruder(Fuse):
    """Lets the calls pass, and does something just before the chosen one."""

    def __init__(self, at: int, action: Callable[[], None]) -> None:
        super().__init__()
        self._moment = at
        self._action = action

    @contextmanager
    def passing(self, name: str, *, may_freeze: bool = True) -> Iterator[None]:
        with super().passing(name, may_freeze=may_freeze):
            with self._lock:
                comes = len(self.calls) > self._moment >= 0
                self._moment = -1 if comes else self._moment
            if comes:
                self._action()
            yield


class ForgetfulDatabase(Database):
    """A database that loses the answer to the first attempt of every transaction, after it was committed."""

    def __init__(self, url: str) -> None:
        super().__init__(url, sleep=lambda _: None)

    def transact(self, work: Callable[[sa.Connection], T]) -> T:
        super().transact(work)
        return super().transact(work)


@dataclass(frozen=True, slots=True)
class State:
    """Everything that must be the same in the end, whatever happened on the way."""

    on_server: list[tuple[bytes, bytes]]
    objects: dict[str, bytes]
    captures: set[tuple[bytes, int]]
    sightings: dict[tuple[bytes, int, bytes], tuple[Any, ...]]
    lines: Counter[tuple[str, bytes]]
    events: Counter[tuple[str, str]]


class Archive:
    """Database, store and clock; polls are run by a worker as ``archiver sync`` does. A context manager."""

    def __init__(self, database_url: str, directory: Path) -> None:
        self.directory = directory
        self.database = Database(database_url, sleep=lambda _: None)
        self.store = FilesystemStore(directory / "store")
        self.clock = Clock()
        self._url = database_url
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        migrate.upgrade(self.database)
        self.store.probe()
        self._stack.callback(self.database.close)
        self.uploads = self._stack.enter_context(ThreadPoolExecutor(3))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What it left claimed must not take up the host's slots of the next story in this database.
        self.execute(sa.update(lease).values(owner=None, expires_at=None, slot=None))
        self._stack.close()

    def serve(self, play: MailboxPlay) -> ScriptedPop3:
        """A mail server with this mailbox, until the archive's end."""
        # Its port may be that of an earlier one, in the same database.
        play.user = f"user-{new_account_id()}"
        return self._stack.enter_context(ScriptedPop3(play))

    def add(self, server: ScriptedPop3, **settings: Any) -> Account:
        """A new account for the mailbox of this server."""
        identity = new_account_id()
        new = Account(
            id=identity,
            name=f"account {identity}",
            url=f"pop3://{server.endpoint.user}@localhost:{server.port}",
            tls="none",
            secret_reference="env:NONE",
        )
        new = replace(new, **settings)
        return self.database.transact(lambda connection: accounts.add(connection, new, self.clock.now()))

    def ports(self, **others: Any) -> Ports:
        """What polls work with; a test replaces what it wants."""
        ports = Ports(
            connect=self.connect,
            password=lambda _: "secret",
            store=self.store,
            database=self.database,
            spool=Spool(self.directory, 1024 * 1024, 64 * 1024),
            uploads=self.uploads,
            now=self.clock.now,
            monotonic=self.clock.monotonic,
            stopping=lambda: False,
            batch=BatchLimits(messages=2),
        )
        return replace(ports, **others)

    def connect(self, account: Account, **limits: Any) -> pop3.Mailbox:
        return pop3.Mailbox.connect(
            pop3.parse_url(account.url, pop3.Tls(account.tls)),
            limits=pop3.Limits(**{"idle_seconds": 20.0, **limits}),
            avoid=policy.avoided(account, self.clock.now()),
        )

    def mortal_ports(self, fuse: Fuse) -> Ports:
        """Of a process that the fuse kills; uploads go one by one, so that each poll has the same calls."""
        database = GatedDatabase(self._url, fuse)
        self._stack.callback(database.close)
        return self.ports(
            store=GatedStore(self.store, fuse),
            database=database,
            connect=lambda account: GatedSession(self.connect(account), fuse),
            uploads=Uploads(at_once=True),
        )

    def worker(
        self,
        ports: Ports | None = None,
        *,
        stopping: threading.Event | None = None,
        sleep: Callable[[float], None] | None = None,
        **terms: Any,
    ) -> Worker:
        """A worker whose clock does not tick by itself."""
        worker = Worker(
            ports or self.ports(),
            Terms(**({"lease_seconds": LEASE_SECONDS, "workers": 2} | terms)),
            stopping=stopping or threading.Event(),
            sleep=sleep or self.clock.advance,
        )
        self._stack.callback(worker.close)
        return worker

    def sync(self, account: Account, ports: Ports | None = None) -> PollReport:
        """Poll to the end, as ``archiver sync`` does."""
        account = self.fresh(account)
        (report,) = self.worker(ports).poll_now([account], lambda _: Unwatched())
        return report

    def poll_on_schedule(self, account: Account, ports: Ports | None = None) -> Any:
        """Poll once as the service does when an account is due, and give the row that is kept of it."""
        worker = self.worker(ports)
        poll_claimed(worker, self.claim(account, owner=worker.terms.owner))
        return self.polls(account)[-1]

    def mailbox_row(self, account: Account) -> Any:
        with self.database.reading() as connection:
            return connection.execute(sa.select(mailbox).where(mailbox.c.account_id == account.id)).one()

    def before(self, account: Account) -> before.BeforePoll:
        """What a poll that begins now begins with."""
        with self.database.reading() as connection:
            return before.before_poll(connection, account.id)

    def fresh(self, account: Account) -> Account:
        """The account as the database has it now."""
        return self.before(account).account

    def claim(self, account: Account, owner: str = "somebody") -> ActiveLease:
        """Take the account's lease."""
        asked_at = self.clock.monotonic()
        claim = self.database.transact(
            lambda connection: claims.claim_account(
                connection, account.id, owner=owner, lease_seconds=LEASE_SECONDS
            )
        )
        if claim is None:
            raise AssertionError("the account is held by another")
        return ActiveLease(claim, LEASE_SECONDS, self.clock.monotonic, asked_at)

    def poll_until_death(self, account: Account, ports: Ports) -> None:
        """A poll that dies, and leaves its lease to run out."""
        held = self.claim(account)
        with suppress(Death):
            finish(tell_poll(self.before(account), held, ports))
        self.run_out(account)

    def run_out(self, account: Account) -> None:
        """Let the account's lease run out, by the database's clock."""
        self.execute(
            sa.update(lease)
            .where(lease.c.account_id == account.id)
            .values(
                expires_at=LONG_AGO, due_at=sa.case((lease.c.due_at.is_(None), sa.null()), else_=LONG_AGO)
            )
        )

    def execute(self, statement: sa.Executable) -> None:
        self.database.transact(lambda connection: connection.execute(statement))

    def lease(self, account: Account) -> Any:
        with self.database.reading() as connection:
            return connection.execute(sa.select(lease).where(lease.c.account_id == account.id)).one()

    def polls(self, account: Account) -> list[Any]:
        with self.database.reading() as connection:
            query = sa.select(poll).where(poll.c.account_id == account.id).order_by(poll.c.token)
            return list(connection.execute(query))

    def sightings(self, account: Account) -> list[Any]:
        with self.database.reading() as connection:
            query = sa.select(sighting).where(sighting.c.account_id == account.id)
            return list(connection.execute(query.order_by(sighting.c.uidl, sighting.c.size)))

    def segments(self, account: Account) -> list[Segment]:
        """The journal in the store, from its first segment on."""
        found: list[Segment] = []
        while (one := journal.read(self.store, account.id, len(found) + 1)) is not None:
            found.append(one[0])
        return found

    def lines(self, account: Account) -> list[Resolved]:
        return [line for segment in self.segments(account) for line in segment.lines]

    def objects(self, account: Account) -> dict[str, bytes]:
        """Every message of the account in the store."""
        content = {}
        for stored in self.store.list(f"messages/{account.id}/"):
            with self.store.get(stored.key) as chunks:
                content[stored.key] = b"".join(chunks)
        return content

    def captures(self, account: Account) -> list[Any]:
        with self.database.reading() as connection:
            return list(captures.listed(connection, account_id=account.id))

    def events(self, account: Account) -> list[dict[str, Any]]:
        from archiver import feed

        return [one for one in feed.backlog(self.database, after=0) if one["account_id"] == account.id]

    def archived(self, account: Account) -> list[bytes]:
        """The contents that are proved: in the store, in the journal, in the database."""
        recorded = {row.sha256 for row in self.captures(account)}
        written = {line.sha256 for line in self.lines(account)}
        objects = self.objects(account)
        return [
            content
            for key, content in objects.items()
            if bytes.fromhex(key.rpartition("/")[2].removesuffix(".eml")) in recorded & written
        ]

    def verify(self, account: Account, *, later_seconds: float = 3600.0) -> Findings:
        """What a verification finds an hour on, when nothing can be under way any more."""
        findings = Findings()
        verify(
            account,
            self.database,
            self.store,
            findings,
            now=datetime.now(UTC) + timedelta(seconds=later_seconds),
            readers=self.uploads,
        )
        return findings

    def state(self, account: Account, play: MailboxPlay) -> State:
        with self.database.reading() as connection:
            query = sa.select(event.c.kind, event.c.body).where(event.c.account_id == account.id)
            kinds = Counter(row.kind for row in connection.execute(query))
        told = Counter((one["event"], one.get("uidl", "")) for one in self.events(account))
        assert kinds == Counter(kind for kind, _ in told.elements())
        return State(
            on_server=list(play.messages),
            objects={key.rpartition("/")[2]: content for key, content in self.objects(account).items()},
            captures={(row.sha256, row.size) for row in self.captures(account)},
            sightings={
                (row.uidl, row.size, row.content): (
                    row.state,
                    row.sha256,
                    # Of a captured one these count sessions that asked to delete it.
                    0 if row.state == "captured" else row.attempts,
                    row.absent_at is not None,
                    row.delete_requested_at is not None,
                )
                for row in self.sightings(account)
            },
            lines=Counter((line.what.value, line.sighting.uidl) for line in self.lines(account)),
            events=told,
        )
