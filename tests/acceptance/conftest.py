"""Archives as an operator has them: a database, a store, and ``archiver`` processes that share them."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.harness.archive import PREFIX, Archive, Bucket, Directory
from tests.harness.cli import cli as start_cli
from tests.harness.seaweedfs import SeaweedFS


@pytest.fixture
def in_directory(tmp_path: Path) -> Iterator[Archive]:
    """SQLite and a directory: one machine. Neither is there yet."""
    url = f"sqlite:///{tmp_path / 'archive' / 'archiver.db'}"
    store = tmp_path / "archive" / "store"
    environment = {"ARCHIVER_DATABASE_URL": url, "ARCHIVER_STORE_URL": f"file:{store}"}
    with start_cli(tmp_path / "work", environment) as cli:
        yield Archive(cli, Directory(store), url)


@pytest.fixture
def in_bucket(tmp_path: Path, postgres_url: str, s3: SeaweedFS, bucket: str) -> Iterator[Archive]:
    """PostgreSQL, with the schema, and a bucket, empty: many machines."""
    environment = {
        "ARCHIVER_DATABASE_URL": postgres_url,
        "ARCHIVER_STORE_URL": f"s3://{bucket}/{PREFIX}",
        **s3.environment,
    }
    client = s3.session().client("s3", endpoint_url=s3.endpoint_url)
    with closing(client), start_cli(tmp_path / "work", environment) as cli:
        cli.do("db", "upgrade")
        yield Archive(cli, Bucket(client, bucket), postgres_url)


@pytest.fixture(
    params=["in_directory", pytest.param("in_bucket", marks=[pytest.mark.postgres, pytest.mark.s3])]
)
def archive(request: pytest.FixtureRequest) -> Archive:
    """Each kind of archive in turn."""
    made: Archive = request.getfixturevalue(request.param)
    return made
