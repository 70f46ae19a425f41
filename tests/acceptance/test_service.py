"""``archiver run``: many processes share the accounts, die and are replaced, and say how they are."""

import json
import re
import socket
import threading
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from types import TracebackType
from typing import Any, Self

import pytest

from archiver.demo import processes
from archiver.demo.corpus import corpus as generate_corpus
from archiver.demo.dovecot import Dovecot
from tests.conftest import Mailbox
from tests.harness.archive import Archive, sha256
from tests.harness.cli import Running, wait_for
from tests.harness.proxy import Proxy

pytestmark = pytest.mark.slow

ACCOUNTS = 50
LEASE_SECONDS = 6.0
TICK_SECONDS = 1.0
NOISE_SECONDS = 4.0
"""What a busy machine may add."""

LATENCY_SECONDS = 0.1
"""Each way, between archiver and mail server: polls last long enough to meet if they could."""


def test_two_processes_share_fifty_accounts_and_one_inherits_them_all(
    in_bucket: Archive, dovecot: Dovecot, mailbox: Callable[..., Mailbox]
) -> None:
    mail = list(generate_corpus(2 * ACCOUNTS, seed=4, scale=0.1))
    boxes = [mailbox([message]) for message in mail[:ACCOUNTS]]
    with Proxy(dovecot.pop3s_port, latency_seconds=LATENCY_SECONDS) as line:
        in_bucket.cli.environment |= {
            "ARCHIVER_ACCOUNTS_FILE": str(in_bucket.accounts_file(boxes, port=line.port)),
            "ARCHIVER_LEASE_SECONDS": str(LEASE_SECONDS),
            "ARCHIVER_INTERVAL_SECONDS": "2",
        }
        one, other = in_bucket.cli.start("run"), in_bucket.cli.start("run")

        def each_polled_both_ways() -> bool:
            shares = [polled(process) for process in (one, other)]
            return len(shares[0] | shares[1]) == ACCOUNTS and all(len(share) >= 10 for share in shares)

        wait_for(each_polled_both_ways, "all accounts are polled, a good part by each", seconds=60)
        in_bucket.expect_each_once(mail[:ACCOUNTS])

        # One dies in the midst of its polls.
        wait_for(lambda: len(held_by(in_bucket, one)) >= 3, "the one holds leases")
        one.kill()
        died_at = datetime.now(UTC)
        orphans = held_by(in_bucket, one)
        assert orphans
        seen = len(other.log("poll.ended"))

        def inherited() -> bool:
            return orphans <= {line["account"] for line in other.log("poll.ended")[seen:]}

        wait_for(inherited, "the other polls the accounts that the dead one held")
        taken_over_by = died_at + timedelta(seconds=LEASE_SECONDS + TICK_SECONDS + NOISE_SECONDS)
        first_polls = {line["account"]: begun(line) for line in reversed(other.log("poll.ended")[seen:])}
        assert max(first_polls[account] for account in orphans) < taken_over_by

        for box, message in zip(boxes, mail[ACCOUNTS:], strict=True):
            box.deliver([message])
        wait_for(lambda: len(in_bucket.captured()) == 2 * ACCOUNTS, "the new mail is captured", seconds=60)
        in_bucket.expect_each_once(mail)

        # The other is told to end.
        wait_for(lambda: held_by(in_bucket, other), "the other is in the midst of polls")
        other.terminate()
        assert other.wait(30).code == 0
        assert in_bucket.rows("SELECT owner FROM lease WHERE owner IS NOT NULL") == []

    assert {line["outcome"] for line in one.log("poll.ended") + other.log("poll.ended")} == {"ok"}
    expect_one_poll_at_a_time(one.log("poll.ended") + other.log("poll.ended"))
    for box in boxes:
        expect_one_session_at_a_time(dovecot, box.user)


def test_a_service_says_how_it_is(
    in_bucket: Archive, mailbox: Callable[..., Mailbox], corpus: list[bytes]
) -> None:
    (port,) = processes.free_ports(1)
    in_bucket.cli.environment["ARCHIVER_HTTP_LISTEN"] = f"127.0.0.1:{port}"
    ask = Asking(f"http://127.0.0.1:{port}")
    box = mailbox(corpus[:10])
    in_bucket.change("DROP SCHEMA public CASCADE")
    in_bucket.change("CREATE SCHEMA public")

    service = in_bucket.cli.start("run")

    # Without schema it waits, and does not crash.
    wait_for(lambda: service.log("service.waiting"), "it waits for the schema")
    assert ask("/livez")[0] == 200
    assert ask("/readyz")[0] == 503
    assert ask("/metrics")[0] == 200

    in_bucket.cli.do("db", "upgrade")
    wait_for(lambda: ask("/readyz")[0] == 200, "it is ready once the schema is there")
    assert ask("/livez")[0] == 200

    # An account that is added while it runs is polled, and the feed and the metrics tell of it.
    assert json.loads(ask("/v1/events?after=0")[1]) == {"events": [], "next": 0}
    in_bucket.cli.run("account", "add", "alice", box.url, *in_bucket.access(box))
    wait_for(lambda: service.log("poll.ended"), "the new account is polled")
    first = json.loads(ask("/v1/events?after=0&limit=4")[1])
    rest = json.loads(ask(f"/v1/events?after={first['next']}")[1])
    events = first["events"] + rest["events"]
    assert (len(first["events"]), len(events)) == (4, 10)
    assert {event["event"] for event in events} == {"captured"}
    assert [event["sha256"] for event in events] == [sha256(message) for message in corpus[:10]]
    assert [event["position"] for event in events] == sorted({event["position"] for event in events})
    assert ask("/v1/events?after=soon")[0] == 400
    metrics = ask("/metrics")[1].decode().splitlines()
    assert 'archiver_polls_total{outcome="ok"} 1.0' in metrics
    assert "archiver_messages_captured_total 10.0" in metrics

    service.terminate()
    assert service.wait(30).code == 0


def test_a_dead_mail_server_is_left_in_peace(
    in_directory: Archive, mailbox: Callable[..., Mailbox], corpus: list[bytes]
) -> None:
    box = mailbox(corpus[:3])
    add = ("account", "add")
    with DeadServer() as dead:
        for name, url in (("alive", box.url), ("dead", f"pop3s://alice@127.0.0.1:{dead.port}")):
            in_directory.cli.run(*add, name, url, *in_directory.access(box), "--interval", "1")

        service = in_directory.cli.start("run")

        def polls(account: str) -> list[str]:
            ended = service.log("poll.ended")
            return [line["outcome"] for line in ended if line["account"] == account]

        wait_for(lambda: len(polls("alive")) >= 6, "the living server is polled every second")
        # Backed off by up to 30, 60, 120 and 240 seconds: five times by now is one chance in ten thousand.
        assert 1 <= dead.connections <= 4
        assert set(polls("dead")) == {"try_later"}
        assert set(polls("alive")) == {"ok"}
        summary = in_directory.status()
        assert (summary["failing"], summary["paused"]) == (1, 0)
        service.terminate()
        assert service.wait(30).code == 0


class Asking:
    """Asks one HTTP server; gives the status and the body, status 0 when it does not answer."""

    def __init__(self, base: str) -> None:
        self._base = base

    def __call__(self, path: str) -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(f"{self._base}{path}", timeout=10) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()
        except OSError:
            return 0, b""


class DeadServer:
    """Accepts connections and hangs up; counts them. A context manager."""

    def __init__(self) -> None:
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._hang_up, name="dead server", daemon=True)

    def _hang_up(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            connection.close()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Closing alone would not wake the thread that waits in accept.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


def held_by(archive: Archive, process: Running) -> set[str]:
    """The accounts whose lease names this process, dead or alive."""
    leases = archive.rows("SELECT name, owner FROM lease JOIN account ON account.id = lease.account_id")
    return {name for name, owner in leases if owner is not None and f"/{process.pid}/" in owner}


def polled(process: Running) -> set[str]:
    return {line["account"] for line in process.log("poll.ended")}


def begun(poll: dict[str, Any]) -> datetime:
    return datetime.fromisoformat(poll["at"]) - timedelta(seconds=poll["seconds"])


def expect_one_poll_at_a_time(polls: list[dict[str, Any]]) -> None:
    """Of each account, every poll began after the one before it had ended, and with a newer token."""
    by_account = defaultdict(list)
    for poll in sorted(polls, key=begun):
        by_account[poll["account"]].append(poll)
    assert len(by_account) == ACCOUNTS
    for account, story in by_account.items():
        for earlier, later in pairwise(story):
            assert datetime.fromisoformat(earlier["at"]) < begun(later), account
            assert earlier["token"] < later["token"], account


def expect_one_session_at_a_time(server: Dovecot, user: str) -> None:
    """The server's own view: its log has a login and the end of that session by turns."""
    name = re.escape(user)
    told = re.compile(
        rf"^pop3(-login: Info: (Login): user=<{name}>|\({name}\): Info: .* top=\d+ )", re.MULTILINE
    )
    turns = ["login" if line[2] else "end" for line in told.finditer(server.log_file.read_text())]
    assert turns[:2] == ["login", "end"]
    assert all(earlier != later for earlier, later in pairwise(turns)), user
