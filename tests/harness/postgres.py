"""A private PostgreSQL server on loopback, for tests that claim durability.

Owns a cluster below one directory and its server process. It is a real one:
fsync is on, and ``kill`` crashes it as a lost node would, so that what survives
is what was committed. It listens on TCP only, so that the length of the
directory's path does not matter, and lets everybody on this machine in.
"""

import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, LiteralString
from urllib.parse import quote

import psycopg
from psycopg import sql

from archiver.demo import processes

_START_SECONDS = 60.0
_STOP_SECONDS = 30.0

_SETTINGS = {
    "listen_addresses": processes.HOST,
    "unix_socket_directories": "",
    "fsync": "on",
    "shared_buffers": "32MB",
    "max_connections": "200",
    "timezone": "UTC",
}


class Postgres:
    """A PostgreSQL server: ``start`` it, ``stop`` or ``kill`` it, as often as wanted; its port stays."""

    def __init__(self, directory: Path, settings: Mapping[str, str] = MappingProxyType({})) -> None:
        """A cluster in ``directory``, made if there is none; ``settings`` go before those of the harness."""
        programs = _programs()
        if programs is None:
            raise FileNotFoundError(unavailable())
        self._programs = programs
        self._data = directory / "data"
        self.log_file = directory / "postgres.log"
        (self.port,) = processes.free_ports(1)
        self._process: subprocess.Popen[bytes] | None = None
        self._settings = _SETTINGS | dict(settings)
        if self._data.exists():
            return
        directory.mkdir(parents=True, exist_ok=True)
        processes.give(directory)
        options = "--no-sync --username postgres --auth trust --encoding UTF8 --locale C --pgdata"
        made = processes.start([str(programs / "initdb"), *options.split(), str(self._data)], self.log_file)
        if made.wait(_START_SECONDS) != 0:
            raise RuntimeError(f"initdb failed: {self.log_file.read_text()[-2000:]}")

    @property
    def url(self) -> str:
        """The server's own database, as the superuser."""
        return self._url("postgres")

    @property
    def pid(self) -> int:
        """The server's first process, whose children are the others."""
        return int((self._data / "postmaster.pid").read_text().splitlines()[0])

    def create_database(self, name: str) -> str:
        """Make an empty database and return its URL."""
        self._execute("CREATE DATABASE {}", name)
        return self.database_url(name)

    def database_url(self, name: str) -> str:
        """The URL of a database of this server."""
        return self._url(name)

    def execute(self, statement: LiteralString) -> list[tuple[Any, ...]]:
        """Run a statement in the server's own database, as the superuser; its rows, if it has any."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def standby(self, directory: Path) -> "Postgres":
        """A copy in ``directory`` that follows this server once it is started, until it is told to lead."""
        directory.mkdir(parents=True)
        processes.give(directory)
        options = ["--write-recovery-conf", "--checkpoint=fast", "--no-sync", "--dbname", self.url]
        copy = [str(self._programs / "pg_basebackup"), "--pgdata", str(directory / "data"), *options]
        log_file = directory / "postgres.log"
        if processes.start(copy, log_file).wait(_START_SECONDS) != 0:
            raise RuntimeError(f"pg_basebackup failed: {log_file.read_text()[-2000:]}")
        return Postgres(directory, self._settings)

    def lead(self) -> None:
        """Promote a standby; returns when it takes writes."""
        if self.execute("SELECT pg_promote()") != [(True,)]:
            raise RuntimeError("the standby was not promoted in time")

    def drop_database(self, name: str) -> None:
        """Remove a database, whoever is still connected to it."""
        self._execute("DROP DATABASE {} WITH (FORCE)", name)

    def start(self) -> None:
        """Start the server and wait until it answers; after ``kill`` it recovers first."""
        settings = [f"--{name}={value}" for name, value in self._settings.items()]
        command = [str(self._programs / "postgres"), "-D", str(self._data), "-p", str(self.port), *settings]
        self._process = processes.start(command, self.log_file)
        processes.wait_until(self._answers, self._process, self.log_file, seconds=_START_SECONDS)

    def stop(self) -> None:
        """Shut down in good order: sessions are ended, a checkpoint is written ("fast shutdown")."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """Crash: every process ends at once, nothing is written any more ("immediate shutdown").

        SIGQUIT rather than SIGKILL, which would leave orphans that block the next start for a while.
        """
        self._end(signal.SIGQUIT)

    def _end(self, how: int) -> None:
        if self._process is not None:
            processes.stop(self._process, gracefully=how, seconds=_STOP_SECONDS)
            self._process = None

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.url, connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True

    def _execute(self, statement: str, name: str) -> None:
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(sql.SQL(statement).format(sql.Identifier(name)))

    def _url(self, name: str) -> str:
        return f"postgresql://postgres@{processes.HOST}:{self.port}/{quote(name, safe='')}"


@contextmanager
def postgres(directory: Path) -> Iterator[Postgres]:
    """A new cluster in ``directory``, started; stopped at the end."""
    server = Postgres(directory)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def unavailable() -> str | None:
    """Why there is no PostgreSQL here, or None when there is."""
    return None if _programs() else "PostgreSQL's initdb and postgres are not installed"


def _programs() -> Path | None:
    """The directory of the newest server's programs. Debian keeps them out of PATH."""
    candidates = sorted(
        (path for path in Path("/usr/lib/postgresql").glob("*/bin") if path.parent.name.isdigit()),
        key=lambda path: int(path.parent.name),
        reverse=True,
    )
    found = shutil.which("initdb")
    if found:
        candidates.append(Path(found).resolve().parent)
    return next(
        (path for path in candidates if (path / "initdb").exists() and (path / "postgres").exists()), None
    )
