"""A POP2 server on loopback (RFC 937), well-behaved or with faults put in.

No other server of that protocol is left to test against. Owns the states of the
protocol, in which a command out of order ends the session; connections, and the
record of what clients sent, are those of ``scripted_pop3``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from archiver.pop3 import Endpoint, Tls, Version
from tests.harness.scripted_pop3 import Channel, ScriptedPop3, Talk


@dataclass(slots=True)
class Pop2Play:
    """A mailbox with these messages; an empty one stands for a number that holds none.

    ``faults`` maps a whole command line (``READ 2``) or a verb to the octets
    sent in place of the right answer, after which the server disconnects if they
    begin with ``-``, or are empty. ``cuts`` maps a number to the octets after
    which the server disconnects in that message. ``folders`` are what FOLD opens.
    """

    messages: list[bytes]
    user: str = "user"
    password: str = "secret"
    greeting: bytes = b"+ POP2 scripted server ready\r\n"
    faults: Mapping[str, bytes] = field(default_factory=dict)
    cuts: Mapping[int, int] = field(default_factory=dict)
    folders: Mapping[str, list[bytes]] = field(default_factory=dict)

    def talk(self, channel: Channel) -> None:
        """One session."""
        channel.send(self.greeting)
        session = _Session(self)
        while not session.over:
            line = channel.line().decode()
            fault = self.faults.get(line, self.faults.get(line.partition(" ")[0]))
            if fault is None:
                channel.send(session.answer(line))
                continue
            channel.send(fault)
            session.over = fault[:1] in {b"", b"-"}


class _Session:
    """The state machine of one session."""

    def __init__(self, play: Pop2Play) -> None:
        self.over = False
        self._play = play
        self._messages = list(play.messages)
        self._state = "AUTH"
        self._current = 1

    def answer(self, line: str) -> bytes:
        verb, _, argument = line.partition(" ")
        match self._state, verb:
            case ("AUTH", "HELO") | (("MBOX" | "ITEM"), "FOLD"):
                return self._helo(argument) if verb == "HELO" else self._fold(argument)
            case (("MBOX" | "ITEM"), "READ"):
                self._current = int(argument or self._current)
                return self._read()
            case "ITEM", "RETR":
                self._state = "NEXT"
                self.over = self._current in self._play.cuts
                return self._messages[self._current - 1][: self._play.cuts.get(self._current)]
            case "NEXT", "ACKS":
                self._current += 1
                return self._read()
            case (("AUTH" | "MBOX" | "ITEM"), "QUIT"):
                return self._end(b"+ Sayonara\r\n")
        return self._end(b"- Bogus or out of sequence command\r\n")

    def _helo(self, argument: str) -> bytes:
        if argument != f"{self._play.user} {self._play.password}":
            return self._end(b"- Bad login\r\n")
        self._state = "MBOX"
        return b"#%d messages in your mailbox\r\n" % len(self._messages)

    def _fold(self, folder: str) -> bytes:
        self._messages = list(self._play.folders.get(folder, []))
        self._state, self._current = "MBOX", 1
        return b"#%d messages in %b\r\n" % (len(self._messages), folder.encode())

    def _read(self) -> bytes:
        within = 1 <= self._current <= len(self._messages)
        size = len(self._messages[self._current - 1]) if within else 0
        self._state = "ITEM" if size else "MBOX"
        return b"=%d characters in message %d\r\n" % (size, self._current)

    def _end(self, said: bytes) -> bytes:
        self.over = True
        return said


def pop2_server(play: Pop2Play) -> ScriptedPop3:
    """A server of this mailbox: a context manager."""
    return ScriptedPop3([[Talk(play.talk)]])


def pop2_endpoint(server: ScriptedPop3) -> Endpoint:
    """What a client needs to log in to such a server."""
    return replace(server.endpoint, tls=Tls.NONE, version=Version.POP2)
