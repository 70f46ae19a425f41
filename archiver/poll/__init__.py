"""One poll of one mailbox: the story of its messages, top to bottom.

Owns the order of the steps, on which the promises rest:

1. A message is read from the server into the spool.
2. It is put into the store.
3. A journal segment that names it is put into the store.
4. One transaction records the segment in the database.
5. The server is asked to delete the message, if the policy says so and the
   message is proved to be archived.
6. QUIT, once all that was fetched in this session is recorded.

A poll may stop between any two steps. The next poll finishes or repeats the work
and ends in the same state. A session is never repeated in place; the schedule
repeats polls.

The parts: ``look`` (glance or listing), ``plan`` (what to do about a listing),
``budget`` (what may still be fetched), ``intake`` (steps 1 and 2, and batches),
``chain`` (steps 3 and 4), ``absences``, ``proof`` and ``deletion`` (step 5).

Threads: one thread at a time tells a poll's story. It may change where the story
yields. Two kinds of work go on in other threads meanwhile: uploads, and one
recording at a time. ``intake`` and ``chain`` say what belongs to them.
"""

from collections.abc import Generator, Iterator
from enum import Enum
from typing import Final, Literal, Self

from archiver import policy, pop3
from archiver.db import sightings
from archiver.db.before import BeforePoll, before_poll
from archiver.errors import (
    ArchiverError,
    IntegrityError,
    MessageRefused,
    OperatorNeeded,
    Outcome,
    TryLater,
)
from archiver.evidence.identity import StoreMismatch
from archiver.model import Counts, PollReport, StoppedBy, segment_key
from archiver.poll import server as mailserver
from archiver.poll.absences import record_absences, record_vanished_contents
from archiver.poll.budget import Spending
from archiver.poll.chain import Chain, Recorder, Source
from archiver.poll.deletion import Deletion
from archiver.poll.intake import Intake
from archiver.poll.look import Look
from archiver.poll.plan import Plan
from archiver.poll.ports import Lease, Ports, Unwatched, Watch
from archiver.poll.proof import Expected, fault


class Needs(Enum):
    """What a story needs before it goes on."""

    THREAD = "thread"
    """A thread of its own: what follows reads and writes, computes, and may take long."""


NEEDS_THREAD: Final = Needs.THREAD

Story = Generator[Literal[Needs.THREAD], None, PollReport]
"""A poll that goes on each time it is asked to, by ``begin`` and ``finish``, in any thread."""


def begin(story: Story) -> PollReport | Literal[Needs.THREAD]:
    """Go on up to where the story needs a thread, or to its end. Until then it waits for the server only."""
    try:
        return next(story)
    except StopIteration as end:
        report: PollReport = end.value
        return report


def finish(story: Story) -> PollReport:
    """Go on to the end, in this thread."""
    while (report := begin(story)) is NEEDS_THREAD:
        pass
    return report


def poll(
    before: BeforePoll,
    lease: Lease,
    ports: Ports,
    watch: Watch | None = None,
    *,
    may_glance: bool = False,
) -> Story:
    """Poll one account and report. Errors that are ours or the server's end up in the report.

    ``before`` was read from the database after the account was claimed: what
    was read earlier may be out of date. With ``may_glance``, a mailbox that
    looks unchanged is not listed. A poll that a person asked for always lists.
    """
    with _Poll(before, lease, ports, watch or Unwatched()) as one:
        try:
            if lease.claim.recover:
                yield NEEDS_THREAD
                one.catch_up()
            with mailserver.translated(), one.log_in() as mailbox:
                seen = one.look.glance(mailbox) if may_glance else None
                if one.look.is_unchanged(seen):
                    one.quit(mailbox)
                    return one.report_unchanged()
                yield NEEDS_THREAD
                intake = one.list(mailbox, seen)
                one.check_store(intake.plan)
                one.archive(mailbox, intake)
                Deletion(mailbox, intake, lease, ports).run()
                one.look_back(mailbox, intake)
                one.quit(mailbox)
        except ArchiverError as error:
            return one.report(error.outcome, error)
        return one.report("ok")


class _Poll:
    """One poll: what its steps share, and what its report says. For the thread that tells the story."""

    def __init__(self, before: BeforePoll, lease: Lease, ports: Ports, watch: Watch) -> None:
        self.lease = lease
        self.ports = ports
        self.watch = watch
        self.started_at = ports.monotonic()
        self.recorder = Recorder(Chain(before, lease, ports), ports.uploads)
        self.is_calling = False
        self.mailbox: pop3.Session | None = None
        self.listing: pop3.Listing | None = None
        self.intake: Intake | None = None
        self.stopped_by: StoppedBy | None = None
        self._begin_with(before)

    def _begin_with(self, before: BeforePoll) -> None:
        self.before, self.account = before, before.account
        self.spending = Spending(before, self.ports, self.started_at)
        self.look = Look(before, self.lease, self.ports)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.intake is not None:
            self.intake.close()

    def catch_up(self) -> None:
        """Record what an earlier holder of the lease wrote to the journal and could not record."""
        self.recorder.now(lambda chain: chain.catch_up())
        with self.ports.database.reading() as connection:
            self._begin_with(before_poll(connection, self.account.id))

    def log_in(self) -> pop3.Session:
        """A session that is logged in. If the password is refused and another is to be had, try that once."""
        password = self.ports.password(self.account)
        try:
            return self._log_in_by(password)
        except pop3.Pop3Error as error:
            another = None
            if error.kind is pop3.FailureKind.AUTH:
                another = self.ports.another_password(self.account, password)
            if another is None:
                raise
        return self._log_in_by(another)

    def _log_in_by(self, password: str) -> pop3.Session:
        self.is_calling = True
        mailbox = self.mailbox = self.ports.connect(self.account)
        try:
            mailbox.login(password)
        except BaseException:
            mailbox.close()
            raise
        return mailbox

    def list(self, mailbox: pop3.Session, seen: pop3.Glance | None) -> Intake:
        """List the mailbox, and compare the listing with what is known."""
        server = mailserver.of_facts(mailbox.facts)
        listing = self.listing = self.look.list(mailbox, seen)
        plan = self._plan(listing)
        self.intake = Intake(
            plan,
            Source(self.account, server, listing),
            self.recorder,
            self.spending,
            self.lease,
            self.ports,
            self.watch,
            counts=self.look.unlisted + plan.counts,
        )
        return self.intake

    def _plan(self, listing: pop3.Listing) -> Plan:
        account = self.account
        delete = policy.delete_in_force(
            account.delete, suspended=account.deletion_suspended, forbidden=self.ports.forbid_deletion
        )
        with self.ports.database.reading() as connection:
            # Of what came since the last listing, nothing was there before.
            plan = Plan.of(
                listing,
                sightings.present(connection, account.id, account.epoch) if listing.first == 1 else (),
                sightings.absent_quarantined(connection, account.id, account.epoch),
                delete=delete,
                now=self.ports.now(),
            )
        if plan.still_there:
            claim, now = self.lease.claim, self.ports.now()
            self.ports.database.transact(
                lambda connection: sightings.listed_again(
                    connection, claim, account.epoch, plan.still_there, now
                )
            )
        self.watch.listed(listing.count, len(plan.fetch), plan.bytes_to_fetch())
        return plan

    def check_store(self, plan: Plan) -> None:
        """Before anything is fetched, written or deleted: check that this store belongs to this database.

        It must show the archive's identity, and the last segment that the database knows.
        """
        if not (plan.fetch or plan.absent or plan.due):
            return
        try:
            self.ports.check_store()
        except StoreMismatch as error:
            # The trouble is not this account's, and passes when the volume is back.
            raise TryLater(str(error), hint=error.hint) from error
        head = self.recorder.state.head
        if head.sequence:
            last = Expected(segment_key(self.account.id, head.sequence), head.digest)
            if (found := fault(self.ports.store, last)) is not None:
                raise IntegrityError(found, hint="nothing was fetched or deleted; run: archiver verify")

    def archive(self, mailbox: pop3.Session, intake: Intake) -> None:
        """Fetch new messages and record them in batches. Whatever fails, those fetched whole are recorded."""
        plan = intake.plan
        if not plan.looks_renumbered and plan.overflows:
            record_absences(intake, self.ports)
        intake.open_batch(() if plan.looks_renumbered else plan.pop_absent())
        try:
            for outcome in mailbox.retrieve(self._supply(intake), intake.open_spool):
                item = intake.answered(outcome.entry)
                match outcome:
                    case pop3.Retrieved(sink=spooled):
                        try:
                            spooled.seal()
                        except MessageRefused as refused:
                            intake.drop(item)
                            intake.blame(item, str(refused))
                            continue
                        intake.store(item, spooled)
                    case pop3.Refused(error=error):
                        intake.quarantine(item, str(error))
                intake.record_stored()
        except (TryLater, OperatorNeeded):
            # The spool or the store has no room for one message: the others must not have been
            # fetched for nothing. But if the journal is ahead of the database, nothing goes on.
            intake.end_recording()
            if not self.recorder.is_uncertain:
                intake.record_all()
            raise
        except pop3.Pop3Error as error:
            intake.end_recording()
            if (item_in_transit := intake.in_transit(mailbox, error)) is not None:
                intake.blame(item_in_transit, str(error))
            intake.record_all()
            raise
        intake.record_all()
        if not plan.looks_renumbered:
            record_absences(intake, self.ports)
            record_vanished_contents(intake, self.ports)

    def _supply(self, intake: Intake) -> Iterator[pop3.Entry]:
        """The entries to ask for, until something holds back. The client takes them as its window moves."""
        for index in intake.plan.fetch:
            item = intake.plan.item(index)
            if self.ports.stopping():
                return
            self.stopped_by = self.spending.holds_back(item.entry.size)
            if self.stopped_by is not None:
                return
            yield intake.ask(item)

    def look_back(self, mailbox: pop3.Session, intake: Intake) -> None:
        """Remember what the mailbox looks like, if nothing is left to do."""
        if not intake.to_come and not intake.counts.delete_requested:
            self.look.remember(mailbox, intake.plan)

    def quit(self, mailbox: pop3.Session) -> None:
        """End the session: all that was fetched in it is recorded by now.

        Only QUIT makes deletions happen (RFC 1939 section 6). If none was asked
        for, a server that disconnects instead of answering does no harm.
        """
        self.lease.check()
        try:
            mailbox.quit()
        except pop3.Pop3Error:
            if self.intake is not None and self.intake.counts.delete_requested:
                raise

    def report_unchanged(self) -> PollReport:
        """The mailbox is as it was when it was last listed, and so is what is known of its messages."""
        return self._report("ok", None, self.before.listed, self.look.shown_last)

    def report(self, outcome: Outcome, error: ArchiverError | None = None) -> PollReport:
        """What the poll did, up to where it came."""
        listed = None if self.listing is None else self.listing.count
        counts = self.look.unlisted if self.intake is None else self.intake.counts
        return self._report(outcome, error, listed, counts)

    def _report(
        self, outcome: Outcome, error: ArchiverError | None, listed: int | None, counts: Counts
    ) -> PollReport:
        facts = None if self.mailbox is None else self.mailbox.facts
        return PollReport(
            account=self.account.name,
            outcome=outcome,
            listed=listed,
            counts=counts + Counts(fetched_bytes=self.spending.fetched_bytes),
            seconds=self.ports.monotonic() - self.started_at,
            error=None if error is None else str(error),
            hint=None if error is None else error.hint,
            segments=self.recorder.state.segments,
            glanced=self.look.glanced,
            last_look=self.look.last_look,
            wait_seconds=error.wait_seconds if isinstance(error, TryLater) else None,
            # The next poll also accounts for objects that no segment names yet.
            journal_uncertain=self.recorder.is_uncertain or _has_uploads(self.intake),
            avoid=() if facts is None else tuple(sorted(facts.avoid)),
            suspect=() if facts is None else tuple(sorted(facts.suspect)),
            login_delay_seconds=None if facts is None else facts.login_delay_seconds,
            implementation=None if facts is None else facts.implementation,
            warnings=() if facts is None else (*mailserver.warnings(self.account, facts), *self._of_budget()),
            reached=self.mailbox is not None if self.is_calling else None,
            stopped_by=self.stopped_by,
        )

    def _of_budget(self) -> Iterator[str]:
        if self.stopped_by == "day" and self.intake is not None:
            yield (
                f"the day's budget is spent: {self.spending.today_bytes} bytes fetched since 00:00 UTC, "
                f"and {self.intake.to_come} messages wait for tomorrow"
            )


def _has_uploads(intake: Intake | None) -> bool:
    return intake is not None and intake.has_uploads
