"""What a mailbox does not show any more, recorded. For the poll's own thread.

Owns when an absence is certain. Which messages are absent by their ids is the
plan's to say.
"""

from archiver.db import sightings
from archiver.model import Resolved, SightingKey, What
from archiver.poll.intake import Intake
from archiver.poll.plan import ABSENCES_AT_ONCE
from archiver.poll.ports import Ports

_KNOWN_BY_ID = "it is known by its id"
"""Why a sighting ended although its message is still there."""


def record_absences(intake: Intake, ports: Ports) -> None:
    """Record the messages that are not listed any more, some thousands at a time."""
    plan, account = intake.plan, intake.account
    while lines := plan.pop_absent():
        intake.write(lines)
        if not plan.overflows:
            return
        with ports.database.reading() as connection:
            after = lines[-1].sighting
            rows = sightings.present(connection, account.id, account.epoch, after=after)
            plan.find_more_absent(rows, after)


def record_vanished_contents(intake: Intake, ports: Ports) -> None:
    """Record the messages without an id of their own that are not on the server any more.

    This takes the content of every listed message, from its sighting or from having
    been fetched now. A message in quarantine, or still to come, may be any of them.
    """
    plan, account = intake.plan, intake.account
    vanished = plan.contents - intake.seen_contents
    if not vanished or not plan.believed or intake.to_come or intake.counts.quarantined:
        return
    with ports.database.reading() as connection:
        present = sightings.present(connection, account.id, account.epoch)
        # A message that had no id may have one now; one whose id stood twice may have it alone.
        by_id = {
            former
            for key, known in present
            if not key.content and known.sha256 is not None
            for former in (key._replace(content=known.sha256), SightingKey(b"", key.size, known.sha256))
            if former in vanished
        }
    now = ports.now()
    lines = [
        Resolved(
            What.GONE,
            sighting,
            now,
            sha256=sighting.content,
            reason=_KNOWN_BY_ID if sighting in by_id else None,
        )
        for sighting in sorted(vanished)
    ]
    for start in range(0, len(lines), ABSENCES_AT_ONCE):
        intake.write(lines[start : start + ABSENCES_AT_ONCE])
