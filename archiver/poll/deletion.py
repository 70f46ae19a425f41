"""Which messages the server is asked to delete, the proof that they are archived, and DELE.

Owns step 5 of a batch. Promises that DELE is sent only for a message that

- this session's one listing shows with the id and size of a committed transaction,
- whose content was read in this session,
- and whose object and journal segments are found intact in the store now.

For the poll's own thread. The store is asked in other threads.
"""

from array import array
from collections.abc import Iterator
from functools import partial

from archiver import policy, pop3
from archiver.db import sightings
from archiver.db.captures import Provable
from archiver.errors import IntegrityError, OperatorNeeded, TryLater
from archiver.model import Counts, Resolved, What, message_key, segment_key
from archiver.poll.intake import Intake
from archiver.poll.plan import Item
from archiver.poll.ports import Lease, Ports
from archiver.poll.proof import Expected, fault
from archiver.store.spool import SpooledMessage

DELETIONS_AT_ONCE = 500
"""Messages between a check of the store and their DELE. A lost connection leaves these uncertain."""

READING_AGAIN_SECONDS = 300.0
"""How long one session reads messages again before it deletes them: all of it is lost with the connection."""

_Candidate = tuple[Item, Provable]


class Deletion:
    """The deletions of one session."""

    def __init__(self, mailbox: pop3.Session, intake: Intake, lease: Lease, ports: Ports) -> None:
        self._mailbox = mailbox
        self._intake = intake
        self._plan = intake.plan
        self._lease = lease
        self._ports = ports

    def run(self) -> None:
        """Ask the server to delete what the policy lets go, if it is proved to be archived."""
        plan = self._plan
        if plan.looks_renumbered:
            return
        self._delete_fetched(plan.pop_deletable())
        began_at = self._ports.monotonic()
        for indices in _in_parts(plan.due):
            if self._ports.stopping():
                return
            same = self._read_again(self._old_enough(indices), began_at)
            self._ask_to_delete(self._prove(same))
        # A message that came under the id of another may go by its own age.
        self._delete_fetched(plan.pop_deletable())

    def _delete_fetched(self, fetched: "array[int]") -> None:
        """Delete what this session fetched and recorded."""
        for indices in _in_parts(fetched):
            if self._ports.stopping():
                return
            self._ask_to_delete(self._prove(self._old_enough(indices)))

    def _old_enough(self, indices: "array[int]") -> list[_Candidate]:
        """Those of these messages whose capture is old enough for the policy."""
        account, now = self._intake.account, self._ports.now()
        items = [self._plan.item(index) for index in indices]
        with self._ports.database.reading() as connection:
            found = sightings.provable(
                connection, account.id, account.epoch, [item.sighting.uidl for item in items]
            )
        return [
            (item, found[item.sighting])
            for item in items
            if item.sighting in found
            and policy.may_delete(self._plan.delete, found[item.sighting].captured_at, now)
        ]

    def _read_again(self, candidates: list[_Candidate], began_at: float) -> list[_Candidate]:
        """Those that are, byte for byte, what an earlier session captured, as far as the budgets go.

        RFC 1939 section 7 lets a server give an id to another message once its own
        is gone. Between two polls that goes unseen, and of two messages with one
        size only the content tells. Another content is archived like a new message.
        A message that the server refuses stays where it is.
        """
        intake = self._intake
        expected = {item.entry.number: (item, provable) for item, provable in candidates}
        same: list[_Candidate] = []
        intake.open_batch()
        supply = self._supply([item for item, _ in candidates], began_at)
        try:
            for outcome in self._mailbox.retrieve(supply, intake.open_spool):
                item = intake.answered(outcome.entry)
                former = expected[outcome.entry.number][1].sha256
                match outcome:
                    case pop3.Retrieved(sink=spooled):
                        spooled.seal()
                        if spooled.sha256 == former:
                            same.append(expected[outcome.entry.number])
                            intake.count_read(spooled.size)
                            intake.drop(item)
                        else:
                            self._replace(item, former, spooled)
                    case pop3.Refused():
                        intake.drop(item)
                intake.record_due()
        except (TryLater, OperatorNeeded):
            if not intake.recorder.is_uncertain:
                intake.record_all()
            raise
        except pop3.Pop3Error as error:
            intake.record_all()
            if (item_in_transit := intake.in_transit(self._mailbox, error)) is not None:
                self._put_off(item_in_transit)
            raise
        intake.record_all()
        return same

    def _supply(self, items: list[Item], began_at: float) -> Iterator[pop3.Entry]:
        """What to read again, as far as the budgets go. The rest waits for the next poll."""
        for item in items:
            if (
                self._ports.stopping()
                or self._ports.monotonic() - began_at >= READING_AGAIN_SECONDS
                or self._intake.spending.holds_back(item.entry.size) is not None
            ):
                return
            yield self._intake.ask(item)

    def _replace(self, item: Item, former: bytes, spooled: SpooledMessage) -> None:
        """Another message has this id and size: the former one is gone, by our request or not."""
        intake = self._intake
        ours = item.sighting in self._plan.still_there
        intake.resolve(
            Resolved(
                What.DELETED if ours else What.GONE,
                item.sighting._replace(content=former),
                self._ports.now(),
                sha256=former,
            )
        )
        intake.counts -= Counts(known=1)
        intake.store(item, spooled)

    def _put_off(self, item: Item) -> None:
        """The connection died over this message, which is archived: the next polls do not read it again."""
        claim, epoch, now = self._lease.claim, self._intake.account.epoch, self._ports.now()
        self._ports.database.transact(
            lambda connection: sightings.deletion_put_off(connection, claim, epoch, item.sighting, now)
        )

    def _prove(self, candidates: list[_Candidate]) -> list[Item]:
        """Their messages. Raises IntegrityError if an object or a journal segment is not as it must be."""
        if not candidates:
            return []
        account_id, recorder = self._intake.account.id, self._intake.recorder
        objects = [
            Expected(message_key(account_id, each.sha256), each.sha256, each.size) for _, each in candidates
        ]
        # The head stands for the sightings, which segments after a capture's own may be about.
        sequences = {each.sequence for _, each in candidates} | {recorder.state.head.sequence}
        digests = recorder.now(lambda chain: {each: chain.digest(each) for each in sorted(sequences)})
        segments = [Expected(segment_key(account_id, each), digest) for each, digest in digests.items()]
        check = partial(fault, self._ports.store)
        for found in self._ports.uploads.map(check, [*objects, *segments]):
            if found is not None:
                raise IntegrityError(
                    found, hint="nothing was deleted from the mail server; run: archiver verify"
                )
        return [item for item, _ in candidates]

    def _ask_to_delete(self, chosen: list[Item]) -> None:
        """Record that deletion is asked for, then ask."""
        if not chosen:
            return
        claim, epoch = self._lease.claim, self._intake.account.epoch
        keys = [item.sighting for item in chosen]
        self._ports.database.transact(
            lambda connection: sightings.deletions_requested(
                connection, claim, epoch, keys, self._ports.now()
            )
        )
        self._lease.check()
        asked = self._mailbox.delete([item.entry for item in chosen])
        self._intake.counts += Counts(delete_requested=len(asked))


def _in_parts(indices: "array[int]") -> Iterator["array[int]"]:
    """Some hundreds at a time."""
    return (indices[at : at + DELETIONS_AT_ONCE] for at in range(0, len(indices), DELETIONS_AT_ONCE))
