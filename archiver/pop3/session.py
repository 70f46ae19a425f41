"""What a caller may ask of a mailbox, whichever version of the protocol its server speaks.

Owns the verbs that POP2 and POP3 have in common, and the choice between the
two. Leaves the meaning of each verb on the wire to ``mailbox`` and ``pop2``.
"""

import builtins
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Protocol, Self

from archiver.pop3.listing import Entry, Listing
from archiver.pop3.mailbox import Mailbox
from archiver.pop3.pop2 import Pop2Mailbox
from archiver.pop3.transport import DEFAULT_TLS, TlsSettings
from archiver.pop3.url import Endpoint, Version
from archiver.pop3.values import DEFAULT_LIMITS, Glance, Limits, Refused, Retrieved, ServerFacts, SinkT


class Session(Protocol):
    """A session with one mailbox, made by ``connect``; a context manager, for one thread at a time.

    The order is ``login``, ``list``, then ``retrieve`` and ``delete`` as wanted,
    then ``quit``. Leaving the block in any other way deletes nothing. Every
    method may raise Pop3Error; ``Mailbox`` tells of which kinds.
    """

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    @property
    def facts(self) -> ServerFacts:
        """What is known of the server by now."""

    @property
    def in_transit(self) -> Entry | None:
        """The entry whose message is awaited or being received; stays set when the connection dies there."""

    def login(self, password: str) -> None:
        """Log in as the endpoint's user."""

    def glance(self, number: int | None = None) -> Glance:
        """How many messages there are, and of how many octets; with a number, that message's uid too."""

    def list(self) -> Listing:
        """The one listing of this session."""

    def list_from(self, first: int, last: int) -> Listing | None:
        """The messages of these numbers alone, in place of the listing; None where they cannot be had so."""

    def retrieve(
        self, entries: Iterable[Entry], open_sink: Callable[[Entry], SinkT]
    ) -> Iterator[Retrieved[SinkT] | Refused[SinkT]]:
        """Fetch messages, in the order of ``entries``, each into the sink that is opened for it."""

    def delete(self, entries: Iterable[Entry]) -> builtins.list[Entry]:
        """Mark messages for deletion at ``quit``; returns those that the server did mark."""

    def round_trip(self) -> float:
        """Seconds that a command takes which does nothing."""

    def quit(self) -> None:
        """End the session so that what was marked is deleted, and close."""

    def close(self) -> None:
        """Drop the connection, so that nothing is deleted. May be called again."""


def connect(
    endpoint: Endpoint,
    *,
    tls_settings: TlsSettings = DEFAULT_TLS,
    limits: Limits = DEFAULT_LIMITS,
    avoid: Iterable[str] = (),
    monotonic: Callable[[], float] = time.monotonic,
) -> Session:
    """A session with the endpoint's server, in the version of the protocol that the endpoint names.

    Not yet logged in. ``avoid`` names what the server was seen to trip over, as
    ``facts`` told in an earlier session. Raises Pop3Error.
    """
    if endpoint.version is Version.POP2:
        return Pop2Mailbox(endpoint, tls_settings=tls_settings, limits=limits, monotonic=monotonic)
    return Mailbox.connect(
        endpoint,
        tls_settings=tls_settings,
        limits=limits,
        avoid=avoid,
        monotonic=monotonic,
    )
