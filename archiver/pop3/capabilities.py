"""What a server says it can do (CAPA, RFC 2449 section 5).

Owns the parsing of a capability list. Promises to accept any list: unknown tags,
empty lines, repetitions, and the word CAPA that some servers put first. Servers
list too much and too little, so a list is advice. Only PIPELINING, which would
do harm on a server without it, depends on it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from archiver.pop3.failures import printable


@dataclass(frozen=True, slots=True)
class Capabilities:
    """A capability list."""

    lines: tuple[str, ...]
    """For people."""
    parameters: Mapping[str, tuple[str, ...]]
    """By tag in upper case. Parameters of a repeated tag are joined."""

    def __contains__(self, tag: str) -> bool:
        return tag in self.parameters

    @property
    def sasl_mechanisms(self) -> frozenset[str]:
        """The names after SASL (RFC 2449 section 6.3), in upper case."""
        return frozenset(name.upper() for name in self.parameters.get("SASL", ()))

    @property
    def login_delay_seconds(self) -> float | None:
        """The shortest time between two logins (RFC 2449 section 6.5)."""
        for parameter in self.parameters.get("LOGIN-DELAY", ()):
            if parameter.isdecimal():
                return min(float(parameter), _LONGEST_DELAY_SECONDS)
        return None

    @property
    def expire_days(self) -> int | None:
        """After how many days the server may remove messages (RFC 2449 section 6.7).

        0: as soon as they are read. None: never, or it does not say.
        """
        for parameter in self.parameters.get("EXPIRE", ()):
            if parameter.isdecimal():
                return min(int(parameter), _LONGEST_EXPIRE_DAYS)
        return None

    @property
    def implementation(self) -> str | None:
        """What the server calls itself (RFC 2449 section 6.9)."""
        return " ".join(self.parameters.get("IMPLEMENTATION", ())) or None


_LONGEST_DELAY_SECONDS = 86400.0
_LONGEST_EXPIRE_DAYS = 36500


@lru_cache(maxsize=64)
def parse_capabilities(block: bytes) -> Capabilities:
    """Parse the multi-line response to CAPA. A server sends the same one in each session, so it is cached."""
    lines: list[str] = []
    parameters: dict[str, tuple[str, ...]] = {}
    for octets in block.splitlines():
        line = printable(octets.strip())
        tag, *words = line.split() or [""]
        if tag.upper() in {"", "CAPA"}:
            continue
        lines.append(line)
        parameters[tag.upper()] = parameters.get(tag.upper(), ()) + tuple(words)
    return Capabilities(tuple(lines), parameters)
