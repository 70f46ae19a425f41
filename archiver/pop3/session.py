"""What a caller may ask of a mailbox, by POP2 or POP3.

Owns the verbs that both protocols share, and the choice between the two. Leaves
the meaning of each verb on the wire to ``mailbox`` and ``pop2``.
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

    The order is ``login``, ``list``, then ``retrieve`` and ``delete`` as needed,
    then ``quit``. Leaving the block in any other way deletes nothing. Every
    method may raise Pop3Error; ``Mailbox`` says of which kinds.
    """

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    @property
    def facts(self) -> ServerFacts:
        """The facts known about the server so far."""

    @property
    def in_transit(self) -> Entry | None:
        """The entry whose message is being received; stays set if the connection fails there."""

    def login(self, password: str) -> None:
        """Log in as the endpoint's user."""

    def glance(self, number: int | None = None) -> Glance:
        """How many messages there are and their total size; with a number, that message's uid too."""

    def list(self) -> Listing:
        """The one listing of this session."""

    def list_from(self, first: int, last: int) -> Listing | None:
        """Only the messages with these numbers; None if the server cannot list them singly."""

    def retrieve(
        self, entries: Iterable[Entry], open_sink: Callable[[Entry], SinkT]
    ) -> Iterator[Retrieved[SinkT] | Refused[SinkT]]:
        """Fetch messages, in the order of ``entries``, each into the sink that is opened for it."""

    def delete(self, entries: Iterable[Entry]) -> builtins.list[Entry]:
        """Mark messages for deletion at ``quit``; return those that the server marked."""

    def round_trip(self) -> float:
        """Seconds that a command without effect takes."""

    def quit(self) -> None:
        """End the session so that the server deletes what was marked, and close."""

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
    """A session with the endpoint's server, by the protocol that the endpoint names, before its login.

    ``avoid`` names what the server trips over, as ``facts`` gave it in an earlier
    session. Raises Pop3Error.
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
