"""A POP3 client for archives. It knows nothing of the rest of the project and could be published by itself.

From the bottom up, each module knowing only those before it:

- ``failures``: the one error, its kinds, and what an ``-ERR`` means;
- ``url``: POP URLs and the channel that they demand;
- ``wire``: framing, without I/O;
- ``listing``, ``capabilities``, ``sasl``: what replies say, and how to log in;
- ``transport``: socket, TLS, time;
- ``mailbox``: the session, which is all that most callers need.

It promises that the octets of a message come out exactly as the server meant
them, that memory and time are bounded whatever a server sends, that nothing
secret crosses a channel that is not private, and that nothing is deleted
unless ``Mailbox.quit`` was called.
"""

from archiver.pop3.failures import FailureKind, Pop3Error
from archiver.pop3.listing import Entry, Listing
from archiver.pop3.mailbox import Limits, Mailbox, Refused, Retrieved, ServerFacts, Sink
from archiver.pop3.url import Endpoint, Tls, UrlError, parse_url

__all__ = [
    "Endpoint",
    "Entry",
    "FailureKind",
    "Limits",
    "Listing",
    "Mailbox",
    "Pop3Error",
    "Refused",
    "Retrieved",
    "ServerFacts",
    "Sink",
    "Tls",
    "UrlError",
    "parse_url",
]
