"""What a connection may cost: how long it may take, how many there are, how much it may send.

Connecting needs no token. Connections that ask for nothing would take the
descriptors that polls need, so each phase of a connection has a time limit. A
new connection displaces the oldest when there are too many: a probe asks at
once, and gets its answer even then.
"""

import asyncio
import json
from dataclasses import dataclass
from typing import Any, Final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from archiver.web.problems import BAD_REQUEST, MEDIA_TYPE, body

ACCEPTED_AT_ONCE: Final = 16
"""Connections by which the limit may be exceeded for a moment."""
HEAD_BYTES: Final = 16 * 1024
"""Largest header that may arrive in pieces. The tokens of some proxies take 8 KB."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one server grants to all who connect."""

    head_seconds: float = 10.0
    """From the connection, or the answer before, until a request's header is complete."""
    answer_seconds: float = 60.0
    """From the header until the client has the answer."""
    connections: int = 64
    """Connections at the same time."""


class Limited(H11Protocol):
    """A connection that ends when it takes too long, or when others need its place."""

    limits = Limits()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadline: asyncio.TimerHandle | None = None
        self._since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self._begin(answering=False)
        others = [each for each in self.connections if isinstance(each, Limited) and each is not self]
        if len(others) >= self.limits.connections:
            # Not by what it is doing: the request of a new connection may not be read yet.
            min(others, key=lambda each: each._since)._end()

    def data_received(self, data: bytes) -> None:
        cycle = self.cycle
        super().data_received(data)
        if self.cycle is not cycle and not self.cycle.response_complete:
            self._begin(answering=True)

    def on_response_complete(self) -> None:
        cycle = self.cycle
        super().on_response_complete()
        # A request that was sent ahead may have begun by now, and a slow client still reads.
        unread = self.transport.get_write_buffer_size() > 0
        self._begin(answering=unread or self.cycle is not cycle)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """As uvicorn's, as a problem. ``msg`` says only that this was no request."""
        if self.cycle is not None:
            self.cycle.disconnected = True
        if self.conn.our_state not in {h11.IDLE, h11.SEND_RESPONSE}:
            self._end()  # an answer has begun: nothing can be said any more
            return
        content = json.dumps(body(BAD_REQUEST, msg)).encode()
        headers = [
            (b"content-type", MEDIA_TYPE.encode()),
            (b"content-length", str(len(content)).encode()),
            (b"connection", b"close"),
        ]
        for event in (
            h11.Response(status_code=BAD_REQUEST, headers=headers, reason=b"Bad Request"),
            h11.Data(data=content),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _begin(self, *, answering: bool) -> None:
        self._cancel()
        self._since = self.loop.time()
        seconds = self.limits.answer_seconds if answering else self.limits.head_seconds
        self._deadline = self.loop.call_later(seconds, self._end)

    def _cancel(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _end(self) -> None:
        """At once: a client that does not read would hold up an orderly end."""
        self.connections.discard(self)
        self.transport.abort()


def limited(limits: Limits) -> type[Limited]:
    """The class of connections for a server with these limits. uvicorn makes one for each client."""
    return type("Limited", (Limited,), {"limits": limits})
