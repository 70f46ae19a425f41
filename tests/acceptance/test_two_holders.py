"""Two workers that each believe they hold an account, and two whose clocks differ: the promises hold."""

import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest

from archiver.demo.dovecot import Dovecot
from tests.conftest import Mailbox, require
from tests.harness.archive import Archive, Directory
from tests.harness.cli import cli as start_cli
from tests.harness.cli import wait_for
from tests.soak.holders import Trial, trial

pytestmark = pytest.mark.slow

SEED = 7
ROUNDS = 1
HOUR_SECONDS = 3600
DELIVERIES, DELIVERY_SECONDS = 4, 1.5


@pytest.fixture
def holders(archive: Archive, dovecot: Dovecot) -> Iterator[Trial]:
    with trial(archive, dovecot, SEED) as one:
        yield one


def test_a_worker_that_stood_still_past_its_lease_writes_and_deletes_nothing_more(holders: Trial) -> None:
    assert sum(holders.round() for _ in range(ROUNDS)) >= ROUNDS
    holders.come_to_rest()


@pytest.fixture
def on_shared_disk(tmp_path: Path, postgres_url: str) -> Iterator[Archive]:
    """PostgreSQL, with the schema, and a directory: a store that does not look at the clock of who writes."""
    store = tmp_path / "store"
    environment = {"ARCHIVER_DATABASE_URL": postgres_url, "ARCHIVER_STORE_URL": f"file:{store}"}
    with start_cli(tmp_path / "work", environment) as cli:
        cli.do("db", "upgrade")
        yield Archive(cli, Directory(store), postgres_url)


@pytest.mark.parametrize("hours", [1, -1])
def test_workers_whose_clocks_differ_by_an_hour_agree_about_leases(
    on_shared_disk: Archive, dovecot: Dovecot, tmp_path: Path, hours: int
) -> None:
    """The database's clock decides. What only one's own clock can tell, when a message came, is off."""
    archive = on_shared_disk
    other_clock = clock_set_by(hours, tmp_path)
    with trial(archive, dovecot, SEED) as one:
        both = [archive.cli.start("run", environment=environment) for environment in (other_clock, {})]
        for running in both:
            wait_for(partial(running.log, "service.started"), "it has begun")
        for _ in range(DELIVERIES):
            for witness in one.boxes:
                witness.deliver(one.message() for _ in range(3))
            time.sleep(DELIVERY_SECONDS)
        wait_for(lambda: all(box.recorded() == set(box.delivered) for box in one.boxes), "all is archived")
        logs = [running.log("poll.ended") for running in both]
        for running in both:
            running.terminate()
            assert running.wait().code == 0

        # Each had its share, and none took what the other held.
        assert all(logs)
        assert {line["outcome"] for log in logs for line in log} <= {"ok", "try_later"}
        one.come_to_rest()
    [(apart,)] = archive.rows("SELECT max(captured_at) - min(captured_at) FROM capture")
    assert apart > timedelta(minutes=55)


@pytest.mark.parametrize("hours", [1, -1])
def test_a_worker_whose_clock_is_off_by_an_hour_is_refused_by_the_bucket(
    in_bucket: Archive, mailbox: Callable[..., Mailbox], tmp_path: Path, hours: int
) -> None:
    """S3 takes no request that was signed a quarter of an hour ago, or ahead: so nothing is touched."""
    box = mailbox([b"Subject: one\r\n\r\n"])
    refused = in_bucket.cli.run(
        "sync", box.url, *in_bucket.access(box), environment=clock_set_by(hours, tmp_path)
    )
    assert refused.code in (1, 2)
    assert "RequestTimeTooSkewed" in refused.err
    assert box.messages() == [b"Subject: one\r\n\r\n"]
    assert in_bucket.objects.written() == {}


def clock_set_by(hours: int, directory: Path) -> dict[str, str]:
    """The environment of a process whose time of day is off by so much; its monotonic clock is not."""
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
    require(None if library else "libfaketime is not installed (Debian: faketime)")
    # The library gets clock_nanosleep(2) wrong, by which Python sleeps; select(2) it leaves alone.
    (directory / "sitecustomize.py").write_text(
        "import select, time\ntime.sleep = lambda seconds: select.select([], [], [], seconds) and None\n"
    )
    return {
        "LD_PRELOAD": f"{library}",
        "FAKETIME": f"{hours * HOUR_SECONDS:+d}",
        "DONT_FAKE_MONOTONIC": "1",
        "PYTHONPATH": f"{directory}",
    }
