"""A disk runs full under the spool, the store, or the database, and has room again."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Mailbox
from tests.harness import small_disk as harness_small_disk
from tests.harness.archive import Archive, Directory
from tests.harness.cli import cli as start_cli
from tests.harness.small_disk import SmallDisk

pytestmark = pytest.mark.slow

DISK_BYTES = 6 * 1024 * 1024
SIZES = [40_000, 60_000, 900_000, 30_000, 50_000, 20_000]
"""Of the messages, in octets: one of them fills what is left of the disk."""

LEFT_BYTES = 400_000


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    # Not a server that could be installed: where it is not allowed, CI or not, it cannot be had.
    if (reason := harness_small_disk.why_not()) is not None:
        pytest.skip(reason)
    with harness_small_disk.small_disk(tmp_path / "disk", DISK_BYTES) as made:
        yield made


@pytest.fixture
def mail() -> list[bytes]:
    return [b"Subject: %d\r\n\r\n%s" % (octets, (b"%076d\r\n" % octets) * (octets // 78)) for octets in SIZES]


@contextmanager
def archive_on(
    disk: SmallDisk, tmp_path: Path, database: Path, store: Path, **settings: str
) -> Iterator[Archive]:
    """An archive of which ``database``, ``store`` or the spool are on the disk."""

    def seen(path: Path) -> Path:
        return disk.seen / path.relative_to(disk.path) if path.is_relative_to(disk.path) else path

    environment = {
        "ARCHIVER_DATABASE_URL": f"sqlite:///{database}",
        "ARCHIVER_STORE_URL": f"file:{store}",
        "ARCHIVER_BATCH_MESSAGES": "2",
        "ARCHIVER_LEASE_SECONDS": "5",
        **settings,
    }
    with start_cli(tmp_path / "work", environment, under=disk.under) as cli:
        yield Archive(cli, Directory(seen(store)), f"sqlite:///{database}")


def looked_into(archive: Archive, disk: SmallDisk, directory: Path) -> Archive:
    """The archive with a copy of its database, since SQLite finds its way to the path that others see."""
    path = Path(archive.database_url.removeprefix("sqlite:///"))
    copies = directory / "copies"
    copies.mkdir()
    for file in (disk.seen / path.relative_to(disk.path)).parent.glob(f"{path.name}*"):
        shutil.copy(file, copies)
    return replace(archive, database_url=f"sqlite:///{copies / path.name}")


def poll(archive: Archive, box: Mailbox) -> dict[str, Any]:
    ended = archive.cli.run("sync", box.url, *archive.access(box), "--delete", "after-archived", "--json")
    [report] = ended.json
    assert (ended.code == 0) == (report["outcome"] == "ok"), ended
    return report


def test_no_room_to_spool(
    disk: SmallDisk, mailbox: Callable[..., Mailbox], mail: list[bytes], tmp_path: Path
) -> None:
    box = mailbox(mail)
    (disk.seen / "spool").mkdir()
    spool = {"ARCHIVER_SPOOL_DIRECTORY": str(disk.path / "spool"), "ARCHIVER_SPOOL_MESSAGE_BYTES": "1000"}
    with archive_on(disk, tmp_path, tmp_path / "archiver.db", tmp_path / "store", **spool) as archive:
        disk.fill(leave_bytes=LEFT_BYTES)

        report = poll(archive, box)

        # What came before it is archived; nothing may go in a session that failed.
        assert (report["outcome"], report["new"], report["delete_requested"]) == ("try_later", 2, 0)
        assert "spool a message" in report["error"]
        assert "No space left on device" in report["error"]
        assert len(box.messages()) == len(mail)
        archive.expect_none_lost(mail[:2], [])
        disk.make_room()
        assert poll(archive, box)["outcome"] == "ok"
        assert box.messages() == []
        archive.expect_each_once(mail)


def test_no_room_to_store(
    disk: SmallDisk, mailbox: Callable[..., Mailbox], mail: list[bytes], tmp_path: Path
) -> None:
    box = mailbox(mail)
    with archive_on(disk, tmp_path, tmp_path / "archiver.db", disk.path / "store") as archive:
        disk.fill(leave_bytes=LEFT_BYTES)

        report = poll(archive, box)

        # What was on its way already, and fits, is kept with what came before.
        assert (report["outcome"], report["delete_requested"]) == ("try_later", 0)
        assert 2 <= report["new"] < len(mail)
        assert "No space left on device" in report["error"]
        assert len(box.messages()) == len(mail)
        # Whatever has its final name is whole.
        archive.expect_none_lost(mail[:2], [])
        disk.make_room()
        assert poll(archive, box)["outcome"] == "ok"
        assert box.messages() == []
        archive.expect_each_once(mail)


def test_no_room_for_the_database(
    disk: SmallDisk, mailbox: Callable[..., Mailbox], mail: list[bytes], tmp_path: Path
) -> None:
    box = mailbox(mail[:2])
    with archive_on(disk, tmp_path, disk.path / "archiver.db", tmp_path / "store") as archive:
        assert poll(archive, box)["outcome"] == "ok"
        box.deliver(mail[2:])
        disk.fill()

        ended = archive.cli.run("sync", box.url, *archive.access(box), "--json")

        assert ended.code != 0
        assert "it may be full" in ended.err
        assert len(box.messages()) == len(mail) - 2
        looked_into(archive, disk, tmp_path).expect_none_lost(mail, box.messages())
        disk.make_room()
        assert poll(archive, box)["outcome"] == "ok"
        assert box.messages() == []
        archive.expect_each_once(mail)


def test_the_database_runs_full_in_the_middle_of_a_poll(
    disk: SmallDisk, mailbox: Callable[..., Mailbox], tmp_path: Path
) -> None:
    """The journal is written, the row that tells of it is not: the next poll takes the one for the other."""
    mail = [b"Subject: %d\r\n\r\nof many\r\n" % number for number in range(1500)]
    box = mailbox(mail)
    with archive_on(disk, tmp_path, disk.path / "archiver.db", tmp_path / "store") as archive:
        archive.cli.environment["ARCHIVER_BATCH_MESSAGES"] = "100"
        archive.cli.run(
            "account", "add", "alice", box.url, *archive.access(box), "--delete", "after-archived"
        )
        disk.fill(leave_bytes=1_000_000)

        [report] = archive.cli.run("sync", "alice", "--json").json

        assert report["outcome"] == "try_later"
        assert "full" in report["error"]
        assert 0 < report["new"] < len(mail)
        captured = looked_into(archive, disk, tmp_path).captured()
        assert len(archive.journalled()) > len(captured) >= report["new"]
        assert len(box.messages()) == len(mail)
        disk.make_room()
        [report] = archive.cli.run("sync", "alice", "--json").json
        assert report["outcome"] == "ok"
        assert box.messages() == []
        archive.expect_each_once(mail)
