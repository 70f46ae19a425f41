"""What the bench makes of samples: rates, ratios, pages; and what a fleet's arithmetic says."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.bench import cost, report
from tests.bench.contest import Contender, Goal, Measured, Sample, compete
from tests.bench.machine import BenchError


def sample(seconds: float, cpu_seconds: float = 0.1) -> Sample:
    return Sample(
        units=100,
        octets=1_000,
        seconds=seconds,
        client_cpu_seconds=cpu_seconds,
        machine_cpu_seconds=0.2,
        peak_bytes=1024**2,
    )


def test_contenders_take_turns_and_each_round_begins_with_another() -> None:
    turns: list[str] = []

    def turn(who: str, seconds: float) -> Contender:
        def take(name: str) -> Sample:
            turns.append(who)
            return sample(seconds)

        return Contender(who, take)

    contest = compete(
        "t", "messages", [turn("ours", 1.0), turn("theirs", 2.0)], rounds=3, seconds=60, tag="t"
    )

    assert turns == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    assert contest.ratio("ours", "theirs") == 2.0
    assert contest.median("ours", "client_cpu_ms") == pytest.approx(1.0)


def test_a_peer_that_is_not_installed_is_told_of_and_compared_with_nothing() -> None:
    def never(_: str) -> Sample:
        raise AssertionError

    contenders = [
        Contender("ours", lambda _: sample(1.0)),
        Contender("theirs", never, missing="not installed"),
    ]
    contest = compete("t", "messages", contenders, rounds=1, seconds=60, tag="t")

    assert contest.ratio("ours", "theirs") is None
    assert contest.absent == {"theirs": "not installed"}


def test_a_turn_that_did_not_do_the_whole_work_ends_the_row() -> None:
    def half(_: str) -> Sample:
        raise BenchError("read 50 of 100")

    with pytest.raises(BenchError, match="theirs: read 50 of 100"):
        compete("t", "messages", [Contender("theirs", half)], rounds=1, seconds=60, tag="t")


def test_the_pages_are_made_from_what_was_kept(tmp_path: Path) -> None:
    contest = compete(
        "Title",
        "messages",
        [Contender("archiver", lambda _: sample(0.5), "stores")],
        rounds=2,
        seconds=60,
        tag="t",
    )
    goals = (Goal("fast", 200.0, 150.0, ">="), Goal("cheap", 2.0, 1.0, "<="), Goal("beside", None, 1.0, ">="))
    kept = {
        "row": "a",
        "title": "Row",
        "at": "2026-01-01T00:00:00+00:00",
        "seconds": 60.0,
        "commit": "0123abc",
        "load": 1.0,
        "others": 0.02,
        "machine": {"processors": "1 x p", "memory": "1 GiB", "disk": "d", "system": "s", "python": "3"},
        "versions": {"mpop": "1.4"},
        "corpus": {"messages": 1, "octets": 1, "median": 1, "mean": 1, "largest": 1},
        "measured": asdict(Measured([contest], goals, ("A note.",))),
    }
    (tmp_path / "a.json").write_text(json.dumps(kept))

    report.write(tmp_path, tmp_path, ["a"])

    page, picture = (tmp_path / "results.md").read_text(), (tmp_path / "results.svg").read_text()
    assert "| archiver | 200 | 200 | 200 | 2 |" in page
    assert [line.rpartition("| ")[2] for line in page.splitlines() if line.startswith("| a |")] == [
        "met |",
        "**missed** |",
        "not measured |",
    ]
    assert "A note." in page
    assert "| 0123abc | a | 1.0 | 2% to 2% |" in page
    assert picture.count("<rect") == 2


def test_ten_times_the_mailboxes_ask_ten_times_as_much() -> None:
    small, large = cost.need(10_000), cost.need(100_000)

    assert large.polls_a_second == pytest.approx(10 * small.polls_a_second)
    assert large.puts_a_day == pytest.approx(10 * small.puts_a_day)
    assert large.worker_cores == pytest.approx(10 * small.worker_cores)
    assert cost.need(1_000).pods == cost.LEAST_PODS


def test_the_tables_of_the_page_are_those_of_the_arithmetic() -> None:
    """They are written by ``python -m tests.bench.cost``."""
    assert cost.tables() in (cost.DOCS / "cost.md").read_text()
