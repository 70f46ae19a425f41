"""Octets to and from a server: TCP, TLS, and time.

Owns the socket. Promises that nothing waits longer than it was told, that both
directions are served at once (so that a client which sends commands and a
server which sends messages never wait for each other), and that TLS is at least
1.2, with chain and host name verified. Leaves the meaning of the octets, and
the name of the host in errors, to the mailbox.

Time is a monotonic clock given by the caller; a deadline is a point on it.
"""

import hashlib
import math
import select
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Final, Self

from archiver.pop3.failures import FailureKind, Pop3Error

RECEIVE_OCTETS: Final = 65536
"""Asked of each read. A TLS record holds 16 KiB; from 128 KiB on, malloc would map memory for each read."""

_TIME_IS_OVER: Final = "the time for this step is over"


@dataclass(frozen=True, slots=True)
class TlsFacts:
    """What was agreed with the server: for the record, since the certificate proves whom we spoke to."""

    version: str
    cipher: str
    certificate_sha256: str
    certificate_not_after: datetime | None


def tls_context(ca_file: Path | None) -> ssl.SSLContext:
    """A verifying context: the system's store, or ``ca_file`` alone. Shared, since loading a store is slow.

    Raises Pop3Error of kind OPERATOR when the file cannot be used. A changed
    file is read anew.
    """
    if ca_file is None:
        return _context(None, 0)
    try:
        return _context(str(ca_file), ca_file.stat().st_mtime_ns)
    except OSError as error:  # ssl.SSLError is one
        raise Pop3Error(
            FailureKind.OPERATOR, f"the CA file {ca_file} cannot be used: {_reason(error)}"
        ) from error


@lru_cache(maxsize=64)
def _context(ca_file: str | None, _changed_ns: int) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca_file)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


class Transport:
    """One connection. Every method raises Pop3Error with the reason alone; the caller adds what was tried."""

    def __init__(self, connected: socket.socket, host: str, monotonic: Callable[[], float]) -> None:
        self._socket = connected
        self._host = host
        self._monotonic = monotonic
        self._outgoing = bytearray()
        self._tls: TlsFacts | None = None
        self._socket.setblocking(False)

    @classmethod
    def connect(cls, host: str, port: int, *, timeout_seconds: float, monotonic: Callable[[], float]) -> Self:
        """Connect to the first address of ``host`` that answers; all of them share ``timeout_seconds``.

        The look-up of the name has no limit but the resolver's own.
        """
        try:
            addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, ValueError) as error:  # a name that is no name
            raise Pop3Error(
                FailureKind.TRANSIENT, f"the name cannot be resolved: {_reason(error)}"
            ) from error
        deadline = monotonic() + timeout_seconds
        refusal: OSError = TimeoutError("timed out")
        for left, (family, kind, protocol, _, address) in zip(
            range(len(addresses), 0, -1), addresses, strict=True
        ):
            share_seconds = (deadline - monotonic()) / left
            if share_seconds <= 0:
                break
            candidate = socket.socket(family, kind, protocol)
            try:
                candidate.settimeout(share_seconds)
                candidate.connect(address)
                candidate.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except OSError as error:
                candidate.close()
                refusal = error
            else:
                return cls(candidate, host, monotonic)
        raise Pop3Error(FailureKind.TRANSIENT, f"no connection: {_reason(refusal)}") from refusal

    @property
    def tls(self) -> TlsFacts | None:
        """What TLS agreed on; None while the channel is in clear."""
        return self._tls

    def start_tls(self, context: ssl.SSLContext, *, deadline: float) -> None:
        """Handshake, with the host's name checked and sent (SNI)."""
        try:
            wrapped = context.wrap_socket(
                self._socket, server_hostname=self._host.rstrip("."), do_handshake_on_connect=False
            )
        except (ValueError, OSError) as error:
            raise Pop3Error(FailureKind.TRANSIENT, f"TLS cannot start: {_reason(error)}") from error
        self._socket = wrapped
        while True:
            try:
                wrapped.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._wait(select.POLLIN, deadline, "the TLS handshake did not end")
            except ssl.SSLWantWriteError:
                self._wait(select.POLLOUT, deadline, "the TLS handshake did not end")
            except OSError as error:
                raise _handshake_failure(error) from error
        self._tls = _tls_facts(wrapped)

    def send(self, octets: bytes) -> None:
        """Send what the connection takes now; ``receive`` sends the rest.

        A connection that is broken says so at the next ``receive``, after the
        last words of the server.
        """
        self._outgoing += octets
        self._flush()

    def receive(self, *, idle_seconds: float, deadline: float) -> bytes:
        """The next octets, b"" at the end of the stream; waits ``idle_seconds``, never past ``deadline``."""
        started = self._monotonic()
        if started >= deadline:
            raise _timed_out(_TIME_IS_OVER)
        limit = min(started + idle_seconds, deadline)
        while True:
            octets = self.receive_now()
            if octets is not None:
                return octets
            events = select.POLLIN | (select.POLLOUT if self._flush() else 0)
            self._wait(
                events,
                limit,
                f"nothing came for {idle_seconds:g} s" if limit < deadline else _TIME_IS_OVER,
            )

    def receive_now(self) -> bytes | None:
        """What has arrived, b"" at the end of the stream, None when there is nothing yet."""
        try:
            return self._socket.recv(RECEIVE_OCTETS)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return None
        except OSError as error:
            raise Pop3Error(FailureKind.TRANSIENT, f"the connection broke: {_reason(error)}") from error

    def close(self) -> None:
        """Drop the connection. May be called again."""
        if isinstance(self._socket, ssl.SSLSocket):
            with suppress(OSError, ValueError):  # a farewell that nobody waits for
                self._socket.unwrap()
        self._socket.close()

    def _flush(self) -> bool:
        """Send what the connection takes. True when something is left."""
        while self._outgoing:
            try:
                sent = self._socket.send(self._outgoing)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return True
            except OSError:
                self._outgoing.clear()  # reading tells what happened, and what the server said before it
            else:
                del self._outgoing[:sent]
        return False

    def _wait(self, events: int, deadline: float, reason: str) -> None:
        left_seconds = deadline - self._monotonic()
        if left_seconds > 0:
            poll = select.poll()  # not select(): a process with many threads has descriptors over 1023
            poll.register(self._socket, events)
            if poll.poll(math.ceil(left_seconds * 1000)):
                return
        raise _timed_out(reason)


def _timed_out(reason: str) -> Pop3Error:
    return Pop3Error(FailureKind.TRANSIENT, f"timed out: {reason}")


def _handshake_failure(error: OSError) -> Pop3Error:
    reason = f"TLS failed: {_reason(error)}"
    if isinstance(error, ssl.SSLCertVerificationError):
        return Pop3Error(FailureKind.OPERATOR, reason)
    if isinstance(error, ssl.SSLError) and error.reason in {"WRONG_VERSION_NUMBER", "HTTP_REQUEST"}:
        return Pop3Error(FailureKind.OPERATOR, "TLS failed: the server speaks no TLS on this port")
    return Pop3Error(FailureKind.TRANSIENT, reason)


def _tls_facts(wrapped: ssl.SSLSocket) -> TlsFacts:
    der = wrapped.getpeercert(binary_form=True) or b""
    not_after = (wrapped.getpeercert() or {}).get("notAfter")
    cipher = wrapped.cipher()
    return TlsFacts(
        version=wrapped.version() or "",
        cipher=cipher[0] if cipher else "",
        certificate_sha256=hashlib.sha256(der).hexdigest(),
        certificate_not_after=(
            datetime.fromtimestamp(ssl.cert_time_to_seconds(not_after), UTC)
            if isinstance(not_after, str)
            else None
        ),
    )


def _reason(error: Exception) -> str:
    """One line for people, without the C source positions that OpenSSL adds."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message.rstrip(".")
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.replace("_", " ").lower()
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
