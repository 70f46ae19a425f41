"""The socket: both directions at once, and time."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from archiver.pop3.failures import FailureKind, Pop3Error
from archiver.pop3.transport import Transport

SIZE = 4_000_000
SOON_SECONDS = 30.0


@pytest.fixture
def pair() -> Iterator[tuple[Transport, socket.socket]]:
    """A transport and its peer, with buffers that hold next to nothing."""
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    transport = Transport(ours, "localhost", time.monotonic)
    yield transport, theirs
    transport.close()
    theirs.close()


def receive(transport: Transport, idle_seconds: float = SOON_SECONDS) -> bytes:
    return transport.receive(idle_seconds=idle_seconds, deadline=time.monotonic() + SOON_SECONDS)


def test_two_sides_that_both_send_first_do_not_wait_for_each_other(
    pair: tuple[Transport, socket.socket],
) -> None:
    """A server that sends a message does not read; a client that pipelines must go on reading meanwhile."""
    transport, peer = pair
    got_by_peer = bytearray()

    def serve() -> None:
        peer.sendall(b"s" * SIZE)
        while len(got_by_peer) < SIZE:
            got_by_peer.extend(peer.recv(65536))
        peer.sendall(b"end")
        peer.shutdown(socket.SHUT_WR)

    server = threading.Thread(target=serve, daemon=True)
    server.start()
    transport.send(b"c" * SIZE)
    got = bytearray()
    while octets := receive(transport):
        got += octets
    server.join(SOON_SECONDS)
    assert got == b"s" * SIZE + b"end"
    assert got_by_peer == b"c" * SIZE


def test_silence_ends_the_wait(pair: tuple[Transport, socket.socket]) -> None:
    with pytest.raises(Pop3Error, match=r"nothing came for 0\.01 s") as caught:
        receive(pair[0], idle_seconds=0.01)
    assert caught.value.kind is FailureKind.TRANSIENT


def test_a_deadline_holds_though_octets_are_there(pair: tuple[Transport, socket.socket]) -> None:
    transport, peer = pair
    peer.sendall(b"x")
    with pytest.raises(Pop3Error, match="time for this step is over"):
        transport.receive(idle_seconds=SOON_SECONDS, deadline=time.monotonic())


def test_looking_does_not_wait(pair: tuple[Transport, socket.socket]) -> None:
    transport, peer = pair
    assert transport.receive_now() is None
    peer.sendall(b"x")
    assert transport.receive_now() == b"x"
    peer.close()
    assert transport.receive_now() == b""


def test_the_last_words_of_a_server_are_read_though_nothing_can_be_sent(
    pair: tuple[Transport, socket.socket],
) -> None:
    transport, peer = pair
    peer.sendall(b"-ERR farewell\r\n")
    peer.close()
    transport.send(b"NOOP\r\n")
    assert receive(transport) == b"-ERR farewell\r\n"
