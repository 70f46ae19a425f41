"""An archive and its mailboxes, seen from outside.

What a test learns here it learns by SQL, from files, by plain S3 requests and
over a raw socket, and from what ``archiver`` processes print; never through
the code under test.
"""

import hashlib
import json
import socket
import sqlite3
import ssl
import stat
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

import psycopg
from psycopg import sql

from archiver.demo import SessionLog
from tests.conftest import Mailbox
from tests.harness.cli import Cli, wait_for

PREFIX = "mail/archive"
SERVER_SECONDS = 60.0


class Written(NamedTuple):
    """What tells that an object was written again, were it with the same content."""

    size: int
    when: object
    which: object


class Objects(Protocol):
    """A store, seen from outside."""

    def written(self, below: str = "") -> dict[str, Written]:
        """Every object by its key, or those in the folder ``below``."""

    def read(self, key: str) -> bytes:
        """The content of an object."""


@dataclass(frozen=True, slots=True)
class Directory:
    """A store in a directory. What begins with a dot is no key, and may come and go."""

    root: Path

    def written(self, below: str = "") -> dict[str, Written]:
        written = {}
        for path in self.root.glob(f"{below or '[!.]*'}/**/*"):
            status = path.stat()
            if not stat.S_ISDIR(status.st_mode):
                key = str(path.relative_to(self.root))
                written[key] = Written(status.st_size, status.st_mtime_ns, status.st_ino)
        return written

    def read(self, key: str) -> bytes:
        return (self.root / key).read_bytes()


@dataclass(frozen=True, slots=True)
class Bucket:
    """A store in a bucket, below ``PREFIX``."""

    client: Any
    name: str

    def written(self, below: str = "") -> dict[str, Written]:
        prefix = f"{PREFIX}/{below}/" if below else f"{PREFIX}/"
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix)
        return {
            item["Key"].removeprefix(f"{PREFIX}/"): Written(item["Size"], item["LastModified"], item["ETag"])
            for page in pages
            for item in page.get("Contents", ())
        }

    def uploads(self) -> list[Any]:
        """Uploads in parts that were begun and not ended."""
        return list(self.client.list_multipart_uploads(Bucket=self.name).get("Uploads", ()))

    def read(self, key: str) -> bytes:
        with self.client.get_object(Bucket=self.name, Key=f"{PREFIX}/{key}")["Body"] as content:
            octets: bytes = content.read()
        return octets


@dataclass(frozen=True, slots=True)
class Archive:
    """One archive. ``cli`` has it in its environment."""

    cli: Cli
    objects: Objects
    database_url: str
    _password_files: dict[str, Path] = field(default_factory=dict)

    def sync(self, mailbox: Mailbox, *more: str | Path) -> dict[str, Any]:
        """Poll a mailbox by its URL, to a good end; gives the report."""
        [report] = self.cli.do("sync", mailbox.url, *self.access(mailbox), *more, "--json").json
        return report

    def access(self, mailbox: Mailbox) -> tuple[str | Path, ...]:
        """The options that a mailbox wants: whom to trust, and where its password is."""
        return ("--ca-file", mailbox.ca_file, "--password-file", self.password_file(mailbox))

    def password_file(self, mailbox: Mailbox) -> Path:
        file = self.cli.directory / f"password of {mailbox.user}"
        file.write_text(f"{mailbox.password}\n")
        return file

    def accounts_file(self, boxes: Iterable[Mailbox], *, port: int | None = None, more: str = "") -> Path:
        """The accounts of these mailboxes as a cluster's configuration has them, reached at another port.

        ``more`` is what each of them has beside.
        """
        tables = [
            f"""[[account]]
name = "{box.user}"
url = "pop3s://{box.user}@{box.server.host}:{port or box.server.pop3s_port}"
ca_file = "{box.ca_file}"
password = "file:{self.password_file(box)}"
{more}
"""
            for box in boxes
        ]
        file = self.cli.directory / "accounts.toml"
        file.write_text("\n".join(tables))
        return file

    def fall_due(self) -> None:
        """Let every account that nobody polls be due now, however long it was backed off."""
        now = "strftime('%Y-%m-%d %H:%M:%f000', 'now')" if self._in_file else "now()"
        # Who is due already keeps the place in the line.
        self.change(f"UPDATE lease SET due_at = {now} WHERE owner IS NULL AND due_at > {now}")

    def status(self) -> dict[str, Any]:
        [summary] = self.cli.run("status", "--json").json
        return summary

    def messages(self) -> list[dict[str, Any]]:
        """What ``message list`` tells, capture by capture."""
        return self.cli.do("message", "list", "--json").json

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """Ask the database."""
        with self._database() as database:
            return list(database.execute(query))

    def change(self, statement: str) -> None:
        """Change the database behind the archiver's back, as only a test may."""
        with self._database() as database:
            database.execute(statement)
            database.commit()

    def database(self) -> bytes:
        """The octets of everything that the database holds."""
        if self._in_file:
            path = Path(self.database_url.removeprefix("sqlite:///"))
            return b"".join(file.read_bytes() for file in path.parent.glob(f"{path.name}*"))
        tables = self.rows("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        octets = bytearray()
        with self._database() as database:
            for (table,) in tables:
                query = sql.SQL("COPY (SELECT * FROM {}) TO STDOUT (FORMAT binary)")
                with database.cursor().copy(query.format(sql.Identifier(table))) as rows:
                    octets += b"".join(rows)
        return bytes(octets)

    @contextmanager
    def nothing_can_be_recorded(self) -> Iterator[None]:
        """Whoever wants to record a capture waits until the end of this block."""
        lock = "BEGIN IMMEDIATE" if self._in_file else "LOCK TABLE capture, journal IN EXCLUSIVE MODE"
        with self._database() as database:
            database.execute(lock)
            yield
            database.rollback()

    def is_unlocked(self) -> bool:
        """Whether nobody is in the midst of a transaction that writes what a poll writes."""
        try:
            with self._database() as database:
                if self._in_file:
                    database.execute("PRAGMA busy_timeout = 0")
                    database.execute("BEGIN IMMEDIATE")
                else:
                    database.execute("SELECT 1 FROM lease FOR UPDATE NOWAIT")
                database.rollback()
        except (sqlite3.OperationalError, psycopg.errors.LockNotAvailable):
            return False
        return True

    @property
    def _in_file(self) -> bool:
        return self.database_url.startswith("sqlite:///")

    @contextmanager
    def _database(self) -> Iterator[Any]:
        path = self.database_url.removeprefix("sqlite:///")
        opened = (
            psycopg.connect(self.database_url)
            if path == self.database_url
            else sqlite3.connect(path, timeout=30)
        )
        with closing(opened):
            yield opened

    def stored(self) -> list[str]:
        """The SHA-256 that each message in the store is named by."""
        keys = [PurePosixPath(key) for key in self.objects.written()]
        return [key.stem for key in keys if key.parts[0] == "messages"]

    def journalled(self) -> list[str]:
        """The SHA-256 of every capture that the journal tells of, in its order."""
        segments = sorted(key for key in self.objects.written() if key.startswith("journal/"))
        lines = [json.loads(line) for key in segments for line in self.objects.read(key).splitlines()]
        return [line["sha256"] for line in lines if line.get("what") == "captured"]

    def captured(self) -> list[str]:
        """The SHA-256 of every capture that the database knows."""
        return [bytes(digest).hex() for (digest,) in self.rows("SELECT sha256 FROM capture")]

    def expect_none_lost(self, delivered: Iterable[bytes], left: Iterable[bytes]) -> None:
        """Each message that was delivered is left on its server, or in the store: these octets, and proved.

        Proved is what the journal and the database tell of. Nothing in the store is other than its name says.
        """
        contents = [self.objects.read(key) for key in self.objects.written() if key.startswith("messages/")]
        assert sorted(map(sha256, contents)) == sorted(self.stored())
        proved = set(map(sha256, contents)) & set(self.journalled()) & set(self.captured())
        assert set(map(sha256, delivered)) - set(map(sha256, left)) <= proved

    def expect_each_once(self, messages: list[bytes]) -> None:
        """These messages are in the archive, each once, and nothing else is; and the archive proves it."""
        wanted = sorted(map(sha256, messages))
        assert len(set(wanted)) == len(wanted)
        listed = self.messages()
        assert sorted(line["sha256"] for line in listed) == wanted
        assert len({line["capture"] for line in listed}) == len(wanted)
        assert sorted(self.journalled()) == wanted
        assert sorted(self.stored()) == wanted
        self.expect_proved(len(wanted))

    def expect_proved(self, messages: int) -> None:
        """``verify`` has hashed so many messages again and found nothing; ``status`` misses none."""
        [verdict] = self.cli.do("verify", "--json").json
        found = {name: verdict[name] for name in ("missing", "damaged", "chain_breaks", "unrecorded")}
        assert found == dict.fromkeys(found, 0), verdict["findings"]
        assert verdict["checked"] == messages
        summary = self.status()
        assert (summary["captures"], summary["unaccounted"], summary["quarantined"]) == (messages, 0, 0)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def retrieve_all(mailbox: Mailbox) -> dict[str, bytes]:
    """All that the server gives by RETR, by UIDL: over TLS, with nothing but the dots undone.

    RFC 1939, section 3: a line that begins with the termination octet got one more.
    """
    server = mailbox.server
    trusting = ssl.create_default_context(cafile=server.ca_file)
    with (
        socket.create_connection((server.host, server.pop3s_port), timeout=SERVER_SECONDS) as plain,
        trusting.wrap_socket(plain, server_hostname=server.host) as connection,
        connection.makefile("rb") as answers,
    ):

        def ask(command: str) -> bytes:
            connection.sendall(f"{command}\r\n".encode())
            answer = answers.readline()
            assert answer.startswith(b"+OK"), answer
            return answer

        def lines() -> Iterator[bytes]:
            while (line := answers.readline()) != b".\r\n":
                assert line, "the connection ended within an answer"
                yield line[1:] if line.startswith(b".") else line

        assert answers.readline().startswith(b"+OK")
        ask(f"USER {mailbox.user}")
        ask(f"PASS {mailbox.password}")
        ask("UIDL")
        numbers = [line.decode().split() for line in lines()]
        contents = {}
        for number, uidl in numbers:
            ask(f"RETR {number}")
            contents[uidl] = b"".join(lines())
        ask("QUIT")
    return contents


def sessions(mailbox: Mailbox, count: int) -> list[SessionLog]:
    """The sessions of this mailbox that ended, as its server counted them, once there are so many."""

    def ended() -> list[SessionLog]:
        return [session for session in mailbox.server.sessions() if session.user == mailbox.user]

    wait_for(lambda: len(ended()) >= count, f"{count} sessions of {mailbox.user}")
    return ended()
