"""Fixtures: real servers, started once per process; a mailbox, a database and a bucket for each test.

If a server is missing, the test fails where the environment says CI, and is skipped elsewhere.
Each test carries a marker for each server that it needs. The markers of the fixtures below are
added here. A module that starts a server by itself marks its tests itself.
"""

import itertools
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

from archiver.demo import MailServer
from archiver.demo import dovecot as demo_dovecot
from archiver.demo.corpus import corpus as generate_corpus
from archiver.demo.dovecot import Dovecot
from tests.harness import postgres as harness_postgres
from tests.harness.postgres import Postgres

if TYPE_CHECKING:
    from tests.harness.seaweedfs import SeaweedFS

_CORPUS_COUNT, _CORPUS_SEED = 200, 20240108

SERVERS = ("dovecot", "postgres", "pgbouncer", "s3", "pop3_servers", "kerberos")
"""The markers of tests that need a server. `server` stands for any of them."""

_STARTED_HERE = ("dovecot", "postgres", "s3")
"""Fixtures of this file that start a server, each named as its marker."""

_current_item = pytest.StashKey[pytest.Item]()

# How long an example takes says more of the machine than of the code.
settings.register_profile("untimed", settings(), deadline=None)
settings.load_profile("untimed")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Half as many processes again as there are cores: many tests wait for a clock or a disk."""
    if config.getoption("numprocesses") != "auto":
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores + (cores + 1) // 2


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with the servers that its fixtures start, before pytest applies ``-m``."""
    for item in items:
        names = item.fixturenames if isinstance(item, pytest.Function) else ()
        for server in _STARTED_HERE:
            if server in names:
                item.add_marker(server)
        if any(item.get_closest_marker(server) for server in SERVERS):
            item.add_marker("server")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was skipped and why, one line for each reason."""
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", ())
        if isinstance(report.longrepr, tuple)
    )
    if reasons:
        terminalreporter.section("skipped")
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count} test{'s' * (count > 1)}: {reason}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.config.stash[_current_item] = item


def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest) -> None:
    """Fail a test that starts a server without its marker: ``make quick`` would run it."""
    item = request.config.stash[_current_item]
    if fixturedef.argname in _STARTED_HERE and not item.get_closest_marker(fixturedef.argname):
        pytest.fail(f"{item.nodeid} needs the marker {fixturedef.argname}")


def require(reason: str | None, environment: Mapping[str, str] = os.environ) -> None:
    """Go on when there is no reason not to; otherwise fail in CI, and skip with the reason elsewhere."""
    if reason is None:
        return
    if environment.get("CI"):
        pytest.fail(f"in CI every server must be there: {reason}")
    pytest.skip(reason)


@dataclass(frozen=True, slots=True)
class Mailbox:
    """One user's mailbox on a real server."""

    server: MailServer
    user: str
    password: str

    @property
    def url(self) -> str:
        return self.server.url(self.user)

    @property
    def ca_file(self) -> Path:
        return self.server.ca_file

    def deliver(self, messages: Iterable[bytes]) -> None:
        self.server.deliver(self.user, messages)

    def messages(self) -> list[bytes]:
        """What there is, also while the server is deleting what a session asked for."""
        while True:
            with suppress(FileNotFoundError):
                return self.server.messages(self.user)

    def remove(self, number: int) -> None:
        self.server.remove(self.user, number)


@pytest.fixture(scope="session")
def server_directory() -> Iterator[Path]:
    """A directory that servers without root's rights can enter; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory(prefix="archiver-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        directory.chmod(0o755)
        yield directory


@pytest.fixture(scope="session")
def dovecot(server_directory: Path) -> Iterator[Dovecot]:
    require(demo_dovecot.unavailable(server_directory))
    with Dovecot(server_directory / "dovecot") as server:
        yield server


@pytest.fixture(scope="session")
def _numbers() -> Iterator[int]:
    """For names that no other test of this run has."""
    return itertools.count(1)


@pytest.fixture
def mailbox(dovecot: Dovecot, _numbers: Iterator[int]) -> Callable[..., Mailbox]:
    """A factory of mailboxes on Dovecot, each for a new user: ``mailbox([message, ...])``.

    Each has a password of its own, unless one is given.
    """

    def make(messages: Iterable[bytes] = (), *, password: str | None = None) -> Mailbox:
        user = f"user{next(_numbers)}"
        made = Mailbox(dovecot, user, password=password or f"secret of {user}")
        dovecot.add_user(made.user, made.password)
        made.deliver(messages)
        return made

    return make


@pytest.fixture(scope="session")
def postgres(server_directory: Path) -> Iterator[Postgres]:
    require(harness_postgres.unavailable())
    with harness_postgres.postgres(server_directory / "postgres") as server:
        yield server


@pytest.fixture
def postgres_url(postgres: Postgres, _numbers: Iterator[int]) -> Iterator[str]:
    """A new, empty database."""
    name = f"test{next(_numbers)}"
    yield postgres.create_database(name)
    postgres.drop_database(name)


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """A database file that is not there yet."""
    return f"sqlite:///{tmp_path / 'archiver.db'}"


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def database_url(request: pytest.FixtureRequest) -> str:
    """Each of the databases in turn."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture(scope="session")
def s3(server_directory: Path) -> "Iterator[SeaweedFS]":
    from tests.harness import seaweedfs

    require(seaweedfs.why_not())
    with seaweedfs.seaweedfs(server_directory / "seaweedfs") as server:
        yield server


@pytest.fixture
def bucket(s3: "SeaweedFS", _numbers: Iterator[int]) -> str:
    """The name of a new, empty bucket."""
    name = f"test-{next(_numbers)}"
    s3.create_bucket(name)
    return name


@pytest.fixture(scope="session")
def corpus() -> list[bytes]:
    """Two hundred sample messages with every oddity, about 15 MB."""
    return list(generate_corpus(_CORPUS_COUNT, _CORPUS_SEED))
