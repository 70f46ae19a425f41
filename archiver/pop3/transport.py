"""Bytes to and from a server: TCP, TLS, and time.

Owns the socket. Promises:

- no wait is longer than the caller allows;
- both directions are served at once, so that a client which sends commands and
  a server which sends messages never wait for each other;
- before anything is sent through a TLS channel, it is as its ``TlsSettings``
  demand: chain and host name are verified, or the certificate is pinned. The
  version is 1.2 or later, or an older one that the settings allow.

Leaves the meaning of the bytes, and the host's name in errors, to
``conversation``. Time is a monotonic clock given by the caller; a deadline is a
point on it.
"""

import base64
import binascii
import errno
import hashlib
import os
import re
import socket
import ssl
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache, partial
from pathlib import Path
from selectors import EVENT_READ, EVENT_WRITE
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from archiver.pop3.failures import FailureKind, Pop3Error, printable
from archiver.pop3.loop import aside, until_ready

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

RECEIVE_BYTES: Final = 65536
"""The size of each read. A TLS record has 16 KiB. From 128 KiB on, malloc would map memory each time."""

_LARGE_RECORD_BYTES: Final = 1024
"""A smaller record is probably a complete answer, so that another read would find nothing."""

_TIME_IS_OVER: Final = "the time for this step is over"


TLS_VERSIONS: Final = ("1.0", "1.1", "1.2", "1.3")
"""What ``TlsSettings.minimum_version`` may be, in ascending order."""

SAFE_TLS_VERSIONS: Final = TLS_VERSIONS[2:]
"""Those that RFC 8996 allows. 1.0 and 1.1 are for a server that cannot be replaced."""


@dataclass(frozen=True, slots=True)
class TlsSettings:
    """Which servers to trust, by which TLS, and as which client to appear. Raises ValueError."""

    ca_file: Path | None = None
    """Trusted in place of the system's authorities."""
    pins: frozenset[str] = frozenset()
    """SHA-256 digests in hex, as ``parse_pin`` returns them.

    Each is of the server's certificate (DER), or of the public key in it
    (SubjectPublicKeyInfo, RFC 7469 section 2.4). If there are any, one must
    match, and chain, name and dates do not matter.
    """
    minimum_version: str = "1.2"
    """One of ``TLS_VERSIONS``."""
    client_certificate: Path | None = None
    client_key: Path | None = None
    """Without a passphrase. None if ``client_certificate`` contains it."""
    server_name: str | None = None
    """Expected in the certificate, and sent (SNI), in place of the host that is called."""

    def __post_init__(self) -> None:
        if self.minimum_version not in TLS_VERSIONS:
            raise ValueError(
                f"TLS version {self.minimum_version!r} does not exist: use {', '.join(TLS_VERSIONS)}"
            )
        if self.client_key is not None and self.client_certificate is None:
            raise ValueError("a client key needs a client certificate")
        if any(pin != parse_pin(pin) for pin in self.pins):
            raise ValueError("pins are 64 digits of hex in lower case")
        if self.server_name is not None and not _can_be_a_name(self.server_name):
            raise ValueError(f"{self.server_name!r} cannot be a server's name")


def _can_be_a_name(name: str) -> bool:
    """Whether ``ssl`` can encode it. ``ssl`` itself would notice only after it has taken the socket."""
    try:
        return bool(name.rstrip(".").encode("idna"))
    except UnicodeError:
        return False


DEFAULT_TLS: Final = TlsSettings()


def parse_pin(text: str) -> str:
    """A pin in lower-case hex, from what people have.

    That is 64 hex digits, with or without colons, or ``sha256//`` and base64, as
    curl's ``--pinnedpubkey`` takes it. Raises ValueError.
    """
    if text.startswith(_BASE64_PIN):
        with suppress(binascii.Error, ValueError):
            digest = base64.b64decode(text.removeprefix(_BASE64_PIN), validate=True)
            if len(digest) == hashlib.sha256().digest_size:
                return digest.hex()
    elif _HEX_PIN.fullmatch(text):
        return text.replace(":", "").lower()
    raise ValueError(
        "a pin is the SHA-256 of a certificate or of its public key: 64 hex digits, or sha256//BASE64"
    )


_BASE64_PIN: Final = "sha256//"
_HEX_PIN: Final = re.compile(r"([0-9A-Fa-f]{2}:?){31}[0-9A-Fa-f]{2}")


@dataclass(frozen=True, slots=True)
class TlsFacts:
    """The TLS of a channel, for the record: the certificate proves which server it was."""

    version: str
    cipher: str
    certificate_sha256: str
    certificate_not_after: datetime | None


@dataclass(frozen=True, slots=True)
class ShownCertificate:
    """A certificate that the server showed, trusted or not."""

    sha256: str
    text: str
    """For people, on one line: subject, end and digest."""


class _Stamp(NamedTuple):
    """Changes whenever a file, or a folder of certificates, changes."""

    path: str
    changed_ns: int
    size: int
    inode: int


class _Material(NamedTuple):
    """All that a context depends on. Accounts that differ only in pins or names share a context."""

    verifies: bool
    ca_file: Path | None
    minimum_version: str
    client_certificate: Path | None
    client_key: Path | None


def tls_context(settings: TlsSettings) -> ssl.SSLContext:
    """A context for ``settings``. Equal settings share one: loading the system's store takes some 20 ms.

    Files that changed are read again, those of the system too. Raises Pop3Error
    (OPERATOR) if a file cannot be used.
    """
    material = _Material(
        verifies=not settings.pins,
        ca_file=None if settings.pins else settings.ca_file,
        minimum_version=settings.minimum_version,
        client_certificate=settings.client_certificate,
        client_key=settings.client_key,
    )
    # The stamps are taken before the files are read. So a change in between costs one more reading, and
    # never leaves a context that is out of date. A context that cannot be made is not cached.
    return _context(material, tuple(map(_stamp, _files(material))))


def _files(material: _Material) -> list[tuple[str, Path]]:
    """The files that the context is read from, each with its name for people."""
    found: list[tuple[str, Path | str | None]] = [
        ("client certificate", material.client_certificate),
        ("client key", material.client_key),
        ("CA file", material.ca_file),
    ]
    if material.verifies and material.ca_file is None:
        system = ssl.get_default_verify_paths()
        found += [("system's CA file", system.cafile), ("system's CA folder", system.capath)]
    return [(what, Path(path)) for what, path in found if path]


def _stamp(file: tuple[str, Path]) -> _Stamp:
    what, path = file
    try:
        found = path.stat()
    except OSError as error:
        raise _unusable(what, path, error) from error
    return _Stamp(str(path), found.st_mtime_ns, found.st_size, found.st_ino)


@lru_cache(maxsize=64)
def _context(material: _Material, _stamps: tuple[_Stamp, ...]) -> ssl.SSLContext:
    if material.verifies:
        try:
            context = ssl.create_default_context(cafile=material.ca_file)
        except OSError as error:  # ssl.SSLError is one
            raise _unusable("CA file", material.ca_file, error) from error
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if material.minimum_version in SAFE_TLS_VERSIONS:
        context.minimum_version = _MINIMUM_VERSIONS[material.minimum_version]
    else:
        # TLS before 1.2 signs its handshake with SHA-1, which OpenSSL 3 accepts only at security level 0.
        # After the handshake the agreed version is compared with the minimum.
        context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        context.set_ciphers("DEFAULT:!aNULL:@SECLEVEL=0")
        context.options |= _LEGACY_SERVER_CONNECT
    if material.client_certificate is not None:
        try:
            context.load_cert_chain(
                material.client_certificate,
                material.client_key,
                password=lambda: b"",  # else OpenSSL would ask at the terminal
            )
        except OSError as error:
            raise _unusable("client certificate", material.client_certificate, error) from error
    return context


_LEGACY_SERVER_CONNECT: Final = 0x4
"""SSL_OP_LEGACY_SERVER_CONNECT. Servers of that age lack secure renegotiation (RFC 5746), and OpenSSL 3
would end the handshake. The ssl module has a name for it from Python 3.12 on."""

_MINIMUM_VERSIONS: Final = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


def _unusable(what: str, path: Path | None, error: OSError) -> Pop3Error:
    return Pop3Error(FailureKind.OPERATOR, f"the {what} {path} cannot be used: {_reason(error)}")


class TimedOut(Pop3Error):
    """A wait ended without result."""

    def __init__(self, reason: str, *, at_deadline: bool) -> None:
        super().__init__(FailureKind.TRANSIENT, f"timed out: {reason}")
        self.at_deadline = at_deadline
        """Whether the deadline passed; otherwise it was the idle time."""


class PlainText(Pop3Error):
    """The server answered a TLS handshake in clear text."""

    def __init__(self) -> None:
        super().__init__(FailureKind.OPERATOR, "the server does not speak TLS on this port")


class Distrusted(Pop3Error):
    """The server's certificate does not pass the verification that the settings demand."""


class Transport:
    """One connection. Every Pop3Error holds the reason alone; the caller adds what was tried."""

    def __init__(self, connected: socket.socket, host: str, monotonic: Callable[[], float]) -> None:
        self._socket = connected
        self._host = host
        self._monotonic = monotonic
        self._outgoing = bytearray()
        self._tls: TlsFacts | None = None
        self._is_drained = False
        connected.setblocking(False)

    @classmethod
    def connect(cls, host: str, port: int, *, timeout_seconds: float, monotonic: Callable[[], float]) -> Self:
        """Connect to the first address of ``host`` that answers; all of them share ``timeout_seconds``.

        Only the resolver itself limits how long it looks up the name.
        """
        try:
            addresses = _addresses(host, port)
        except (OSError, ValueError) as error:  # ValueError: the name cannot be encoded
            raise Pop3Error(FailureKind.TRANSIENT, _unresolved(host, error)) from error
        deadline = monotonic() + timeout_seconds
        refusal: OSError | None = None
        for left, (family, kind, protocol, _, address) in zip(
            range(len(addresses), 0, -1), addresses, strict=True
        ):
            share_seconds = (deadline - monotonic()) / left
            if share_seconds <= 0:
                break
            candidate = socket.socket(family, kind, protocol)
            try:
                _connect(candidate, address, share_seconds)
                candidate.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except OSError as error:
                candidate.close()
                refusal = error
            else:
                return cls(candidate, host, monotonic)
        if refusal is None or isinstance(refusal, TimeoutError):
            raise TimedOut("no connection", at_deadline=True) from refusal
        raise Pop3Error(FailureKind.TRANSIENT, f"no connection: {_reason(refusal)}") from refusal

    @property
    def tls(self) -> TlsFacts | None:
        """The TLS of the channel; None while it is in clear text."""
        return self._tls

    @property
    def server_end_point(self) -> bytes | None:
        """The ``tls-server-end-point`` that a login can be bound to (RFC 5929 section 4.1), or None."""
        wrapped = self._socket
        if self._tls is None or not isinstance(wrapped, ssl.SSLSocket):
            return None
        return end_point(wrapped.getpeercert(binary_form=True) or b"")

    def start_tls(self, settings: TlsSettings, *, deadline: float) -> None:
        """Handshake, and check that the channel is as ``settings`` demand."""
        wrapped = self._handshake(settings, deadline)
        facts = _tls_facts(wrapped)
        _check_version(facts.version, settings.minimum_version)
        if settings.pins:
            _check_pins(wrapped.getpeercert(binary_form=True) or b"", settings.pins)
        self._tls = facts

    def look_at_certificate(self, settings: TlsSettings, *, deadline: float) -> ShownCertificate:
        """The certificate that the server shows, unverified. After it only ``close`` is allowed."""
        wrapped = self._handshake(replace(settings, pins=_NO_PIN), deadline)
        return _shown(wrapped.getpeercert(binary_form=True) or b"")

    def _handshake(self, settings: TlsSettings, deadline: float) -> ssl.SSLSocket:
        context = tls_context(settings)
        name = (settings.server_name or self._host).rstrip(".")
        try:
            wrapped = context.wrap_socket(self._socket, server_hostname=name, do_handshake_on_connect=False)
        except ValueError as error:
            raise Pop3Error(FailureKind.OPERATOR, f"TLS cannot start: {_reason(error)}") from error
        except OSError as error:
            raise Pop3Error(FailureKind.TRANSIENT, f"TLS cannot start: {_reason(error)}") from error
        self._socket = wrapped
        while True:
            try:
                wrapped.do_handshake()
            except ssl.SSLWantReadError:
                self._wait(EVENT_READ, deadline, "the TLS handshake did not finish")
            except ssl.SSLWantWriteError:
                self._wait(EVENT_WRITE, deadline, "the TLS handshake did not finish")
            except OSError as error:
                raise _handshake_failure(error, settings) from error
            else:
                return wrapped

    def send(self, octets: bytes) -> None:
        """Send what the connection takes now; ``receive`` sends the rest.

        If the connection is broken, the next ``receive`` raises the error, after
        everything that the server sent before.
        """
        self._outgoing += octets
        self._flush()

    def receive(self, *, idle_seconds: float, deadline: float) -> bytes:
        """The next bytes, b"" at the end of the stream; waits ``idle_seconds``, never past ``deadline``."""
        started = self._monotonic()
        if started >= deadline:
            raise TimedOut(_TIME_IS_OVER, at_deadline=True)
        limit = min(started + idle_seconds, deadline)
        while True:
            # The last read found nothing, so wait before the next one.
            octets = None if self._is_drained else self.receive_now()
            if octets is not None:
                return octets
            events = EVENT_READ | (EVENT_WRITE if self._flush() else 0)
            idle = limit < deadline
            self._wait(
                events,
                limit,
                f"nothing came for {idle_seconds:g} s" if idle else _TIME_IS_OVER,
                at_deadline=not idle,
            )
            self._is_drained = False

    def receive_now(self) -> bytes | None:
        """The bytes that have arrived, b"" at the end of the stream, None if nothing has arrived yet.

        A TLS read returns one record, and servers make small records. So while
        records are large, those that have arrived are returned together.
        """
        octets = self._receive_some()
        if octets is None or len(octets) < _LARGE_RECORD_BYTES:
            return octets
        taken, size = [octets], len(octets)
        while size < RECEIVE_BYTES:
            try:
                more = self._receive_some()
            except Pop3Error:
                break  # the next call raises it again, after these bytes were returned
            if not more:
                break
            taken.append(more)
            size += len(more)
        return b"".join(taken)

    def _receive_some(self) -> bytes | None:
        self._is_drained = False
        try:
            return self._socket.recv(RECEIVE_BYTES)
        except (BlockingIOError, ssl.SSLWantReadError):
            self._is_drained = True
            return None
        except ssl.SSLWantWriteError:
            return None
        except OSError as error:
            # In TLS 1.3 a client learns only now whether the server accepts its certificate.
            kind = FailureKind.OPERATOR if _refuses_us(error) else FailureKind.TRANSIENT
            raise Pop3Error(kind, f"the connection broke: {_reason(error)}") from error

    def close(self) -> None:
        """Drop the connection. May be called again."""
        if isinstance(self._socket, ssl.SSLSocket):
            with suppress(OSError, ValueError):  # a farewell, which need not arrive
                self._socket.unwrap()
        self._socket.close()

    def _flush(self) -> bool:
        """Send what the connection takes. True if something is left."""
        while self._outgoing:
            try:
                sent = self._socket.send(self._outgoing)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return True
            except OSError:
                self._outgoing.clear()  # the next read raises the error, after the last bytes of the server
            else:
                del self._outgoing[:sent]
        return False

    def _wait(self, events: int, deadline: float, reason: str, *, at_deadline: bool = True) -> None:
        left_seconds = deadline - self._monotonic()
        if left_seconds <= 0 or not until_ready(self._socket.fileno(), events, left_seconds):
            raise TimedOut(reason, at_deadline=at_deadline)


def _addresses(host: str, port: int) -> Sequence[tuple[Any, ...]]:
    """Addresses as from getaddrinfo(3), which blocks to look up a name. Raises OSError, ValueError."""
    look_up = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    try:
        return look_up(flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        return aside(look_up)


def _unresolved(host: str, error: Exception) -> str:
    if isinstance(error, socket.gaierror) and error.errno in _NO_SUCH_HOST:
        return f"there is no host {host!r}: check the spelling"
    return f"the name {host!r} cannot be resolved: {_reason(error)}"


_NO_SUCH_HOST: Final = {socket.EAI_NONAME, socket.EAI_NODATA}


def _connect(candidate: socket.socket, address: Any, seconds: float) -> None:
    """Connect. Raises OSError, and TimeoutError if there is no answer."""
    candidate.setblocking(False)
    problem = candidate.connect_ex(address)
    if problem == errno.EINPROGRESS:
        if not until_ready(candidate.fileno(), EVENT_WRITE, seconds):
            raise TimeoutError
        problem = candidate.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if problem:
        raise OSError(problem, os.strerror(problem))


def _handshake_failure(error: OSError, settings: TlsSettings) -> Pop3Error:
    reason = _reason(error)
    if isinstance(error, ssl.SSLCertVerificationError):
        return Distrusted(FailureKind.OPERATOR, reason)
    if _refuses_us(error):
        return Pop3Error(FailureKind.OPERATOR, f"the server refuses our TLS: {reason}")
    if isinstance(error, ssl.SSLError) and error.reason in _NO_TLS:
        return PlainText()
    if isinstance(error, ssl.SSLError) and error.reason in _TOO_OLD:
        return Pop3Error(FailureKind.OPERATOR, f"{reason}; TLS {settings.minimum_version} is required")
    if isinstance(error, ssl.SSLEOFError):
        # Dovecot sends no alert; a server that is restarted looks the same.
        reason = f"{reason}; a server without TLS {settings.minimum_version} may disconnect like this"
    return Pop3Error(FailureKind.TRANSIENT, reason)


_NO_TLS: Final = frozenset({"WRONG_VERSION_NUMBER", "HTTP_REQUEST"})
_TOO_OLD: Final = frozenset({"UNSUPPORTED_PROTOCOL", "TLSV1_ALERT_PROTOCOL_VERSION"})
_REFUSALS: Final = frozenset(
    {
        "ACCESS_DENIED",
        "BAD_CERTIFICATE",
        "CERTIFICATE_EXPIRED",
        "CERTIFICATE_REQUIRED",
        "CERTIFICATE_REVOKED",
        "CERTIFICATE_UNKNOWN",
        "HANDSHAKE_FAILURE",
        "NO_CERTIFICATE",
        "UNKNOWN_CA",
        "UNSUPPORTED_CERTIFICATE",
    }
)
"""Alerts (RFC 8446 section 6.2) that come again until an operator changes a certificate or the settings."""


def _refuses_us(error: OSError) -> bool:
    """Whether the server rejects our certificate, or the lack of one, or everything that we offer."""
    reason = (error.reason if isinstance(error, ssl.SSLError) else None) or ""
    return reason.partition("_ALERT_")[2] in _REFUSALS


def _check_version(agreed: str, minimum: str) -> None:
    """Raise Pop3Error if the agreed version is older than allowed."""
    version = {"TLSv1": "1.0"}.get(agreed, agreed.removeprefix("TLSv"))
    if version not in TLS_VERSIONS or TLS_VERSIONS.index(version) < TLS_VERSIONS.index(minimum):
        raise Pop3Error(FailureKind.OPERATOR, f"the server speaks {agreed}; TLS {minimum} is required")


def _check_pins(der: bytes, pins: frozenset[str]) -> None:
    """Raise Pop3Error if neither the certificate nor its key is pinned."""
    certificate = hashlib.sha256(der).hexdigest()
    if certificate in pins or _spki_sha256(der) in pins:
        return
    raise Pop3Error(
        FailureKind.SECURITY,
        f"the server's certificate is not pinned, so nothing was sent to it; SHA-256 {certificate}",
    )


def _spki_sha256(der: bytes) -> str | None:
    """The digest of the certificate's public key; None if the kind of key is unknown."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    certificate = _certificate(der)
    if certificate is None:
        return None
    try:
        key = certificate.public_key()
        spki = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    except (ValueError, UnsupportedAlgorithm):
        return None
    return hashlib.sha256(spki).hexdigest()


def end_point(der: bytes) -> bytes | None:
    """A certificate's digest by the hash of its own signature; None if that has no hash.

    SHA-256 replaces MD5 and SHA-1 (RFC 5929 section 4.1).
    """
    from cryptography.exceptions import UnsupportedAlgorithm

    certificate = _certificate(der)
    try:
        algorithm = None if certificate is None else certificate.signature_hash_algorithm
    except UnsupportedAlgorithm:
        return None
    if algorithm is None:  # Ed25519 and similar, which include the hash
        return None
    name = "sha256" if algorithm.name in {"md5", "sha1"} else algorithm.name
    return hashlib.new(name, der).digest()


def _certificate(der: bytes) -> "Certificate | None":
    """The decoded certificate, or None. The import takes some 50 ms, and few logins need it."""
    from cryptography import x509

    try:
        return x509.load_der_x509_certificate(der)
    except (ValueError, x509.InvalidVersion):
        return None


def _shown(der: bytes) -> ShownCertificate:
    digest = hashlib.sha256(der).hexdigest()
    decoded = _certificate(der)
    if decoded is None:
        return ShownCertificate(digest, f"a certificate that cannot be read, SHA-256 {digest}")
    try:
        subject = printable(decoded.subject.rfc4514_string().encode())
        ends = f"{decoded.not_valid_after_utc:%Y-%m-%d}"
    except ValueError:
        subject, ends = "unreadable", "unknown"
    return ShownCertificate(digest, f"subject {subject or 'empty'}, valid until {ends}, SHA-256 {digest}")


_NO_PIN: Final = frozenset({"0" * 64})
"""Settings with a pin verify nothing during the handshake."""


def _tls_facts(wrapped: ssl.SSLSocket) -> TlsFacts:
    der = wrapped.getpeercert(binary_form=True) or b""
    cipher = wrapped.cipher()
    digest = hashlib.sha256(der).hexdigest()
    ends = _ends.get(digest) or _not_after(wrapped, der)
    if len(_ends) >= _ENDS_KEPT:
        _ends.clear()
    _ends[digest] = ends
    return TlsFacts(
        version=wrapped.version() or "",
        cipher=cipher[0] if cipher else "",
        certificate_sha256=digest,
        certificate_not_after=ends,
    )


_ENDS_KEPT: Final = 1000
_ends: dict[str, datetime | None] = {}
"""When certificates end, by their digest. Decoding one takes a tenth of a handshake, and few are new."""


def _not_after(wrapped: ssl.SSLSocket, der: bytes) -> datetime | None:
    decoded = (wrapped.getpeercert() or {}).get("notAfter")
    if isinstance(decoded, str):
        return datetime.fromtimestamp(ssl.cert_time_to_seconds(decoded), UTC)
    # OpenSSL decodes only a certificate that it verified, and not a pinned one.
    certificate = _certificate(der)
    try:
        return None if certificate is None else certificate.not_valid_after_utc
    except ValueError:
        return None


def _reason(error: Exception) -> str:
    """One line for people, without the C source positions that OpenSSL adds."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message.rstrip(".")
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.replace("_", " ").lower()
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
