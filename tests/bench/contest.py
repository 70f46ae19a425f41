"""Who is measured against whom: contenders in turns, their samples, and what was aimed at.

A row of the report has one contest or several. In each round every contender
has its turn, and the next round begins with the next contender, so that what
disturbs one disturbs the others. Ratios are of medians of one run. A contender
whose turn shows that it did not do the whole work ends the row: its figure
would not be true.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tests.bench.machine import BenchError, Cost

Figure = Literal["rate", "seconds", "seconds_each", "client_cpu_ms", "server_cpu_ms"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One turn: so many messages, mailboxes or objects, of so many octets, at this cost."""

    units: int
    octets: int
    seconds: float
    client_cpu_seconds: float
    machine_cpu_seconds: float
    peak_bytes: int
    start_seconds: float = 0.0
    server_cpu_seconds: float = 0.0
    """Of the one server that the row is about, where there is such a one: PostgreSQL, or the line."""

    @classmethod
    def of(cls, cost: Cost, units: int, octets: int, *, server_cpu_seconds: float = 0.0) -> "Sample":
        return cls(
            units=units,
            octets=octets,
            seconds=cost.seconds,
            client_cpu_seconds=cost.client_cpu_seconds,
            machine_cpu_seconds=cost.machine_cpu_seconds,
            peak_bytes=cost.peak_bytes,
            start_seconds=cost.start_seconds,
            server_cpu_seconds=server_cpu_seconds,
        )


@dataclass(frozen=True, slots=True)
class Contender:
    """``turn`` takes a name that no other turn has. ``does`` says what work it is, where it differs."""

    name: str
    turn: Callable[[str], Sample]
    does: str = ""
    rounds: int | None = None
    """Fewer than the others have, for what is slow."""
    missing: str | None = None
    """Why it cannot be had here."""


@dataclass(frozen=True, slots=True)
class Contest:
    """What came out. ``unit`` is what a rate counts."""

    title: str
    unit: str
    samples: Mapping[str, Sequence[Sample]]
    does: Mapping[str, str]
    absent: Mapping[str, str]

    def median(self, name: str, figure: Figure) -> float | None:
        """Of one contender; None where it was not measured."""
        samples = self.samples.get(name)
        return statistics.median(figure_of(sample, figure) for sample in samples) if samples else None

    def ratio(self, name: str, other: str, figure: Figure = "rate") -> float | None:
        ours, theirs = self.median(name, figure), self.median(other, figure)
        return None if ours is None or not theirs else ours / theirs

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Goal:
    """``value`` is None where it could not be measured."""

    text: str
    value: float | None
    target: float
    sense: Literal[">=", "<="]


@dataclass(frozen=True, slots=True)
class Measured:
    """What a row found. ``notes`` are sentences for whoever reads the figures."""

    contests: Sequence[Contest]
    goals: Sequence[Goal] = ()
    notes: Sequence[str] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


def figure_of(sample: Sample, figure: Figure) -> float:
    match figure:
        case "rate":
            return sample.units / sample.seconds
        case "seconds":
            return sample.seconds
        case "seconds_each":
            return sample.seconds / sample.units
        case "client_cpu_ms":
            return sample.client_cpu_seconds * 1000 / sample.units
        case "server_cpu_ms":
            return sample.server_cpu_seconds * 1000 / sample.units


def compete(
    title: str, unit: str, contenders: Sequence[Contender], *, rounds: int, seconds: float, tag: str
) -> Contest:
    """So many rounds, or fewer when they take over ``seconds``, but one at least. Raises BenchError."""
    present = [contender for contender in contenders if contender.missing is None]
    samples: dict[str, list[Sample]] = {contender.name: [] for contender in present}
    began = time.monotonic()
    for number in range(rounds):
        if number and time.monotonic() - began > seconds * number / (number + 1):
            break
        start = number % len(present)
        for contender in (*present[start:], *present[:start]):
            if contender.rounds is not None and number >= contender.rounds:
                continue
            name = f"{tag}-{present.index(contender)}-{number}"
            try:
                samples[contender.name].append(contender.turn(name))
            except BenchError as error:
                raise BenchError(f"{title}: {contender.name}: {error}") from error
    absent = {one.name: one.missing for one in contenders if one.missing is not None}
    does = {contender.name: contender.does for contender in present}
    return Contest(title, unit, samples, does, absent)
