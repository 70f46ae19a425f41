"""Real POP3 servers, of eight unrelated families, each private and on loopback.

Owns their processes and everything they write, below one directory each.
Promises that nothing of the machine's users, mail or ports is touched, and that
nothing is left running. Leaves the programs themselves to ``tools/servers``,
which puts them into ``CACHE``; Dovecot is installed in the system.

The distributed ones (Courier, Cyrus, popa3d, solid-pop3d, GNU mailutils) come
from Debian packages that cannot be installed side by side, and are unpacked;
they need root, as each runs in a mount namespace of its own. WildDuck's core
needs node, twisted.mail only Python.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self

from archiver.pop3 import Endpoint, Tls

CACHE: Final = Path(sys.prefix) / ".cache" / "servers"
"""Where ``tools/servers`` keeps what it fetched: ``debian/`` and ``node/``."""

NAMES: Final = ("dovecot", "courier", "cyrus", "popa3d", "solid-pop3d", "mailutils", "wildduck", "twisted")


class Server(Protocol):
    """A running POP3 server. A context manager: it is stopped at the end."""

    @property
    def ports(self) -> dict[Tls, int]:
        """The port for each way to speak to it. A server without TLS has ``Tls.NONE`` alone."""

    @property
    def ca_file(self) -> Path: ...

    def new_user(self, messages: Iterable[bytes]) -> tuple[str, str]:
        """A user whose mailbox holds ``messages`` (lines end in CRLF): name and password."""

    def stored(self, user: str) -> list[bytes]:
        """What the mailbox holds now, in its order, with CRLF; headers that delivery added are there."""

    def close(self) -> None:
        """Stop."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class Box:
    """A user's mailbox on one of the servers."""

    server: Server
    user: str
    password: str

    def endpoint(self, tls: Tls | None = None) -> Endpoint:
        """Where it is, by the best TLS that the server has, or by the one that is named."""
        chosen = tls or next(each for each in Tls if each in self.server.ports)
        return Endpoint("127.0.0.1", self.server.ports[chosen], chosen, self.user)

    def stored(self) -> list[bytes]:
        return self.server.stored(self.user)


def unavailable(name: str, directory: Path) -> str | None:
    """Why this server cannot be had here, or None when it can."""
    return _family(name).unavailable(name, directory)


def start(name: str, directory: Path) -> Server:
    """Start one, with its files in ``directory``, which it makes. Raises OperatorNeeded when it does not."""
    return _family(name).start(name, directory)


def box(server: Server, messages: Iterable[bytes] = ()) -> Box:
    """A new mailbox."""
    return Box(server, *server.new_user(messages))


class _Family(Protocol):
    """A module that starts some of the servers."""

    def unavailable(self, name: str, directory: Path, /) -> str | None: ...
    def start(self, name: str, directory: Path, /) -> Server: ...


def _family(name: str) -> _Family:
    from tests.harness.servers import debian, installed, scripts

    if name == "dovecot":
        return installed
    return scripts if name in {"wildduck", "twisted"} else debian
