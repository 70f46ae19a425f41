"""An archive for each story: on each database in turn, or on SQLite where the database does not matter."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.postgres import Postgres
from tests.scenarios.story import Archive


@pytest.fixture(scope="session")
def shared_postgres_url(postgres: Postgres, _numbers: Iterator[int]) -> str:
    """One database for all stories that look at their own accounts only: a new one takes a second each."""
    return postgres.create_database(f"shared{next(_numbers)}")


@pytest.fixture(
    params=[
        pytest.param("sqlite_url", id="sqlite"),
        pytest.param("shared_postgres_url", id="postgres", marks=pytest.mark.postgres),
    ]
)
def archive(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Archive]:
    """An archive whose database may hold the accounts of other stories."""
    with Archive(request.getfixturevalue(request.param), tmp_path) as archive:
        yield archive


@pytest.fixture
def lone_archive(database_url: str, tmp_path: Path) -> Iterator[Archive]:
    """An archive with a database of its own."""
    with Archive(database_url, tmp_path) as archive:
        yield archive


@pytest.fixture
def small_archive(sqlite_url: str, tmp_path: Path) -> Iterator[Archive]:
    """An archive on SQLite alone."""
    with Archive(sqlite_url, tmp_path) as archive:
        yield archive
