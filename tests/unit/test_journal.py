"""The journal's segments: what is written is read back, and whatever else lies there is refused."""

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archiver.errors import IntegrityError
from archiver.evidence import journal
from archiver.model import (
    NO_DIGEST,
    JournalHead,
    Resolved,
    Segment,
    ServerRecord,
    SightingKey,
    What,
    message_key,
    segment_key,
)
from archiver.store.filesystem import FilesystemStore
from archiver.store.spool import BytesBody

AT = datetime(2024, 2, 29, 12, 0, 0, 123456, tzinfo=UTC)
DIGEST = hashlib.sha256(b"content").digest()
ACCOUNT = "0123456789abcdef"

CAPTURED = Resolved(What.CAPTURED, SightingKey(b"a", 7), AT, sha256=DIGEST, size=7, version_id="v1")

SEGMENT = Segment(
    account_id=ACCOUNT,
    account_name="work",
    account_url="pop3s://me@mail.example.com",
    epoch=1,
    sequence=1,
    previous=NO_DIGEST,
    token=5,
    written_at=AT,
    server=ServerRecord("mail.example.com", 995, "+OK \\x1b hello", "PLAIN", "TLSv1.3", "AES", "ab" * 32),
    listing_count=3,
    listing_digest=DIGEST,
    lines=(CAPTURED,),
)

octets = st.binary(max_size=20)
sightings = st.builds(SightingKey, octets, st.integers(-1, 2**63 - 1), st.just(b""))
resolutions = st.one_of(
    st.builds(
        Resolved,
        what=st.sampled_from([What.CAPTURED, What.KNOWN]),
        sighting=sightings,
        resolved_at=st.datetimes(timezones=st.just(UTC)),
        sha256=st.binary(min_size=32, max_size=32),
        size=st.integers(0, 2**62),
        version_id=st.none() | st.text(max_size=5),
    ),
    st.builds(
        Resolved,
        what=st.just(What.QUARANTINED),
        sighting=sightings,
        resolved_at=st.datetimes(timezones=st.just(UTC)),
        reason=st.text(st.characters(), max_size=20),
        attempts=st.integers(0, 100),
    ),
    st.builds(
        Resolved,
        what=st.sampled_from([What.GONE, What.DELETED]),
        sighting=sightings,
        resolved_at=st.datetimes(timezones=st.just(UTC)),
    ),
)


@given(st.lists(resolutions, max_size=5), st.text(st.characters(), max_size=20))
@pytest.mark.slow
def test_what_is_written_is_read_back(lines: list[Resolved], greeting: str) -> None:
    segment = replace(SEGMENT, lines=tuple(lines), server=replace(SEGMENT.server, greeting=greeting))
    encoded = journal.encode(segment)
    assert journal.decode(encoded, "here") == segment
    assert journal.encode(journal.decode(encoded, "here")) == encoded
    # A line each, in plain ASCII: an auditor needs no more than a text editor.
    assert encoded.isascii()
    assert len(encoded.split(b"\n")) == len(lines) + 2


def test_a_listing_that_did_not_begin_at_the_first_message_says_so() -> None:
    segment = replace(SEGMENT, listing_first=3)
    encoded = journal.encode(segment)
    assert journal.decode(encoded, "here") == segment
    assert json.loads(encoded.splitlines()[0])["listing"] == {"count": 3, "sha256": DIGEST.hex(), "first": 3}
    assert b'"first"' not in journal.encode(SEGMENT)


def test_lone_surrogates_are_kept_as_they_are() -> None:
    segment = replace(SEGMENT, account_name="\udcff")
    assert journal.decode(journal.encode(segment), "here") == segment


def test_a_sighting_by_content_is_told_apart() -> None:
    line = Resolved(What.KNOWN, SightingKey(b"", 7, DIGEST), AT, sha256=DIGEST, size=7)
    segment = replace(SEGMENT, lines=(line,))
    assert journal.decode(journal.encode(segment), "here").lines[0].sighting == line.sighting


def test_what_an_auditor_reads() -> None:
    header, line = map(json.loads, journal.encode(SEGMENT).splitlines())
    assert header["account"] == {"id": ACCOUNT, "name": "work", "url": "pop3s://me@mail.example.com"}
    assert header["server"]["tls"]["certificate_sha256"] == "ab" * 32
    assert (header["schema"], header["sequence"], header["poll"], header["lines"]) == (1, 1, 5, 1)
    assert line == {
        "what": "captured",
        "uidl": "a",
        "listed_size": 7,
        "at": "2024-02-29T12:00:00.123456+00:00",
        "sha256": DIGEST.hex(),
        "key": message_key(ACCOUNT, DIGEST),
        "size": 7,
        "version_id": "v1",
    }


def audit(store: Path) -> tuple[int, str]:
    """What the script for auditors in docs/compliance.md exits with and prints."""
    page = (Path(__file__).parents[2] / "docs" / "compliance.md").read_text()
    [script] = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    command = [sys.executable, "-c", script, str(store)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not ended.stderr
    return ended.returncode, ended.stdout


def test_an_auditors_script_accepts_a_sound_archive_and_finds_what_is_wrong(tmp_path: Path) -> None:
    first = journal.encode(SEGMENT)
    digest = hashlib.sha256(first).digest()
    second = journal.encode(replace(SEGMENT, sequence=2, previous=digest, lines=()))
    message = tmp_path / message_key(ACCOUNT, DIGEST)
    segments = [tmp_path / segment_key(ACCOUNT, number) for number in (1, 2)]
    for path, content in zip((message, *segments), (b"content", first, second), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    sound = f"{ACCOUNT} 1 captured; chain ends in {hashlib.sha256(second).hexdigest()}\n"
    assert audit(tmp_path) == (0, sound)

    message.write_bytes(b"altered")
    assert audit(tmp_path) == (1, f"missing or altered: {message}\n{sound}")
    message.write_bytes(b"content")
    segments[0].write_bytes(first.replace(b"PLAIN", b"LOGIN"))
    assert audit(tmp_path) == (1, f"chain broken at {segments[1]}\n{sound}")


def changed(change: Callable[[dict[str, Any], dict[str, Any]], object]) -> bytes:
    header, line = map(json.loads, journal.encode(SEGMENT).splitlines())
    change(header, line)
    return b"".join(json.dumps(each).encode() + b"\n" for each in (header, line))


@pytest.mark.parametrize(
    "change",
    [
        lambda header, line: header.update(schema=2),
        lambda header, line: header.update(schema="\x1b[2J"),
        lambda header, line: header.update(lines=2),
        lambda header, line: header.update(sequence="1"),
        lambda header, line: header.update(sequence=True),
        lambda header, line: header.update(sequence=1.0),
        lambda header, line: header.update(poll="5"),
        lambda header, line: header.update(poll=2**63),
        lambda header, line: header.update(previous="ab"),
        lambda header, line: header.update(written_at="2024-02-29T12:00:00"),
        lambda header, line: header.update(written_at=7),
        lambda header, line: header.pop("server"),
        lambda header, line: header.update(server=[]),
        lambda header, line: line.update(what="forged"),
        lambda header, line: line.update(uidl="\u20ac"),
        lambda header, line: line.update(uidl=None),
        lambda header, line: line.update(sha256="zz"),
        lambda header, line: line.update(sha256="ab"),
        lambda header, line: line.pop("sha256"),
        lambda header, line: line.pop("size"),
        lambda header, line: line.update(size=-1),
        lambda header, line: line.update(listed_size="7"),
        lambda header, line: line.update(at="yesterday"),
        lambda header, line: line.update(attempts=None),
    ],
)
def test_a_segment_with_a_wrong_value_is_refused(change: Callable[..., object]) -> None:
    with pytest.raises(IntegrityError, match="here") as caught:
        journal.decode(changed(change), "here")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"{}",
        b"[]\n",
        b"null",
        b"7",
        b'"x"',
        b"\xff\xfe",
        b"[" * 200_000,
        b"9" * 10_000,
        b"{}\n\n",
    ],
)
def test_what_is_no_segment_is_refused(content: bytes) -> None:
    with pytest.raises(IntegrityError, match="here is not a journal segment"):
        journal.decode(content, "here")


@given(st.binary(max_size=200))
def test_no_octets_do_anything_else(content: bytes) -> None:
    with pytest.raises(IntegrityError):
        journal.decode(content, "here")


def test_a_later_time_zone_is_the_same_time() -> None:
    line = replace(CAPTURED, resolved_at=AT.astimezone(timezone(timedelta(hours=5))))
    decoded = journal.decode(journal.encode(replace(SEGMENT, lines=(line,))), "here")
    assert decoded.lines[0].resolved_at == AT


# In a store.


@pytest.fixture
def store(tmp_path: Path) -> FilesystemStore:
    store = FilesystemStore(tmp_path)
    store.probe()
    return store


def test_a_segment_is_found_by_its_number(store: FilesystemStore) -> None:
    body = BytesBody(journal.encode(SEGMENT))
    store.put(segment_key(ACCOUNT, 1), body)
    assert journal.read(store, ACCOUNT, 1) == (SEGMENT, body.sha256)
    assert journal.read(store, ACCOUNT, 2) is None


def test_a_segment_under_another_number_or_account_is_refused(store: FilesystemStore) -> None:
    body = BytesBody(journal.encode(SEGMENT))
    for account_id, sequence in ((ACCOUNT, 2), ("f" * 16, 1)):
        store.put(segment_key(account_id, sequence), body)
        with pytest.raises(IntegrityError, match="holds segment 1 of account"):
            journal.read(store, account_id, sequence)


def test_an_endless_segment_is_not_read_into_memory(store: FilesystemStore) -> None:
    path = Path(store.url.removeprefix("file:")) / segment_key(ACCOUNT, 1)
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(journal.SEGMENT_BYTES + 1)
    with pytest.raises(IntegrityError, match="too large"):
        journal.read(store, ACCOUNT, 1)


def test_a_chain_is_of_numbers_and_digests() -> None:
    assert journal.follows(SEGMENT, JournalHead(0, NO_DIGEST))
    assert not journal.follows(SEGMENT, JournalHead(0, DIGEST))
    assert not journal.follows(SEGMENT, JournalHead(1, NO_DIGEST))
