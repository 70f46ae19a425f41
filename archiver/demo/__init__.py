"""A mail server on this machine with sample mailboxes, for ``archiver demo`` and for the tests.

Owns the sample messages (``corpus``) and two POP3 servers behind one
interface: a real Dovecot where it is installed, and a small one that needs
nothing but Python. Both listen on loopback only, on ports of their own, and
keep nothing after they are closed but what lies in the directory given.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

__all__ = ["MailServer", "SessionLog", "start_mail_server"]


@dataclass(frozen=True, slots=True)
class SessionLog:
    """What a client did in one session in which it logged in, as the server counted it.

    ``quit`` is true when the client ended the session by QUIT. ``retr`` and
    ``top`` count commands that were granted; ``retr_bytes`` are those of the
    status lines and contents sent in answer to RETR. ``dele`` counts messages
    that were removed, which only QUIT does (RFC 1939, section 6). ``listed`` is
    how many messages the mailbox had when the session began.
    """

    user: str
    quit: bool
    retr: int
    retr_bytes: int
    top: int
    dele: int
    listed: int


class MailServer(Protocol):
    """A POP3 server that holds the mailboxes of a few users. A context manager: it is stopped at the end.

    Messages are bytes with CRLF at every line's end, the last one's too; what
    RETR sends is exactly that. A message's number, where one is asked for, is
    its place in the mailbox as it is now, from 1.
    """

    @property
    def host(self) -> str:
        """The address that it listens on; the certificate names it."""

    @property
    def pop3s_port(self) -> int:
        """The port of POP3 over TLS."""

    @property
    def pop3_port(self) -> int:
        """The port of POP3 in the clear, with STLS."""

    @property
    def ca_file(self) -> Path:
        """The certificate by which to verify the server, PEM."""

    def url(self, user: str) -> str:
        """The POP URL of a user's mailbox, over TLS; without the password."""

    def add_user(self, user: str, password: str) -> None:
        """Make a user with an empty mailbox. Raises ValueError for one that exists, or an odd name."""

    def deliver(self, user: str, messages: Iterable[bytes]) -> None:
        """Add messages to a mailbox, in this order. Sessions under way may not see them."""

    def messages(self, user: str) -> list[bytes]:
        """What is in a mailbox now, in its order."""

    def remove(self, user: str, number: int) -> None:
        """Take a message away, as another client would. Raises IndexError."""

    def sessions(self, *, at_least: int = 0) -> list[SessionLog]:
        """The sessions that have ended, in the order of their ends; waits a while for ``at_least`` of them.

        Raises TimeoutError when they do not come.
        """

    def close(self) -> None:
        """Stop. May be called again."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def start_mail_server(directory: Path, users: Mapping[str, str]) -> MailServer:
    """Start Dovecot where it can be had, the small server otherwise. The caller closes it.

    ``directory`` takes the server's files; ``users`` gives each one's password.
    """
    from archiver.demo import dovecot, pop3d

    if dovecot.unavailable(directory) is None:
        return dovecot.Dovecot(directory, users)
    return pop3d.Pop3Server(directory, users)
