"""A store and a database that do not belong together: nothing is fetched, written or deleted."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest
import sqlalchemy as sa

from archiver.db.tables import archive as archive_table
from archiver.errors import IntegrityError, OperatorNeeded
from archiver.evidence import identity
from archiver.evidence.identity import FORMAT, KEY, Identity, StoreMismatch
from archiver.model import Account
from archiver.poll.ports import Ports
from archiver.store.filesystem import FilesystemStore
from tests.harness.scripted_pop3 import MailboxPlay
from tests.scenarios.story import Archive, message
from tests.scenarios.test_poll import AFTER_ARCHIVED, mailbox

NOW = datetime(2026, 11, 30, tzinfo=UTC)


def check(archive: Archive) -> Identity:
    return identity.check(archive.store, archive.database, NOW)


def checking(archive: Archive) -> Ports:
    return archive.ports(check_store=lambda: check(archive) and None)


def files(archive: Archive) -> set[str]:
    root = archive.directory / "store"
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def captured(archive: Archive) -> tuple[MailboxPlay, Account]:
    """An archive with an identity and two captures."""
    play = mailbox("a", "b")
    account = archive.add(archive.serve(play), delete=AFTER_ARCHIVED)
    check(archive)
    assert archive.sync(account, checking(archive)).counts.new == 2
    return play, account


def unmount(archive: Archive) -> Path:
    """What is seen of a mount point whose volume is away; returns where the volume is."""
    volume = archive.directory / "volume"
    (archive.directory / "store").rename(volume)
    (archive.directory / "store").mkdir()
    return volume


def mount(archive: Archive, volume: Path) -> None:
    shutil.rmtree(archive.directory / "store")
    volume.rename(archive.directory / "store")


def forget(archive: Archive) -> None:
    """As a database of an earlier release: it has captures, and no identity."""
    archive.execute(sa.delete(archive_table))


def test_a_new_store_and_a_new_database_get_one_identity(lone_archive: Archive) -> None:
    made = check(lone_archive)
    assert len(made.archive_id) == 32
    assert check(lone_archive) == made
    shown = json.loads((lone_archive.directory / "store" / KEY).read_bytes())
    assert (shown["archive"], shown["format"]) == made


def test_processes_that_start_together_make_one_identity(lone_archive: Archive) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = {future.result() for future in [pool.submit(check, lone_archive) for _ in range(8)]}
    assert made == {identity.read(lone_archive.store)}


def test_an_empty_store_under_a_database_with_captures_is_refused(lone_archive: Archive) -> None:
    captured(lone_archive)
    volume = unmount(lone_archive)
    with pytest.raises(StoreMismatch) as caught:
        check(lone_archive)
    assert "ARCHIVER_STORE_URL" in str(caught.value.hint)
    assert files(lone_archive) == set()
    mount(lone_archive, volume)
    check(lone_archive)


def test_the_store_of_another_archive_is_refused(lone_archive: Archive) -> None:
    mine = check(lone_archive)
    document = {"archive": "0" * 32, "format": FORMAT, "made_at": NOW.isoformat()}
    (lone_archive.directory / "store" / KEY).write_text(json.dumps(document))
    with pytest.raises(StoreMismatch, match=mine.archive_id):
        check(lone_archive)


def test_a_store_with_the_right_journals_gets_the_identity(lone_archive: Archive) -> None:
    captured(lone_archive)
    before = check(lone_archive)
    (lone_archive.directory / "store" / KEY).unlink()
    assert check(lone_archive) == before
    # A release without identities made both: they get one.
    (lone_archive.directory / "store" / KEY).unlink()
    forget(lone_archive)
    assert check(lone_archive).archive_id != before.archive_id


def test_a_database_without_an_identity_joins_the_archive_of_its_store(lone_archive: Archive) -> None:
    captured(lone_archive)
    before = check(lone_archive)
    forget(lone_archive)
    assert check(lone_archive) == before


@pytest.mark.parametrize("with_identity", [True, False])
def test_a_store_that_is_older_than_the_database_is_not_recognised(
    lone_archive: Archive, with_identity: bool
) -> None:
    play, account = captured(lone_archive)
    shutil.copytree(lone_archive.directory / "store", lone_archive.directory / "snapshot")
    play.messages.append((b"c", message("c")))
    assert lone_archive.sync(account, checking(lone_archive)).counts.new == 1
    mount(lone_archive, lone_archive.directory / "snapshot")
    forget(lone_archive)
    if not with_identity:
        (lone_archive.directory / "store" / KEY).unlink()
    with pytest.raises(StoreMismatch, match="older than the database"):
        check(lone_archive)


def test_a_later_format_is_refused(lone_archive: Archive) -> None:
    document = {"archive": "0" * 32, "format": FORMAT + 1}
    (lone_archive.directory / "store" / KEY).write_text(json.dumps(document))
    with pytest.raises(OperatorNeeded, match=f"format {FORMAT + 1}") as caught:
        check(lone_archive)
    assert caught.value.hint == "upgrade archiver"


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"null",
        b"{}",
        b"[" * 10_000,
        b"\xff",
        b'{"archive": 1, "format": 1}',
        b'{"archive": "a", "format": "1"}',
        b'{"archive": "a", "format": true}',
        b" " * (identity.LARGEST_BYTES + 1),
    ],
    ids=lambda junk: repr(junk[:20]),
)
def test_what_is_no_identity_is_not_believed(lone_archive: Archive, junk: bytes) -> None:
    (lone_archive.directory / "store" / KEY).write_bytes(junk)
    with pytest.raises(IntegrityError, match=KEY):
        check(lone_archive)


def test_a_volume_that_goes_away_while_the_service_runs(lone_archive: Archive) -> None:
    play, account = captured(lone_archive)
    play.messages.append((b"c", message("c")))
    volume = unmount(lone_archive)
    report = lone_archive.sync(account, checking(lone_archive))
    assert (report.outcome, report.counts.new, report.counts.delete_requested) == ("try_later", 0, 0)
    assert files(lone_archive) == set()
    assert b"c" in [uidl for uidl, _ in play.messages]
    mount(lone_archive, volume)
    assert lone_archive.sync(account, checking(lone_archive)).counts.new == 1


@pytest.mark.parametrize("harm", ["missing", "altered"])
def test_a_store_without_the_last_segment_gets_nothing(lone_archive: Archive, harm: str) -> None:
    """An older snapshot of the right store: its identity is the same."""
    play, account = captured(lone_archive)
    play.messages.append((b"c", message("c")))
    last = max((lone_archive.directory / "store" / "journal" / account.id).iterdir())
    if harm == "missing":
        last.unlink()
    else:
        last.write_bytes(last.read_bytes().replace(b"captured", b"CAPTURED"))
    before = files(lone_archive)
    report = lone_archive.sync(account, checking(lone_archive))
    assert (report.outcome, report.counts.new, report.counts.delete_requested) == ("integrity", 0, 0)
    assert files(lone_archive) == before
    assert (b"c", message("c")) in play.messages


def test_two_stores_do_not_share_an_identity(lone_archive: Archive, tmp_path: Path) -> None:
    other = FilesystemStore(tmp_path / "other")
    other.probe()
    check(lone_archive)
    again = partial(identity.check, other, lone_archive.database, NOW)
    # No captures yet: the empty directory may become this archive's store.
    assert again() == check(lone_archive)
