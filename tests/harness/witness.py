"""What was delivered to one mailbox, and what became of it: the three promises, judged from outside.

Owns the memory of all that was ever delivered and of every object that was
ever seen; asks the mail server's files, the store and the database by their
own means. Each check may be made at any moment, whoever polls, and whoever was
killed: none asks for what only a later poll can make good.
"""

import json
import threading
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from tests.conftest import Mailbox
from tests.harness.archive import Archive, Written, sha256


class Witness:
    """The witness of one account and its mailbox. For several threads."""

    def __init__(self, archive: Archive, mailbox: Mailbox, account: str) -> None:
        self.archive = archive
        self.mailbox = mailbox
        self.account = account
        [(self.account_id,)] = archive.rows(f"SELECT id FROM account WHERE name = '{account}'")
        self.delivered: list[str] = []
        self._seen: dict[str, Written] = {}
        self._segments: dict[str, list[dict[str, Any]]] = {}
        self._lock = threading.Lock()

    def deliver(self, messages: Iterable[bytes]) -> None:
        """Put messages into the mailbox, and remember them."""
        messages = list(messages)
        with self._lock:
            # Remembered before they are there: what is there is known here.
            self.delivered += map(sha256, messages)
            self.mailbox.deliver(messages)

    def on_server(self) -> set[str]:
        """What the mailbox holds, while its server may be moving and deleting files."""
        while True:
            with suppress(FileNotFoundError):
                return set(map(sha256, self.mailbox.messages()))

    def stored(self) -> Counter[str]:
        """The SHA-256 that each of the account's messages in the store is named by."""
        return Counter(key.rpartition("/")[2].removesuffix(".eml") for key in self._look("messages"))

    def recorded(self) -> set[str]:
        """The SHA-256 of each capture in the database."""
        query = f"SELECT sha256 FROM capture WHERE account_id = '{self.account_id}'"
        return {bytes(digest).hex() for (digest,) in self.archive.rows(query)}

    def journalled(self) -> Counter[str]:
        """How often the journal says of each content that it was captured."""
        return Counter(line["sha256"] for line in self.lines() if line["what"] == "captured")

    def lines(self) -> list[dict[str, Any]]:
        """What the journal tells of sightings, in its order."""
        return [line for segment in self.segments() for line in segment[1:]]

    def segments(self) -> list[list[dict[str, Any]]]:
        """The journal: header and lines of each segment. What was read once is not read again."""
        keys = sorted(self._look("journal"))
        with self._lock:
            for key in keys:
                if key not in self._segments:
                    octets = self.archive.objects.read(key)
                    self._segments[key] = [json.loads(line) for line in octets.splitlines()]
            return [self._segments[key] for key in keys]

    def unrecorded_segments(self) -> int:
        """How many segments are in the store of which the database does not know."""
        query = f"SELECT sequence FROM journal WHERE account_id = '{self.account_id}'"
        [(sequence,)] = self.archive.rows(query)
        return len(self.segments()) - int(sequence)

    def token(self) -> int:
        """The token of the newest claim."""
        [(token,)] = self.archive.rows(f"SELECT token FROM lease WHERE account_id = '{self.account_id}'")
        return int(token)

    def lost(self) -> set[str]:
        """What is not on the server any more, and not wholly archived: it must be empty at any moment."""
        with self._lock:
            delivered = set(self.delivered)
        missed = delivered - self.on_server()
        # Looked at later than the server: what was gone then must be safe by now.
        missed -= self.recorded() & self.journalled().keys() & self.stored().keys()
        # A file that its server renames meanwhile may be passed by: only what is missed twice is gone.
        return missed - self.on_server() if missed else missed

    def expect_nothing_lost(self) -> None:
        """The first promise, at any moment."""
        lost = self.lost()
        assert not lost, f"{self.account}: neither on the server nor archived: {sorted(lost)}"

    def expect_each_once(self) -> None:
        """At the end: everything is archived, each content once, and nothing else is."""
        wanted = Counter(set(self.delivered))
        assert self.recorded() == wanted.keys()
        assert self.journalled() == wanted
        assert self.stored() == wanted

    def _look(self, kind: str) -> dict[str, Written]:
        """The account's objects of a kind. Of those that were there before, none may have changed."""
        found = self.archive.objects.written(f"{kind}/{self.account_id}")
        with self._lock:
            for key, written in found.items():
                before = self._seen.setdefault(key, written)
                assert written == before, f"{key} was written again: {before}, then {written}"
            gone = [key for key in self._seen if key.startswith(kind) and key not in found]
        # Another thread may have seen what was written after this look.
        assert all(key in self.archive.objects.written(f"{kind}/{self.account_id}") for key in gone), gone
        return found
