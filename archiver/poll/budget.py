"""What one poll may still fetch: its session's budget, its account's day, and the turn of others.

Owns what was asked for and what was fetched. For the poll's own thread.
"""

from archiver.db.before import BeforePoll
from archiver.model import StoppedBy
from archiver.poll.ports import Ports


class Spending:
    """What a poll has asked for and fetched so far, set against what it may."""

    def __init__(self, before: BeforePoll, ports: Ports, started_at: float) -> None:
        self._ports = ports
        self._started_at = started_at
        self._day_bytes = before.account.day_bytes or ports.budget.day_bytes
        self._earlier_bytes = before.day_bytes if before.day == ports.now().date() else 0
        self._asked_messages = self._asked_bytes = 0
        self.fetched_bytes = 0

    @property
    def today_bytes(self) -> int:
        """Bytes that were fetched from the account today (UTC), by this poll and those before it."""
        return self._earlier_bytes + self.fetched_bytes

    def asked(self, size: int | None) -> None:
        """The server is asked for one more message."""
        self._asked_messages += 1
        self._asked_bytes = self._asked_for() + (size or 0)

    def fetched(self, size: int) -> None:
        """One more message was read from the server."""
        self.fetched_bytes += size

    def holds_back(self, size: int | None) -> StoppedBy | None:
        """Why this poll may not ask for one more message, of that size; None if it may."""
        budget, seconds = self._ports.budget, self._ports.monotonic() - self._started_at
        size, asked_for = size or 0, self._asked_for()
        if budget.ends_at is not None and self._ports.now() >= budget.ends_at:
            return "blackout"
        spent = self._earlier_bytes + asked_for
        if self._day_bytes is not None and spent and spent + size > self._day_bytes:
            return "day"
        if (
            seconds >= self._ports.session_seconds
            or (budget.messages is not None and self._asked_messages >= budget.messages)
            or (budget.total_bytes is not None and asked_for and asked_for + size > budget.total_bytes)
        ):
            return "session"
        return "room" if seconds >= budget.slice_seconds and self._ports.make_room() else None

    def _asked_for(self) -> int:
        # A listing may understate sizes.
        return max(self._asked_bytes, self.fetched_bytes)
