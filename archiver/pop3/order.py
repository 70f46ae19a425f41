"""The order of a session's verbs: what may follow what. POP3 and POP2 share it.

Owns every rule about the order. A verb that the table does not allow is a
programming error and raises RuntimeError before anything is sent.
"""

from collections.abc import Mapping
from enum import Enum
from typing import Final

from archiver.pop3.failures import Pop3Error


class State(Enum):
    """How far a session has come. The value completes the sentence "the session is ..."."""

    CONNECTED = "not logged in"
    LOGGED_IN = "logged in"
    """The mailbox may still be listed."""
    LISTED = "listed, which happens once"
    """No more listing: there was one, or a DELE was sent. After a DELE some servers renumber their
    listings while RETR and DELE keep the old numbers, so a later listing would delete the wrong messages."""
    CLOSED = "closed"


class Verb(Enum):
    """What a caller asks of a session. ``close`` is missing: it is lawful at any time."""

    LOGIN = "login"
    GLANCE = "glance"
    LIST_FROM = "list_from"
    LIST = "list"
    RETRIEVE = "retrieve"
    DELETE = "delete"
    ROUND_TRIP = "round_trip"
    QUIT = "quit"


_LAWFUL: Final[Mapping[State, Mapping[Verb, State]]] = {
    State.CONNECTED: {
        Verb.LOGIN: State.LOGGED_IN,
        Verb.QUIT: State.CLOSED,
    },
    State.LOGGED_IN: {
        Verb.GLANCE: State.LOGGED_IN,
        Verb.LIST_FROM: State.LOGGED_IN,
        Verb.LIST: State.LISTED,
        Verb.RETRIEVE: State.LOGGED_IN,
        Verb.DELETE: State.LISTED,
        Verb.ROUND_TRIP: State.LOGGED_IN,
        Verb.QUIT: State.CLOSED,
    },
    State.LISTED: {
        Verb.GLANCE: State.LISTED,
        Verb.RETRIEVE: State.LISTED,
        Verb.DELETE: State.LISTED,
        Verb.ROUND_TRIP: State.LISTED,
        Verb.QUIT: State.CLOSED,
    },
    State.CLOSED: {},
}


class Order:
    """Where one session stands."""

    def __init__(self) -> None:
        self._state = State.CONNECTED
        self._failure: Pop3Error | None = None

    def require(self, verb: Verb) -> None:
        """Raise RuntimeError unless ``verb`` may come now; after a failure, raise that failure again."""
        self.require_open()
        if verb not in _LAWFUL[self._state]:
            raise RuntimeError(f"{verb.value} is out of order: the session is {self._state.value}")

    def advance(self, verb: Verb) -> None:
        """Note that ``verb`` comes now. Raises as ``require`` does."""
        self.require(verb)
        self._state = _LAWFUL[self._state][verb]

    def require_open(self) -> None:
        """Raise RuntimeError if the session is closed; after a failure, raise that failure again."""
        if self._failure is not None:
            raise self._failure
        if self._state is State.CLOSED:
            raise RuntimeError(f"the session is {State.CLOSED.value}")

    def close(self, failure: Pop3Error | None = None) -> None:
        """Note that the session is over, and by which failure, if there was one."""
        self._state = State.CLOSED
        self._failure = failure or self._failure
