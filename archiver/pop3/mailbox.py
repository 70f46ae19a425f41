"""One POP3 session, from the connection to QUIT (RFC 1939).

Owns what a session can do with a mailbox. Promises:

- a message goes to the caller's sink as it arrives, and is never in memory as a whole;
- nothing is deleted unless ``quit`` was called: leaving the block in any other
  way drops the connection, and a server deletes only at QUIT (RFC 1939 section 6);
- an error that concerns one message alone is a ``Refused``; every other error
  ends the session, and is a ``Pop3Error``.

Leaves to the caller what to fetch, what to delete, and when to try again. Leaves
to ``opening`` how the channel becomes private, and to ``login`` how to log in.
Only one thread at a time may use a session.
"""

import builtins
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from types import TracebackType
from typing import Self, TypeVar

from archiver.pop3.conversation import Terms
from archiver.pop3.failures import FailureKind, Pop3Error, Stage
from archiver.pop3.listing import LARGEST_NUMBER, Entry, Listing, SizeColumn, UidlColumn, decimal, join
from archiver.pop3.login import log_in
from archiver.pop3.opening import open_conversation
from archiver.pop3.order import Verb
from archiver.pop3.replies import Pop3Conversation, Quirks
from archiver.pop3.transport import DEFAULT_TLS, TlsSettings
from archiver.pop3.url import Endpoint
from archiver.pop3.values import DEFAULT_LIMITS, Glance, Limits, Refused, Retrieved, ServerFacts, SinkT
from archiver.pop3.wire import Command, Reply, Shape, command

ColumnT = TypeVar("ColumnT", UidlColumn, SizeColumn)


class Mailbox:
    """A session with one mailbox. Made by ``connect``; a context manager.

    The order is ``login``, ``list``, then ``retrieve`` and ``delete`` as needed,
    then ``quit``; ``order`` has the whole table. A verb out of order, or while
    messages are outstanding, raises RuntimeError. Every verb may raise Pop3Error.
    """

    def __init__(self, terms: Terms, quirks: Quirks) -> None:
        """Use ``connect``."""
        self._terms = terms
        self._quirks = quirks
        self._mechanism: str | None = None
        self._in_transit: Entry | None = None
        self._talk = open_conversation(terms, quirks)

    @classmethod
    def connect(
        cls,
        endpoint: Endpoint,
        *,
        tls_settings: TlsSettings = DEFAULT_TLS,
        limits: Limits = DEFAULT_LIMITS,
        avoid: Iterable[str] = (),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> Self:
        """Connect, start TLS as the endpoint demands, read the greeting, ask for CAPA.

        If the server stalls or disconnects at CAPA or UTF8, the session connects
        again and leaves that command out. ``avoid`` has names of ``AVOIDABLE``, as ``facts`` gave them in an
        earlier session; other names are ignored. Raises Pop3Error.
        """
        return cls(Terms.begin(endpoint, tls_settings, limits, monotonic), Quirks(frozenset(avoid)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def facts(self) -> ServerFacts:
        """The facts known about the server so far."""
        return replace(self._talk.facts, mechanism=self._mechanism)

    @property
    def in_transit(self) -> Entry | None:
        """The entry whose message is being received; stays set if the connection fails there."""
        return self._in_transit

    def login(self, password: str) -> None:
        """Log in, by the best way that the server and the endpoint have in common.

        ``password`` is the access token if the endpoint fixes XOAUTH2 or
        OAUTHBEARER, and is not sent if it fixes EXTERNAL. CAPA is asked again
        afterwards; with pipelining it goes out along with the next ``glance`` or
        ``list``, and ``facts`` has the earlier answer until then.

        Raises Pop3Error: AUTH if the credentials were refused, TRANSIENT for a
        lock or throttling, OPERATOR if a person must act, SECURITY if the channel
        is not private or the server lies.
        """
        self._talk.order.require(Verb.LOGIN)
        self._mechanism = log_in(self._talk, password, self._call_again)
        self._talk.order.advance(Verb.LOGIN)
        self._talk.ask_capa(may_wait=True)

    def _call_again(self) -> Pop3Conversation:
        self._talk = open_conversation(self._terms, self._quirks)
        return self._talk

    def glance(self, number: int | None = None) -> Glance:
        """What STAT says of the mailbox and, with a number, ``UIDL number`` of that message.

        If the server gives no answer, or one in another form, a field becomes None.
        Some servers count wrongly in STAT, so it is a hint.
        """
        self._begin(Verb.GLANCE)
        if self._quirks.avoids("STAT"):
            return Glance(None, None)
        asked = [command("STAT")]
        if number is not None and not self._quirks.avoids("UIDL", "UIDL-N"):
            asked.append(command("UIDL", number))
        stat, *uidl = [self._listing_reply() for _ in self._talk.ask(*asked)]
        count, size = _count_and_size(stat)
        return Glance(count, size, self._uid(number, *uidl) if number is not None and uidl else None)

    def _uid(self, number: int, reply: Reply) -> bytes | None:
        """The uid in the answer to ``UIDL number``: one line, ``+OK number uid``.

        A server that forgets the number (Twisted) may as well send a listing
        after its +OK (Mailpit), which would answer the next command. So it is not
        asked again.
        """
        if not reply.ok:
            return None
        column = UidlColumn()
        column.feed(reply.text)
        column.finish()
        if list(column.numbers) == [number] and column.at(0):
            return column.at(0)
        self._quirks.found |= {"UIDL-N"}
        return None

    def list(self) -> Listing:
        """The one listing of this session, by UIDL and LIST.

        UIDL is tried even if CAPA lacks it. Raises Pop3Error (PROTOCOL) if the
        server has neither UIDL nor LIST.
        """
        self._begin(Verb.LIST)
        verbs = ("LIST",) if self._quirks.avoids("UIDL") else ("UIDL", "LIST")
        uidl: UidlColumn | None = None
        sizes: SizeColumn | None = None
        for asked in self._talk.ask(*(command(verb, shape=Shape.BLOCK) for verb in verbs)):
            if asked.label == "UIDL":
                uidl = self._column(asked, UidlColumn())
            else:
                sizes = self._column(asked, SizeColumn())
        if uidl is None and sizes is None:
            raise self._talk.error(FailureKind.PROTOCOL, "UIDL and LIST", "the server knows neither")
        return join(uidl, sizes)

    def _column(self, asked: Command, column: ColumnT) -> ColumnT | None:
        """The response to UIDL or LIST, read into ``column``; None if the server lacks the command."""
        talk = self._talk
        reply = self._listing_reply()
        if reply.ok:
            limits = self._terms.limits
            for chunk in talk.block(asked, limits.listing_bytes, limits.listing_lines):
                column.feed(chunk)
            column.finish()
            return column
        is_unknown = talk.meaning(reply, Stage.LISTING).kind is FailureKind.PROTOCOL
        if talk.lists(asked.label) or not is_unknown:
            raise talk.refused_at(Stage.LISTING, asked.label, reply)
        return None

    def list_from(self, first: int, last: int) -> Listing | None:
        """The messages from ``first`` to ``last`` alone, by ``UIDL n`` and ``LIST n``.

        None unless the server gives a uid and a size for each. ``list`` may still
        be called afterwards. For a few messages: with pipelining all commands are
        sent at once.
        """
        self._begin(Verb.LIST_FROM)
        if self._quirks.avoids("UIDL", "UIDL-N"):
            return None
        uidl, sizes = UidlColumn(), SizeColumn()
        columns: dict[str, UidlColumn | SizeColumn] = {"UIDL": uidl, "LIST": sizes}
        numbers = range(first, last + 1)
        asked = [(verb, command(verb, number)) for number in numbers for verb in columns]
        for (verb, _), _ in zip(asked, self._talk.ask(*(each for _, each in asked)), strict=True):
            reply = self._listing_reply()
            if reply.ok:
                columns[verb].feed(reply.text + b"\n")
        uidl.finish()
        sizes.finish()
        listing = join(uidl, sizes, first=first)
        complete = [entry.number for entry in listing.entries if None not in entry]
        return listing if complete == list(numbers) and listing.is_legible else None

    def retrieve(
        self, entries: Iterable[Entry], open_sink: Callable[[Entry], SinkT]
    ) -> Iterator[Retrieved[SinkT] | Refused[SinkT]]:
        """Fetch messages, in the order of ``entries``, each into the sink that ``open_sink`` gives for it.

        With pipelining up to ``limits.window`` RETRs are outstanding, so that the
        server goes on sending while the caller works. ``entries`` is consumed as
        the window refills, so that the caller can end it at any time; messages
        already asked for still come. ``open_sink`` is called when the message
        begins. After an iteration that is abandoned before its end, only
        ``close`` works: replies are unread.

        Raises Pop3Error for what concerns the whole session. Then ``in_transit``
        is the message at which the connection failed, or None if the server
        refused to go on.
        """
        self._begin(Verb.RETRIEVE)
        supply = iter(entries)
        awaited: deque[Entry] = deque()
        while True:
            self._talk.order.require_open()
            self._refill(awaited, supply, _retr)
            if not awaited:
                return
            self._in_transit = awaited[0]
            try:
                result = self._receive_message(awaited.popleft(), open_sink)
            except BaseException as error:  # a sink's too: its message is half read
                self._talk.fail(error)
                raise
            self._in_transit = None
            self._talk.received += 1
            with suppress(Pop3Error):  # raised again after this message, which is complete, was handed over
                self._refill(awaited, supply, _retr)
            yield result

    def _receive_message(
        self, entry: Entry, open_sink: Callable[[Entry], SinkT]
    ) -> Retrieved[SinkT] | Refused[SinkT]:
        doing = f"RETR {entry.number}"
        reply = self._talk.reply()
        if not reply.ok:
            error = self._talk.refused_at(Stage.RETRIEVE, doing, reply)
            if error.kind is not FailureKind.POISON:
                self._in_transit = None  # the server answered, so this message is not to blame
                raise error
            return Refused(entry, error)
        sink = open_sink(entry)
        size, limit = 0, self._terms.limits.message_bytes
        for octets in self._talk.content():
            size += len(octets)
            if size <= limit:
                sink.write(octets)
        if size > limit:
            reason = f"the message has {size} bytes, more than the limit of {limit}"
            error = self._talk.error(FailureKind.POISON, doing, reason, limit="message_bytes")
            return Refused(entry, error, sink)
        return Retrieved(entry, sink)

    def delete(self, entries: Iterable[Entry]) -> builtins.list[Entry]:
        """Mark messages for deletion at ``quit``; returns those that the server answered with +OK.

        If it raises Pop3Error, nothing is deleted.
        """
        self._begin(Verb.DELETE)
        supply = iter(entries)
        awaited: deque[Entry] = deque()
        marked: list[Entry] = []
        while True:
            self._refill(awaited, supply, _dele)
            if not awaited:
                return marked
            entry = awaited.popleft()
            if self._talk.reply().ok:
                marked.append(entry)

    def round_trip(self) -> float:
        """Seconds that a NOOP takes. An -ERR is an answer too."""
        self._begin(Verb.ROUND_TRIP)
        started = self._terms.monotonic()
        self._talk.send(command("NOOP"))
        self._talk.reply()
        return self._terms.monotonic() - started

    def quit(self) -> None:
        """End the session so that the server deletes what was marked, and close.

        After a Pop3Error it is unknown what was deleted. +OK does not prove a
        deletion either; only a later listing does.
        """
        self._talk.require_quiet()
        self._talk.order.require(Verb.QUIT)
        try:
            self._talk.send(command("QUIT"))
            reply = self._talk.reply(self._talk.last_step("quit_seconds"))
            if not reply.ok:
                raise self._talk.refused_at(Stage.UPDATE, "QUIT", reply)
        finally:
            self.close()

    def close(self) -> None:
        """Drop the connection without QUIT, so that nothing is deleted. May be called again."""
        self._talk.close()

    def _begin(self, verb: Verb) -> None:
        self._talk.require_quiet()
        self._talk.order.advance(verb)

    def _listing_reply(self) -> Reply:
        return self._talk.reply(self._talk.waiting("listing_seconds"))

    def _refill(
        self, awaited: deque[Entry], supply: Iterator[Entry], render: Callable[[Entry], Command]
    ) -> None:
        """Keep the window full: once a quarter of it is answered, send what the supply gives."""
        window = self._terms.limits.window if self._talk.pipelining else 1
        if len(awaited) > window * 3 // 4:
            return
        batch = list(islice(supply, window - len(awaited)))
        if batch:
            awaited.extend(batch)
            self._talk.send(*map(render, batch))


def _count_and_size(stat: Reply) -> tuple[int, int] | tuple[None, None]:
    """How many messages there are, and their bytes, if the answer to STAT makes sense."""
    match [decimal(field) for field in stat.text.split()[:2]]:
        case [int(count), int(size)] if stat.ok and count <= LARGEST_NUMBER:
            return count, size
        case _:
            return None, None


def _retr(entry: Entry) -> Command:
    return command("RETR", entry.number, shape=Shape.BLOCK)


def _dele(entry: Entry) -> Command:
    return command("DELE", entry.number)
