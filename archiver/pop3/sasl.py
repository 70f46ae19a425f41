"""How a client proves who it is: SASL mechanisms (RFC 5034) and the choice among them.

Owns what a mechanism says and which one is tried. Promises that the choice is
by our policy and never by the server's order, and that a secret appears in no
``repr``. Leaves the AUTH exchange itself (base64, two-step form, cancelling) to
the mailbox.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from archiver.pop3.failures import FailureKind, Pop3Error

LOGIN_COMMANDS: Final = "USER/PASS"
"""The commands of RFC 1939, which are no SASL mechanism; a URL fixes them by ``;AUTH=+LOGIN``."""


class Mechanism(Protocol):
    """One run of a SASL mechanism, from the client's side. Octets are raw, not base64."""

    @property
    def name(self) -> str:
        """The registered name, in upper case."""

    @property
    def complete(self) -> bool:
        """Whether the client has nothing left to say or to verify; a +OK before that is an attack."""

    def start(self) -> bytes | None:
        """What the client says first, or None when the server speaks first."""

    def respond(self, challenge: bytes, /) -> bytes:
        """The answer to a challenge. Raises Pop3Error for one that the mechanism does not allow."""


@dataclass(slots=True)
class Plain:
    """PLAIN (RFC 4616): one message with user and password, in UTF-8."""

    user: str
    password: str = field(repr=False)
    name: str = field(default="PLAIN", init=False)
    complete: bool = field(default=False, init=False)

    def start(self) -> bytes:
        if "\0" in self.user or "\0" in self.password:
            raise Pop3Error(
                FailureKind.OPERATOR, "SASL PLAIN cannot carry a NUL in the user name or password"
            )
        self.complete = True
        return b"\0" + self.user.encode() + b"\0" + self.password.encode()

    def respond(self, _challenge: bytes, /) -> bytes:
        raise Pop3Error(FailureKind.PROTOCOL, "the server asks for more than SASL PLAIN has to say")


MECHANISMS: Final[Mapping[str, Callable[[str, str], Mechanism]]] = {"PLAIN": Plain}
"""Constructors by name: user and password to a mechanism. Order is preference; new mechanisms join here."""


def choose_mechanism(
    offered: frozenset[str],
    fixed: str | None,
    *,
    private: bool,
    user_is_ascii: bool = True,
) -> tuple[str, ...]:
    """The ways to log in, best first. A later one is for a server that does not know the earlier ones.

    ``offered`` are the SASL names of CAPA, empty when it told none. ``fixed``
    is what the URL names: then nothing else is tried (RFC 2384), offered or
    not, since servers under-report. ``private`` says whether a password may
    cross this channel: by TLS, or because the operator said so. USER/PASS is
    always the last resort, as every server knows it, where it can carry the
    name. Raises Pop3Error: SECURITY when the channel is not private, OPERATOR
    when there is no way.
    """
    if not private:
        raise Pop3Error(FailureKind.SECURITY, "the password was not sent: the channel is not private")
    if fixed is not None:
        name = LOGIN_COMMANDS if fixed == "+LOGIN" else fixed
        if name != LOGIN_COMMANDS and name not in MECHANISMS:
            raise Pop3Error(
                FailureKind.OPERATOR, f"the login mechanism {fixed} that the URL names is not supported"
            )
        return (name,)
    ways = tuple(name for name in MECHANISMS if name in offered)
    if user_is_ascii or not ways:
        ways += (LOGIN_COMMANDS,)
    return ways
