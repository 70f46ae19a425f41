"""What a fleet of mailboxes needs, derived from measured costs.

Owns the assumptions about mail and machines, the prices, the arithmetic, and
the measured costs (``MEASURED``). ``make bench`` keeps those that its rows
measure in docs/performance/costs.json, and writes the tables of
docs/performance/cost.md. ``python -m tests.bench.cost`` writes them without
measuring.
"""

import json
import math
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from tests.bench.contest import Figure, Sample, figure_of
from tests.bench.corpus import FULL
from tests.bench.many_mailboxes import FAR_POLLS, IN_BUCKET
from tests.bench.report import fill

DOCS = Path(__file__).parents[2] / "docs" / "performance"
SIZES = (1_000, 10_000, 100_000, 1_000_000)


@dataclass(frozen=True, slots=True)
class Costs:
    """Costs on one core of the machine on which ``make bench`` ran."""

    poll_worker_ms: float
    """CPU of the worker's process for a poll over TLS with nothing new (row d)."""
    poll_database_ms: float
    """CPU of PostgreSQL for the same (row d)."""
    poll_seconds: float
    """How long such a poll takes at a round trip of 40 ms (row d)."""
    message_worker_ms: float
    """CPU of the worker for a message, read, hashed, PUT and recorded in a batch (row a)."""
    batch_worker_ms: float
    """CPU of the worker for a batch itself: segment, its PUT, its transaction (row c, less a and d)."""
    batch_database_ms: float
    """CPU of PostgreSQL for a batch of one message (simulation)."""
    worker_mib: float
    """Memory of a worker's process that may poll 256 mailboxes at once (simulation)."""


_KEPT = "costs.json"


def kept(docs: Path = DOCS) -> Costs:
    """The costs of the last run."""
    return Costs(**json.loads((docs / _KEPT).read_text()))


MEASURED: Final = kept()

POLLS_A_DAY: Final = 24 * 60 // 5
MESSAGES_A_DAY: Final = 20
BUSIEST_HOUR: Final = 3.0  # times the mean: mail arrives in working hours, polls are spread evenly
MESSAGE_BYTES: Final = 80_000
ROW_BYTES: Final = 900  # capture, sighting, event and their indexes
DAYS_A_MONTH: Final = 30.4

WORKERS: Final = 256  # ARCHIVER_WORKERS in each pod
CORE_SHARE: Final = 0.7  # of a core: Python's threads take turns, and above this share queues grow
DATABASE_SHARE: Final = 0.5  # of its cores: vacuum, checkpoints and readers of the feed need the rest
CONNECTIONS: Final = 10  # ARCHIVER_DATABASE_CONNECTIONS in each pod
LEAST_PODS: Final = 2  # one may die
DATABASE_CONNECTIONS: Final = 400  # with more, PostgreSQL's own processes cost more than they gain


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars. ``put`` and ``get`` are of 1,000 requests, ``gb`` of a gigabyte and month."""

    name: str
    put: float
    get: float
    gb: float


# Amazon's list (aws.amazon.com/s3/pricing, S3 Standard, US East (N. Virginia), first 50 TB) and Cloudflare's
# (developers.cloudflare.com/r2/pricing, Standard), looked up in November 2026; Amazon's where it is quoted.
PRICES: Final = (
    Price("Amazon S3 Standard, us-east-1", put=0.005, get=0.0004, gb=0.023),
    Price("Cloudflare R2 Standard", put=0.0045, get=0.00036, gb=0.015),
)


@dataclass(frozen=True, slots=True)
class Need:
    """The needs of ``mailboxes`` mailboxes, in the busiest hour where that matters."""

    mailboxes: int
    polls_a_second: float
    messages_a_second: float
    worker_cores: float
    at_once: float
    pods: int
    database_cores: float
    connections: int
    puts_a_day: float
    rows_gib_a_month: float
    mail_gb_a_month: float

    @property
    def short_of(self) -> str:
        """Which part decides the number of pods."""
        return "CPU" if self.worker_cores / CORE_SHARE >= self.at_once / WORKERS else "polls at once"

    def dollars_a_month(self, price: Price) -> float:
        """For requests alone."""
        return self.puts_a_day * DAYS_A_MONTH * price.put / 1000


def need(mailboxes: int, costs: Costs = MEASURED) -> Need:
    """The arithmetic. Mail arrives at random: with a mean of m, a poll finds something with 1 - e^-m."""
    polls = mailboxes * POLLS_A_DAY / 86_400
    messages = mailboxes * MESSAGES_A_DAY / 86_400
    batches_a_day = mailboxes * POLLS_A_DAY * (1 - math.exp(-MESSAGES_A_DAY / POLLS_A_DAY))
    busy = messages * BUSIEST_HOUR
    busy_batches = polls * (1 - math.exp(-busy / polls))
    worker = (
        polls * costs.poll_worker_ms + busy * costs.message_worker_ms + busy_batches * costs.batch_worker_ms
    )
    database = polls * costs.poll_database_ms + busy_batches * costs.batch_database_ms
    cores, at_once = worker / 1000, polls * costs.poll_seconds
    pods = max(LEAST_PODS, math.ceil(cores / CORE_SHARE), math.ceil(at_once / WORKERS))
    return Need(
        mailboxes=mailboxes,
        polls_a_second=polls,
        messages_a_second=busy,
        worker_cores=cores,
        at_once=at_once,
        pods=pods,
        database_cores=database / 1000 / DATABASE_SHARE,
        connections=pods * CONNECTIONS,
        puts_a_day=mailboxes * MESSAGES_A_DAY + batches_a_day,
        rows_gib_a_month=mailboxes * MESSAGES_A_DAY * DAYS_A_MONTH * ROW_BYTES / 1024**3,
        mail_gb_a_month=mailboxes * MESSAGES_A_DAY * DAYS_A_MONTH * MESSAGE_BYTES / 1e9,
    )


def tables(costs: Costs = MEASURED) -> str:
    """The tables of cost.md."""
    needs = [need(size, costs) for size in SIZES]
    head = (
        "| | " + " | ".join(f"{each.mailboxes:,}" for each in needs) + " |\n| --- |" + " ---: |" * len(needs)
    )
    lines = [
        _line("polls a second", [f"{each.polls_a_second:,.1f}" for each in needs]),
        _line("messages a second, busiest hour", [f"{each.messages_a_second:,.1f}" for each in needs]),
        _line("polls at once", [f"{each.at_once:,.0f}" for each in needs]),
        _line("busy worker cores", [f"{each.worker_cores:,.2f}" for each in needs]),
        _line(f"**pods** of one core, {WORKERS} workers each", [f"**{each.pods:,}**" for each in needs]),
        _line("their number is set by", [_deciding(each) for each in needs]),
        _line(
            "**PostgreSQL cores**, half of them idle", [f"**{each.database_cores:,.1f}**" for each in needs]
        ),
        _line("**connections** at most", [f"**{each.connections:,}**" for each in needs]),
        _line("too many without a pooler", [_pooler(each) for each in needs]),
        _line("PUTs a day", [f"{each.puts_a_day:,.0f}" for each in needs]),
        _line("rows a month, GiB", [f"{each.rows_gib_a_month:,.1f}" for each in needs]),
        _line("mail a month, GB", [f"{each.mail_gb_a_month:,.0f}" for each in needs]),
        *(
            _line(
                f"requests a month, {price.name}", [f"${each.dollars_a_month(price):,.0f}" for each in needs]
            )
            for price in PRICES
        ),
        *(
            _line(
                f"storing one month's mail for a month, {price.name}",
                [f"${each.mail_gb_a_month * price.gb:,.0f}" for each in needs],
            )
            for price in PRICES
        ),
    ]
    measured = (
        "| measured | |\n| --- | ---: |\n"
        f"| a poll with nothing new, worker | {costs.poll_worker_ms:g} ms of CPU |\n"
        f"| the same, PostgreSQL | {costs.poll_database_ms:g} ms of CPU |\n"
        f"| the same, at 40 ms round trip, from claim to release | {costs.poll_seconds:g} s |\n"
        f"| a message, worker | {costs.message_worker_ms:g} ms of CPU |\n"
        f"| a batch, worker | {costs.batch_worker_ms:g} ms of CPU |\n"
        f"| a batch of one message, PostgreSQL | {costs.batch_database_ms:g} ms of CPU |\n"
        f"| a worker process with up to {WORKERS} polls at once | {costs.worker_mib:g} MiB |"
    )
    return f"{measured}\n\n{head}\n" + "\n".join(lines)


def _line(name: str, cells: list[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |"


def _deciding(each: Need) -> str:
    return "redundancy" if each.pods == LEAST_PODS else each.short_of


def _pooler(each: Need) -> str:
    return "yes" if each.connections > DATABASE_CONNECTIONS else "no"


def measured_by(rows: Path, costs: Costs) -> Costs:
    """These costs, updated if the rows a, c and d exist. The simulation's costs stay."""
    if not all((rows / f"{letter}.json").exists() for letter in "acd"):
        return costs
    [backfill] = _contests(rows, "a")
    many, _ = _contests(rows, "c")
    near, far = _contests(rows, "d")
    poll_ms = _median(near, IN_BUCKET, "client_cpu_ms")
    message_ms = _median(backfill, "archiver", "client_cpu_ms")
    mailbox_ms = FULL.in_each * _median(many, IN_BUCKET, "client_cpu_ms")
    return replace(
        costs,
        poll_worker_ms=_rounded(poll_ms),
        poll_database_ms=_rounded(_median(near, IN_BUCKET, "server_cpu_ms")),
        # Little's law: polls running at once, divided by polls finished in a second.
        poll_seconds=_rounded(min(FAR_POLLS, FULL.mailboxes) / _median(far, IN_BUCKET, "rate")),
        message_worker_ms=_rounded(message_ms),
        batch_worker_ms=_rounded(max(0.0, mailbox_ms - FULL.in_each * message_ms - poll_ms)),
    )


def _contests(rows: Path, letter: str) -> list[dict[str, list[Sample]]]:
    """The samples of each contest of a row, by contender."""
    contests = json.loads((rows / f"{letter}.json").read_text())["measured"]["contests"]
    return [
        {name: [Sample(**each) for each in of_it] for name, of_it in contest["samples"].items()}
        for contest in contests
    ]


def _median(contest: dict[str, list[Sample]], name: str, figure: Figure) -> float:
    return statistics.median(figure_of(sample, figure) for sample in contest[name])


def _rounded(value: float) -> float:
    """Two significant digits: the measurement is not more precise."""
    return float(f"{value:.2g}")


def write(rows: Path | None = None, docs: Path = DOCS) -> None:
    """Write the tables into the page. With ``rows``, first update and keep the measured costs."""
    costs = kept(docs)
    if rows is not None:
        costs = measured_by(rows, costs)
        (docs / _KEPT).write_text(json.dumps(asdict(costs), indent=1) + "\n")
    fill(docs / "cost.md", "cost", tables(costs))


if __name__ == "__main__":
    write()
