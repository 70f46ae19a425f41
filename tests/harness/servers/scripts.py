"""Two servers that are libraries: WildDuck's POP3 core under node, twisted.mail under Python.

Each serves the files ``<user>/<number>.eml`` below its directory as they are,
with the password in ``password``, and removes at QUIT what was deleted.
"""

import importlib.util
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from archiver.demo import processes
from archiver.demo.certificates import self_signed
from archiver.pop3 import Tls
from tests.harness import servers

_HERE: Final = Path(__file__).parent
_PASSWORD: Final = "correct horse"
_START_SECONDS: Final = 30.0
_STOP_SECONDS: Final = 5.0


class Library:
    """Implements ``Server``."""

    def __init__(self, name: str, directory: Path) -> None:
        directory.mkdir(parents=True)
        directory.chmod(0o755)
        self._mail = directory / "mail"
        self._mail.mkdir()
        (directory / "password").write_text(_PASSWORD)
        self.ca_file, _ = self_signed(directory)
        plain, tls = processes.free_ports(2)
        self.ports = {Tls.STARTTLS: plain} if name == "wildduck" else {Tls.IMPLICIT: tls}
        self.ports[Tls.NONE] = plain
        self._numbers = count(1)
        program = "wildduck_core.js" if name == "wildduck" else "twisted_mail.py"
        shutil.copy(_HERE / program, directory)
        run: list[str | Path] = [sys.executable]
        ports = [str(plain), str(tls)]
        if name == "wildduck":
            run = ["env", f"NODE_PATH={servers.CACHE / 'node' / 'node_modules'}", _node() or "node"]
            ports = [str(plain)]
        with (directory / "log").open("wb") as said:
            self._process = subprocess.Popen(
                [*run, directory / program, directory, *ports],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        try:
            processes.wait_until(self._greets, self._process, directory / "log", seconds=_START_SECONDS)
        except BaseException:
            self.close()
            raise

    def _greets(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.ports[Tls.NONE]), timeout=5) as connection:
                return connection.recv(3) == b"+OK"
        except OSError:
            return False

    def new_user(self, messages: Iterable[bytes]) -> tuple[str, str]:
        user = f"u{next(self._numbers)}"
        (self._mail / user).mkdir()
        for number, message in enumerate(messages, start=1):
            (self._mail / user / f"{number:06}.eml").write_bytes(message)
        return user, _PASSWORD

    def stored(self, user: str) -> list[bytes]:
        return [path.read_bytes() for path in sorted((self._mail / user).iterdir())]

    def close(self) -> None:
        processes.stop(self._process, seconds=_STOP_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _node() -> str | None:
    return shutil.which("node")


def unavailable(name: str, _directory: Path) -> str | None:
    if name == "twisted":
        found = all(importlib.util.find_spec(each) for each in ("twisted", "OpenSSL", "service_identity"))
        reason = None if found else "twisted, or what it needs for TLS, is not installed"
    elif _node() is None:
        reason = "node is not installed"
    elif not (servers.CACHE / "node" / "node_modules" / "@zone-eu" / "wildduck").is_dir():
        reason = "WildDuck was not fetched; with npm, tools/servers does it"
    else:
        reason = None
    return reason


def start(name: str, directory: Path) -> Library:
    return Library(name, directory)
