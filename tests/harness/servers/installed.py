"""Dovecot, as the rest of the tests use it, in the clothes of the other servers."""

from collections.abc import Iterable
from itertools import count
from pathlib import Path

from archiver.demo import dovecot
from archiver.pop3 import Tls


class InstalledDovecot(dovecot.Dovecot):
    """Implements ``Server``."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.ports = {Tls.IMPLICIT: self.pop3s_port, Tls.STARTTLS: self.pop3_port, Tls.NONE: self.pop3_port}
        self._numbers = count(1)

    def new_user(self, messages: Iterable[bytes]) -> tuple[str, str]:
        user, password = f"u{next(self._numbers)}", "correct horse"
        self.add_user(user, password)
        self.deliver(user, messages)
        return user, password

    def stored(self, user: str) -> list[bytes]:
        return self.messages(user)


def unavailable(_name: str, directory: Path) -> str | None:
    return dovecot.unavailable(directory)


def start(_name: str, directory: Path) -> InstalledDovecot:
    return InstalledDovecot(directory)
