"""The three promises against everything that can happen, in any order: a state machine for Hypothesis.

Owns the rules: mail comes and goes, servers renumber and misbehave, stores and
databases fail before and after they did their work, an old copy of the
database is put back, clocks jump, leases run out, and a worker is killed or
stands still at any call of any port while others go on. Polls are asked for in
person, or fall due, and then go by what was listed before. The database is real
SQLite, the store a real directory, the mail server speaks POP3 on a socket;
workers are the product's own. What holds after each rule is judged from
outside: by files, by SQL, and by what the mail server remembers.
"""

import hashlib
import itertools
import json
import sqlite3
import tempfile
from collections import Counter
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import sqlalchemy as sa
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from archiver.db import accounts, leases, requests
from archiver.db.tables import host, lease
from archiver.model import NEVER_DELETE, DeletePolicy, PollReport, message_key, segment_key
from archiver.poll.ports import Unwatched
from tests.machine.mailbox import Fault, Letter, ModelMailbox, Session
from tests.machine.process import GatedDatabase, GatedSession, GatedStore, Process, Turn, Uploads
from tests.scenarios.story import LEASE_SECONDS, LONG_AGO, Archive, Clock

ACCOUNT = "5" * 16
DAY_SECONDS = 86400.0
WEEK_SECONDS = 7 * DAY_SECONDS

MOST_POLLS = 12
"""To come to rest, once nothing fails any more."""

FROZEN_AT_ONCE = 2

BELIEVED_FOR = timedelta(hours=4)
"""So long, by the clock of the day, a poll of the schedule may go by what was listed before."""

FAIR_SHARES = {"stories with a glance": 0.1, "stories with a tail": 0.05}
"""In so many stories, at least, a poll believes that the mailbox is as it was, or that it only grew."""

_CALLS = (
    "mail.connect",
    "mail.login",
    "mail.glance",
    "mail.list_from",
    "mail.list",
    "mail.retrieve",
    "mail.delete",
    "mail.quit",
    "store.put messages",
    "store.put journal",
    "store.get",
    "store.stat",
    "db.reading",
    "db.transact",
    "db.commit",
)
_REPEATED = ("store.put messages", "store.put journal", "db.transact")

_turns = st.one_of(
    st.builds(
        Turn,
        fate=st.sampled_from(["killed", "failing", "frozen"]),
        name=st.sampled_from(_CALLS),
        nth=st.integers(0, 4),
        after=st.booleans(),
    ),
    st.builds(
        Turn,
        fate=st.sampled_from(["killed", "frozen"]),
        name=st.just(""),
        nth=st.integers(0, 70),
        after=st.booleans(),
    ),
    st.builds(Turn, fate=st.just("repeated"), name=st.sampled_from(_REPEATED), nth=st.integers(0, 3)),
)
_some_turns: st.SearchStrategy[list[Turn]] = st.one_of(st.just([]), st.lists(_turns, min_size=1, max_size=3))
_policies = st.sampled_from(["never", "after-archived", "after-days=3"])
_change = st.sampled_from(
    ["comes", "comes before another", "goes", "is exchanged", "is exchanged at the end"]
)
_changes = st.lists(st.lists(_change, max_size=3), min_size=1, max_size=3)
_faults = st.builds(
    Fault,
    verb=st.sampled_from(["CAPA", "PASS", "STAT", "UIDL", "LIST", "RETR", "DELE", "QUIT"]),
    nth=st.integers(0, 3),
    how=st.sampled_from(["drop", "do and drop", "refuse", "refuse for now", "cut"]),
)


def content(number: int) -> bytes:
    """A message; no two numbers have the same, nor the same size."""
    return f"Subject: {number}\r\n\r\n.\r\n..\r\nFrom {'x' * number}\r\n".encode()


def twin(of: bytes) -> bytes:
    """Another message of the same size, whose twin is the first."""
    return of.replace(b"From", b"from") if b"From" in of else of.replace(b"from", b"From")


@cache
def _template() -> bytes:
    """An empty database with the schema."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        with Archive(f"sqlite:///{path / 'archiver.db'}", path):
            pass
        with closing(sqlite3.connect(path / "archiver.db")) as database:
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return (path / "archiver.db").read_bytes()


def expect_fair_shares(figures: Counter[str]) -> None:
    """What these stories were to try, they tried often enough."""
    for what, share in FAIR_SHARES.items():
        assert figures[what] >= share * figures["stories"], figures


class SettableClock(Clock):
    """A clock whose time of day can be set, while its monotonic time goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.set_by = timedelta()

    def now(self) -> datetime:
        return super().now() + self.set_by


@dataclass(frozen=True, slots=True)
class Look:
    """What was listed of a mailbox: whole, at that time, and since then what came behind the last one."""

    listed_at: datetime
    letters: list[Letter]
    uidls: list[bytes | None]

    def hides(self, letter: Letter, session: Session) -> bool:
        """Whether this one, in a session that saw no more of them listed, looks like the one in its place.

        It took that one's place, or that of another which had; and where it is
        the last of those that were listed, it has its id.
        """
        place = session.letters.index(letter)
        if place >= len(self.letters):
            return False
        other = letter.in_place_of
        while other is not None and other is not self.letters[place]:
            other = other.in_place_of
        is_last = place == len(self.letters) - 1
        return other is not None and not (is_last and session.uidls[place] != self.uidls[place])


class Worker(Process[PollReport | None]):
    """A simulated process with one worker in it, which polls the account once."""

    def __init__(self, turns: list[Turn], name: str) -> None:
        super().__init__(turns)
        self.name = name
        self.token: int | None = None
        self.session: Session | None = None
        self.look: Look | None = None
        self.counted = 0


class CrashMachine(RuleBasedStateMachine):
    """An archive, its mailbox, and all that can befall them. ``figures`` counts what all of them did."""

    figures: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.figures["stories"] += 1
        self.stack = ExitStack()
        directory = Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix="archiver-")))
        self.path = directory / "archiver.db"
        self.path.write_bytes(_template())
        self.url = f"sqlite:///{self.path}"
        self.archive = self.stack.enter_context(Archive(self.url, directory))
        self.clock = self.archive.clock = SettableClock()
        self.mailbox = ModelMailbox(judge=self.expect_archived)
        server = self.stack.enter_context(self.mailbox.served())
        self.account = self.archive.add(server, id=ACCOUNT, name="account")
        self.numbers = itertools.count(1)
        self.workers = itertools.count(1)
        self.frozen: list[Worker] = []
        self.objects: dict[str, tuple[int, int, bytes]] = {}
        self.look: Look | None = None
        self.followed = 0
        self.copied: tuple[Look | None, int] | None = None
        self.was_restored = False
        self.came_back: set[bytes | None] = set()
        self.deleting = False
        self.seen: set[str] = set()

    # Mail comes and goes.

    @initialize(number=st.integers(0, 5), policy=_policies, polls=st.integers(0, 2))
    def begin(self, number: int, policy: str, polls: int) -> None:
        for _ in range(number):
            self.deliver()
        self.change_policy(policy)
        for _ in range(polls):
            self.start_worker([], at_once=True, due=True)
            self.deliver()

    @rule()
    def deliver(self) -> None:
        number = next(self.numbers)
        self.mailbox.put(b"id-%d" % number, content(number))

    @rule(data=st.data())
    @precondition(lambda self: self.mailbox.letters)
    def deliver_before_another(self, data: st.DataObject) -> None:
        number = next(self.numbers)
        self.mailbox.put_before(self.choose(data), b"id-%d" % number, content(number))

    @rule(data=st.data(), named=st.booleans())
    @precondition(lambda self: self.mailbox.history)
    def deliver_a_copy_or_a_twin(self, data: st.DataObject, named: bool) -> None:
        letter = data.draw(st.sampled_from(range(len(self.mailbox.history))), "letter")
        octets = self.mailbox.history[letter].content
        octets = data.draw(st.sampled_from([octets, twin(octets)]), "octets")
        self.mailbox.put(b"id-%d" % next(self.numbers) if named else None, octets)

    @rule()
    def deliver_without_id(self) -> None:
        self.mailbox.put(None, content(next(self.numbers)))

    @rule(data=st.data())
    @precondition(lambda self: self.mailbox.letters)
    def deliver_under_an_id_that_is_in_use(self, data: st.DataObject) -> None:
        uidl = self.choose(data).uidl
        self.mailbox.put(uidl, content(next(self.numbers)))

    @rule(data=st.data(), same=st.booleans())
    def deliver_under_an_id_that_was_in_use(self, data: st.DataObject, same: bool) -> None:
        in_use = {letter.uidl for letter in self.mailbox.letters}
        gone = [letter for letter in self.mailbox.history if letter.uidl not in in_use]
        if gone:
            old = gone[data.draw(st.integers(0, len(gone) - 1), "letter")]
            if same:
                self.came_back.add(old.uidl)
            self.mailbox.put(old.uidl, old.content if same else content(next(self.numbers)))

    @rule(data=st.data())
    @precondition(lambda self: self.mailbox.letters)
    def an_id_is_given_again_to_a_twin(self, data: st.DataObject) -> None:
        """Another message of the same size stands under the id of one that somebody else removed.

        Where that one is archived, the other must be before it is deleted, and
        need not be as long as it stays. Also where only the journal tells, to a
        database that was put back.
        """
        old = self.choose(data)
        is_archived = hashlib.sha256(old.content).hexdigest() in self.named_by_the_journal()
        hidden = old.hidden or is_archived
        self.mailbox.exchange(old, old.uidl, twin(old.content), last=True, hidden=hidden)

    @rule(data=st.data(), last=st.booleans())
    @precondition(lambda self: self.mailbox.letters)
    def one_is_exchanged(self, data: st.DataObject, last: bool) -> None:
        """For another of its size. Where that does not come last, only a whole listing must find it out."""
        old = self.choose(data)
        self.mailbox.exchange(old, b"id-%d" % next(self.numbers), twin(old.content), last=last)

    @rule(data=st.data())
    @precondition(lambda self: self.mailbox.letters)
    def somebody_else_removes(self, data: st.DataObject) -> None:
        self.choose(data).removed_by = "another"

    @rule(data=st.data())
    @precondition(lambda self: self.mailbox.letters)
    def a_size_is_told_differently(self, data: st.DataObject) -> None:
        self.choose(data).listed_size += 10_000 * next(self.numbers)

    @rule(data=st.data())
    @precondition(lambda self: self.mailbox.letters)
    def two_sizes_are_told_the_other_way_round(self, data: st.DataObject) -> None:
        one, other = self.choose(data), self.choose(data)
        one.listed_size, other.listed_size = other.listed_size, one.listed_size

    @rule()
    @precondition(lambda self: self.mailbox.letters)
    def every_id_is_another(self) -> None:
        """A migration: the same messages, numbered anew."""
        for letter in self.mailbox.letters:
            letter.uidl = b"id-%d" % next(self.numbers)

    def choose(self, data: st.DataObject) -> Letter:
        letters = self.mailbox.letters
        return letters[data.draw(st.integers(0, len(letters) - 1), "letter")]

    # The world misbehaves.

    @rule(faults=st.lists(_faults, min_size=1, max_size=2))
    def the_next_session_meets(self, faults: list[Fault]) -> None:
        self.mailbox.faults = faults

    @rule(gives=st.booleans())
    def the_server_knows_uidl(self, gives: bool) -> None:
        self.mailbox.gives_uidl = gives

    @rule()
    def the_next_session_is_shown_nothing(self) -> None:
        self.mailbox.hides_all = True

    @rule(seconds=st.sampled_from([1.0, LEASE_SECONDS, 3700.0, DAY_SECONDS, WEEK_SECONDS]))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(days=st.sampled_from([-400.0, -1.0, 0.0, 1.0]))
    def somebody_sets_the_clock(self, days: float) -> None:
        self.clock.set_by = timedelta(days=days)

    @rule(policy=_policies)
    def change_policy(self, policy: str) -> None:
        """As an operator does, who also ends a hold."""
        self.deleting = policy != "never"
        former = self.archive.fresh(self.account)
        changed = replace(former, delete=DeletePolicy.parse(policy))

        def change(connection: sa.Connection) -> None:
            accounts.change(connection, changed, self.clock.now(), former=former)
            requests.allow_deletion(connection, ACCOUNT)

        self.archive.database.transact(change)
        self.look = None

    @rule()
    def the_database_is_copied(self) -> None:
        self.copied = self.look, self.followed
        _copy(self.path, self.path.with_suffix(".copy"))

    @rule(is_told=st.booleans())
    @precondition(lambda self: self.copied)
    def the_copy_is_put_back(self, is_told: bool) -> None:
        """All processes are ended before; whether the operator has it catch up is left to chance."""
        for worker in self.frozen:
            worker.kill()
        self.frozen.clear()
        _copy(self.path.with_suffix(".copy"), self.path)
        assert self.copied is not None
        self.look, self.followed = self.copied
        if is_told:
            self.archive.database.transact(leases.doubt_journals)
            self.look = None
        self.was_restored = True

    # Workers.

    @rule(turns=_some_turns, at_once=st.booleans(), due=st.booleans())
    @precondition(lambda self: len(self.frozen) < FROZEN_AT_ONCE)
    def poll(self, turns: list[Turn], at_once: bool, due: bool) -> None:
        self.start_worker(turns, at_once=at_once, due=due)

    @rule(turns=_some_turns, at_once=st.booleans(), due=st.booleans(), clocks_agree=st.booleans())
    @precondition(lambda self: len(self.frozen) < FROZEN_AT_ONCE)
    def poll_once_the_lease_has_run_out(
        self, turns: list[Turn], at_once: bool, due: bool, clocks_agree: bool
    ) -> None:
        self.run_out(clocks_agree=clocks_agree)
        self.start_worker(turns, at_once=at_once, due=due)

    @rule(nth=st.integers(0, 50), after=st.booleans(), at_once=st.booleans(), due=st.booleans())
    def poll_and_die(self, nth: int, after: bool, at_once: bool, due: bool) -> None:
        self.run_out(clocks_agree=True)
        self.start_worker([Turn("killed", "", nth, after)], at_once=at_once, due=due)

    @rule(nth=st.integers(0, 50), after=st.booleans(), at_once=st.booleans(), due=st.booleans())
    @precondition(lambda self: len(self.frozen) < FROZEN_AT_ONCE)
    def poll_and_stand_still(self, nth: int, after: bool, at_once: bool, due: bool) -> None:
        self.run_out(clocks_agree=True)
        self.start_worker([Turn("frozen", "", nth, after)], at_once=at_once, due=due)

    @rule(data=st.data(), changes=_changes, turns=_some_turns, at_once=st.booleans())
    @precondition(lambda self: len(self.frozen) < FROZEN_AT_ONCE)
    def the_schedule_polls_again_and_again(
        self, data: st.DataObject, changes: list[list[str]], turns: list[Turn], at_once: bool
    ) -> None:
        """What most polls are like: little changed since the one before, or nothing."""
        self.run_out(clocks_agree=True)
        self.start_worker([], at_once=at_once, due=True)
        for at, few in enumerate(changes, 1):
            for change in few:
                self.change_a_little(data, change)
            self.start_worker(turns if at == len(changes) else [], at_once=at_once, due=True)

    def change_a_little(self, data: st.DataObject, change: str) -> None:
        if change == "comes" or not self.mailbox.letters:
            self.deliver()
        elif change == "comes before another":
            self.deliver_before_another(data)
        elif change == "goes":
            self.somebody_else_removes(data)
        else:
            self.one_is_exchanged(data, last=change == "is exchanged at the end")

    @rule(data=st.data(), turns=_some_turns)
    @precondition(lambda self: self.frozen)
    def one_wakes_up(self, data: st.DataObject, turns: list[Turn]) -> None:
        worker = self.frozen.pop(data.draw(st.integers(0, len(self.frozen) - 1), "worker"))
        self.wake(worker, turns)

    @rule(data=st.data())
    @precondition(lambda self: self.frozen)
    def one_is_killed_where_it_stands(self, data: st.DataObject) -> None:
        self.frozen.pop(data.draw(st.integers(0, len(self.frozen) - 1), "worker")).kill()

    @rule(data=st.data())
    @precondition(lambda self: self.messages() and self.deleting)
    def an_object_is_damaged_and_mended(self, data: st.DataObject) -> None:
        """While it is damaged nothing may be deleted on its account: ``expect_archived`` sees to that."""
        messages = self.messages()
        key = messages[data.draw(st.integers(0, len(messages) - 1), "object")]
        path = self.archive.directory / "store" / key
        sound = path.read_bytes()
        path.write_bytes(bytes(len(sound)))
        self.run_out(clocks_agree=True)
        self.start_worker([], at_once=False, due=False)
        path.write_bytes(sound)
        self.objects[key] = _identity(path)

    def messages(self) -> list[str]:
        return sorted(key for key in self.objects if key.startswith("messages/"))

    def start_worker(self, turns: list[Turn], *, at_once: bool, due: bool) -> PollReport | None:
        """Poll in a new process, until it ends, dies or stands still: as it is ``due``, or in person."""
        self.figures["polls"] += 1
        worker = Worker(turns, f"elsewhere/{next(self.workers)}/1/1")
        if due:
            self.archive.execute(sa.update(lease).where(lease.c.due_at.is_not(None)).values(due_at=LONG_AGO))
            self.archive.execute(sa.update(host).values(retry_at=None))
        before = len(self.mailbox.sessions)
        worker.start(lambda: self.work(worker, at_once, due))
        self.mailbox.faults, self.mailbox.hides_all = [], False
        self.after_a_step(worker, before, woken=False)
        return worker.result

    def work(self, worker: Worker, at_once: bool, due: bool) -> PollReport | None:
        """What a process does, with nothing in its memory but what it makes itself."""
        gate = worker.gate
        database = GatedDatabase(self.url, gate)
        ports = self.archive.ports(
            store=GatedStore(self.archive.store, gate),
            database=database,
            uploads=Uploads(at_once=at_once),
            # So that a small mailbox, too, is asked for what came.
            spared_lines=1,
        )

        def connect(account: Any) -> GatedSession:
            with ExitStack() as left_open:
                with gate.passing("mail.connect"):
                    session = self.archive.connect(account)
                    # The kernel closes what a killed process had open.
                    left_open.callback(session.close)
                left_open.pop_all()
            return GatedSession(session, gate)

        runs = self.archive.worker(
            replace(ports, connect=connect),
            owner=worker.name,
            # It waits for a lease that another holds: in a few long steps, not in many short ones.
            sleep=lambda _: self.clock.advance(LEASE_SECONDS / 2),
        )
        try:
            if due:
                for ended in runs.changeovers.change_over([], 1, may_wait=True):
                    ended.result()
                return None
            [report] = runs.poll_now([self.archive.fresh(self.account)], lambda _: Unwatched())
            return report
        finally:
            runs.close()
            database.close()

    def wake(self, worker: Worker, turns: list[Turn]) -> None:
        """Let one go on. If another has the account by now, it must change nothing that was recorded."""
        newest = self.held()[0]
        frozen_at, before = worker.frozen_at, self.recorded()
        sessions, deletions = len(self.mailbox.sessions), self.mailbox.deletions
        worker.go_on(turns)
        # Who never heard of the claim that it was given claims anew, and is late no more.
        is_late = worker.token not in (None, newest) and self.held()[0] == newest
        if is_late:
            assert self.recorded() == before, (frozen_at, "a late worker changed the database")
            if frozen_at != "mail.quit":
                # Of a QUIT that was as good as sent nobody can take anything back.
                assert self.mailbox.deletions == deletions, (frozen_at, "a late worker deleted")
        self.after_a_step(worker, sessions, woken=True, is_late=is_late)

    def after_a_step(self, worker: Worker, sessions: int, *, woken: bool, is_late: bool = False) -> None:
        """A worker ended, died or stands still; there were so many ``sessions`` before."""
        if len(self.mailbox.sessions) > sessions:
            worker.session = self.mailbox.sessions[-1]
        self.figures["calls of ports"] += len(worker.gate.calls) - worker.counted
        worker.counted = len(worker.gate.calls)
        if worker.gate.killed:
            self.figures["kills"] += 1
        elif not worker.ended:
            self.figures["standstills"] += 1
        if not worker.ended:
            token, owner = self.held()
            if owner == worker.name:
                # What an operator changes from here on it need not have seen.
                worker.token, worker.look = token, self.look
            self.frozen.append(worker)
        elif worker.result is not None and worker.result.outcome == "ok":
            self.expect_accounted_for(worker.result, worker.session, None)
        if not is_late:
            self.follow(worker, woken=woken)

    def follow(self, worker: Worker, *, woken: bool) -> None:
        """What became of the polls of this step, and what the next one may believe of the mailbox."""
        session, ended = worker.session, self.ended()
        if session is not None and session.listed is not None and not ended:
            # Its listing showed what was there: nobody may look away from that any more.
            self.look = None
        for poll in ended:
            self.followed = poll.token
            assert not (poll.error or "").startswith("internal error"), poll.error
            if poll.outcome == "ok":
                assert session is not None
                believed = self.look or worker.look
                if session.listed is None and not woken:
                    self.expect_fresh()
                self.expect_accounted_for(poll, session, believed)
                self.look = self.looked(poll, session, believed)
            elif poll.listed is not None or poll.glanced:
                self.look = None

    def looked(self, poll: Any, session: Session, believed: Look | None) -> Look | None:
        """What the next poll may believe, after this one, which went well."""
        if session.listed is not None:
            look = Look(self.clock.now(), session.letters, session.uidls)
        elif poll.glanced:
            self.see("glance")
            return self.look
        else:
            assert believed is not None
            self.see("tail")
            came = slice(len(believed.letters), None)
            letters, uidls = session.letters[came], session.uidls[came]
            look = replace(believed, letters=believed.letters + letters, uidls=believed.uidls + uidls)
        return None if poll.to_come or poll.delete_requested else look

    def expect_fresh(self) -> None:
        """What is believed was seen not long ago, and not in the future."""
        assert self.look is not None, "there was nothing to be believed"
        assert timedelta() <= self.clock.now() - self.look.listed_at <= BELIEVED_FOR

    def see(self, what: str) -> None:
        """Count it, and the stories in which it is seen."""
        self.figures[f"{what}s"] += 1
        if what not in self.seen:
            self.seen.add(what)
            self.figures[f"stories with a {what}"] += 1

    def run_out(self, *, clocks_agree: bool) -> None:
        """The lease's end, by the database's clock; and by that of its holder, if they agree."""
        if clocks_agree:
            self.clock.advance(LEASE_SECONDS)
        self.archive.run_out(self.account)

    # The promises.

    @invariant()
    def nothing_is_lost(self) -> None:
        self.figures["steps"] += 1
        if self.mailbox.wrongs:
            raise self.mailbox.wrongs.pop()

    @invariant()
    def nothing_is_altered(self) -> None:
        root = self.archive.directory / "store"
        contents = {letter.content for letter in self.mailbox.history}
        found = {str(path.relative_to(root)): path for path in root.glob("[!.]*/**/*.*")}
        assert found.keys() >= self.objects.keys()
        for key in found.keys() - self.objects.keys():
            if key.startswith("messages/"):
                octets = found[key].read_bytes()
                assert found[key].stem == hashlib.sha256(octets).hexdigest()
                assert octets in contents
        identities = {key: _identity(path) for key, path in found.items()}
        assert {key: identities[key] for key in self.objects} == self.objects, "an object was written again"
        self.objects = identities

    @invariant()
    def the_database_has_what_the_journal_has(self) -> None:
        segments = self.segments()
        (sequence, digest) = self.ask("SELECT sequence, digest FROM journal")[0]
        assert sequence <= len(segments)
        if sequence:
            assert hashlib.sha256(segments[sequence - 1]).digest() == digest
        lines = [line for segment in segments[:sequence] for line in _lines(segment)]
        captured = Counter(line["sha256"] for line in lines if line["what"] == "captured")
        assert captured == Counter(sha256.hex() for (sha256,) in self.ask("SELECT sha256 FROM capture"))
        every = [line for segment in segments for line in _lines(segment) if line["what"] == "captured"]
        assert len({line["sha256"] for line in every}) == len(every), "a content was captured twice"

    def expect_archived(self, letter: Letter) -> None:
        """What we delete is in the store, octet for octet, and journal and database know it."""
        assert letter.uidl is not None, "a message without an id was deleted"
        digest = hashlib.sha256(letter.content)
        path = (
            self.archive.directory
            / f"store/messages/{ACCOUNT}/{digest.hexdigest()[:2]}/{digest.hexdigest()}.eml"
        )
        assert path.exists(), (letter, "deleted, and not in the store")
        assert path.read_bytes() == letter.content, (letter, "deleted, and another in the store")
        assert digest.hexdigest() in self.named_by_the_journal(), (letter, "deleted, and not in the journal")
        rows = self.ask("SELECT 1 FROM capture WHERE sha256 = ?", digest.digest())
        assert rows, (letter, "deleted, and not in the database")

    def expect_accounted_for(self, poll: Any, session: Session | None, believed: Look | None) -> None:
        """Of each message that a session saw: it is archived, set aside, or still to come.

        ``poll`` is its report, or the row that is kept of it. Without a whole
        listing it may overlook what looks like what it knows, and no more.
        """
        assert session is not None
        assert session.listed is not None or believed is not None, "there was nothing to be believed"
        shown = session.letters if session.listed is None else session.listed
        assert poll.listed == len(shown), (poll, shown)
        missing = self.missing(shown)
        if session.listed is None and believed is not None:
            missing = [letter for letter in missing if not believed.hides(letter, session)]
        quarantined = (poll.counts if isinstance(poll, PollReport) else poll).quarantined
        assert len(missing) <= quarantined + (poll.to_come or 0), (poll, missing, "unaccounted for")

    def captured(self) -> set[bytes]:
        return {sha256 for (sha256,) in self.ask("SELECT sha256 FROM capture")}

    def missing(self, letters: list[Letter]) -> list[Letter]:
        """Those that are not archived, and could be."""
        recorded = self.captured()
        return [
            letter
            for letter in letters
            if not letter.hidden and hashlib.sha256(letter.content).digest() not in recorded
        ]

    def teardown(self) -> None:
        try:
            self.come_to_rest()
        finally:
            for worker in self.frozen:
                worker.kill()
            self.stack.close()

    def come_to_rest(self) -> None:
        """Once nothing fails any more, everything is archived, once, and it can be proved."""
        for worker in list(self.frozen):
            self.frozen.remove(worker)
            self.wake(worker, [])
        mailbox = self.mailbox
        mailbox.faults, mailbox.hides_all, mailbox.gives_uidl = [], False, True
        self.clock.set_by = max(self.clock.set_by, timedelta()) + timedelta(days=500)
        self.poll_until_nothing_is_left()
        if unknown := self.segments_behind_the_database():
            # An older copy, whose operator did not have it catch up, and no mail came that would have.
            assert self.was_restored
            assert unknown <= {finding.key for finding in self.archive.verify(self.account).named}
            self.archive.database.transact(leases.doubt_journals)
            self.poll_until_nothing_is_left()
            assert not self.segments_behind_the_database()
        self.nothing_is_lost()
        self.nothing_is_altered()
        self.the_database_has_what_the_journal_has()
        self.expect_everything_archived()

    def poll_until_nothing_is_left(self) -> None:
        ends = 0
        for _ in range(MOST_POLLS):
            # Beyond every quarantine, and everything that is believed for a while.
            self.clock.advance(2 * WEEK_SECONDS)
            self.run_out(clocks_agree=True)
            report = self.start_worker([], at_once=True, due=False)
            assert report is not None
            to_do = report.to_come or report.counts.quarantined or report.counts.delete_requested
            ends = ends + 1 if report.outcome == "ok" and not to_do else 0
            if ends == 2:
                return
        raise AssertionError((report, "it does not come to rest"))

    def expect_everything_archived(self) -> None:
        letters, recorded = self.mailbox.letters, self.captured()
        assert not self.missing(letters)
        assert self.archive.segments(self.account) or not recorded
        findings = self.archive.verify(self.account)
        # What was stored and not named yet when its worker died, and then taken away by somebody else,
        # no later poll can name.
        there = {message_key(ACCOUNT, hashlib.sha256(letter.content).digest()) for letter in letters}
        unnamed = {key for key in self.messages() if key not in there}
        strays = [one for one in findings.named if one.key in unnamed and one.kind == "unrecorded"]
        assert findings.named == strays
        assert findings.checked == len(recorded)
        if not self.was_restored:
            self.expect_everything_told(recorded)
        account = self.archive.fresh(self.account)
        if account.delete != NEVER_DELETE and account.deletion_suspended is None:
            times = Counter(letter.uidl for letter in letters)
            left = [letter for letter in letters if letter.uidl is not None and times[letter.uidl] == 1]
            assert not left, "it was to be deleted, and was not"

    def expect_everything_told(self, recorded: set[bytes]) -> None:
        """The feed has each capture once; the journal calls what we deleted deleted.

        The latter not of one that may be a message which shows no id, as it has its size, nor where
        an epoch ended in between: of its ids nothing more is told. Nor where the last message has no
        id, whose line of the listing says nothing: such a listing is not believed to be whole.
        One that came back as it was may never have gone, for all anybody knows: it is gone since, or
        one of those that show no id.
        """
        events = self.archive.events(self.account)
        captured = Counter(event["sha256"] for event in events if event["event"] == "captured")
        assert captured == Counter(sha256.hex() for sha256 in recorded)
        letters = self.mailbox.letters
        unnamed = {letter.listed_size for letter in letters if letter.uidl is None}
        if self.archive.fresh(self.account).epoch > 1 or (letters and letters[-1].uidl is None):
            return
        lines = [line for segment in self.segments() for line in _lines(segment)]
        told: dict[str, set[bytes]] = {"deleted": set(), "gone": set()}
        for line in lines:
            if line["what"] in told:
                told[line["what"]].add(line["uidl"].encode("latin-1"))
        ours = {
            letter.uidl
            for letter in self.mailbox.history
            if letter.removed_by == "us" and letter.listed_size not in unnamed
        }
        untold = ours - {letter.uidl for letter in letters} - told["deleted"]
        untold -= self.came_back if unnamed else self.came_back & told["gone"]
        assert not untold, (untold, "deleted by us, and not told")

    # Looks from outside.

    def ask(self, query: str, *values: object) -> list[Any]:
        with closing(sqlite3.connect(self.path)) as database:
            return database.execute(query, values).fetchall()

    def held(self) -> tuple[int, str | None]:
        """The newest token, and who holds the lease."""
        found: tuple[int, str | None] = self.ask("SELECT token, owner FROM lease")[0]
        return found

    def ended(self) -> list[Any]:
        """The polls whose end was recorded since it was asked last."""
        return [poll for poll in self.archive.polls(self.account) if poll.token > self.followed]

    def recorded(self) -> dict[str, list[Any]]:
        """All that polls record."""
        return {
            table: self.ask(f"SELECT * FROM {table} ORDER BY 1, 2")
            for table in ("capture", "sighting", "journal", "poll", "event")
        }

    def named_by_the_journal(self) -> set[str | None]:
        """Digests in hex; None of what has none."""
        return {line.get("sha256") for segment in self.segments() for line in _lines(segment)}

    def segments_behind_the_database(self) -> set[str]:
        """Keys of those that the store has and the database does not know."""
        [(known,)] = self.ask("SELECT sequence FROM journal")
        return {segment_key(ACCOUNT, number) for number in range(known + 1, len(self.segments()) + 1)}

    def segments(self) -> list[bytes]:
        directory = self.archive.directory / f"store/journal/{ACCOUNT}"
        return [path.read_bytes() for path in sorted(directory.glob("*"))]


def _copy(from_path: Path, to_path: Path) -> None:
    """Copy a database as ``.backup`` of sqlite3 does."""
    with closing(sqlite3.connect(from_path)) as source, closing(sqlite3.connect(to_path)) as target:
        source.backup(target)


def _identity(path: Path) -> tuple[int, int, bytes]:
    """What tells that a file was written again, or replaced."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, path.read_bytes()


def _lines(segment: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in segment.splitlines()[1:]]
