"""A mailbox that remembers everything: what ever lay in it, who took it away, and what a session was shown.

Owns the model of a mail server, behind real POP3 on a socket, and the faults
that the next session meets. Whenever a session's QUIT deletes a message it
asks ``judge`` first; what that raises is kept in ``wrongs``.
"""

import base64
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from tests.harness.scripted_pop3 import Channel, ScriptedPop3, Talk, stuffed

How = Literal["drop", "do and drop", "refuse", "refuse for now", "cut"]

_CAPABILITIES = b"+OK\r\nTOP\r\nUSER\r\nSASL PLAIN\r\nRESP-CODES\r\nPIPELINING\r\n%b.\r\n"


@dataclass(slots=True, eq=False)
class Letter:
    """One message. ``uidl`` is None where the server gives none; ``listed_size`` may differ from the size.

    ``hidden`` is one that has taken over id and size of an archived one between
    two listings: unread, nobody can tell them apart. ``in_place_of`` is the one
    whose place it took, told with the size that the other was told with.
    """

    uidl: bytes | None
    content: bytes
    listed_size: int
    removed_by: Literal["us", "another"] | None = None
    hidden: bool = False
    in_place_of: "Letter | None" = None


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens instead of the right answer to the ``nth`` command of this verb in the next session."""

    verb: str
    nth: int
    how: How


@dataclass(slots=True)
class ModelMailbox:
    """The mailbox. ``history`` has all that ever lay in it, in the order in which it is shown."""

    judge: Callable[[Letter], None] = lambda _: None
    history: list[Letter] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    gives_uidl: bool = True
    hides_all: bool = False
    sessions: list["Session"] = field(default_factory=list)
    wrongs: list[AssertionError] = field(default_factory=list)

    @property
    def letters(self) -> list[Letter]:
        """What lies in the mailbox."""
        return [letter for letter in self.history if letter.removed_by is None]

    @property
    def deletions(self) -> int:
        """How many messages all sessions deleted."""
        return sum(session.deletions for session in self.sessions)

    def put(self, uidl: bytes | None, content: bytes) -> None:
        """A message comes, behind all others."""
        self.history.append(Letter(uidl, content, len(content)))

    def put_before(self, other: Letter, uidl: bytes | None, content: bytes) -> None:
        """One comes between others."""
        self.history.insert(self.history.index(other), Letter(uidl, content, len(content)))

    def exchange(
        self, old: Letter, uidl: bytes | None, content: bytes, *, last: bool, hidden: bool = False
    ) -> None:
        """Somebody else takes one away, and another of its size comes: behind all others, or in its place."""
        old.removed_by = "another"
        new = Letter(uidl, content, old.listed_size, hidden=hidden, in_place_of=old)
        self.history.insert(len(self.history) if last else self.history.index(old), new)

    @contextmanager
    def served(self) -> Iterator[ScriptedPop3]:
        """A server of this mailbox."""
        with ScriptedPop3([[Talk(self._talk)]]) as server:
            yield server

    def _talk(self, channel: Channel) -> None:
        self.sessions.append(Session(self, channel))
        self.sessions[-1].run()

    def take(self, letters: list[Letter]) -> int:
        """A session's QUIT: these go, as far as nobody else took them before; returns how many."""
        taken = 0
        for letter in letters:
            if letter.removed_by is None:
                try:
                    self.judge(letter)
                except AssertionError as wrong:
                    self.wrongs.append(wrong)
                letter.removed_by = "us"
                taken += 1
        return taken


class Session:
    """One session, which sees the mailbox as it was at the login.

    ``letters`` and ``uidls`` are what it sees, ``listed`` those that a whole
    listing showed, None before there was one; ``deletions`` counts what it deleted.
    """

    def __init__(self, mailbox: ModelMailbox, channel: Channel) -> None:
        self.letters: list[Letter] = []
        self.uidls: list[bytes | None] = []
        self.listed: list[Letter] | None = None
        self.deletions = 0
        self._mailbox = mailbox
        self._channel = channel
        self._marked: list[int] = []
        self._times: Counter[str] = Counter()
        self._faults = {(fault.verb, fault.nth): fault.how for fault in mailbox.faults}

    def run(self) -> None:
        self._channel.send(b"+OK ready\r\n")
        goes_on = True
        while goes_on:
            line = self._channel.line().decode()
            verb, _, argument = line.partition(" ")
            how = self._faults.get((verb, self._times[verb]))
            self._times[verb] += 1
            goes_on = self._meet(how, verb, argument) if how else self._obey(verb, argument)

    def _obey(self, verb: str, argument: str) -> bool:
        self._channel.send(self._answer(verb, argument))
        return verb != "QUIT"

    def _meet(self, how: How, verb: str, argument: str) -> bool:
        match how:
            case "drop":
                return False
            case "do and drop":
                self._answer(verb, argument)
                return False
            case "refuse":
                self._channel.send(b"-ERR no\r\n")
                return True
            case "refuse for now":
                self._channel.send(b"-ERR [SYS/TEMP] not now\r\n")
                return True
            case "cut":
                answer = self._answer(verb, argument)
                self._channel.send(answer[: len(answer) // 2])
                return False

    def _answer(self, verb: str, argument: str) -> bytes:  # noqa: PLR0911 - a table of verbs
        match verb:
            case "CAPA":
                return _CAPABILITIES % (b"UIDL\r\n" if self._mailbox.gives_uidl else b"")
            case "USER" | "NOOP":
                return b"+OK\r\n"
            case "PASS":
                return self._log_in()
            case "AUTH":
                base64.b64decode(argument.partition(" ")[2], validate=True)
                return self._log_in()
            case "STAT":
                return b"+OK %d %d\r\n" % (
                    len(self.letters),
                    sum(letter.listed_size for letter in self.letters),
                )
            case "UIDL" if self._mailbox.gives_uidl:
                return self._list(self.uidls, argument)
            case "LIST":
                return self._list([b"%d" % letter.listed_size for letter in self.letters], argument)
            case "RETR":
                letter = self.letters[int(argument) - 1]
                if letter.removed_by is not None:
                    return b"-ERR it is gone\r\n"
                return b"+OK\r\n" + stuffed(letter.content)
            case "DELE":
                self._marked.append(int(argument) - 1)
                return b"+OK\r\n"
            case "QUIT":
                self._take_marked()
                return b"+OK\r\n"
            case _:
                return b"-ERR unknown command\r\n"

    def _take_marked(self) -> None:
        for place in self._marked:
            letter = self.letters[place]
            if letter.removed_by is None:
                # It goes by the id that this session showed, whatever it is called by now.
                letter.uidl = self.uidls[place]
        self.deletions += self._mailbox.take([self.letters[place] for place in self._marked])

    def _log_in(self) -> bytes:
        self.letters = [] if self._mailbox.hides_all else self._mailbox.letters
        self.uidls = [letter.uidl for letter in self.letters]
        return b"+OK\r\n"

    def _list(self, values: list[bytes | None], argument: str) -> bytes:
        if argument:
            value = values[int(argument) - 1] if int(argument) <= len(values) else None
            return (
                b"-ERR no such message\r\n"
                if value is None
                else b"+OK %s %b\r\n" % (argument.encode(), value)
            )
        lines = {
            number: b"%d %b\r\n" % (number, value)
            for number, value in enumerate(values, 1)
            if value is not None
        }
        if values and values[-1] is None and lines:
            # Without a line it would be taken for one that arrived after UIDL was answered.
            lines[len(values)] = b"%d\r\n" % len(values)
        self.listed = [self.letters[number - 1] for number in lines]
        return b"+OK\r\n" + b"".join(lines.values()) + b".\r\n"
