"""A mailbox's address: POP URLs (RFC 2384), and the channel that they demand.

Owns the parsing and writing of ``pop3s://user@host`` and its relatives; ``pop2:``
is an addition of this project. Promises that a URL never contains a password.
Promises that nothing passes which could break out of a command line (CR, LF,
NUL), and that no error repeats a possible secret. Leaves secrets, and the choice
of a mechanism, to others.
"""

import re
import unicodedata
from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv6Address
from typing import Final
from urllib.parse import quote, unquote_to_bytes


class Tls(Enum):
    """How the channel becomes private."""

    IMPLICIT = "implicit"
    """TLS from the first byte (RFC 8314 section 3)."""
    STARTTLS = "starttls"
    """STLS demanded before any secret is sent (RFC 2595 section 4), and no fallback to clear text."""
    NONE = "none"
    """No TLS: the operator explicitly allows passwords in clear text on this path."""


class Version(Enum):
    """Which Post Office Protocol the server speaks."""

    POP2 = 2
    """RFC 937."""
    POP3 = 3
    """RFC 1939."""


class UrlError(ValueError):
    """A POP URL that cannot be used. The message is one line and never repeats the URL."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Which server to call, and as which user."""

    host: str
    """A name in A-labels, an IPv4 address, or an IPv6 address without brackets."""
    port: int
    tls: Tls
    user: str
    mechanism: str | None = None
    """The way to log in that the URL fixes after ``;AUTH=``, in upper case. None: any.

    It is a SASL name, ``+LOGIN`` or ``+APOP``.
    """
    version: Version = Version.POP3
    folder: str | None = None
    """The mailbox to open in place of the user's own; only POP2 can (FOLD)."""

    @property
    def address(self) -> str:
        """``host:port`` for people, with brackets around an IPv6 address."""
        return f"{self._bracketed_host}:{self.port}"

    @property
    def url(self) -> str:
        """The URL of this endpoint: ``parse_url(endpoint.url, endpoint.tls) == endpoint``.

        ``Tls.IMPLICIT`` and ``Tls.STARTTLS`` are part of the URL. ``Tls.NONE`` is
        not, so that a URL copied elsewhere demands TLS.
        """
        scheme = _POP2 if self.version is Version.POP2 else "pop3s" if self.tls is Tls.IMPLICIT else "pop3"
        auth = f";AUTH={self.mechanism}" if self.mechanism else ""
        port = "" if self.port == _default_port(self.version, self.tls) else f":{self.port}"
        path = f"/{quote(self.folder, safe='')}" if self.folder else ""
        return f"{scheme}://{quote(self.user, safe='')}{auth}@{self._bracketed_host}{port}{path}"

    @property
    def _bracketed_host(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host


_DEFAULT_PORTS: Final = {Tls.IMPLICIT: 995, Tls.STARTTLS: 110, Tls.NONE: 110}
_POP2: Final = "pop2"
_POP2_PORT: Final = 109
_SCHEMES: Final = {"pop3s": Tls.IMPLICIT, "pops": Tls.IMPLICIT, "pop3": Tls.STARTTLS, "pop": Tls.STARTTLS}
_USER_BYTES = 1024  # far more than the 255 octets of a command line; SASL lines may be longer

_FOLDER_BYTES = 200  # fits into a command line of 255 octets beside FOLD
_HOST_NAME_BYTES = 253  # RFC 1035 section 2.3.4, without the root
_LARGEST_PORT = 65535

_PORT = re.compile(r"[0-9]{1,5}")
_HOST_NAME = re.compile(r"(?!-)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?")
_AUTH_TYPE = re.compile(r"\+?[A-Z0-9_-]{1,40}")
_BAD_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")


def parse_url(url: str, tls: Tls | None = None) -> Endpoint:
    """Parse a POP URL: ``pop3s://user@host``, ``pop3://user@host:1110``, ``pop://user;AUTH=PLAIN@[::1]``.

    ``pop3s`` means TLS from the first byte, port 995. ``pop3`` and ``pop`` mean
    port 110 and, without ``tls``, STLS demanded. ``pop2``, port 109, has no TLS of
    its own: ``tls`` must be NONE, or IMPLICIT if something before the server
    (stunnel) adds it. The path of ``pop2`` names a folder. The last ``@`` ends the
    user name, so that an address as user name needs no ``%40``. Raises UrlError.
    """
    if any(c.isspace() or not c.isprintable() for c in url):
        raise UrlError("the URL contains a space or a control character; in a user name write it as %XX")
    scheme, separator, rest = url.partition("://")
    scheme = scheme.lower()
    if not separator or scheme not in {*_SCHEMES, _POP2}:
        raise UrlError("a POP URL starts with pop3s:// (TLS) or pop3:// (STARTTLS)")
    _refuse_password(rest)
    if "?" in rest or "#" in rest:
        raise UrlError("a POP URL has no query and no fragment; in a user name write ? as %3F and # as %23")
    authority, _, path = rest.partition("/")
    if path and scheme != _POP2:
        raise UrlError("a POP URL has no path; in a user name write / as %2F")
    userinfo, at, hostport = authority.rpartition("@")
    user, mechanism = _parse_userinfo(userinfo if at else "")
    host, port = _parse_hostport(hostport)
    if scheme == _POP2:
        version, channel = Version.POP2, _pop2_channel(tls, mechanism)
    else:
        version, channel = Version.POP3, _channel(_SCHEMES[scheme], tls)
    port = _default_port(version, channel) if port is None else port
    return Endpoint(host, port, channel, user, mechanism, version, _folder(path))


def _refuse_password(rest: str) -> None:
    # This comes first, and looks at everything before the last "@". A password may contain "/", "?" or "@",
    # and an error about those would come too late.
    if ":" in rest.rpartition("@")[0]:
        raise UrlError(
            "the URL must not contain a password: URLs end up in shell history, process lists and logs; "
            "give the password by prompt, standard input or file (write a colon in a user name as %3A)"
        )


def _channel(of_scheme: Tls, asked: Tls | None) -> Tls:
    if of_scheme is Tls.IMPLICIT and asked not in {None, Tls.IMPLICIT}:
        raise UrlError(
            "pop3s:// means TLS from the first byte, so tls must be implicit; for any other tls use pop3://"
        )
    return of_scheme if asked is None else asked


def _pop2_channel(asked: Tls | None, mechanism: str | None) -> Tls:
    if mechanism is not None:
        raise UrlError("pop2:// has one way to log in, so remove ;AUTH=")
    if asked is None or asked is Tls.STARTTLS:
        raise UrlError(
            "pop2:// has no TLS, so the password crosses the network in clear text: "
            "to allow that, for example in a tunnel, set tls none; "
            "if something before the server adds TLS, set tls implicit"
        )
    return asked


def _default_port(version: Version, tls: Tls) -> int:
    return _POP2_PORT if version is Version.POP2 else _DEFAULT_PORTS[tls]


def _parse_userinfo(userinfo: str) -> tuple[str, str | None]:
    encoded_user, semicolon, parameter = userinfo.partition(";")
    user = _percent_decoded(encoded_user)
    if not user:
        raise UrlError("the URL names no user: pop3s://user@host")
    if len(user.encode()) > _USER_BYTES:
        raise UrlError(f"the user name is longer than {_USER_BYTES} bytes")
    if not semicolon:
        return user, None
    name, _, value = parameter.partition("=")
    auth_type = _percent_decoded(value).upper()
    if name.upper() != "AUTH" or not (auth_type == "*" or _AUTH_TYPE.fullmatch(auth_type)):
        raise UrlError("only ;AUTH=<mechanism> may follow the user name; write a semicolon in it as %3B")
    return user, None if auth_type == "*" else auth_type


def _folder(path: str) -> str | None:
    """The folder's name, which FOLD sends as the rest of its line."""
    folder = _percent_decoded(path)
    if len(folder) > _FOLDER_BYTES or not folder.isascii() or folder != folder.strip():
        raise UrlError(
            f"a folder of pop2:// is ASCII of at most {_FOLDER_BYTES} bytes; write a / in it as %2F"
        )
    return folder or None


def _percent_decoded(text: str) -> str:
    if _BAD_PERCENT.search(text):
        raise UrlError("two hexadecimal digits must follow a % in the URL; write a % itself as %25")
    try:
        decoded = unquote_to_bytes(text).decode()
    except UnicodeDecodeError:
        raise UrlError("the percent-encoded text is not UTF-8") from None
    if any(unicodedata.category(c) == "Cc" for c in decoded):
        raise UrlError("the URL contains a control character, which no command can carry")
    return decoded


def _parse_hostport(hostport: str) -> tuple[str, int | None]:
    if hostport.startswith("["):
        literal, bracket, after = hostport[1:].partition("]")
        if not bracket or (after and not after.startswith(":")):
            raise UrlError("write an IPv6 address in brackets: pop3s://user@[::1]:995")
        try:
            host = str(IPv6Address(literal))
        except ValueError:
            raise UrlError("the text in brackets is not an IPv6 address") from None
        if "%" in host:
            raise UrlError("an IPv6 address in a URL cannot have a zone")
        colon, port = after[:1], after[1:]
    elif hostport.count(":") > 1:
        raise UrlError("write an IPv6 address in brackets: pop3s://user@[::1]:995")
    else:
        name, colon, port = hostport.partition(":")
        host = _host_name(name)
    return host, _port(port) if colon else None


def _host_name(name: str) -> str:
    if not name:
        raise UrlError("the URL names no host: pop3s://user@host")
    try:
        host = name.lower() if name.isascii() else name.encode("idna").decode("ascii")
    except UnicodeError:
        host = ""
    if len(host) > _HOST_NAME_BYTES or not _HOST_NAME.fullmatch(host):
        raise UrlError("the host is neither a name nor an address (write an IPv6 address in brackets)")
    return host


def _port(text: str) -> int:
    if not _PORT.fullmatch(text) or not 1 <= int(text) <= _LARGEST_PORT:
        raise UrlError(f"the port must be a number from 1 to {_LARGEST_PORT}")
    return int(text)
