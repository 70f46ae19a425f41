"""When an account is polled, by its own calendar: interval, cron expression, blackout windows.

Owns the reading of what an operator writes, and the arithmetic of local time:
pure functions over aware times. Cron expressions mean what they mean to Debian's
cron (``cronsim``). The rest of the engine asks for the next moment and for the
end of a blackout. ``policy`` decides what a poll's outcome means for the next one.

Local time jumps twice a year. A fixed time that the clock skips comes right after
the jump; a fixed time in an hour that comes twice is used once. An expression
with ``*`` in its minute or hour follows real time. A blackout covers both hours
of the same name.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from functools import lru_cache
from typing import NamedTuple, Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError

from archiver.model import Account

LONGEST_WAIT_SECONDS = 31 * 86400.0
"""However long its interval, an account is polled once a month."""

INTERVAL_GROWTH = 1.5
"""Factor by which an adaptive interval grows with each poll that finds no new mail."""

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")

_MINUTES_OF_DAY = 24 * 60
_WINDOW = re.compile(
    r"(?:(?P<first>[a-z]{3})(?:-(?P<last>[a-z]{3}))?\s+)?"
    r"(?P<start>\d{1,2}:\d{2})\s*-\s*(?P<end>\d{1,2}:\d{2})",
    re.ASCII,
)


class Window(NamedTuple):
    """A span of local time on some days of the week (Monday is 0). It may end on the next day."""

    days: frozenset[int]
    start_minute: int
    end_minute: int


def parse_zone(name: str) -> tzinfo:
    """A time zone of the IANA database, such as Europe/Berlin. Raises ValueError with a sentence."""
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"unknown time zone {name!r}: use a name such as Europe/Berlin") from None


def parse_blackout(text: str) -> tuple[Window, ...]:
    """Windows such as ``Mon-Fri 08:00-18:00, Sat 22:00-02:00``. Raises ValueError with a sentence."""
    windows = tuple(_window(part.strip()) for part in text.lower().split(",")) if text.strip() else ()
    closed = {
        (day * _MINUTES_OF_DAY + minute) % (7 * _MINUTES_OF_DAY)
        for window in windows
        for day in window.days
        for minute in range(window.start_minute, window.end_minute)
    }
    if len(closed) == 7 * _MINUTES_OF_DAY:
        raise ValueError(f"the blackout {text!r} leaves no time to poll: pause the account instead")
    return windows


def _window(text: str) -> Window:
    found = _WINDOW.fullmatch(text)
    if found is None:
        raise ValueError(
            f"{text!r} is not a blackout: write Mon-Fri 08:00-18:00, or 22:00-02:00 for all days, with commas"
        )
    for day in (found["first"], found["last"]):
        if day is not None and day not in _DAYS:
            raise ValueError(f"{day!r} is not a day: use Mon, Tue, Wed, Thu, Fri, Sat, Sun")
    start, end = _minute(found["start"]), _minute(found["end"])
    if start in (end, _MINUTES_OF_DAY):
        raise ValueError(f"the blackout {text!r} has no length: a whole day is 00:00-24:00")
    days = frozenset(range(7))
    if found["first"] is not None:
        first = _DAYS.index(found["first"])
        length = (_DAYS.index(found["last"] or found["first"]) - first) % 7 + 1
        days = frozenset((first + n) % 7 for n in range(length))
    return Window(days, start, end if end > start else end + _MINUTES_OF_DAY)


def _minute(text: str) -> int:
    hour, minute = map(int, text.split(":"))
    if minute > 59 or hour * 60 + minute > _MINUTES_OF_DAY:  # noqa: PLR2004
        raise ValueError(f"{text!r} is not a time of day: use 00:00 to 24:00")
    return hour * 60 + minute


# Of many accounts few have expressions of their own, and each poll asks.
@lru_cache(maxsize=1024)
def check_cron(text: str) -> str:
    """A cron expression of five fields, checked. Raises ValueError with a sentence."""
    if len(text.split()) != 5:  # noqa: PLR2004
        raise ValueError(f"{text!r} is not a cron expression: five fields, minute hour day month weekday")
    try:
        next(CronSim(text, datetime(2000, 1, 1, tzinfo=UTC)))
    except CronSimError as error:
        raise ValueError(f"{text!r} is not a cron expression: {str(error).lower()}") from None
    except StopIteration:
        raise ValueError(f"{text!r} never comes") from None
    return text


def next_moment(cron: str, zone: tzinfo, after: datetime) -> datetime:
    """The first moment after ``after`` at which a checked expression, read in this zone, matches."""
    moments = CronSim(cron, after.astimezone(zone))
    found = next(moments)
    # In the second of two equal hours, the moment that was passed in the first one comes up again.
    while found <= after:
        found = next(moments)
    return found.astimezone(UTC)


@dataclass(frozen=True, slots=True)
class Timetable:
    """When one account is polled: by its cron expression if it has one, else by its interval."""

    interval_seconds: float
    interval_max_seconds: float | None = None
    cron: str | None = None
    zone: tzinfo = UTC
    blackout: tuple[Window, ...] = ()

    @classmethod
    def of(cls, account: Account) -> Self:
        """Raises ValueError with a sentence that says what is wrong with the account's settings."""
        zone = parse_zone(account.time_zone)
        longest = account.interval_max_seconds
        if longest is not None and longest < account.interval_seconds:
            raise ValueError(
                f"the longest interval ({longest:g} s) is shorter than the interval "
                f"({account.interval_seconds:g} s)"
            )
        return cls(
            account.interval_seconds,
            longest,
            None if account.cron is None else check_cron(account.cron),
            zone,
            parse_blackout(account.blackout),
        )

    def wait_seconds(self, now: datetime, interval_seconds: float) -> tuple[float, bool]:
        """Time until the next poll, and whether it may be spread: an interval may, a named moment may not."""
        moment = self.next_cron(now)
        if moment is not None:
            return (moment - now).total_seconds(), False
        return min(interval_seconds, LONGEST_WAIT_SECONDS), True

    def next_cron(self, now: datetime) -> datetime | None:
        """The next moment of the cron expression; None without one."""
        return None if self.cron is None else next_moment(self.cron, self.zone, now)

    def adapted_seconds(self, stands_at: float | None, *, news: bool) -> float | None:
        """The adaptive interval after a poll that found new mail, or no mail; None if it does not adapt.

        New mail resets it to the shortest at once, since more mail often follows.
        """
        if self.interval_max_seconds is None:
            return None
        if news or stands_at is None:
            return self.interval_seconds
        grown = max(stands_at, self.interval_seconds) * INTERVAL_GROWTH
        return min(grown, self.interval_max_seconds)

    def blackout_ends(self, now: datetime) -> datetime | None:
        """When polling is allowed again; None if it is at this moment. Windows that touch are one."""
        ends_at: datetime | None = None
        while (end := max((end for start, end in self._windows(ends_at or now)), default=None)) is not None:
            ends_at = end
        return ends_at

    def blackout_begins(self, now: datetime) -> datetime | None:
        """When the next window begins, within a week or so; None without any."""
        return min((start for start, _ in self._spans(now) if start > now), default=None)

    def _windows(self, moment: datetime) -> Iterator[tuple[datetime, datetime]]:
        return ((start, end) for start, end in self._spans(moment) if start <= moment < end)

    def _spans(self, moment: datetime) -> Iterator[tuple[datetime, datetime]]:
        """Every window of the days around a moment, in UTC."""
        if not self.blackout:
            return
        today = moment.astimezone(self.zone).date()
        for offset in range(-1, 9):
            day = today + timedelta(days=offset)
            for window in self.blackout:
                if day.weekday() in window.days:
                    # PEP 495: of an hour that comes twice, fold 1 is the second; of one that does
                    # not exist, fold 0 is the later.
                    ends = (self._at(day, window.end_minute, fold) for fold in (0, 1))
                    yield self._at(day, window.start_minute, 0), max(ends)

    def _at(self, day: date, minute: int, fold: int) -> datetime:
        """Local time as UTC."""
        days, minute = divmod(minute, _MINUTES_OF_DAY)
        clock = time(minute // 60, minute % 60, tzinfo=self.zone, fold=fold)
        return datetime.combine(day + timedelta(days=days), clock).astimezone(UTC)
