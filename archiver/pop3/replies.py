"""POP3 commands and their replies: one line, or many lines that end in a dot.

Owns pipelining, the bounds of multi-line replies, what CAPA says, and what a
server trips over. Promises that commands are sent ahead only to a server that
lists PIPELINING. Leaves the meaning of each verb to ``mailbox``, ``login`` and
``opening``.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from archiver.pop3.capabilities import Capabilities, parse_capabilities
from archiver.pop3.conversation import Conversation, Terms, Time, Wait
from archiver.pop3.failures import FailureKind, Meaning, Pop3Error, Stage, classify
from archiver.pop3.values import ServerFacts
from archiver.pop3.wire import BlockEnd, Command, Event, Receiver, Reply, Shape, command

_CAPABILITY_BYTES: Final = 64 * 1024  # the longest seen is under 1 KiB
_LISTINGS: Final = frozenset({"UIDL", "LIST"})


@dataclass(slots=True)
class Quirks:
    """What the server trips over, by names of ``AVOIDABLE``. All connections of a session share it."""

    avoid: frozenset[str]
    """Not used in this session."""
    found: frozenset[str] = frozenset()
    """The server tripped over it, beyond doubt."""
    suspect: frozenset[str] = frozenset()
    """The server stalled or disconnected there, which may be chance."""

    def avoids(self, *names: str) -> bool:
        """Whether any of these must not be used."""
        return not self.avoid.isdisjoint(names)


class Pop3Conversation(Conversation[Receiver]):
    """One POP3 connection. Raises Pop3Error."""

    def __init__(self, terms: Terms, quirks: Quirks) -> None:
        """Connect."""
        receiver = partial(
            Receiver, status_line_bytes=terms.limits.status_line_bytes, show=terms.secrets.show
        )
        super().__init__(terms, receiver, refusal=b"-ERR")
        self.quirks = quirks
        self.capabilities: Capabilities | None = None
        """By the last CAPA; None where the server does not know CAPA, or was not asked."""
        self.is_utf8 = False
        """Whether the session is in UTF8 mode (RFC 6856)."""
        self.received = 0
        """How many messages came completely."""
        self._capa_is_due = False

    @property
    def facts(self) -> ServerFacts:
        """The facts known about the server so far."""
        known = self.capabilities
        return replace(
            super().facts,
            capabilities=known.lines if known else (),
            pipelining=self.pipelining,
            bare_lf=self.receiver.bare_lf,
            login_delay_seconds=known.login_delay_seconds if known else None,
            expire_days=known.expire_days if known else None,
            utf8=self.is_utf8,
            implementation=known.implementation if known else None,
            avoid=self.quirks.found,
            suspect=self.quirks.suspect,
        )

    @property
    def pipelining(self) -> bool:
        """Whether commands may be sent before the replies to earlier ones."""
        return self.lists("PIPELINING") and not self.quirks.avoids("PIPELINING")

    def lists(self, tag: str) -> bool:
        """Whether CAPA lists this tag."""
        return self.capabilities is not None and tag in self.capabilities

    @property
    def may_skip_sasl(self) -> bool:
        """Whether USER and PASS will do. Without TLS an attacker on the line could force us to them."""
        return self.terms.endpoint.mechanism is None and self.is_encrypted

    # Commands.

    def expect(self, *commands: Command) -> None:
        """Announce that the replies to these commands come next."""
        super().expect(*commands)
        for each in commands:
            self.receiver.expect(each.shape)

    def ask(self, *commands: Command) -> Iterator[Command]:
        """Each command, once it is sent, so that its reply can be read.

        With pipelining all are sent at once, and a CAPA that is due goes first.
        """
        pipelining = self.pipelining
        capa = self._take_due_capa()
        if at_once := (*capa, *commands) if pipelining else capa:
            self.send(*at_once)
        self._read_capa(capa)
        for each in commands:
            if not pipelining:
                self.send(each)
            yield each

    def ask_capa(self, *, may_wait: bool = False) -> None:
        """Ask what the server can do.

        If it ``may_wait`` and the server can do pipelining, CAPA is sent along with the next ``ask``.
        """
        self._capa_is_due = not self.quirks.avoids("CAPA")
        if may_wait and self.pipelining:
            return
        capa = self._take_due_capa()
        if capa:
            self.send(*capa)
        self._read_capa(capa)

    def _take_due_capa(self) -> tuple[Command, ...]:
        due, self._capa_is_due = self._capa_is_due, False
        return (command("CAPA", shape=Shape.BLOCK),) if due else ()

    def _read_capa(self, sent: Iterable[Command]) -> None:
        for asked in sent:
            wait = self.step("capability_seconds")
            known = None
            if self.reply(wait).ok:
                chunks = self.block(asked, _CAPABILITY_BYTES, _CAPABILITY_BYTES, wait.until)
                known = parse_capabilities(b"".join(chunks))
            self.capabilities = known

    # Replies.

    def reply(self, wait: Wait | None = None) -> Reply:
        """The next status line. The default wait is ``idle_seconds``."""
        event = self._next(wait or self.waiting("idle_seconds"))
        if isinstance(event, Reply):
            return event
        raise RuntimeError("a multi-line response was not read to its end")

    def content(self, until: Time | None = None) -> Iterator[bytes]:
        """The content of a multi-line response as it arrives, to its end."""
        wait = self.waiting("idle_seconds")
        if until is not None:
            wait = wait._replace(until=until)
        while isinstance(octets := self._next(wait), bytes):
            yield octets

    def block(
        self, asked: Command, most_bytes: int, most_lines: int, until: Time | None = None
    ) -> Iterator[bytes]:
        """As ``content``; a longer response ends the session."""
        size = lines = 0
        for chunk in self.content(until):
            size += len(chunk)
            lines += chunk.count(b"\n")
            if size > most_bytes or lines > most_lines:
                reason = f"the response is longer than {most_lines} lines or {most_bytes} bytes"
                limit = "listing_bytes" if size > most_bytes else "listing_lines"
                with self.named(asked.label, fatal=True):
                    raise Pop3Error(
                        FailureKind.PROTOCOL, reason, limit=limit if asked.label in _LISTINGS else None
                    )
            yield chunk

    def _next(self, wait: Wait) -> Event:
        """The next event of the reply that is due. An error here ends the session."""
        due = self.outstanding[0]
        try:
            while (event := self.receiver.next_event()) is None:
                self.receive(wait)
        except Pop3Error as error:
            self._note_what_broke(error, due)
            with self.named(due.label, fatal=True):
                raise
        if isinstance(event, BlockEnd) or (
            isinstance(event, Reply) and not (event.ok and due.shape is Shape.BLOCK)
        ):
            self.outstanding.popleft()
        return event

    def _note_what_broke(self, error: Pop3Error, due: Command) -> None:
        """Note what the server may have tripped over when it failed at the reply that is due."""
        many = len(self.outstanding) > 1
        if error.kind is FailureKind.PROTOCOL and self.pipelining and (many or due.shape is Shape.BLOCK):
            self.quirks.found |= {"PIPELINING"}
        if error.kind is not FailureKind.TRANSIENT or error.limit == self.terms.deadline.limit:
            return
        # A server that kept up with a whole window of commands can do pipelining; then the line failed.
        if many and self.pipelining and self.received < self.terms.limits.window:
            self.quirks.suspect |= {"PIPELINING"}
        verb, *arguments = due.octets.decode("ascii", "replace").split() or [""]
        match verb, arguments:
            case (("CAPA" | "UTF8" | "STAT"), []):
                self.quirks.suspect |= {verb}
            case (("UIDL" | "LIST"), [_]):
                self.quirks.suspect |= {"UIDL-N"}
            case "UIDL", [] if not self.receiver.in_reply and not self.lists("UIDL"):
                self.quirks.suspect |= {"UIDL"}
            case "AUTH", [_, *_] if self.may_skip_sasl:
                self.quirks.suspect |= {"AUTH"}

    # Refusals.

    def meaning(self, reply: Reply, stage: Stage) -> Meaning:
        """What an -ERR means, given what CAPA lists."""
        known = self.capabilities
        return classify(
            reply.text,
            stage,
            auth_resp_code=self.lists("AUTH-RESP-CODE"),
            login_delay_seconds=known.login_delay_seconds if known else None,
        )

    def refused_at(
        self, stage: Stage, doing: str, reply: Reply, *, proof: str = "", hint: str = ""
    ) -> Pop3Error:
        """An error for an -ERR; the rest is as in ``refused``."""
        return self.refused(doing, reply.text, self.meaning(reply, stage), proof=proof, hint=hint)
