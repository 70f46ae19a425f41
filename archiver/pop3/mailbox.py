"""One POP3 session: from the connection to QUIT (RFC 1939, RFC 2449, RFC 2595, RFC 5034).

Owns the order of commands, what may be pipelined, and every limit. Promises:

- nothing secret crosses a channel that is not private, and never a fallback;
- a message's octets reach the caller's sink as they arrive, never the whole of
  it in memory;
- nothing is deleted unless ``quit`` was called: leaving the block in any other
  way drops the connection, and a server deletes only at QUIT (RFC 1939 section 6);
- an error that concerns one message alone is a ``Refused``; every other error
  ends the session, and is a ``Pop3Error``.

Leaves to the caller what to fetch, what to delete, when to try again. A session
is used by one thread at a time.
"""

import base64
import binascii
import builtins
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Final, NamedTuple, Self, TypeVar

from archiver.pop3.capabilities import Capabilities, parse_capabilities
from archiver.pop3.failures import (
    FailureKind,
    Pop3Error,
    Stage,
    Verdict,
    classify,
    printable,
    says_unknown_command,
)
from archiver.pop3.listing import LARGEST_NUMBER, Entry, Listing, SizeColumn, UidlColumn, decimal, join
from archiver.pop3.sasl import (
    APOP,
    LOGIN_COMMANDS,
    MECHANISMS,
    SCRAM_MECHANISMS,
    Credentials,
    Mechanism,
    RefusedInside,
    apop_digest,
    apop_stamp,
    binding_for,
    choose_mechanism,
    is_prepared,
)
from archiver.pop3.transport import DEFAULT_TLS, TimedOut, TlsSettings, Transport
from archiver.pop3.url import Endpoint, Tls
from archiver.pop3.values import DEFAULT_LIMITS, Glance, Limits, Refused, Retrieved, ServerFacts, SinkT
from archiver.pop3.wire import (
    COMMAND_LINE_OCTETS,
    BlockEnd,
    Command,
    Event,
    Receiver,
    Reply,
    Shape,
    Status,
    command,
)

_CAPABILITY_OCTETS: Final = 64 * 1024  # the longest seen is under 1 KiB
_LISTINGS: Final = frozenset({"UIDL", "LIST"})
_CHALLENGES: Final = 8  # of one login; SCRAM needs two
_GREETING: Final = Command(b"", "the greeting", Shape.GREETING)


ColumnT = TypeVar("ColumnT", UidlColumn, SizeColumn)


class _Time(NamedTuple):
    """A span of seconds, or a point of the monotonic clock, and the field of ``Limits`` it comes from."""

    seconds: float
    limit: str


@dataclass(frozen=True, slots=True)
class _Refusal:
    """A login that was refused: by what command, and with what -ERR."""

    label: str
    reply: Reply
    hint: str = ""
    challenged: bool = False
    """Whether the server had made a challenge before it refused."""

    @property
    def unknown(self) -> bool:
        """Whether the form was refused, and not the credentials. Who made a challenge knows the mechanism."""
        return not self.challenged and says_unknown_command(self.reply.text)


class Mailbox:
    """A session with one mailbox. Made by ``connect``; a context manager.

    The order is ``login``, ``list``, then ``retrieve`` and ``delete`` as wanted,
    then ``quit``.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        tls_settings: TlsSettings,
        limits: Limits,
        avoid: frozenset[str],
        monotonic: Callable[[], float],
    ) -> None:
        """Use ``connect``."""
        self._endpoint = endpoint
        self._tls_settings = tls_settings
        self._limits = limits
        self._avoid = avoid
        self._found: frozenset[str] = frozenset()
        self._suspect: frozenset[str] = frozenset()
        self._monotonic = monotonic
        self._deadline = _Time(monotonic() + limits.session_seconds, "session_seconds")
        self._idle = _Time(limits.idle_seconds, "idle_seconds")
        self._secrets: tuple[bytes, ...] = ()
        self._failure: Pop3Error | None = None
        self._closed = False
        self._mechanism: str | None = None
        self._in_transit: Entry | None = None
        self._arrived = 0
        self._listed = False
        self._call()

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

        A server that hangs, or hangs up, at CAPA (or at UTF8) is called again
        without it. ``avoid`` are names of ``AVOIDABLE``, as ``facts`` gave them in
        an earlier session; what is no such name is ignored. Raises Pop3Error.
        """
        return cls(
            endpoint,
            tls_settings=tls_settings,
            limits=limits,
            avoid=frozenset(avoid),
            monotonic=monotonic,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def facts(self) -> ServerFacts:
        """What is known of the server by now."""
        tls = self._transport.tls
        known = self._capabilities
        return ServerFacts(
            host=self._endpoint.host,
            port=self._endpoint.port,
            greeting=self._greeting,
            capabilities=known.lines if known else (),
            tls_version=tls.version if tls else None,
            cipher=tls.cipher if tls else None,
            certificate_sha256=tls.certificate_sha256 if tls else None,
            certificate_not_after=tls.certificate_not_after if tls else None,
            mechanism=self._mechanism,
            pipelining=self._pipelining,
            bare_lf=self._receiver.bare_lf,
            login_delay_seconds=known.login_delay_seconds if known else None,
            expire_days=known.expire_days if known else None,
            utf8=self._utf8,
            implementation=known.implementation if known else None,
            avoid=self._found,
            suspect=self._suspect,
        )

    @property
    def in_transit(self) -> Entry | None:
        """The entry whose message is awaited or being received; stays set when the connection dies there."""
        return self._in_transit

    # The session's steps, in their order.

    def login(self, password: str) -> None:
        """Log in, by the best way that the server and the endpoint have in common; then ask for CAPA again.

        With PIPELINING that CAPA goes out along with the next ``glance`` or
        ``list``, and ``facts`` has what came before until then.
        ``password`` is the access token where the endpoint fixes XOAUTH2 or
        OAUTHBEARER, and goes nowhere where it fixes EXTERNAL. Another way is
        tried only when the first one was refused without a look at the password:
        the server does not know it, or keeps nothing to check a SCRAM by. Raises
        Pop3Error: AUTH when the credentials were refused, TRANSIENT for a lock or
        throttling, OPERATOR when a person is needed, SECURITY when the channel is
        not private or the server lies. Neither the password nor what was made of
        it is in any error. A server that hangs up between two ways (free.fr,
        popa3d) is called again, once, for the second.
        """
        if self._mechanism is not None:
            raise RuntimeError("the session is logged in")
        with self._named("login"):
            self._secrets = _secrets(self._endpoint.user, password)
            ways = deque(self._ways(password))
        deadline = self._until("login_seconds")
        refused_before = False
        while True:
            way = ways.popleft()
            try:
                refusal = self._login_by(way, password, deadline)
            except Pop3Error as error:
                if not refused_before or error.kind is not FailureKind.TRANSIENT or error.limit is not None:
                    raise
                refused_before = False
                ways.appendleft(way)
                self._call()
                continue
            if refusal is None:
                self._mechanism = way
                break
            refused_before = True
            if self._keeps_no_scram(way, refusal):
                ways = deque(each for each in ways if each not in SCRAM_MECHANISMS)
            elif not refusal.unknown:
                ways.clear()
            if not ways:
                raise self._refused(refusal.label, refusal.reply, Stage.LOGIN, hint=refusal.hint)
        self._capa_is_due = "CAPA" not in self._avoid
        if not self._pipelining:
            self._begin()

    def glance(self, number: int | None = None) -> Glance:
        """What STAT says of the mailbox and, with a number, ``UIDL number`` of that message.

        What a server answers beside the point, or not at all, is None; some err
        in STAT, so it is a hint. Raises Pop3Error when the session fails.
        """
        self._need_quiet()
        if "STAT" in self._avoid:
            return Glance(None, None)
        asked = [command("STAT")]
        if number is not None and not self._avoid & {"UIDL", "UIDL-N"}:
            asked.append(command("UIDL", number))
        sent = self._begin(*asked)
        count, size = self._stat(asked[0], sent=sent)
        uidl = self._uidl_of(number, asked[1], sent=sent) if number is not None and len(asked) > 1 else None
        return Glance(count, size, uidl)

    def list(self) -> Listing:
        """The one listing of this session, by UIDL and LIST; a second call is a programming error.

        After a DELE some servers renumber their listings while RETR and DELE
        keep the old numbers, so a session lists once, before any DELE. UIDL is
        tried even if CAPA lacks it. Raises Pop3Error when the server has neither
        UIDL nor LIST.
        """
        if self._listed:
            raise RuntimeError("a session lists its mailbox once")
        self._listed = True
        asked = [command(verb, shape=Shape.BLOCK) for verb in ("UIDL", "LIST") if verb not in self._avoid]
        sent = self._begin(*asked)
        uidl = self._column(asked[0], UidlColumn(), sent=sent) if len(asked) > 1 else None
        sizes = self._column(asked[-1], SizeColumn(), sent=sent)
        if uidl is None and sizes is None:
            raise self._error(FailureKind.PROTOCOL, "UIDL and LIST", "the server knows neither")
        return join(uidl, sizes)

    def list_from(self, first: int, last: int) -> Listing | None:
        """The messages from ``first`` to ``last`` alone, by ``UIDL n`` and ``LIST n``, in place of ``list``.

        None unless each has a uid and a size by that. ``list`` may still be called,
        also where the caller does not believe what this one tells. For a few
        messages: with PIPELINING all is asked at once. Raises Pop3Error when the
        session fails.
        """
        if self._listed:
            raise RuntimeError("a session lists its mailbox once")
        self._need_quiet()
        if self._avoid & {"UIDL", "UIDL-N"}:
            return None
        uidl, sizes = UidlColumn(), SizeColumn()
        asked = [
            (column, command(verb, number))
            for number in range(first, last + 1)
            for verb, column in (("UIDL", uidl), ("LIST", sizes))
        ]
        sent = self._begin(*(each for _, each in asked))
        for column, each in asked:
            reply = self._line(each, sent=sent)
            if reply.ok:
                column.feed(reply.text + b"\n")
        uidl.finish()
        sizes.finish()
        listing = join(uidl, sizes, first=first)
        told = [entry.number for entry in listing.entries if None not in entry]
        return listing if told == list(range(first, last + 1)) and listing.is_legible else None

    def retrieve(
        self, entries: Iterable[Entry], open_sink: Callable[[Entry], SinkT]
    ) -> Iterator[Retrieved[SinkT] | Refused[SinkT]]:
        """Fetch messages, in the order of ``entries``, each into the sink that ``open_sink`` gives for it.

        With PIPELINING up to ``limits.window`` RETRs are under way, so that the
        server sends on while the caller works; ``entries`` is consumed lazily, as
        the window refills, so that the caller can end the supply at any time;
        what was already asked for still comes. ``open_sink`` is called when the
        message begins. An iteration that is abandoned earlier leaves replies
        unread: the session is then good for ``close`` alone.

        Raises Pop3Error for what concerns the whole session; ``in_transit`` is
        the message at which the connection failed, None when it did not fail but
        the server refused to go on.
        """
        self._need_quiet()
        supply = iter(entries)
        awaited: deque[Entry] = deque()
        while True:
            self._need_life()
            self._refill(awaited, supply, _retr)
            if not awaited:
                return
            self._in_transit = awaited[0]
            try:
                result = self._receive_message(awaited.popleft(), open_sink)
            except BaseException as error:  # a sink's too: its message is half read
                if isinstance(error, Pop3Error):
                    self._failure = error
                self.close()
                raise
            self._in_transit = None
            self._arrived += 1
            with suppress(Pop3Error):  # raised again once this message, which is complete, was handed over
                self._refill(awaited, supply, _retr)
            yield result

    def delete(self, entries: Iterable[Entry]) -> builtins.list[Entry]:
        """Mark messages for deletion at ``quit``; returns those that the server answered with +OK.

        RuntimeError while messages are outstanding. Raises Pop3Error when the
        session fails, and then nothing is deleted.
        """
        self._need_quiet()
        supply = iter(entries)
        awaited: deque[Entry] = deque()
        marked: list[Entry] = []
        while True:
            self._refill(awaited, supply, _dele)
            if not awaited:
                return marked
            entry = awaited.popleft()
            if self._reply(self._idle, self._deadline).ok:
                marked.append(entry)

    def round_trip(self) -> float:
        """Seconds that a NOOP takes; an -ERR is an answer too. Raises Pop3Error."""
        self._need_quiet()
        started = self._monotonic()
        self._send(command("NOOP"))
        self._reply(self._idle, self._deadline)
        return self._monotonic() - started

    def quit(self) -> None:
        """End the session so that the server deletes what was marked, and close.

        RuntimeError while messages are outstanding. A Pop3Error means that it is
        not known what was deleted; +OK does not prove it either: only a later
        listing does.
        """
        self._need_quiet()
        try:
            self._send(command("QUIT"))
            span = _Time(self._limits.quit_seconds, "quit_seconds")
            reply = self._reply(span, _Time(self._monotonic() + span.seconds, span.limit))
            if not reply.ok:
                raise self._refused("QUIT", reply, Stage.UPDATE)
        finally:
            self.close()

    def close(self) -> None:
        """Drop the connection without QUIT, so that nothing is deleted. May be called again."""
        self._closed = True
        self._transport.close()

    # Opening.

    def _call(self) -> None:
        """Connect, as often as the server trips over a verb at the beginning, each time without the last."""
        while True:
            self._forget()
            with self._named("connect", limit="connect_seconds"):
                self._transport = Transport.connect(
                    self._endpoint.host,
                    self._endpoint.port,
                    timeout_seconds=self._limits.connect_seconds,
                    monotonic=self._monotonic,
                )
            try:
                return self._open(self._tls_settings)
            except Pop3Error:
                self.close()
                tripped = (self._suspect & {"CAPA", "UTF8"}) - self._avoid
                if not tripped:
                    raise
                self._avoid |= tripped
            except BaseException:
                self.close()
                raise

    def _forget(self) -> None:
        """What a connection begins with."""
        self._failure, self._closed = None, False
        self._receiver = self._new_receiver()
        self._outstanding: deque[Command] = deque()
        self._capabilities: Capabilities | None = None
        self._capa_is_due = False
        self._greeting = ""
        self._stamp: bytes | None = None
        self._utf8 = False

    def _open(self, tls_settings: TlsSettings) -> None:
        if self._endpoint.tls is Tls.IMPLICIT:
            self._start_tls(tls_settings)
        self._expect(_GREETING)
        greeting = self._reply(self._span("greeting_seconds"), self._until("greeting_seconds"))
        self._greeting = printable(greeting.text)
        self._stamp = apop_stamp(greeting.text)
        if not greeting.ok:
            raise self._refused(_GREETING.label, greeting, Stage.GREETING)
        if self._endpoint.tls is Tls.STARTTLS:
            self._upgrade(tls_settings)
        self._capa_is_due = "CAPA" not in self._avoid
        self._begin()
        if self._capabilities is not None and "UTF8" in self._capabilities and "UTF8" not in self._avoid:
            self._switch_to_utf8()

    def _switch_to_utf8(self) -> None:
        """Ask for messages as they are (RFC 6856 section 2.1): a server may convert what is not ASCII.

        After STLS and before the login. Never unasked for: some servers hang up
        at a verb that they do not know. One that refuses goes on as it was.
        LANG is not needed beside it: until it is sent, a server that has it
        speaks i-default (section 3), which is what ``failures`` can read.
        """
        self._send(command("UTF8"))
        self._utf8 = self._reply(self._idle, self._deadline).ok

    def _upgrade(self, tls_settings: TlsSettings) -> None:
        """STLS (RFC 2595 section 4). CAPA is not asked in clear: what it said would have to be forgotten."""
        asked = command("STLS")
        self._send(asked)
        reply = self._reply(self._idle, self._deadline)
        if not reply.ok:
            raise self._error(
                FailureKind.SECURITY,
                asked.label,
                f"the server refuses TLS, nothing secret was sent: {self._show(reply.text)!r}",
            )
        if self._receiver.surplus:
            raise self._error(
                FailureKind.SECURITY,
                asked.label,
                "octets in clear came after the +OK: somebody injected them",
            )
        self._receiver = self._new_receiver()
        self._start_tls(tls_settings)

    def _start_tls(self, tls_settings: TlsSettings) -> None:
        deadline = self._until("connect_seconds")
        with self._named("TLS", limit=deadline.limit):
            self._transport.start_tls(tls_settings, deadline=deadline.seconds)

    def _told_capabilities(self, asked: Command, deadline: _Time) -> Capabilities | None:
        """The answer to a CAPA that was sent; None from a server that does not know it."""
        if self._reply(self._span("capability_seconds"), deadline).ok:
            return parse_capabilities(self._block(asked, _CAPABILITY_OCTETS, deadline))
        return None

    # Logging in.

    @property
    def _offered(self) -> frozenset[str]:
        known = self._capabilities
        return known.sasl_mechanisms if known else frozenset()

    def _ways(self, password: str) -> tuple[str, ...]:
        """The ways to log in that server, channel, endpoint and password leave, best first."""
        user, fixed = self._endpoint.user, self._endpoint.mechanism
        login_commands = self._utf8_logins or (user + password).isascii()
        offered = self._offered
        if "AUTH" in self._avoid and self._auth_is_dispensable and login_commands:
            offered = frozenset()
        scram = offered.intersection(SCRAM_MECHANISMS)
        if scram and fixed is None and not is_prepared(Credentials(user, password)):
            offered -= scram
        return choose_mechanism(
            offered,
            fixed,
            private=self._transport.tls is not None or self._endpoint.tls is Tls.NONE,
            login_commands=login_commands,
            binds=(bool(scram) or fixed in SCRAM_MECHANISMS) and self._transport.server_end_point is not None,
        )

    @property
    def _auth_is_dispensable(self) -> bool:
        """Whether USER and PASS will do. Without TLS, who cuts the line must not choose how we log in."""
        return self._endpoint.mechanism is None and self._transport.tls is not None

    def _login_by(self, way: str, password: str, deadline: _Time) -> _Refusal | None:
        """Try one way; None when it worked."""
        if way == LOGIN_COMMANDS:
            return self._login_by_user_pass(password, deadline)
        if way == APOP:
            return self._login_by_apop(password, deadline)
        binding = self._transport.server_end_point if way in SCRAM_MECHANISMS else None
        credentials = Credentials(
            self._endpoint.user,
            password,
            self._endpoint.host,
            self._endpoint.port,
            binding_for(way, self._offered, binding),
        )
        refusal = None
        # Servers older than RFC 5034 know AUTH only without an initial response.
        for at_once in (True, False):
            with self._named("login"):
                mechanism = MECHANISMS[way](credentials)
                initial = mechanism.start()
            refusal = self._authenticate(mechanism, initial, deadline, at_once=at_once)
            if refusal is None or not refusal.unknown or initial is None:
                break
        return refusal

    def _keeps_no_scram(self, way: str, refusal: _Refusal) -> bool:
        """Whether a server refused SCRAM before its first challenge: it did not look at the password.

        Servers (Dovecot) offer SCRAM to all, and have nothing to check it by for
        those whose password they keep otherwise.
        """
        verdict = self._verdict(refusal.reply, Stage.LOGIN)
        return way in SCRAM_MECHANISMS and not refusal.challenged and verdict.kind is FailureKind.AUTH

    def _login_by_apop(self, password: str, deadline: _Time) -> _Refusal | None:
        with self._named(APOP):
            if self._stamp is None:
                raise Pop3Error(
                    FailureKind.OPERATOR, "nothing was sent: the greeting holds no stamp that is safe to use"
                )
            digest = apop_digest(self._stamp, password)
            self._secrets = (digest.encode(), *self._secrets)
            step = command(APOP, self._endpoint.user, digest, label=APOP)
        self._send(step)
        reply = self._reply(self._span("login_seconds"), deadline)
        return None if reply.ok else _Refusal(APOP, reply)

    def _login_by_user_pass(self, password: str, deadline: _Time) -> _Refusal | None:
        with self._named("login"):
            steps = (
                command("USER", self._endpoint.user, label="USER", utf8=self._utf8_logins),
                command("PASS", password, label="PASS", utf8=self._utf8_logins),
            )
        for step in steps:
            self._send(step)
            reply = self._reply(self._span("login_seconds"), deadline)
            if not reply.ok:
                return _Refusal(step.label, reply)
        return None

    def _authenticate(
        self, mechanism: Mechanism, initial: bytes | None, deadline: _Time, *, at_once: bool
    ) -> _Refusal | None:
        """The AUTH exchange (RFC 5034 section 4), to its +OK or -ERR; None when it worked."""
        label = f"AUTH {mechanism.name}"
        opening = label.encode()
        if at_once and initial is not None:
            whole = opening + b" " + (self._encoded(initial) or b"=")
            if len(whole) + 2 <= COMMAND_LINE_OCTETS:
                opening, initial = whole, None
        self._send(Command(opening + b"\r\n", label, Shape.EXCHANGE))
        challenged = False
        for _ in range(_CHALLENGES):
            reply = self._reply(self._span("login_seconds"), deadline)
            if reply.ok:
                with self._named(label):
                    mechanism.conclude(reply.text)
                return None
            if reply.status is not Status.CHALLENGE:
                return _Refusal(label, reply, mechanism.hint, challenged=challenged)
            if initial is None:
                challenged = True
                answer = self._answer(mechanism, reply, deadline)
            else:
                answer, initial = initial, None
            self._send(Command(self._encoded(answer) + b"\r\n", label, Shape.EXCHANGE))
        raise self._error(FailureKind.PROTOCOL, label, f"the server made more than {_CHALLENGES} challenges")

    def _answer(self, mechanism: Mechanism, challenge: Reply, deadline: _Time) -> bytes:
        """The answer to a challenge. A bad challenge cancels the exchange, which keeps the framing intact."""
        label = f"AUTH {mechanism.name}"
        cancel = b"*"
        try:
            return mechanism.respond(base64.b64decode(challenge.text, validate=True))
        except RefusedInside as refusal:
            error: Pop3Error = refusal
            cancel = base64.b64encode(refusal.farewell)
        except Pop3Error as refusal:
            error = refusal
        except binascii.Error:
            error = Pop3Error(FailureKind.PROTOCOL, "the server's challenge is not base64")
        self._send(Command(cancel + b"\r\n", label, Shape.EXCHANGE))
        said = self._reply(self._span("login_seconds"), deadline).text
        reasons = [str(error), f"the server said {self._show(said)!r}" if said else "", mechanism.hint]
        raise self._error(error.kind, label, "; ".join(filter(None, reasons)))

    def _encoded(self, message: bytes) -> bytes:
        """A message of a mechanism as it goes to the wire; from now on it is a secret, in both forms."""
        encoded = base64.b64encode(message)
        if message not in {b"", self._endpoint.user.encode()}:
            self._secrets = (encoded, message, *self._secrets)
        return encoded

    # Listing and retrieving.

    def _begin(self, *asked: Command) -> bool:
        """Ask for CAPA where it is due; with pipelining, send these along. Returns whether they were sent."""
        pipelined = self._pipelining
        due = [command("CAPA", shape=Shape.BLOCK)] if self._capa_is_due else []
        self._capa_is_due = False
        if at_once := (*due, *asked) if pipelined else due:
            self._send(*at_once)
        for capa in due:
            self._capabilities = self._told_capabilities(capa, self._until("capability_seconds"))
        return pipelined

    def _stat(self, asked: Command, *, sent: bool) -> tuple[int, int] | tuple[None, None]:
        """How many messages there are, and of how many bytes, if the answer to STAT makes sense."""
        reply = self._line(asked, sent=sent)
        match [decimal(field) for field in reply.text.split()[:2]]:
            case [int(count), int(size)] if reply.ok and count <= LARGEST_NUMBER:
                return count, size
            case _:
                return None, None

    def _uidl_of(self, number: int, asked: Command, *, sent: bool) -> bytes | None:
        """The answer to ``UIDL number``: one line, ``+OK number uid``.

        A server that forgets the number (Twisted) may as well send a listing
        behind its +OK (Mailpit), which would answer the next command: it is not
        asked again.
        """
        reply = self._line(asked, sent=sent)
        if not reply.ok:
            return None
        column = UidlColumn()
        column.feed(reply.text)
        column.finish()
        if list(column.numbers) == [number] and column.at(0):
            return column.at(0)
        self._found |= {"UIDL-N"}
        return None

    def _line(self, asked: Command, *, sent: bool) -> Reply:
        """The reply to a command which may have been sent already."""
        if not sent:
            self._send(asked)
        return self._reply(self._span("listing_seconds"), self._deadline)

    def _column(self, asked: Command, column: ColumnT, *, sent: bool) -> ColumnT | None:
        """The response to UIDL or LIST, read into ``column``; None when the server does not know it."""
        reply = self._line(asked, sent=sent)
        if reply.ok:
            limits = self._limits
            for chunk in self._bounded(asked, limits.listing_octets, limits.listing_lines, self._deadline):
                column.feed(chunk)
            column.finish()
            return column
        if (
            self._promised(asked.label)
            or self._verdict(reply, Stage.LISTING).kind is not FailureKind.PROTOCOL
        ):
            raise self._refused(asked.label, reply, Stage.LISTING)
        return None

    def _bounded(self, asked: Command, most_octets: int, most_lines: int, deadline: _Time) -> Iterator[bytes]:
        """A multi-line response as it arrives, up to its limits."""
        octets = lines = 0
        for chunk in self._content(deadline):
            octets += len(chunk)
            lines += chunk.count(b"\n")
            if octets > most_octets or lines > most_lines:
                reason = f"the response is longer than {most_lines} lines or {most_octets} octets"
                limit = "listing_octets" if octets > most_octets else "listing_lines"
                with self._named(asked.label, fatal=True):
                    raise Pop3Error(
                        FailureKind.PROTOCOL, reason, limit=limit if asked.label in _LISTINGS else None
                    )
            yield chunk

    def _block(self, asked: Command, most_octets: int, deadline: _Time) -> bytes:
        """A whole multi-line response, bounded."""
        return b"".join(self._bounded(asked, most_octets, most_octets, deadline))

    def _receive_message(
        self, entry: Entry, open_sink: Callable[[Entry], SinkT]
    ) -> Retrieved[SinkT] | Refused[SinkT]:
        doing = f"RETR {entry.number}"
        reply = self._reply(self._idle, self._deadline)
        if not reply.ok:
            error = self._refused(doing, reply, Stage.RETRIEVE)
            if error.kind is not FailureKind.POISON:
                self._in_transit = None  # it was answered: the session does not end because of this message
                raise error
            return Refused(entry, error)
        sink = open_sink(entry)
        size, limit = 0, self._limits.message_octets
        for octets in self._content(self._deadline):
            size += len(octets)
            if size <= limit:
                sink.write(octets)
        if size > limit:
            reason = f"the message has {size} octets, more than the limit of {limit}"
            error = self._error(FailureKind.POISON, doing, reason, limit="message_octets")
            return Refused(entry, error, sink)
        return Retrieved(entry, sink)

    # Commands and replies.

    @property
    def _pipelining(self) -> bool:
        known = self._capabilities
        return known is not None and "PIPELINING" in known and "PIPELINING" not in self._avoid

    def _promised(self, tag: str) -> bool:
        return self._capabilities is not None and tag in self._capabilities

    @property
    def _utf8_logins(self) -> bool:
        return self._capabilities is not None and self._capabilities.utf8_logins

    def _span(self, limit: str) -> _Time:
        return _Time(getattr(self._limits, limit), limit)

    def _until(self, limit: str) -> _Time:
        """The end of a step that may take as long as that limit says, never past the session's."""
        return min(_Time(self._monotonic() + getattr(self._limits, limit), limit), self._deadline)

    def _new_receiver(self) -> Receiver:
        return Receiver(status_line_octets=self._limits.status_line_octets, show=self._show)

    def _need_life(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise RuntimeError("the session is closed")

    def _need_quiet(self) -> None:
        self._need_life()
        if self._outstanding:
            raise RuntimeError("replies of this session are still to be read")

    def _refill(
        self, awaited: deque[Entry], supply: Iterator[Entry], render: Callable[[Entry], Command]
    ) -> None:
        """Keep the window full: once a quarter of it is answered, send what the supply gives."""
        window = self._limits.window if self._pipelining else 1
        if len(awaited) > window * 3 // 4:
            return
        batch = list(islice(supply, window - len(awaited)))
        if batch:
            awaited.extend(batch)
            self._send(*map(render, batch))

    def _send(self, *commands: Command) -> None:
        self._need_life()
        if not self._outstanding:
            self._hear_out(commands[0].label)
        self._expect(*commands)
        self._transport.send(b"".join(each.octets for each in commands))

    def _expect(self, *commands: Command) -> None:
        for each in commands:
            self._receiver.expect(each.shape)
            self._outstanding.append(each)

    def _hear_out(self, doing: str) -> None:
        """Notice what came unasked, before it is taken for the answer to the next command.

        A server that ends the session on its own may say so in an -ERR line.
        """
        with self._named(doing, fatal=True):
            octets = self._transport.receive_now()
            if octets:
                self._receiver.feed(octets)
            surplus = self._receiver.surplus
            if surplus[:4].upper() == b"-ERR":
                raise Pop3Error(
                    FailureKind.TRANSIENT,
                    f"the server ended the session: {self._show(surplus[4:].strip())!r}",
                )
            if surplus:
                raise Pop3Error(FailureKind.PROTOCOL, f"the server said unasked {self._show(surplus)!r}")
            if octets == b"":
                raise Pop3Error(FailureKind.TRANSIENT, "the server closed the connection")

    def _next(self, idle: _Time, deadline: _Time) -> Event:
        """The next event of the reply that is due. An error here ends the session."""
        due = self._outstanding[0]
        try:
            while (event := self._receiver.next_event()) is None:
                self._receiver.feed(self._receive(idle, deadline))
        except Pop3Error as error:
            self._note_what_broke(error, due)
            with self._named(due.label, fatal=True):
                raise
        if isinstance(event, BlockEnd) or (
            isinstance(event, Reply) and not (event.ok and due.shape is Shape.BLOCK)
        ):
            self._outstanding.popleft()
        return event

    def _note_what_broke(self, error: Pop3Error, due: Command) -> None:
        """Tell what the server may have tripped over, when it failed at the reply that is due."""
        many = len(self._outstanding) > 1
        if error.kind is FailureKind.PROTOCOL and self._pipelining and (many or due.shape is Shape.BLOCK):
            self._found |= {"PIPELINING"}
        if error.kind is not FailureKind.TRANSIENT or error.limit == self._deadline.limit:
            return
        # Who kept up with a whole window of commands knows how to; then it was the line.
        if many and self._pipelining and self._arrived < self._limits.window:
            self._suspect |= {"PIPELINING"}
        verb, *arguments = due.octets.decode("ascii", "replace").split() or [""]
        match verb, arguments:
            case (("CAPA" | "UTF8" | "STAT"), []):
                self._suspect |= {verb}
            case (("UIDL" | "LIST"), [_]):
                self._suspect |= {"UIDL-N"}
            case "UIDL", [] if not self._receiver.in_reply and not self._promised("UIDL"):
                self._suspect |= {"UIDL"}
            case "AUTH", [_, *_] if self._auth_is_dispensable:
                self._suspect |= {"AUTH"}

    def _receive(self, idle: _Time, deadline: _Time) -> bytes:
        try:
            octets = self._transport.receive(idle_seconds=idle.seconds, deadline=deadline.seconds)
        except TimedOut as error:
            error.limit = (deadline if error.at_deadline else idle).limit
            raise
        if not octets:
            where = " in the middle of a reply" if self._receiver.in_reply else ""
            raise Pop3Error(FailureKind.TRANSIENT, f"the server closed the connection{where}")
        return octets

    def _reply(self, idle: _Time, deadline: _Time) -> Reply:
        event = self._next(idle, deadline)
        if isinstance(event, Reply):
            return event
        raise RuntimeError("a multi-line response was not read to its end")

    def _content(self, deadline: _Time) -> Iterator[bytes]:
        while isinstance(octets := self._next(self._idle, deadline), bytes):
            yield octets

    # Errors.

    @contextmanager
    def _named(self, doing: str, *, fatal: bool = False, limit: str | None = None) -> Iterator[None]:
        """Add what was tried, and where, to an error from below. ``limit`` is what a wait ended by."""
        try:
            yield
        except Pop3Error as error:
            exceeded = limit if isinstance(error, TimedOut) and error.limit is None else error.limit
            named = self._error(error.kind, doing, str(error), error.wait_seconds, exceeded)
            if fatal:
                self._failure = named
                self.close()
            raise named from error

    def _show(self, octets: bytes) -> str:
        """The server's octets for people. It may repeat what it was sent: what is secret is taken out."""
        for secret in self._secrets:
            octets = octets.replace(secret, b"***")
        return printable(octets)

    def _error(
        self,
        kind: FailureKind,
        doing: str,
        reason: str,
        wait_seconds: float | None = None,
        limit: str | None = None,
    ) -> Pop3Error:
        message = f"{doing} at {self._endpoint.address}: {reason}"
        return Pop3Error(kind, message, wait_seconds=wait_seconds, limit=limit)

    def _verdict(self, reply: Reply, stage: Stage) -> Verdict:
        known = self._capabilities
        return classify(
            reply.text,
            stage,
            auth_resp_code=known is not None and "AUTH-RESP-CODE" in known,
            login_delay_seconds=known.login_delay_seconds if known else None,
        )

    def _refused(self, doing: str, reply: Reply, stage: Stage, *, hint: str = "") -> Pop3Error:
        verdict = self._verdict(reply, stage)
        said = (
            f"the server said {self._show(reply.text)!r}"
            if reply.text
            else "the server refused without a word"
        )
        return self._error(verdict.kind, doing, f"{said}; {hint}" if hint else said, verdict.wait_seconds)


def _secrets(user: str, password: str) -> tuple[bytes, ...]:
    """What must never be quoted from a server that repeats what it was sent, the longest first.

    Raises Pop3Error of kind OPERATOR for what no login can carry.
    """
    if any(octet in field for octet in "\r\n\0" for field in (user, password)):
        raise Pop3Error(
            FailureKind.OPERATOR, "nothing was sent: the user name or the password holds CR, LF or NUL"
        )
    try:
        secret = password.encode()
        message = b"\0" + user.encode() + b"\0" + secret
    except UnicodeEncodeError:
        raise Pop3Error(
            FailureKind.OPERATOR, "nothing was sent: the user name or the password is not Unicode text"
        ) from None
    return tuple(each for each in (base64.b64encode(message), base64.b64encode(secret), secret) if each)


def _retr(entry: Entry) -> Command:
    return command("RETR", entry.number, shape=Shape.BLOCK)


def _dele(entry: Entry) -> Command:
    return command("DELE", entry.number)
