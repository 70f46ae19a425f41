"""How a mailbox is looked at: by a glance, by listing what came since, or by listing all of it.

A glance is STAT and the UIDL of the last message. It tells whether a mailbox is
unchanged for two commands, whatever the mailbox holds. Owns when a glance is
believed, and what is remembered for the next one. For the poll's own thread.
"""

from datetime import datetime

from archiver import policy, pop3
from archiver.db import sightings
from archiver.db.before import BeforePoll
from archiver.model import Counts, LastLook
from archiver.poll.plan import Plan
from archiver.poll.ports import Lease, Ports


class Look:
    """One poll's look at a mailbox."""

    def __init__(self, before: BeforePoll, lease: Lease, ports: Ports) -> None:
        self._before = before
        self._lease = lease
        self._ports = ports
        self._trusted_until: datetime | None = None
        self.glanced = False
        """Whether a glance is all that the mailbox was looked at with."""
        self.unlisted = Counts()
        """What the last listing showed and this one, being incremental, does not repeat."""
        self.last_look: LastLook | None = None
        """What the next poll compares its glance with."""

    @property
    def shown_last(self) -> Counts:
        """What became of the messages that the last listing showed."""
        before = self._before
        return Counts(known=before.listed - before.quarantined, quarantined=before.quarantined)

    def glance(self, mailbox: pop3.Session) -> pop3.Glance | None:
        """Glance at the mailbox, if the answer may be trusted; else None.

        A message that is new or gone changes the count, the total size or the last
        UIDL. What slips through all three is found by the next full listing. After
        a poll that was cut short nothing is trusted: it may have seen the change
        and recorded nothing of it.
        """
        last = self._before.last_look
        if (
            last is None
            or self._lease.claim.recover
            or not policy.is_trusted(last.trusted_until, self._ports.now(), self._ports.full_listing_seconds)
        ):
            return None
        self.glanced = True
        return mailbox.glance(last.last_number)

    def is_unchanged(self, seen: pop3.Glance | None) -> bool:
        """Whether the mailbox looks as it did when it was last listed."""
        last = self._before.last_look
        if seen is None or last is None:
            return False
        return seen == pop3.Glance(last.stat_count, last.stat_size, last.last_uidl)

    def list(self, mailbox: pop3.Session, seen: pop3.Glance | None) -> pop3.Listing:
        """List the mailbox: what came since the last listing if that is certain, else all of it."""
        added = None
        if seen is not None and self._before.last_look is not None:
            added = self._list_added(mailbox, self._before.last_look, seen)
        self.glanced = False
        return added or mailbox.list()

    def _list_added(self, mailbox: pop3.Session, last: LastLook, seen: pop3.Glance) -> pop3.Listing | None:
        """The messages after the last one, if the mailbox did nothing but grow by them.

        Then the message that was last has its old number, count and total size grew
        by exactly the new messages, and their UIDLs are new and differ.
        """
        if (
            seen.count is None
            or seen.size is None
            or last.last_number != last.stat_count
            or seen.uidl != last.last_uidl
            or not policy.is_worth_increment(
                listed=last.stat_count,
                new=seen.count - last.stat_count,
                spared_lines=self._ports.spared_lines,
                pipelining=mailbox.facts.pipelining,
            )
        ):
            return None
        added = mailbox.list_from(last.stat_count + 1, seen.count)
        if added is None or sum(entry.size or 0 for entry in added.entries) != seen.size - last.stat_size:
            return None
        uidls = [entry.uidl or b"" for entry in added.entries]
        account = self._before.account
        with self._ports.database.reading() as connection:
            if len(set(uidls)) < len(uidls) or sightings.is_any_present(
                connection, account.id, account.epoch, uidls
            ):
                return None
        self.unlisted = self.shown_last
        self._trusted_until = last.trusted_until
        return added

    def remember(self, mailbox: pop3.Session, plan: Plan) -> None:
        """Glance once more, now that nothing is left to do: the next poll compares its glance with this one.

        The server is asked for the same as it will be then. If it stumbles over
        that, or contradicts its own listing, it is listed at each poll.
        """
        if not plan.is_clear:
            return
        now = self._ports.now()
        until = policy.trusted_until(
            now, self._ports.full_listing_seconds, plan.due_at(), self._ports.uniform
        )
        if until is None:
            return
        if self._trusted_until is not None:
            until = min(until, self._trusted_until)
        entries = plan.listing.entries
        last = entries[-1] if entries else None
        try:
            seen = mailbox.glance(None if last is None else last.number)
        except pop3.Pop3Error:
            return
        if seen.size is None or seen.count != plan.listing.count:
            return
        if last is None:
            self.last_look = LastLook(seen.count, seen.size, None, None, until)
        elif last.uidl is not None and seen.uidl == last.uidl:
            self.last_look = LastLook(seen.count, seen.size, last.number, last.uidl, until)
