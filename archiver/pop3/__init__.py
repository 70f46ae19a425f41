"""A POP3 client for archives. It knows nothing of the rest of the project and could be published by itself.

From the bottom up; each module imports only those before it:

- ``failures``: the one error, its kinds, and what an ``-ERR`` means;
- ``url``: POP URLs and the channel that they demand;
- ``wire``: framing, without I/O;
- ``loop``: how sessions wait, each in a thread of its own or many in one;
- ``listing``, ``capabilities``, ``sasl``: what replies say, and what a login says;
- ``transport``: socket, TLS, time;
- ``values``: what a session takes and returns;
- ``order``: which verb may follow which;
- ``conversation``: commands and replies over one connection, errors with a name;
- ``replies``, ``opening``, ``login``: what POP3 adds, up to an open mailbox;
- ``mailbox``: a session by POP3; ``pop2``: one by its forerunner;
- ``session``: what both can do, and ``connect``, which is all that most callers need.

It promises:

- the bytes of a message come out exactly as the server meant them;
- memory and time are bounded, whatever a server sends;
- no secret crosses a channel that is not private;
- nothing is deleted unless ``Mailbox.quit`` was called.
"""

from archiver.pop3.failures import FailureKind, Pop3Error
from archiver.pop3.listing import Entries, Entry, Listing
from archiver.pop3.loop import Loop, aside
from archiver.pop3.mailbox import Mailbox
from archiver.pop3.pop2 import Pop2Mailbox
from archiver.pop3.session import Session, connect
from archiver.pop3.transport import SAFE_TLS_VERSIONS, TLS_VERSIONS, TlsSettings, parse_pin
from archiver.pop3.url import Endpoint, Tls, UrlError, Version, parse_url
from archiver.pop3.values import AVOIDABLE, Glance, Limits, Refused, Retrieved, ServerFacts, Sink

__all__ = [
    "AVOIDABLE",
    "SAFE_TLS_VERSIONS",
    "TLS_VERSIONS",
    "Endpoint",
    "Entries",
    "Entry",
    "FailureKind",
    "Glance",
    "Limits",
    "Listing",
    "Loop",
    "Mailbox",
    "Pop2Mailbox",
    "Pop3Error",
    "Refused",
    "Retrieved",
    "ServerFacts",
    "Session",
    "Sink",
    "Tls",
    "TlsSettings",
    "UrlError",
    "Version",
    "aside",
    "connect",
    "parse_pin",
    "parse_url",
]
