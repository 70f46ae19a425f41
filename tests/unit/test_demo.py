"""The sample mail and the small server of ``archiver demo``; what both servers share is in contract/."""

import base64
import hashlib
import io
import os
import poplib
import re
import signal
import socket
import ssl
import statistics
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from archiver.demo import start_mail_server
from archiver.demo.__main__ import practise
from archiver.demo.certificates import self_signed
from archiver.demo.corpus import corpus
from archiver.demo.dovecot import Dovecot, unavailable
from archiver.demo.pop3d import Pop3Server

ODDITIES = 13
ENOUGH_FOR_ALL = 4 * ODDITIES


@pytest.fixture(scope="module")
def sample() -> list[bytes]:
    return list(corpus(1_000, seed=7))


class TestCorpus:
    def test_is_the_same_in_every_process(self) -> None:
        program = (
            "import hashlib; from archiver.demo.corpus import corpus;"
            "print(hashlib.sha256(b''.join(corpus(60, seed=3))).hexdigest())"
        )
        digests = {
            subprocess.run(
                [sys.executable, "-c", program],
                env=os.environ | {"PYTHONHASHSEED": hash_seed, "TZ": zone, "LC_ALL": "C"},
                capture_output=True,
                text=True,
                check=True,
            ).stdout.strip()
            for hash_seed, zone in (("1", "UTC"), ("2", "Asia/Tokyo"))
        }

        assert digests == {hashlib.sha256(b"".join(corpus(60, seed=3))).hexdigest()}

    def test_a_smaller_one_begins_a_larger_one_and_another_seed_shares_nothing(self) -> None:
        assert list(corpus(10, seed=1)) == list(islice(corpus(100, seed=1), 10))
        assert set(corpus(50, seed=1)).isdisjoint(corpus(50, seed=2))

    def test_every_message_differs(self, sample: list[bytes]) -> None:
        assert len(set(sample)) == len(sample)

    def test_every_line_ends_with_crlf(self, sample: list[bytes]) -> None:
        for message in sample:
            assert message.endswith(b"\r\n")
            assert message.count(b"\r") == message.count(b"\n") == message.count(b"\r\n")

    def test_sizes_are_those_of_business_mail(self, sample: list[bytes]) -> None:
        sizes = [len(message) for message in sample]

        assert 12_000 < statistics.median(sizes) < 20_000
        assert 55_000 < statistics.mean(sizes) < 95_000
        assert 1_000_000 < max(sizes) < 8_100_000

    def test_scale_makes_it_smaller(self) -> None:
        assert 10e6 < sum(map(len, corpus(300, seed=1, scale=0.6))) < 20e6

    @pytest.mark.parametrize(
        "pattern",
        [
            rb"\r\n\.\r\n",  # a line that would end an answer
            rb"\r\n\.\.\r\n",
            rb"\r\n\.x\r\n",
            rb"[^\r]{100000}\r\n",
            rb"\A(?:(?!Message-ID)[^\r]+\r\n)+\r\n",
            rb"\A(?:(?!Subject)[^\r]+\r\n)+\r\n",
            rb"\A(?:[^\r]+\r\n)+\r\n\Z",  # header and blank line only
            rb"\A(?:[^\r]+\r\n)+\Z",  # not even a blank line
            rb"Content-Type: message/rfc822",
            rb"application/pkcs7-signature",
            rb"smime-type=enveloped-data",
            rb"List-Id: ",
            rb"\r\nReferences: ",
            rb"multipart/alternative",
            rb"%s" % re.escape(base64.b64encode(b"%PDF-1.7\n%\xe2\xe3")),
            rb"charset=us-ascii\r\nContent-Transfer-Encoding: 8bit",
            rb"\A(?:[^\r]+\r\n)*Subject: [^\r]*[\x80-\xff]",
        ],
    )
    def test_has_what_real_mail_has(self, pattern: bytes, sample: list[bytes]) -> None:
        assert any(re.search(pattern, message) for message in sample)

    def test_a_small_one_has_every_oddity(self) -> None:
        small = list(corpus(ENOUGH_FOR_ALL, seed=5))

        assert sum(b"\r\nMessage-ID:" not in message for message in small) == 1
        assert (
            sum(message.endswith(b"\r\n\r\n") and message.count(b"\r\n\r\n") == 1 for message in small) == 1
        )
        assert sum(b"\r\nList-Id:" in message for message in small) == 1


def test_a_certificate_is_accepted_for_this_machine_only(tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    trusting = ssl.create_default_context(cafile=certificate)

    assert key.stat().st_mode & 0o077 == 0
    assert _handshake(certificate, key, trusting, "localhost") is None
    assert _handshake(certificate, key, trusting, "127.0.0.1") is None
    assert isinstance(_handshake(certificate, key, trusting, "example.com"), ssl.SSLCertVerificationError)
    assert isinstance(
        _handshake(certificate, key, ssl.create_default_context(), "localhost"), ssl.SSLCertVerificationError
    )


def _handshake(certificate: Path, key: Path, client: ssl.SSLContext, name: str) -> ssl.SSLError | None:
    """A TLS handshake in memory; the client's complaint, if it has one."""
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(certificate, key)
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=name),
        serving.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError as refused:
                return refused
    assert ends[0].version() is not None
    return None


class TestSmallServer:
    @pytest.fixture
    def server(self, tmp_path: Path) -> Iterator[Pop3Server]:
        with Pop3Server(tmp_path, {"ann": "pass word"}) as server:
            server.deliver("ann", [b"Subject: one\r\n\r\n1\r\n2\r\n3\r\n", b"Subject: two\r\n\r\n.\r\n"])
            yield server

    @pytest.fixture
    def connection(self, server: Pop3Server) -> Iterator[socket.socket]:
        with socket.create_connection((server.host, server.pop3_port), timeout=10) as connection:
            yield connection

    def test_answers_commands_sent_all_at_once_in_their_order(self, connection: socket.socket) -> None:
        connection.sendall(
            b"USER ann\r\nPASS pass word\r\nSTAT\r\nLIST\r\nLIST 2\r\nTOP 1 2\r\nRETR 2\r\n"
            b"DELE 1\r\nRETR 1\r\nRSET\r\nNOOP\r\nSTLS\r\nRETR 0\r\nRETR 99999999999\r\nTOP 1\r\nQUIT\r\n"
        )

        assert _until_closed(connection).split(b"\r\n") == [
            b"+OK archiver demo ready.",
            b"+OK",
            b"+OK Logged in.",
            b"+OK 2 44",
            *(b"+OK", b"1 25", b"2 19", b"."),
            b"+OK 2 19",
            *(b"+OK", b"Subject: one", b"", b"1", b"2", b"."),
            *(b"+OK 19 octets", b"Subject: two", b"", b"..", b"."),
            b"+OK Marked to be deleted.",
            b"-ERR There's no such message.",
            b"+OK",
            b"+OK",
            b"-ERR Unknown command, or not now.",
            b"-ERR There's no such message.",
            b"-ERR There's no such message.",
            b"-ERR TOP takes a message and a number of lines.",
            b"+OK Logging out.",
            b"",
        ]

    @pytest.mark.parametrize(
        ("said", "answer"),
        [
            (b"USER ann\r\nPASS wrong\r\n", b"-ERR [AUTH] Authentication failed.\r\n"),
            (b"USER bob\r\nPASS pass word\r\n", b"-ERR [AUTH] Authentication failed.\r\n"),
            (b"USER \xff\r\nPASS \xff\r\n", b"-ERR [AUTH] Authentication failed.\r\n"),
            (b"AUTH PLAIN\r\n*\r\n", b"-ERR Authentication exchange was cancelled or cannot be read.\r\n"),
            (b"AUTH CRAM-MD5\r\n", b"-ERR Unsupported mechanism.\r\n"),
            (b"PASS pass word\r\n", b"-ERR USER first.\r\n"),
            (b"STAT\r\n", b"-ERR Unknown command, or not now.\r\n"),
        ],
    )
    def test_refuses(self, said: bytes, answer: bytes, connection: socket.socket) -> None:
        connection.sendall(said)
        connection.shutdown(socket.SHUT_WR)

        assert _until_closed(connection).endswith(answer)

    def test_hangs_up_on_an_endless_command(self, connection: socket.socket) -> None:
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            connection.sendall(bytes(50_000_000))

    def test_takes_auth_plain_in_one_step_or_two(self, server: Pop3Server) -> None:
        response = base64.b64encode(b"\0ann\0pass word")
        for said in (b"AUTH PLAIN %s\r\nQUIT\r\n", b"AUTH PLAIN\r\n%s\r\nQUIT\r\n"):
            with socket.create_connection((server.host, server.pop3_port), timeout=10) as connection:
                connection.sendall(said % response)
                assert b"+OK Logged in.\r\n" in _until_closed(connection)

    def test_a_mailbox_is_one_sessions_at_a_time(self, server: Pop3Server, connection: socket.socket) -> None:
        connection.sendall(b"USER ann\r\nPASS pass word\r\n")
        _until(connection, b"Logged in.\r\n")
        with socket.create_connection((server.host, server.pop3_port), timeout=10) as second:
            second.sendall(b"USER ann\r\nPASS pass word\r\nQUIT\r\n")
            assert b"-ERR [IN-USE]" in _until_closed(second)
        connection.close()
        server.sessions(at_least=1)
        with socket.create_connection((server.host, server.pop3_port), timeout=10) as third:
            third.sendall(b"USER ann\r\nPASS pass word\r\nQUIT\r\n")
            assert b"Logged in." in _until_closed(third)

    def test_what_came_with_stls_in_the_clear_is_forgotten(
        self, server: Pop3Server, connection: socket.socket
    ) -> None:
        connection.sendall(b"STLS\r\nUSER ann\r\nPASS pass word\r\n")
        _until(connection, b"+OK Begin TLS negotiation.\r\n")
        trusting = ssl.create_default_context(cafile=server.ca_file)
        with trusting.wrap_socket(connection, server_hostname=server.host) as secure:
            secure.sendall(b"STAT\r\nCAPA\r\nQUIT\r\n")
            answers = _until_closed(secure)

        assert answers.startswith(b"-ERR Unknown command, or not now.\r\n")
        assert b"STLS" not in answers

    def test_a_later_server_gives_no_uidl_again(self, tmp_path: Path) -> None:
        uidls = []
        for _ in range(2):
            with Pop3Server(tmp_path, {"ann": "x"}) as server:
                server.deliver("ann", [b"\r\n"])
                with socket.create_connection((server.host, server.pop3_port), timeout=10) as connection:
                    connection.sendall(b"USER ann\r\nPASS x\r\nUIDL 1\r\nQUIT\r\n")
                    uidls.append(_until_closed(connection).split(b"\r\n")[3])

        assert uidls[0].startswith(b"+OK 1 ")
        assert uidls[0] != uidls[1]

    def test_closing_ends_sessions_under_way(self, server: Pop3Server, connection: socket.socket) -> None:
        _until(connection, b"ready.\r\n")
        server.close()

        assert _until_closed(connection) == b""


def test_the_better_server_that_can_be_had_is_started(tmp_path: Path) -> None:
    with start_mail_server(tmp_path, {"ann": "x"}) as server:
        assert isinstance(server, Pop3Server if unavailable(tmp_path) else Dovecot)
        server.deliver("ann", [b"\r\n"])
        assert server.messages("ann") == [b"\r\n"]


def _until(connection: socket.socket, end: bytes) -> bytes:
    received = b""
    while not received.endswith(end):
        chunk = connection.recv(65536)
        assert chunk, f"closed after {received!r}"
        received += chunk
    return received


def _until_closed(connection: socket.socket) -> bytes:
    received = b""
    try:
        while chunk := connection.recv(65536):
            received += chunk
    except ConnectionResetError:
        pass  # closed with something from us unread
    return received


def test_a_mail_server_to_practise_with_delivers_a_message_a_line(tmp_path: Path) -> None:
    practice = tmp_path / "practice"

    def count() -> int:
        url = urlsplit((practice / "url").read_text().strip())
        assert url.hostname is not None
        assert url.port is not None
        assert url.username is not None
        client = poplib.POP3_SSL(
            url.hostname, url.port, context=ssl.create_default_context(cafile=practice / "ca.pem")
        )
        client.user(url.username)
        client.pass_((practice / "password").read_text().strip())
        sizes = [int(line.split()[1]) for line in client.list()[1]]
        client.quit()
        assert sizes == [file.stat().st_size for file in sorted((practice / "sent").iterdir())]
        return len(sizes)

    def lines() -> Iterator[str]:
        assert count() == 20
        yield "\n"
        assert count() == 21

    output = io.StringIO()
    practise(practice, lines(), output)
    assert "Delivered one more: 21 messages." in output.getvalue()


def test_a_directory_that_is_there_is_not_practised_in(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError):
        practise(tmp_path, [], io.StringIO())


def test_practising_ends_with_its_server_at_sigterm(tmp_path: Path) -> None:
    practice = tmp_path / "practice"
    command = [sys.executable, "-m", "archiver.demo", str(practice)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        assert any("Press Enter" in line for line in program.stdout)
        program.send_signal(signal.SIGTERM)
        assert program.wait(timeout=30) == 0
    url = urlsplit((practice / "url").read_text().strip())
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((url.hostname, url.port))
