"""What a server says it can do (CAPA, RFC 2449 section 5).

Owns the reading of a capability list. Promises to take any list: unknown tags,
empty lines, repetitions, and the word CAPA that some servers put first. Servers
both under- and over-report, so this is advice; only what would be harmful to
try unasked (PIPELINING) depends on it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from archiver.pop3.failures import printable


@dataclass(frozen=True, slots=True)
class Capabilities:
    """A capability list. ``lines`` are for people; parameters of a repeated tag add up."""

    lines: tuple[str, ...]
    parameters: Mapping[str, tuple[str, ...]]

    def __contains__(self, tag: str) -> bool:
        return tag in self.parameters

    @property
    def sasl_mechanisms(self) -> frozenset[str]:
        """The names after SASL (RFC 2449 section 6.3), in upper case."""
        return frozenset(name.upper() for name in self.parameters.get("SASL", ()))

    @property
    def login_delay_seconds(self) -> float | None:
        """The least time between two logins (RFC 2449 section 6.5)."""
        for parameter in self.parameters.get("LOGIN-DELAY", ()):
            if parameter.isdecimal():
                return min(float(parameter), _LONGEST_DELAY_SECONDS)
        return None

    @property
    def expire_days(self) -> int | None:
        """After how many days the server may remove messages (RFC 2449 section 6.7).

        0: as soon as they were read. None: never, or it does not say.
        """
        for parameter in self.parameters.get("EXPIRE", ()):
            if parameter.isdecimal():
                return min(int(parameter), _LONGEST_EXPIRE_DAYS)
        return None

    @property
    def utf8_logins(self) -> bool:
        """Whether USER and PASS take UTF-8 (``UTF8 USER``, RFC 6856 section 2.2)."""
        return "USER" in {word.upper() for word in self.parameters.get("UTF8", ())}

    @property
    def implementation(self) -> str | None:
        """What the server calls itself (RFC 2449 section 6.9)."""
        return " ".join(self.parameters.get("IMPLEMENTATION", ())) or None


_LONGEST_DELAY_SECONDS = 86400.0
_LONGEST_EXPIRE_DAYS = 36500


@lru_cache(maxsize=64)
def parse_capabilities(block: bytes) -> Capabilities:
    """Read the multi-line response to CAPA. A server gives the same one at each session."""
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
