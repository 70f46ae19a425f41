"""What the other tests stand on: both mail servers by one contract, PostgreSQL through crashes, the relay."""

import os
import re
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

import psycopg
import pytest

from archiver.demo import MailServer, SessionLog, processes
from archiver.demo import dovecot as demo_dovecot
from archiver.demo.dovecot import Dovecot
from archiver.demo.pop3d import Pop3Server
from archiver.errors import OperatorNeeded
from tests.conftest import Mailbox, require
from tests.harness import postgres as harness_postgres
from tests.harness.proxy import Break, Proxy
from tests.harness.seaweedfs import SeaweedFS

TIMEOUT_SECONDS = 30.0
PARALLEL_LOG_INS = 100


class Client:
    """Speaks POP3 over a raw socket and changes nothing but the dots (RFC 1939, section 3)."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._stream: BinaryIO = connection.makefile("rb")
        self.line()

    @classmethod
    def tls(cls, server: MailServer) -> "Client":
        trusting = ssl.create_default_context(cafile=server.ca_file)
        plain = socket.create_connection((server.host, server.pop3s_port), timeout=TIMEOUT_SECONDS)
        return cls(trusting.wrap_socket(plain, server_hostname=server.host))

    @classmethod
    def clear(cls, server: MailServer | Proxy, port: int) -> "Client":
        return cls(socket.create_connection((server.host, port), timeout=TIMEOUT_SECONDS))

    def starttls(self, server: MailServer) -> None:
        self.ask("STLS")
        self._stream.close()
        trusting = ssl.create_default_context(cafile=server.ca_file)
        self.connection = trusting.wrap_socket(self.connection, server_hostname=server.host)
        self._stream = self.connection.makefile("rb")

    def send(self, *commands: str) -> None:
        self.connection.sendall("".join(f"{command}\r\n" for command in commands).encode())

    def line(self) -> bytes:
        line = self._stream.readline()
        assert line.endswith(b"\r\n"), line
        return line.removesuffix(b"\r\n")

    def lines(self) -> bytes:
        """The rest of a multi-line answer."""
        content = []
        while (line := self._stream.readline()) != b".\r\n":
            assert line, "the connection ended within an answer"
            content.append(line.removeprefix(b"."))
        return b"".join(content)

    def ask(self, command: str) -> bytes:
        self.send(command)
        answer = self.line()
        assert answer.startswith(b"+OK"), answer
        return answer

    def log_in(self, user: str, password: str) -> None:
        self.ask(f"USER {user}")
        self.ask(f"PASS {password}")

    def quit(self) -> None:
        self.ask("QUIT")
        self.close()

    def close(self) -> None:
        self._stream.close()
        self.connection.close()


@pytest.fixture(params=[pytest.param(Dovecot, marks=pytest.mark.dovecot), Pop3Server])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MailServer]:
    if request.param is Dovecot:
        yield request.getfixturevalue("dovecot")
    else:
        with Pop3Server(tmp_path) as small:
            yield small


@pytest.fixture
def any_mailbox(server: MailServer, _numbers: Iterator[int]) -> Mailbox:
    made = Mailbox(server, f"contract{next(_numbers)}@example.com", "pass word")
    server.add_user(made.user, made.password)
    return made


def ended(mailbox: Mailbox, count: int = 1) -> list[SessionLog]:
    """The sessions of this mailbox, once there are so many. Another's may end meanwhile."""

    def found() -> list[SessionLog]:
        return [log for log in mailbox.server.sessions() if log.user == mailbox.user]

    wait_until(lambda: len(found()) >= count)
    return found()


class TestMailServers:
    def test_retr_gives_back_every_octet_that_was_delivered(
        self, any_mailbox: Mailbox, corpus: list[bytes]
    ) -> None:
        any_mailbox.deliver(corpus)
        client = Client.tls(any_mailbox.server)
        client.log_in(any_mailbox.user, any_mailbox.password)
        numbers = range(1, len(corpus) + 1)

        client.ask("LIST")
        assert client.lines() == b"".join(b"%d %d\r\n" % (n, len(m)) for n, m in enumerate(corpus, 1))
        client.ask("UIDL")
        assert len({line.split()[1] for line in client.lines().splitlines()}) == len(corpus)
        for number, message in zip(numbers, corpus, strict=True):
            client.ask(f"RETR {number}")
            assert client.lines() == message, f"message {number}"
        client.quit()

        assert any_mailbox.messages() == corpus
        (log,) = ended(any_mailbox)
        assert (log.quit, log.retr, log.top, log.dele, log.listed) == (True, len(corpus), 0, 0, len(corpus))
        assert sum(map(len, corpus)) < log.retr_bytes < 1.01 * sum(map(len, corpus))

    def test_starttls_and_pipelining(self, any_mailbox: Mailbox, corpus: list[bytes]) -> None:
        any_mailbox.deliver(corpus[:20])
        client = Client.clear(any_mailbox.server, any_mailbox.server.pop3_port)
        client.starttls(any_mailbox.server)
        client.log_in(any_mailbox.user, any_mailbox.password)

        client.send(*(f"RETR {number}" for number in range(1, 21)), "QUIT")
        for message in corpus[:20]:
            assert client.line().startswith(b"+OK")
            assert client.lines() == message
        assert client.line().startswith(b"+OK")
        client.close()

    def test_deletions_happen_at_quit_only(self, any_mailbox: Mailbox) -> None:
        one, two, three = (b"Subject: %d\r\n\r\n.\r\n" % number for number in range(3))
        any_mailbox.deliver([one, two, three])
        for end in (Client.close, Client.quit):
            client = Client.tls(any_mailbox.server)
            client.log_in(any_mailbox.user, any_mailbox.password)
            client.ask("DELE 2")
            client.ask("TOP 1 0")
            client.lines()
            assert any_mailbox.messages() == [one, two, three]
            end(client)
            ended(any_mailbox, 1 if end is Client.close else 2)

        assert any_mailbox.messages() == [one, three]
        logs = ended(any_mailbox, 2)
        assert [(log.quit, log.dele, log.top, log.listed) for log in logs] == [
            (False, 0, 1, 3),
            (True, 1, 1, 3),
        ]

    def test_another_hand_removes_a_message(self, any_mailbox: Mailbox) -> None:
        any_mailbox.deliver([b"1\r\n", b"2\r\n", b"3\r\n"])
        any_mailbox.remove(2)

        assert any_mailbox.messages() == [b"1\r\n", b"3\r\n"]
        with pytest.raises(IndexError):
            any_mailbox.remove(3)
        with pytest.raises(IndexError):
            any_mailbox.remove(0)

    def test_users_are_told_apart(self, any_mailbox: Mailbox) -> None:
        with pytest.raises(ValueError, match="exists"):
            any_mailbox.server.add_user(any_mailbox.user, "other")
        client = Client.tls(any_mailbox.server)
        client.send(f"USER {any_mailbox.user}", "PASS wrong")
        began = time.monotonic()
        assert client.line().startswith(b"+OK")
        assert client.line().startswith(b"-ERR [AUTH]")
        client.close()

        assert time.monotonic() - began < 1, "failed log-ins are not slowed down"
        assert any_mailbox.url.startswith("pop3s://contract")
        assert "%40example.com@127.0.0.1:" in any_mailbox.url

    def test_many_log_in_at_once(self, any_mailbox: Mailbox) -> None:
        server = any_mailbox.server
        users = [f"{n}.{any_mailbox.user}" for n in range(PARALLEL_LOG_INS)]
        for user in users:
            server.add_user(user, "x")
            server.deliver(user, [f"To: {user}\r\n".encode()])
        all_in = threading.Barrier(PARALLEL_LOG_INS, timeout=TIMEOUT_SECONDS)

        def session(user: str) -> bytes:
            client = Client.tls(server)
            client.log_in(user, "x")
            all_in.wait()
            client.ask("RETR 1")
            content = client.lines()
            client.quit()
            return content

        with ThreadPoolExecutor(PARALLEL_LOG_INS) as threads:
            assert list(threads.map(session, users)) == [f"To: {user}\r\n".encode() for user in users]


@pytest.mark.dovecot
def test_dovecot_locks_a_mailbox_when_told_to(server_directory: Path) -> None:
    require(demo_dovecot.unavailable(server_directory))
    # Its own wait for the lock, ten seconds, is not configurable; a session that ends lets the next one in.
    with Dovecot(server_directory / "locking", {"ann": "x"}, lock_session=True) as server:
        first, second = (Client.clear(server, server.pop3_port) for _ in range(2))
        first.log_in("ann", "x")
        second.ask("USER ann")
        second.send("PASS x")
        second.connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            second.connection.recv(1)
        second.connection.settimeout(TIMEOUT_SECONDS)
        first.quit()
        assert second.connection.recv(100) == b"+OK Logged in.\r\n"
        second.close()


@pytest.mark.dovecot
def test_dovecot_keeps_its_mail_over_a_restart_and_is_gone_when_closed(server_directory: Path) -> None:
    require(demo_dovecot.unavailable(server_directory))
    directory = server_directory / "a path with spaces, 100 % awkward" / "restarted"
    with Dovecot(directory, {"ann": "x"}) as server:
        server.deliver("ann", [b"1\r\n", b"2\r\n"])
    for port in (server.pop3_port, server.pop3s_port):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((server.host, port))
    with Dovecot(directory, {"ann": "new password"}) as server:
        server.deliver("ann", [b"3\r\n"])
        client = Client.clear(server, server.pop3_port)
        client.log_in("ann", "new password")
        assert client.ask("STAT") == b"+OK 3 9"
        client.quit()
        assert server.messages("ann") == [b"1\r\n", b"2\r\n", b"3\r\n"]


@pytest.mark.dovecot
def test_dovecot_says_why_it_does_not_start(server_directory: Path) -> None:
    require(demo_dovecot.unavailable(server_directory))
    with pytest.raises(OperatorNeeded, match="no_such_setting"):
        Dovecot(server_directory / "broken", extra_settings="no_such_setting = 1")


def test_a_server_that_does_not_end_is_killed_with_its_children(tmp_path: Path) -> None:
    said = tmp_path / "said"
    process = processes.start(["sh", "-c", "trap '' TERM; echo ready; sleep 60 | cat"], said)
    processes.wait_until(lambda: said.read_bytes() == b"ready\n", process, said, seconds=TIMEOUT_SECONDS)
    processes.stop(process, seconds=0.1)

    assert process.returncode == -signal.SIGKILL
    processes.stop(process, seconds=0.1)  # once more does no harm


def test_root_is_told_that_its_server_cannot_enter_a_directory(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)

    assert (processes.unreachable(closed / "server") is None) == (os.geteuid() != 0)


def test_a_missing_server_fails_in_ci_and_skips_elsewhere() -> None:
    require(None, {"CI": "true"})
    with pytest.raises(pytest.fail.Exception, match="no such server"):
        require("no such server", {"CI": "true"})
    with pytest.raises(pytest.skip.Exception, match="no such server"):
        require("no such server", {})


@pytest.mark.postgres
def test_postgres_keeps_what_was_committed_over_crashes(server_directory: Path) -> None:
    require(harness_postgres.unavailable())
    with harness_postgres.postgres(server_directory / "crashing") as server:
        url = server.create_database("accounts and mail")
        with psycopg.connect(url) as connection:
            connection.execute("CREATE TABLE kept (n int)")
        for n, end in enumerate((server.kill, server.stop, server.kill)):
            with psycopg.connect(url, autocommit=True) as connection:
                connection.execute("INSERT INTO kept VALUES (%s)", [n])
            with psycopg.connect(url) as open_at_the_crash:
                open_at_the_crash.execute("INSERT INTO kept VALUES (-1)")
                end()
                with pytest.raises(psycopg.OperationalError):
                    open_at_the_crash.execute("SELECT 1")
            server.start()
        with psycopg.connect(url) as connection:
            assert connection.execute("SELECT array_agg(n ORDER BY n) FROM kept").fetchone() == ([0, 1, 2],)
            assert connection.execute("SHOW fsync").fetchone() == ("on",)


def test_each_test_has_a_database_of_its_own(database_url: str) -> None:
    assert database_url.startswith(("sqlite:///", "postgresql://"))
    if database_url.startswith("postgresql"):
        with psycopg.connect(database_url) as connection:
            found = connection.execute(
                "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"
            ).fetchone()
        assert found == (0,)
    else:
        assert not Path(database_url.removeprefix("sqlite:///")).exists()


def test_a_mailbox_is_made_for_each_test(mailbox: Callable[..., Mailbox]) -> None:
    one, other = mailbox([b"1\r\n"]), mailbox()

    assert (one.messages(), other.messages()) == ([b"1\r\n"], [])
    assert one.user != other.user


def test_a_bucket_is_made_for_each_test(bucket: str, s3: SeaweedFS) -> None:
    client = s3.session().client("s3", endpoint_url=s3.endpoint_url)
    assert "Contents" not in client.list_objects_v2(Bucket=bucket)
    client.close()


class TestProxy:
    @pytest.fixture
    def echo(self) -> Iterator[int]:
        """The port of a server that sends back what it gets, and ends when its client does."""
        with echoing() as port:
            yield port

    def test_relays_and_counts_and_records(self, echo: int) -> None:
        with Proxy(echo, record=re.compile(rb"^(RETR|DELE) ")) as proxy, connect(proxy) as client:
            for chunk in (b"RET", b"R 1\r\nNOOP\r\nDELE 1\r\nRE", b"TR 2\r\nPASS secret\r\n"):
                client.sendall(chunk)
            client.shutdown(socket.SHUT_WR)
            said = read_all(client)

            assert said == b"RETR 1\r\nNOOP\r\nDELE 1\r\nRETR 2\r\nPASS secret\r\n"
            assert (proxy.bytes_up, proxy.bytes_down, proxy.connections) == (len(said), len(said), 1)
            assert proxy.lines() == [b"RETR 1", b"DELE 1", b"RETR 2"]
            assert proxy.lines(b"^RETR") == [b"RETR 1", b"RETR 2"]

    def test_latency_delays_but_does_not_serialise(self, echo: int) -> None:
        with Proxy(echo, latency_seconds=0.05) as proxy, connect(proxy) as client:
            began = time.monotonic()
            for n in range(100):
                relayed = proxy.bytes_up
                client.sendall(b"%03d\n" % n)
                wait_until(partial(lambda before: proxy.bytes_up > before, relayed))  # a chunk of its own
            client.shutdown(socket.SHUT_WR)
            assert read_all(client) == b"".join(b"%03d\n" % n for n in range(100))

            assert 0.1 <= time.monotonic() - began < 1.0, "a hundred round trips of 0.1 s would take 10 s"

    def test_bandwidth_is_limited(self, echo: int) -> None:
        content = bytes(1_000_000)
        with Proxy(echo, bytes_per_second=2_000_000) as proxy, connect(proxy) as client:
            began = time.monotonic()
            sending = threading.Thread(target=client.sendall, args=(content,))
            sending.start()
            received = bytearray()
            while len(received) < len(content):
                received += client.recv(65536)
            sending.join()

            assert 0.45 <= time.monotonic() - began < 2.0
            assert received == content

    @pytest.mark.parametrize("how", ["cut", "reset"])
    def test_breaks_after_exactly_so_many_octets(self, echo: int, how: Break) -> None:
        with Proxy(echo) as proxy:
            proxy.break_after(150_000, how)
            with connect(proxy) as client:
                sending = threading.Thread(target=send_until_refused, args=(client, bytes(300_000)))
                sending.start()
                received, was_reset = read_until_broken(client)
                sending.join()
            with connect(proxy) as next_one:
                next_one.sendall(bytes(200_000))
                next_one.shutdown(socket.SHUT_WR)
                assert len(read_all(next_one)) == 200_000

        assert received == 150_000
        assert was_reset or how == "cut"

    def test_breaks_upwards_as_often_as_told(self, echo: int) -> None:
        with Proxy(echo) as proxy:
            proxy.break_after(3, "cut", direction="up", times=2)
            outcomes = []
            for _ in range(3):
                with connect(proxy) as client:
                    client.sendall(b"hello")
                    outcomes.append(client.recv(5))

        assert [len(outcome) <= 3 for outcome in outcomes] == [True, True, False]
        assert proxy.bytes_up == 3 + 3 + 5

    def test_breaks_where_it_looks_so(self, echo: int) -> None:
        with Proxy(echo) as proxy:
            proxy.break_at(rb"RETR 2\r\n(?=\+)", "cut", direction="down")
            with connect(proxy) as client:
                for chunk in (b"RETR 1\r\nRE", b"TR 2\r", b"\n+OK\r\nmore"):
                    client.sendall(chunk)
                received, _ = read_until_broken(client)
            with connect(proxy) as next_one:
                next_one.sendall(b"RETR 2\r\n+OK\r\n")
                next_one.shutdown(socket.SHUT_WR)
                assert read_all(next_one) == b"RETR 2\r\n+OK\r\n"

        assert received == len(b"RETR 1\r\nRETR 2\r\n")
        assert proxy.breaks == 1

    def test_trickles_and_loses_nothing(self, echo: int) -> None:
        with Proxy(echo) as proxy, connect(proxy) as client:
            proxy.break_at(b"fast", "trickle", direction="down")
            client.sendall(b"fast, abc")
            client.shutdown(socket.SHUT_WR)
            began = time.monotonic()
            assert client.recv(100)[:4] == b"fast"
            assert read_all(client)[-3:] == b"abc"
            assert time.monotonic() - began > 1

    def test_breaks_now(self, echo: int) -> None:
        with Proxy(echo) as proxy, connect(proxy) as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
            proxy.break_now("reset")
            with pytest.raises(ConnectionResetError):
                client.recv(1)

    def test_stalls_without_a_word(self, echo: int) -> None:
        with Proxy(echo) as proxy, connect(proxy) as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
            proxy.break_now("stall")
            client.sendall(b"y")
            client.settimeout(0.2)
            with pytest.raises(TimeoutError):
                client.recv(1)

    def test_a_client_of_a_server_that_is_away_is_sent_away(self) -> None:
        (port,) = processes.free_ports(1)
        with Proxy(port) as proxy, connect(proxy) as client:
            assert read_until_broken(client)[0] == 0

    def test_pipelining_through_it_takes_one_round_trip(
        self, dovecot: Dovecot, mailbox: Callable[..., Mailbox]
    ) -> None:
        made = mailbox([b"Subject: %d\r\n\r\n\r\n" % n for n in range(100)])
        with Proxy(dovecot.pop3_port, latency_seconds=0.02, record=re.compile(rb"^RETR ")) as proxy:
            client = Client.clear(proxy, proxy.port)
            client.log_in(made.user, made.password)
            began = time.monotonic()
            client.send(*(f"RETR {n}" for n in range(1, 101)))
            for _ in range(100):
                client.line()
                client.lines()
            seconds = time.monotonic() - began
            client.quit()

            assert 0.04 <= seconds < 1.0, "one at a time they would take 4 s"
            assert len(proxy.lines()) == 100


@contextmanager
def echoing() -> Iterator[int]:
    with socket.create_server((processes.HOST, 0)) as listener:

        def serve(connection: socket.socket) -> None:
            with connection:
                try:
                    while chunk := connection.recv(65536):
                        connection.sendall(chunk)
                except OSError:
                    pass  # broken on purpose

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                serving.append(threading.Thread(target=serve, args=(connection,)))
                serving[-1].start()

        serving = [threading.Thread(target=accept)]
        serving[0].start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        for thread in serving:
            thread.join()


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection((proxy.host, proxy.port), timeout=TIMEOUT_SECONDS)


def read_all(connection: socket.socket) -> bytes:
    chunks = []
    while chunk := connection.recv(65536):
        chunks.append(chunk)
    return b"".join(chunks)


def read_until_broken(connection: socket.socket) -> tuple[int, bool]:
    """How many octets came, and whether a reset was their end."""
    count = 0
    try:
        while chunk := connection.recv(65536):
            count += len(chunk)
    except ConnectionResetError:
        return count, True
    return count, False


def send_until_refused(connection: socket.socket, content: bytes) -> None:
    with suppress(OSError):
        connection.sendall(content)
