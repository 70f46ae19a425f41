"""How commands print: results on standard output, everything else on standard error.

With ``--json``, standard output has one object per line, and nothing else. A
terminal gets progress bars and tables, a pipe gets plain lines.
"""

import io
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from archiver.errors import ArchiverError
from archiver.printable import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from archiver.model import Account

PIPE_COLUMNS = 200
"""The width of a table that is not printed to a terminal."""

LINE_SECONDS = 5.0
"""Time between two lines of progress where no bar can be drawn."""

Json = Annotated[bool, typer.Option("--json", metavar="", help="Print one JSON object per line.")]


def console(*, stderr: bool = False) -> "Console":
    """A console that never wraps or colours text meant for a pipe.

    Text has no markup or emoji names: it may come from a mail server. What prints by a
    console of its own passes it through ``printable``, as ``say`` and tables do.
    """
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=True)


def print_anything() -> None:
    """Escape what the character set of the output lacks, such as an umlaut in ASCII."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def drop_output() -> None:
    """Send what standard output still holds nowhere, so that Python does not try it again at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def note_if_possible(text: str) -> None:
    """A line of progress. A closed pipe or a full disk must not end the poll that it is about."""
    with suppress(OSError):
        note(text)


def say(text: str = "") -> None:
    """A line of result for people."""
    console().print(printable(text))


def note(text: str) -> None:
    """A line that is not the result."""
    console(stderr=True).print(printable(text))


def complain(error: ArchiverError) -> None:
    """An error, on one line, and what to do on the next."""
    note(f"archiver: {one_line(error)}")
    if error.hint:
        note(f"  hint: {one_line(error.hint)}")


def one_line(text: object) -> str:
    return " ".join(str(text).split())


def emit(value: dict[str, Any]) -> None:
    """Print one JSON object on a line, and flush it: a reader may be waiting."""
    sys.stdout.write(json.dumps(value, default=_plain) + "\n")
    sys.stdout.flush()


def _plain(value: object) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.hex()
    return str(value)


@dataclass(slots=True)
class Table:
    """A table with a header, which adapts to the width of the terminal."""

    columns: tuple[str, ...]
    right: tuple[str, ...] = ()
    """The columns that hold numbers."""
    spare: tuple[str, ...] = ()
    """The columns to omit first where the terminal is too narrow."""
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def add_row(self, *cells: str) -> None:
        self.rows.append(tuple(map(printable, cells)))

    def fitted(self, width: int) -> list[str]:
        """The columns to show: where all do not fit, only those that say something."""
        shown = list(self.columns)
        for given_up in (self._says_nothing, self.spare.__contains__):
            if self._width(shown) > width:
                shown = [column for column in shown if not given_up(column)]
        return shown

    def _says_nothing(self, column: str) -> bool:
        return all(cell in NOTHING for cell in self.cells(column))

    def cells(self, column: str) -> list[str]:
        index = self.columns.index(column)
        return [row[index] for row in self.rows]

    def _width(self, columns: list[str]) -> int:
        return sum(max(map(len, (column, *self.cells(column)))) + COLUMN_GAP for column in columns)


NOTHING = ("", "-", "0", "0 bytes")
"""Cells that say nothing."""

COLUMN_GAP = 3
"""Between two columns."""


def table(*columns: str, right: tuple[str, ...] = (), spare: tuple[str, ...] = ()) -> Table:
    """A table with these columns, and no rows yet."""
    return Table(columns, right, spare)


def show(made: Table) -> None:
    """Print a table: as wide as the terminal at most, and with all columns elsewhere."""
    from rich import box
    from rich.table import Table as RichTable

    target = console()
    target.soft_wrap = False
    if not target.is_terminal:
        target.width = PIPE_COLUMNS
    shown = made.fitted(target.width) if target.is_terminal else list(made.columns)
    rich = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in shown:
        rich.add_column(column, justify="right" if column in made.right else "left", overflow="fold")
    for row in zip(*map(made.cells, shown), strict=True):
        rich.add_row(*row)
    target.print(rich)


def size(count: float) -> str:
    """A number of bytes for people."""
    from rich.filesize import decimal

    return decimal(int(count))


def counted(number: int, what: str) -> str:
    """A number of things: ``1 account``, ``2 accounts``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def quoted(text: str) -> str:
    """A word of a command that people copy into their shell."""
    return shlex.quote(text)


def ago(then: datetime | None, now: datetime) -> str:
    """How long since, or until, for people."""
    if then is None:
        return "-"
    seconds = (now - then).total_seconds()
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if abs(seconds) >= length:
            return _tense(f"{abs(seconds) / length:.0f} {unit}", past=seconds > 0)
    return _tense(f"{abs(seconds):.0f} s", past=seconds > 0)


def _tense(text: str, *, past: bool) -> str:
    return f"{text} ago" if past else f"in {text}"


class SyncProgress:
    """The progress of many polls: a bar for each on a terminal, a line every few seconds elsewhere."""

    def __init__(self, *, quiet: bool, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._quiet = quiet
        self._monotonic = monotonic
        self._console = console(stderr=True)
        self._bars: Progress | None = None

    def __enter__(self) -> Self:
        if not self._quiet and self._console.is_terminal:
            from rich import progress

            self._bars = progress.Progress(
                progress.TextColumn("{task.description}", markup=False),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[rate]}"),
                progress.TimeRemainingColumn(),
                console=self._console,
            )
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def watch(self, account: "Account") -> "AccountProgress":
        """The watch for the poll of this account."""
        return AccountProgress(
            account.name, self._bars, None if self._quiet or self._bars else note_if_possible, self._monotonic
        )


class AccountProgress:
    """A ``poll.Watch`` for one account."""

    def __init__(
        self,
        name: str,
        bars: "Progress | None",
        line: Callable[[str], None] | None,
        monotonic: Callable[[], float],
    ) -> None:
        self._name = name
        self._bars = bars
        self._line = line
        self._monotonic = monotonic
        self._task: TaskID | None = None
        self._started_at = self._said_at = monotonic()
        self._messages = self._wanted = 0
        self._bytes = 0

    def listed(self, listed: int, to_fetch: int, total_bytes: int | None) -> None:
        """See ``poll.Watch``."""
        self._messages, self._bytes, self._wanted = 0, 0, to_fetch
        self._started_at = self._said_at = self._monotonic()
        if self._line is not None:
            much = f" ({size(total_bytes)})" if total_bytes else ""
            self._line(f"{self._name}: {listed} on the server, {to_fetch} to fetch{much}")
        if self._bars is not None and to_fetch:
            self._task = self._bars.add_task(printable(self._name), total=to_fetch, rate="")

    def fetched(self, message_bytes: int) -> None:
        """See ``poll.Watch``."""
        self._messages += 1
        self._bytes += message_bytes
        now = self._monotonic()
        rate = f"{self._messages / max(now - self._started_at, 0.001):.0f}/s"
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, advance=1, rate=rate)
        elif self._line is not None and now - self._said_at >= LINE_SECONDS:
            self._said_at = now
            self._line(
                f"{self._name}: {self._messages} of {self._wanted} fetched, {size(self._bytes)}, {rate}"
            )
