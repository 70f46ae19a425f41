"""The one place where real parts meet.

Everything else receives what it works with, so that a test can pass other parts.
Nothing is opened before it is needed: a command that only reads the database
needs no bucket.
"""

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

from archiver import oauth, policy, pop3
from archiver.accounts import file, rules
from archiver.db import Database, accounts, migrate
from archiver.db.hosts import HostSessions
from archiver.errors import UsageError
from archiver.evidence import identity
from archiver.model import Account
from archiver.poll.ports import BatchLimits, Budget, Ports
from archiver.secrets import Secrets
from archiver.settings import Settings
from archiver.store import Store, open_store
from archiver.store.spool import Spool
from archiver.worker import Terms, Worker


class App:
    """The parts of this process, each made from the settings when it is first used. A context manager."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.stopping = threading.Event()
        self.passwords: dict[str, str] = {}
        """Passwords for this run only, by account id."""
        self._close: list[Callable[[], None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for close in reversed(self._close):
            close()

    @staticmethod
    def now() -> datetime:
        return datetime.now(UTC)

    @cached_property
    def raw_database(self) -> Database:
        """The database, whatever its schema."""
        database = Database(self.settings.database_url, pool_size=self.settings.database_connections)
        self._close.append(database.close)
        return database

    @cached_property
    def database(self) -> Database:
        """The database, with the schema of this release. Raises UsageError if it does not exist."""
        if not self.raw_database.exists:
            raise UsageError(
                f"there is no archive yet: no database {self.raw_database.path}",
                hint=f"{self._looked_at}; to create an archive: archiver sync pop3s://you@mail.example.com, "
                "or try one: archiver demo",
            )
        migrate.ensure(self.raw_database)
        return self.raw_database

    @property
    def _looked_at(self) -> str:
        """Where the place of the database comes from."""
        path = self.raw_database.path
        if "database_url" in self.settings.model_fields_set:
            return f"the settings name {path}"
        return f"ARCHIVER_DATABASE_URL is not set, so the current directory was used ({Path.cwd()})"

    def make_database(self) -> None:
        """Create a SQLite database if there is none. For PostgreSQL, ``archiver db upgrade`` does that."""
        migrate.ensure(self.raw_database)

    @cached_property
    def store(self) -> Store:
        """The store, after it has answered once. Raises UsageError, OperatorNeeded, TryLater."""
        store = open_store(
            self.settings.store_url,
            s3_endpoint_url=self.settings.s3_endpoint_url,
            s3_region=self.settings.s3_region,
            s3_addressing_style=self.settings.s3_addressing_style,
            max_connections=self.settings.uploads + 4,
        )
        store.probe()
        return store

    def open_archive(self) -> None:
        """Open store and database for writing. Wrong settings are found before anything is created."""
        if self.raw_database.exists:
            _ = self.database
        _ = self.store
        self.make_database()
        self.check_store()

    def check_store(self) -> None:
        """Check that store and database belong together. Raises as ``identity.check`` does."""
        identity.check(self.store, self.database, self.now())

    def take_in(self, accounts_file: Path) -> int:
        """Bring the accounts of a file into the database, and count what changed. Raises UsageError."""
        return file.take_in(
            self.database, accounts_file, self.now(), interval_seconds=self.settings.interval_seconds
        )

    @cached_property
    def secrets(self) -> Secrets:
        key = self.settings.secret_key
        return Secrets(None if key is None else key.get_secret_value())

    @cached_property
    def access_tokens(self) -> oauth.AccessTokens:
        return oauth.AccessTokens(self.secrets, self._keep_credential)

    def _keep_credential(self, account: Account, reference: str, document: str) -> str:
        """Seal a renewed credential in place of the old one, unless an operator has replaced that."""
        sealed = oauth.reference_to(self.secrets.seal(account, document))
        self.database.transact(
            lambda connection: accounts.exchange_secret(connection, account.id, reference, sealed)
        )
        return sealed

    @property
    def host_sessions(self) -> HostSessions:
        named = {name.lower(): most for name, most in self.settings.host_sessions_of.items()}
        return HostSessions(self.settings.host_sessions, named)

    @cached_property
    def worker(self) -> Worker:
        """The worker. Its clock is not started."""
        terms = Terms(
            lease_seconds=self.settings.lease_seconds,
            workers=self.settings.workers,
            sessions=self.host_sessions,
            ramp_seconds=self.settings.ramp_seconds,
            history_days=self.settings.history_days,
        )
        worker = Worker(self.ports, terms, stopping=self.stopping)
        self._close.append(worker.close)
        return worker

    @cached_property
    def ports(self) -> Ports:
        settings = self.settings
        uploads = ThreadPoolExecutor(settings.uploads, thread_name_prefix="upload")
        self._close.append(lambda: uploads.shutdown(wait=False, cancel_futures=True))
        directory = settings.spool_directory
        if directory is not None and not directory.is_dir():
            raise UsageError(f"the spool directory {directory} does not exist")
        return Ports(
            connect=self.connect,
            password=self.password,
            another_password=self.another_password,
            store=self.store,
            database=self.database,
            spool=Spool(directory, settings.spool_memory_bytes, settings.spool_message_bytes),
            uploads=uploads,
            now=self.now,
            monotonic=time.monotonic,
            stopping=self.stopping.is_set,
            batch=BatchLimits(settings.batch_messages, settings.batch_bytes, settings.batch_seconds),
            session_seconds=settings.session_seconds,
            budget=Budget(
                settings.session_messages,
                settings.session_bytes,
                settings.day_bytes,
                settings.slice_seconds,
            ),
            check_store=self.check_store,
            full_listing_seconds=settings.full_listing_seconds,
            forbid_deletion=settings.forbid_deletion,
            uniform=random.uniform,
        )

    def connect(self, account: Account) -> pop3.Session:
        """A session with the account's server, before the login."""
        settings = self.settings
        return pop3.connect(
            pop3.parse_url(account.url, pop3.Tls(account.tls)),
            tls_settings=rules.tls_settings(account),
            limits=pop3.Limits(
                connect_seconds=account.timeout_seconds or settings.connect_seconds,
                greeting_seconds=account.timeout_seconds or settings.greeting_seconds,
                capability_seconds=settings.capability_seconds,
                login_seconds=settings.login_seconds,
                listing_seconds=settings.listing_seconds,
                idle_seconds=account.timeout_seconds or settings.idle_seconds,
                # A poll yields before this; a session that prevents it is disconnected.
                session_seconds=2 * settings.session_seconds,
                quit_seconds=settings.quit_seconds,
                status_line_bytes=settings.status_line_bytes,
                listing_lines=settings.listing_lines,
                listing_bytes=settings.listing_bytes,
                message_bytes=settings.message_bytes,
            ),
            avoid=policy.avoided(account, self.now()),
        )

    def password(self, account: Account) -> str:
        """The account's password at this moment, or an access token instead."""
        given = self.passwords.get(account.id)
        if given is not None:
            return given
        if oauth.is_oauth(account.secret_reference):
            return pop3.aside(lambda: self.access_tokens.current(account, _user(account)))
        return self.secrets.resolve(account)

    def another_password(self, account: Account, refused: str) -> str | None:
        """A new access token, if the mail server refused the last one; None for a password."""
        if account.id in self.passwords or not oauth.is_oauth(account.secret_reference):
            return None
        return pop3.aside(lambda: self.access_tokens.instead(account, _user(account), refused))


def _user(account: Account) -> str:
    return pop3.parse_url(account.url, pop3.Tls(account.tls)).user
