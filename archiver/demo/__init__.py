"""A mail server on this machine with sample mailboxes, for ``archiver demo`` and for the tests.

Owns the sample messages (``corpus``) and two POP3 servers behind one
interface: a real Dovecot if it is installed, and a small one that needs only
Python. Both listen on loopback only, on ports of their own. After they are
closed, only files in the given directory remain.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

__all__ = ["MailServer", "SessionLog", "start_mail_server"]


@dataclass(frozen=True, slots=True)
class SessionLog:
    """What a client did in one session after its login, as the server counted it."""

    user: str
    quit: bool
    """Whether the client ended the session with QUIT."""
    retr: int
    """RETR commands that succeeded."""
    retr_bytes: int
    """Bytes of the status lines and contents that answered RETR."""
    top: int
    """TOP commands that succeeded."""
    dele: int
    """Messages that were removed, which only QUIT does (RFC 1939, section 6)."""
    listed: int
    """Messages in the mailbox when the session began."""


class MailServer(Protocol):
    """A POP3 server with the mailboxes of a few users. A context manager: it is stopped at the end.

    Messages are bytes with CRLF at the end of every line, including the last
    one. RETR sends exactly these bytes. A message's number is its position in
    the mailbox at this moment, from 1.
    """

    @property
    def host(self) -> str:
        """The address that it listens on; the certificate names it."""

    @property
    def pop3s_port(self) -> int:
        """The port of POP3 over TLS."""

    @property
    def pop3_port(self) -> int:
        """The port of POP3 in clear text, with STLS."""

    @property
    def ca_file(self) -> Path:
        """The certificate by which to verify the server, PEM."""

    def url(self, user: str) -> str:
        """The POP URL of a user's mailbox, over TLS; without the password."""

    def add_user(self, user: str, password: str) -> None:
        """Create a user with an empty mailbox. Raises ValueError if the user exists, or for an odd name."""

    def deliver(self, user: str, messages: Iterable[bytes]) -> None:
        """Add messages to a mailbox, in this order. Sessions that are open may not see them."""

    def messages(self, user: str) -> list[bytes]:
        """The messages in a mailbox, in order."""

    def remove(self, user: str, number: int) -> None:
        """Remove a message, as another client would. Raises IndexError."""

    def sessions(self, *, at_least: int = 0) -> list[SessionLog]:
        """The sessions that have ended, in that order. Waits until there are ``at_least`` of them.

        Raises TimeoutError if that takes too long.
        """

    def close(self) -> None:
        """Stop. May be called again."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def start_mail_server(directory: Path, users: Mapping[str, str]) -> MailServer:
    """Start Dovecot if it is available, otherwise the small server. The caller closes it.

    The server's files go to ``directory``. ``users`` maps each user to a password.
    """
    from archiver.demo import dovecot, pop3d

    if dovecot.unavailable(directory) is None:
        return dovecot.Dovecot(directory, users)
    return pop3d.Pop3Server(directory, users)
