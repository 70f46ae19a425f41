"""twisted.mail as a POP3 server over a directory: ``twisted_mail.py DIRECTORY PORT TLS_PORT``.

Its POP3 server knows no STLS, so TLS has a port of its own, with ``cert.pem``
and ``key.pem`` of the directory.
"""

import io
import sys
from pathlib import Path
from typing import Any

from twisted.cred import checkers, credentials, error, portal
from twisted.internet import endpoints, protocol, reactor
from twisted.mail import pop3
from zope.interface import implementer

# Type checkers do not know which class implements an interface of zope; for them these are ``Any``.
untyped_endpoints: Any = endpoints
untyped_reactor: Any = reactor


@implementer(pop3.IMailbox)
class DirectoryMailbox:
    """The files of one user. What was deleted is removed at QUIT, which is when ``sync`` is called."""

    def __init__(self, directory: Path) -> None:
        self._paths = sorted(directory.iterdir())
        self._deleted: set[int] = set()

    def listMessages(self, index: int | None = None) -> int | list[int]:
        sizes = [
            0 if number in self._deleted else path.stat().st_size for number, path in enumerate(self._paths)
        ]
        return sizes if index is None else sizes[index]

    def getMessage(self, index: int) -> io.BytesIO:
        # It wants local line ends, and makes CRLF of each.
        return io.BytesIO(self._paths[index].read_bytes().replace(b"\r\n", b"\n"))

    def getUidl(self, index: int) -> bytes:
        return self._paths[index].stem.encode()

    def deleteMessage(self, index: int) -> None:
        self._deleted.add(index)

    def undeleteMessages(self) -> None:
        self._deleted.clear()

    def sync(self) -> None:
        for index in self._deleted:
            self._paths[index].unlink()


@implementer(portal.IRealm)
class Realm:
    def __init__(self, mail: Path) -> None:
        self._mail = mail

    def requestAvatar(self, user: bytes, _mind: object, *_interfaces: object) -> tuple[object, ...]:
        return pop3.IMailbox, DirectoryMailbox(self._mail / user.decode()), lambda: None


class OnePassword(checkers.InMemoryUsernamePasswordDatabaseDontUse):
    def __init__(self, password: bytes) -> None:
        super().__init__()
        self._password = password

    def requestAvatarId(self, given: credentials.IUsernamePassword) -> bytes:
        if given.password != self._password:
            raise error.UnauthorizedLogin
        user: bytes = given.username
        return user


class Factory(protocol.ServerFactory):
    def __init__(self, directory: Path) -> None:
        password = (directory / "password").read_bytes()
        realm: Any = Realm(directory / "mail")
        checker: Any = OnePassword(password)
        self._portal = portal.Portal(realm, [checker])

    def buildProtocol(self, _address: object) -> Any:
        session: Any = pop3.POP3()
        session.factory = self
        session.portal = self._portal
        return session


def main(directory: Path, port: str, tls_port: str) -> None:
    factory = Factory(directory)
    tls = f"ssl:{tls_port}:privateKey={directory / 'key.pem'}:certKey={directory / 'cert.pem'}"
    # The plain port last: whoever is greeted there finds both open.
    for endpoint in (tls, f"tcp:{port}"):
        untyped_endpoints.serverFromString(reactor, f"{endpoint}:interface=127.0.0.1").listen(factory)
    untyped_reactor.run()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
