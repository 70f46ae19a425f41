"""A survey of real POP3 servers, and the table of its results in the documentation.

``python -m tests.harness.servers.survey`` asks every server that is available
on this machine and rewrites its row in ``docs/reference/servers.md``. The rows
of the other servers stay as they are.
"""

import io
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from archiver.pop3 import FailureKind, Mailbox, Pop3Error, Retrieved, Tls, TlsSettings
from tests.harness import servers
from tests.harness.servers import Box, Server

PAGE: Final = Path(__file__).parents[3] / "docs" / "reference" / "servers.md"

FEATURES: Final = (
    "TLS",
    "CAPA",
    "login",
    "PIPELINING",
    "UIDL",
    "size in LIST",
    "RETR gives",
    "wrong password",
    "second session",
    "after DELE and QUIT",
    "after DELE and a cut",
)

# Messages that differ in one field: a server that hashes other fields gives them the same UIDL.
_COPY: Final = b"From: a@example.com\r\nTo: b@example.com\r\n%b\r\n\r\nThe body.\r\n"

MESSAGES: Final = (
    b"Message-ID: <dots@example.com>\r\nSubject: dots\r\n\r\n.\r\n..\r\n.x\r\nend.\r\n",
    b"Message-ID: <eight@example.com>\r\nSubject: 8-bit\r\n\r\n" + bytes(range(160, 256)) + b"\r\n",
    b"Message-ID: <long@example.com>\r\nSubject: a long line\r\n\r\n" + b"x" * 900 + b"\r\n",
    b"Message-ID: <replies@example.com>\r\nSubject: looks like replies\r\n\r\n+OK\r\n-ERR\r\n+OK 1 2\r\n",
    b"Message-ID: <big@example.com>\r\nSubject: big\r\n\r\n" + b"0123456789abcdef\r\n" * 20_000,
    _COPY % b"Subject: one",
    _COPY % b"Subject: two",
    _COPY % b"Message-ID: <one@example.com>",
    _COPY % b"Message-ID: <two@example.com>",
)
"""Messages that an mbox, a Maildir and LMTP can all store."""

_TLS_NAMES: Final = {Tls.IMPLICIT: "POP3S", Tls.STARTTLS: "STLS"}


@dataclass(frozen=True, slots=True)
class Fetched:
    """A message as RETR gave it and as the server had stored it."""

    got: bytes
    stored: bytes
    listed_size: int | None

    @property
    def difference(self) -> str:
        """The difference, as the table shows it."""
        if self.got == self.stored:
            return "as stored"
        if self.got == self.stored + b"\r\n":
            return "one more empty line"
        if re.sub(rb"^X-UIDL: [^\r\n]*\r\n", b"", self.got, count=1, flags=re.MULTILINE) == self.stored:
            return "one more field, X-UIDL"
        return "something else"


def session(box: Box, tls: Tls | None = None, **options: Any) -> Mailbox:
    """Open a session and log in."""
    mailbox = Mailbox.connect(
        box.endpoint(tls), tls_settings=TlsSettings(ca_file=box.server.ca_file), **options
    )
    try:
        mailbox.login(box.password)
    except BaseException:
        mailbox.close()
        raise
    return mailbox


def fetch(box: Box, tls: Tls | None = None, **options: Any) -> list[Fetched]:
    """Every message of a mailbox, in the order of the listing; the session ends by QUIT."""
    stored = box.stored()
    with session(box, tls, **options) as mailbox:
        entries = mailbox.list().entries
        results = list(mailbox.retrieve(entries, lambda _: io.BytesIO()))
        mailbox.quit()
    got = [each.sink.getvalue() for each in results if isinstance(each, Retrieved)]
    return [
        Fetched(octets, kept, entry.size) for octets, kept, entry in zip(got, stored, entries, strict=True)
    ]


def survey(server: Server) -> dict[str, str]:
    """Find out what this server does, for each of FEATURES."""
    box = servers.box(server, MESSAGES)
    fetched = fetch(box)
    with session(box) as mailbox:
        facts, listing = mailbox.facts, mailbox.list()
        second = _second_session(box)
    uidls = [entry.uidl for entry in listing.entries]
    exact = all(each.listed_size == len(each.got) for each in fetched)
    same = sorted({each.difference for each in fetched})
    return {
        "TLS": ", ".join(_TLS_NAMES[tls] for tls in server.ports if tls in _TLS_NAMES) or "no",
        "CAPA": "yes" if facts.capabilities else "no",
        "login": facts.mechanism or "",
        "PIPELINING": "yes" if facts.pipelining else "no",
        "UIDL": "unique" if len(set(uidls)) == len(uidls) else "not unique",
        "size in LIST": "bytes of RETR" if exact else "another",
        "RETR gives": ", ".join(same),
        "wrong password": _wrong_password(box),
        "second session": second,
        "after DELE and QUIT": _after_dele(server, leave=Mailbox.quit),
        "after DELE and a cut": _after_dele(server, leave=Mailbox.close),
    }


def _second_session(box: Box) -> str:
    try:
        session(box).close()
    except Pop3Error as error:
        code = re.search(r"\[IN-USE\]", str(error))
        return f"{error.kind.value}, {code[0]}" if code else error.kind.value
    return "allowed"


def _wrong_password(box: Box) -> str:
    with Mailbox.connect(box.endpoint(), tls_settings=TlsSettings(ca_file=box.server.ca_file)) as mailbox:
        try:
            mailbox.login("hunter2")
        except Pop3Error as error:
            if error.kind is not FailureKind.AUTH or "hunter2" in str(error):
                return f"{error.kind.value}: {error}"
            return "auth, [AUTH]" if "[AUTH]" in str(error) else "auth"
    return "accepted"


def _after_dele(server: Server, *, leave: Callable[[Mailbox], None]) -> str:
    box = servers.box(server, MESSAGES[:3])
    with session(box) as mailbox:
        entries = mailbox.list().entries
        mailbox.delete(entries[:1])
        leave(mailbox)
    with session(box) as mailbox:
        left = len(mailbox.list().entries)
        mailbox.quit()
    return {2: "gone", 3: "kept"}.get(left, f"{left} of 3 left")


def rows() -> dict[str, dict[str, str]]:
    """The table of the page, by server."""
    found: dict[str, dict[str, str]] = {}
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if cells[0] in servers.NAMES and len(cells) == len(FEATURES) + 1:
            found[cells[0]] = dict(zip(FEATURES, cells[1:], strict=True))
    return found


def main() -> int:
    """Ask every available server, and rewrite the table."""
    known = rows() if PAGE.exists() else {}
    for name in servers.NAMES:
        with tempfile.TemporaryDirectory(prefix="archiver-", ignore_cleanup_errors=True) as place:
            Path(place).chmod(0o755)
            reason = servers.unavailable(name, Path(place))
            if reason is None:
                with servers.start(name, Path(place) / name) as server:
                    known[name] = survey(server)
            sys.stderr.write(f"{name}: {reason or 'asked'}\n")
    lines = ["| server | " + " | ".join(FEATURES) + " |", "| --- " * (len(FEATURES) + 1) + "|"]
    lines += [
        f"| {name} | " + " | ".join(known[name][feature] for feature in FEATURES) + " |"
        for name in servers.NAMES
        if name in known
    ]
    table = re.compile(r"^\| server \|.*?(?=\n\n|\Z)", re.MULTILINE | re.DOTALL)
    page = table.sub(lambda _: "\n".join(lines), PAGE.read_text())
    PAGE.write_text(page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
