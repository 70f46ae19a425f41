"""A verification finds each fault that was planted, and nothing else."""

import gc
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from archiver.db import requests
from archiver.db.tables import capture, lease
from archiver.db.tables import journal as journal_table
from archiver.errors import OperatorNeeded, TryLater
from archiver.evidence import journal
from archiver.evidence.verify import (
    FINDINGS_KEPT,
    UNRECORDED_KEPT,
    Finding,
    Findings,
    find_strays,
    verify,
)
from archiver.model import Account, journal_prefix, message_key, segment_key
from archiver.store import Body, PutResult, StoredObject
from archiver.store.filesystem import FilesystemStore
from archiver.store.spool import BytesBody
from tests.harness.made_archive import content, make_archive
from tests.harness.scripted_pop3 import MailboxPlay
from tests.scenarios.story import Archive, Fuse, message

NAMES = ("a", "b", "c", "d", "e", "f")
"""Two to a segment, so there are three segments."""


@dataclass(frozen=True, slots=True)
class Scene:
    """An archived mailbox, and where its files lie."""

    archive: Archive
    account: Account

    def object(self, name: str) -> Path:
        return self.archive.directory / "store" / self.key(name)

    def key(self, name: str) -> str:
        return message_key(self.account.id, hashlib.sha256(message(name)).digest())

    def segment(self, sequence: int) -> Path:
        return self.archive.directory / "store" / segment_key(self.account.id, sequence)

    def counts(self) -> tuple[int, int, int, int]:
        findings = self.archive.verify(self.account)
        return findings.missing, findings.damaged, findings.chain_breaks, findings.unrecorded

    def findings(self) -> set[tuple[str, str]]:
        found = self.archive.verify(self.account).named
        # Nothing is said twice.
        assert len({(finding.kind, finding.key) for finding in found}) == len(found)
        return {(finding.kind, finding.key) for finding in found}


@pytest.fixture
def scene(archive: Archive) -> Scene:
    return archived(archive)


def archived(archive: Archive) -> Scene:
    play = MailboxPlay([(name.encode(), message(name)) for name in NAMES])
    account = archive.add(archive.serve(play))
    assert archive.sync(account).segments == 3
    return Scene(archive, account)


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    content = path.read_bytes()
    path.chmod(0o600)
    path.write_bytes(change(content))


def test_a_sound_archive_is_clean(scene: Scene) -> None:
    findings = scene.archive.verify(scene.account)
    assert findings.clean
    assert (findings.checked, findings.segments) == (6, 3)
    assert findings.hashed_bytes == sum(len(message(name)) for name in NAMES)


def test_an_object_removed(scene: Scene) -> None:
    scene.object("b").unlink()
    assert scene.findings() == {("missing", scene.key("b"))}


def test_a_bit_flipped(scene: Scene) -> None:
    rewrite(scene.object("c"), lambda octets: octets[:-3] + bytes([octets[-3] ^ 1]) + octets[-2:])
    assert scene.findings() == {("damaged", scene.key("c"))}
    # Sizes alone do not show it.
    findings = Findings()
    verify(
        scene.account,
        scene.archive.database,
        scene.archive.store,
        findings,
        now=datetime.now(UTC),
        readers=scene.archive.uploads,
        rehash=False,
    )
    assert findings.clean


def test_an_object_truncated(scene: Scene) -> None:
    rewrite(scene.object("d"), lambda octets: octets[:-1])
    assert scene.findings() == {("damaged", scene.key("d"))}


def test_an_object_that_nobody_knows(scene: Scene) -> None:
    content = message("planted")
    key = message_key(scene.account.id, hashlib.sha256(content).digest())
    scene.archive.store.put(key, BytesBody(content))
    assert scene.findings() == {("unrecorded", key)}


def test_a_row_removed(scene: Scene) -> None:
    digest = hashlib.sha256(message("e")).digest()
    scene.archive.execute(sa.delete(capture).where(capture.c.sha256 == digest))
    assert scene.findings() == {("unrecorded", scene.key("e"))}


def test_a_row_slipped_in(scene: Scene) -> None:
    digest = hashlib.sha256(b"never seen").digest()
    row = {
        "account_id": scene.account.id,
        "sha256": digest,
        "size": 10,
        "epoch": 1,
        "uidl": b"x",
        "captured_at": datetime.now(UTC),
        "token": 1,
        "sequence": 1,
    }
    scene.archive.execute(sa.insert(capture).values(row))
    assert scene.findings() == {("unrecorded", message_key(scene.account.id, digest))}


@pytest.mark.parametrize("sequence", [1, 2, 3])
def test_a_segment_removed(scene: Scene, sequence: int) -> None:
    scene.segment(sequence).unlink()
    lost = NAMES[2 * sequence - 2 : 2 * sequence]
    assert scene.findings() == {
        ("chain_break", segment_key(scene.account.id, sequence)),
        *(("unrecorded", scene.key(name)) for name in lost),
    }


@pytest.mark.parametrize("sequence", [1, 2, 3])
def test_a_segment_edited(scene: Scene, sequence: int) -> None:
    rewrite(scene.segment(sequence), lambda octets: octets.replace(b"localhost", b"localhusk"))
    # The link behind it no longer holds; of the last one, the database knows the digest.
    broken = min(sequence + 1, 3)
    assert scene.findings() == {("chain_break", segment_key(scene.account.id, broken))}


@pytest.mark.parametrize(
    "content", [b"", b"{}\n", b"[" * 100_000, b"\xff\n", b'{"schema":1}\n', b"null\n", b"1e999\n"]
)
def test_a_segment_that_is_none(scene: Scene, content: bytes) -> None:
    rewrite(scene.segment(2), lambda _: content)
    assert scene.findings() == {
        ("chain_break", segment_key(scene.account.id, 2)),
        *(("unrecorded", scene.key(name)) for name in ("c", "d")),
    }


def test_a_segment_slipped_in_behind_the_last(scene: Scene) -> None:
    last = scene.archive.segments(scene.account)[-1]
    digest = hashlib.sha256(scene.segment(3).read_bytes()).digest()
    forged = replace(last, sequence=4, previous=digest, lines=())
    key = segment_key(scene.account.id, 4)
    scene.archive.store.put(key, BytesBody(journal.encode(forged)))
    assert scene.findings() == {("unrecorded", key)}


def test_a_segment_slipped_in_between(scene: Scene) -> None:
    segments = scene.archive.segments(scene.account)
    forged = replace(segments[1], lines=segments[1].lines[:1])
    rewrite(scene.segment(2), lambda _: journal.encode(forged))
    assert scene.findings() == {
        ("chain_break", segment_key(scene.account.id, 3)),
        ("unrecorded", scene.key("d")),
    }


@pytest.mark.parametrize("name", ["9.ndjson", "0000000000009.ndjson", "000000000002.ndjson.bak", "x"])
def test_what_is_no_segment_hides_nothing_behind_it(scene: Scene, name: str) -> None:
    key = f"{journal_prefix(scene.account.id)}{name}"
    scene.archive.store.put(key, BytesBody(b"planted"))
    scene.object("f").unlink()
    assert scene.findings() == {("unrecorded", key), ("missing", scene.key("f"))}


def test_a_database_that_was_put_back(scene: Scene) -> None:
    """It lacks the last segments, and no poll is to blame."""
    segments = [scene.segment(number).read_bytes() for number in (1, 2, 3)]
    scene.archive.execute(
        sa.update(journal_table)
        .where(journal_table.c.account_id == scene.account.id)
        .values(sequence=1, digest=hashlib.sha256(segments[0]).digest())
    )
    scene.archive.execute(
        sa.delete(capture).where(capture.c.account_id == scene.account.id, capture.c.sequence > 1)
    )
    # What is counted was put back, too.
    scene.archive.database.transact(partial(requests.recount, account_id=scene.account.id))
    assert scene.findings() == {("unrecorded", segment_key(scene.account.id, number)) for number in (2, 3)}


def test_a_segment_says_nothing_that_a_terminal_would_obey(scene: Scene) -> None:
    segments = scene.archive.segments(scene.account)
    forged = replace(segments[1], account_id="\x1b]0;owned\x07", account_name="\x1b[2J")
    rewrite(scene.segment(2), lambda _: journal.encode(forged))
    details = [finding.detail for finding in scene.archive.verify(scene.account).named]
    assert details
    assert all(detail.isprintable() for detail in details)


def test_a_poll_under_way_is_no_fault(archive: Archive) -> None:
    """What it wrote already is accounted for when it ends, or when the next one has taken it in."""
    play = MailboxPlay([(name.encode(), message(name)) for name in NAMES])
    fuse = Fuse()
    archive.poll_until_death(archive.add(archive.serve(play)), archive.mortal_ports(fuse))
    account = None
    for index, name in enumerate(fuse.calls):
        if not name.startswith(("store.put", "db.")):
            continue
        account = archive.add(archive.serve(play))
        archive.poll_until_death(account, archive.mortal_ports(Fuse(index, after=True)))
        assert archive.verify(account, later_seconds=0.0).clean, (index, name)
    # But not for ever: a quarter of an hour later something should have come of it.
    assert account is not None
    key = message_key(account.id, hashlib.sha256(b"left").digest())
    archive.store.put(key, BytesBody(b"left"))
    archive.execute(sa.update(lease).where(lease.c.account_id == account.id).values(owner="a dead one"))
    assert archive.verify(account, later_seconds=600.0).clean
    assert archive.verify(account, later_seconds=1000.0).named[-1].key == key


def test_what_a_failed_poll_uploaded_is_the_next_ones_to_account_for(archive: Archive) -> None:
    class WithoutJournal(FilesystemStore):
        def put(self, key: str, body: Body) -> PutResult:
            if key.startswith("journal/"):
                raise TryLater("throttled")
            return super().put(key, body)

    account = archive.add(archive.serve(MailboxPlay([(name.encode(), message(name)) for name in NAMES])))
    report = archive.sync(account, archive.ports(store=WithoutJournal(archive.directory / "store")))
    assert (report.outcome, report.counts.new) == ("try_later", 0)
    assert archive.objects(account)
    assert archive.verify(account, later_seconds=0.0).clean
    assert not archive.verify(account).clean
    archive.sync(account)
    assert archive.verify(account).clean


def test_what_comes_during_the_verification_is_left_to_the_next(scene: Scene) -> None:
    scene.archive.store.put(scene.key("late"), BytesBody(message("late")))
    findings = scene.archive.verify(scene.account, later_seconds=-60.0)
    assert findings.clean
    assert scene.counts() == (0, 0, 0, 1)


def test_all_findings_are_counted_and_some_are_named() -> None:
    findings = Findings()
    for number in range(FINDINGS_KEPT + 5):
        findings.add(Finding("missing", "a", str(number), "gone"))
    assert (findings.missing, len(findings.named)) == (FINDINGS_KEPT + 5, FINDINGS_KEPT)
    assert not findings.clean


def test_a_removed_account_is_still_proved(scene: Scene) -> None:
    from archiver.db import accounts

    now = datetime.now(UTC)
    scene.archive.database.transact(lambda connection: accounts.remove(connection, scene.account.id, now))
    scene.object("a").unlink()
    assert scene.counts() == (1, 0, 0, 0)


def test_what_lies_there_for_an_account_that_the_database_lacks(scene: Scene) -> None:
    known, store = {scene.account.id}, scene.archive.store
    findings = Findings()
    find_strays(known, store, findings)
    assert findings.clean
    for key in (
        "messages/0000/00/1.eml",
        "messages/0000/00/2.eml",
        "messages/ffff/00/1.eml",
        "journal/ffff/1",
    ):
        store.put(key, BytesBody(key.encode()))
    find_strays(known, store, findings)
    assert [finding.key for finding in findings.named] == [
        "messages/0000/",
        "messages/ffff/",
        "journal/ffff/",
    ]
    assert findings.unrecorded == 3


foreign_name = st.one_of(
    st.sampled_from(
        [b"~", b"~~", b"~backup.eml", b"!", b"-x", b"00", b"zz", b"new\nline", b"\xff\xfe", b".h"]
    ),
    st.binary(min_size=1, max_size=40),
    st.text(alphabet=st.characters(codec="utf-8"), min_size=1, max_size=40).map(str.encode),
).map(lambda name: bytes(each for each in name if each not in b"/\0") or b"~")


@pytest.fixture(scope="module")
def shared_scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    directory = tmp_path_factory.mktemp("strangers")
    with Archive(f"sqlite:///{directory}/archiver.db", directory) as archive:
        yield archived(archive)


@given(name=foreign_name, where=st.integers(0, 5), as_directory=st.booleans(), filled=st.booleans())
@example(name=b"~backup.eml", where=2, as_directory=False, filled=False)
@example(name=b"ab", where=4, as_directory=False, filled=False)
@example(name=b"000000000002.ndjson.bak", where=5, as_directory=True, filled=False)
@settings(max_examples=60, deadline=None)
def test_every_foreign_name_is_reported_once(
    shared_scene: Scene, name: bytes, where: int, *, as_directory: bool, filled: bool
) -> None:
    scene = shared_scene
    one_of_ours = scene.object("a").parent
    folders = (
        "messages", "journal", f"messages/{scene.account.id}", f"journal/{scene.account.id}",
        f"messages/{scene.account.id}/{one_of_ours.name}", f"journal/{scene.account.id}",
    )  # fmt: skip
    store = scene.archive.directory / "store"
    path = store / folders[where] / os.fsdecode(name)
    is_folder_of_ours = as_directory and not filled and where == 2 and re.fullmatch(rb"[0-9a-f]{2}", name)
    assume(name not in (b".", b"..") and not path.exists() and not is_folder_of_ours)
    if as_directory:
        path.mkdir()
        if filled:
            (path / "inside").write_bytes(b"x")
    else:
        path.write_bytes(b"x")
    try:
        findings = scene.archive.verify(scene.account)
        find_strays({scene.account.id}, scene.archive.store, findings)
    finally:
        shutil.rmtree(path) if as_directory else path.unlink()
    assert (findings.unrecorded, findings.missing, findings.damaged, findings.chain_breaks) == (1, 0, 0, 0)
    assert findings.named[0].key.isprintable()
    json.dumps(findings.named[0]).encode()


def test_a_directory_in_the_place_of_an_object(scene: Scene) -> None:
    scene.object("a").unlink()
    scene.object("a").mkdir()
    scene.segment(3).unlink()
    scene.segment(3).mkdir()
    found = scene.findings()
    assert ("missing", scene.key("a")) in found
    assert ("unrecorded", f"{scene.key('a')}/") in found
    assert ("unrecorded", f"{segment_key(scene.account.id, 3)}/") in found
    assert any(kind == "chain_break" for kind, _ in found)


def test_folders_as_deep_as_they_can_be(scene: Scene) -> None:
    deep = scene.archive.directory / "store" / f"messages/{scene.account.id}" / "/".join(["a"] * 300)
    deep.mkdir(parents=True)
    assert scene.counts() == (0, 0, 0, 1)


def test_many_strangers_do_not_hide_what_is_missing(scene: Scene) -> None:
    folder = scene.object("a").parent
    for number in range(UNRECORDED_KEPT + 20):
        (folder / f"{number}~").touch()
    scene.object("f").unlink()
    findings = scene.archive.verify(scene.account)
    assert (findings.unrecorded, findings.missing) == (UNRECORDED_KEPT + 20, 1)
    assert len(findings.named) == UNRECORDED_KEPT + 1


@dataclass
class Counting:
    """A store that notes, whenever it is used, the most memory blocks that Python had allocated."""

    store: FilesystemStore
    most_blocks: int = 0

    @property
    def url(self) -> str:
        return self.store.url

    def look(self) -> None:
        self.most_blocks = max(self.most_blocks, sys.getallocatedblocks())

    def put(self, key: str, body: Body) -> PutResult:
        return self.store.put(key, body)

    @contextmanager
    def get(self, key: str) -> Iterator[Iterator[bytes]]:
        self.look()
        with self.store.get(key) as chunks:
            yield chunks

    def stat(self, key: str) -> StoredObject | None:
        return self.store.stat(key)

    def list(self, prefix: str, *, after: str = "", strangers: bool = False) -> Iterator[StoredObject]:
        for stored in self.store.list(prefix, after=after, strangers=strangers):
            self.look()
            yield stored
        self.look()

    def names(self, prefix: str, *, after: str = "") -> Iterator[str]:
        return self.store.names(prefix, after=after)

    def probe(self) -> None:
        self.store.probe()


def blocks_to_verify(archive: Archive, account: Account, *, captures: int, expected: Findings) -> int:
    """The most blocks that one verification had allocated at a time, above what there was before."""
    store, findings = Counting(archive.store), Findings()
    gc.collect()
    before = sys.getallocatedblocks()
    verify(
        account,
        archive.database,
        store,
        findings,
        now=datetime.now(UTC) + timedelta(hours=1),
        readers=archive.uploads,
    )
    assert findings.checked == captures
    assert replace(findings, checked=0, hashed_bytes=0, segments=0, named=[]) == expected
    return store.most_blocks - before


def assert_flat(archive: Archive, expected: Callable[[Account, int], Findings]) -> None:
    """Verify accounts of two sizes. ``expected`` may break an account, and says what is to be found then."""
    few, many = 1_100, 2_400  # both more than a batch of rows, and than the findings that are named
    blocks = []
    for captures in (few, few, many):  # the first one fills caches
        account = make_archive(archive.database, archive.directory / "store", captures)
        found = expected(account, captures)
        blocks.append(blocks_to_verify(archive, account, captures=captures, expected=found))
    # One block for every fourth capture would be more.
    assert blocks[2] - blocks[1] < (many - few) / 4


@pytest.mark.slow
def test_memory_does_not_grow_with_an_accounts_captures(archive: Archive) -> None:
    assert_flat(archive, lambda _account, _captures: Findings())


@pytest.mark.slow
def test_memory_does_not_grow_with_what_the_database_lost(small_archive: Archive) -> None:
    def lose_all(account: Account, captures: int) -> Findings:
        small_archive.execute(sa.delete(capture).where(capture.c.account_id == account.id))
        return Findings(unrecorded=captures)

    assert_flat(small_archive, lose_all)


@pytest.mark.slow
def test_memory_does_not_grow_with_what_the_store_lost(small_archive: Archive) -> None:
    def lose_all(account: Account, captures: int) -> Findings:
        shutil.rmtree(small_archive.directory / "store" / "messages" / account.id)
        return Findings(missing=captures)

    assert_flat(small_archive, lose_all)


def test_missing_messages_are_reported_in_the_order_of_the_journal(archive: Archive) -> None:
    account = make_archive(archive.database, archive.directory / "store", 30)
    keys = [message_key(account.id, hashlib.sha256(content(number)).digest()) for number in range(30)]
    for key in keys:
        (archive.directory / "store" / key).unlink()
    assert [finding.key for finding in archive.verify(account).named] == keys


def test_a_scratch_file_that_cannot_be_made_is_reported(scene: Scene, tmp_path: Path) -> None:
    with pytest.raises(OperatorNeeded, match="temporary file in"):
        verify(
            scene.account,
            scene.archive.database,
            scene.archive.store,
            Findings(),
            now=datetime.now(UTC),
            readers=scene.archive.uploads,
            scratch_directory=tmp_path / "none",
        )
    assert scene.archive.verify(scene.account).clean


def test_the_scratch_file_is_gone_before_the_account_is_read(scene: Scene, tmp_path: Path) -> None:
    directory = tmp_path / "scratch"
    directory.mkdir()
    seen: list[Path] = []
    verify(
        scene.account,
        scene.archive.database,
        scene.archive.store,
        findings := Findings(),
        now=datetime.now(UTC),
        readers=scene.archive.uploads,
        progress=lambda _: seen.extend(directory.iterdir()),
        scratch_directory=directory,
    )
    assert findings.checked == len(NAMES)
    assert seen == []
