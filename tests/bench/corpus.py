"""The mail that is measured with: made once, kept, and found again by the next run.

Owns a directory with the messages as files, and Dovecot's Maildirs, whose
files are hard links to them: however many mailboxes there are, the octets lie
on the disk once. The same scale gives the same octets on any machine.
"""

import itertools
import json
import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from archiver.demo import processes
from archiver.demo.corpus import corpus
from archiver.demo.dovecot import Dovecot

# Business mail: of 2,000 messages, 160 MB; the median 15.6 KB, the mean 80 KB, the largest 8.4 MB.
_SEED, _SIZES = 4, 1.05
PASSWORD = "bench"


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured."""

    messages: int
    """Of the one mailbox; ``few`` are its first ones, for what is slow."""
    few: int
    mailboxes: int
    far_mailboxes: int
    in_each: int
    listed: int
    """Of the mailbox that is kept on the server."""
    accounts: int
    batches: int
    windows: tuple[int, ...]
    rounds: int
    slow_rounds: int


FULL = Scale(
    messages=2_000,
    few=400,
    mailboxes=200,
    far_mailboxes=40,
    in_each=20,
    listed=100_000,
    accounts=10_000,
    batches=100,
    windows=(1, 4, 8, 16, 32, 64, 128),
    rounds=5,
    slow_rounds=2,
)
QUICK = Scale(
    messages=60,
    few=20,
    mailboxes=6,
    far_mailboxes=4,
    in_each=3,
    listed=300,
    accounts=200,
    batches=3,
    windows=(1, 32),
    rounds=1,
    slow_rounds=1,
)


@dataclass(frozen=True, slots=True)
class Mailbox:
    """What lies in one mailbox. ``lf_bytes`` are those of the same messages with bare line feeds."""

    user: str
    count: int
    octets: int
    lf_bytes: int


class Corpus:
    """The messages, and which of them lie in which mailbox."""

    def __init__(self, directory: Path, scale: Scale) -> None:
        self.scale = scale
        self.messages = directory / "messages"
        self.mail = directory / "dovecot"
        self._sizes_file = directory / "sizes.json"

    def make(self) -> None:
        """Write what is not there yet. A run that was broken off is finished by the next."""
        sizes = json.loads(self._sizes_file.read_text()) if self._sizes_file.exists() else []
        if len(sizes) == self.scale.messages:
            return
        self.messages.mkdir(parents=True, exist_ok=True)
        sizes = []
        for number, message in enumerate(corpus(self.scale.messages, _SEED, scale=_SIZES)):
            (self.messages / f"{number:05}.eml").write_bytes(message)
            sizes.append((len(message), len(message) - message.count(b"\r\n")))
        unfinished = self._sizes_file.with_suffix(".new")
        unfinished.write_text(json.dumps(sizes))
        unfinished.replace(self._sizes_file)

    @cached_property
    def _sizes(self) -> list[tuple[int, int]]:
        return [(octets, lf_bytes) for octets, lf_bytes in json.loads(self._sizes_file.read_text())]

    def mailbox(self, user: str, first: int, count: int) -> Mailbox:
        """The mailbox of ``count`` messages from a number on; behind the last comes the first."""
        sizes = [self._sizes[number % len(self._sizes)] for number in range(first, first + count)]
        return Mailbox(user, count, sum(size[0] for size in sizes), sum(size[1] for size in sizes))

    @property
    def all(self) -> Mailbox:
        return self.mailbox("all", 0, self.scale.messages)

    @property
    def few(self) -> Mailbox:
        return self.mailbox(f"few{self.scale.few}", 0, self.scale.few)

    @property
    def many(self) -> list[Mailbox]:
        size = self.scale.in_each
        return [
            self.mailbox(f"many{number:03}", number * size, size) for number in range(self.scale.mailboxes)
        ]

    def described(self) -> dict[str, object]:
        """The sizes, for the report."""
        sizes = [octets for octets, _ in self._sizes]
        return {
            "messages": len(sizes),
            "octets": sum(sizes),
            "median": statistics.median(sizes),
            "mean": statistics.mean(sizes),
            "largest": max(sizes),
        }

    @contextmanager
    def served(self) -> Iterator[Dovecot]:
        """Dovecot with all mailboxes but the one of ``listed``, until the end of the block."""
        self.make()
        boxes = [self.all, self.few, *self.many]
        firsts = itertools.chain((0, 0), itertools.count(0, self.scale.in_each))
        for box, first in zip(boxes, firsts, strict=False):
            self._link(box, first)
        with Dovecot(self.mail, {box.user: PASSWORD for box in boxes}) as server:
            yield server

    def _link(self, box: Mailbox, first: int) -> None:
        maildir = self.mail / "mail" / box.user
        if maildir.is_dir():
            return
        made = maildir.with_name(f"{maildir.name}.new")
        for name in ("cur", "new", "tmp"):
            (made / name).mkdir(parents=True, exist_ok=True)
        for place in range(box.count):
            number = (first + place) % len(self._sizes)
            octets, _ = self._sizes[number]
            # Dovecot trusts S and W, and numbers what is new in the order of the names.
            name = f"1700000000.M0P1Q{place:09}.localhost,S={octets},W={octets}"
            self._link_once(self.messages / f"{number:05}.eml", made / "new" / name)
        made.rename(maildir)

    @staticmethod
    def _link_once(source: Path, target: Path) -> None:
        if not target.exists():
            os.link(source, target)

    def serve_listed(self, server: Dovecot) -> str:
        """The user whose mailbox has ``listed`` small messages, which differ. Made when it is not there."""
        user = f"listed{self.scale.listed}"
        if (self.mail / "users" / user).exists():
            return user
        server.add_user(user, PASSWORD)
        new = self.mail / "mail" / user / "new"
        for number in range(self.scale.listed):
            message = b"From: a@contoso.example\r\nSubject: %d\r\n\r\nkept\r\n" % number
            name = f"1700000000.M0P1Q{number:09}.localhost,S={len(message)},W={len(message)}"
            (new / name).write_bytes(message)
        processes.give(new)
        return user
