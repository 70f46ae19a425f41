"""The pages of results: tables, a chart, and which goals were met.

Owns ``results.md``, ``results.svg`` and the marked part of ``windows.md`` in
docs/performance. It generates them from the rows' JSON, so it can write them
again without measuring.
"""

import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tests.bench.contest import Sample, figure_of

_MIB = 1024 * 1024
_NOTHING = "-"
_OTHERS = 0.1  # share of the machine's time used by other processes; above it, the machine was busy
_DISTURBED = "**Measured on a busy machine**: these figures only show that the row works."

# Sizes in the chart, in pixels.
_WIDTH, _LABEL_WIDTH, _FIGURE_WIDTH = 900, 300, 120
_BAR_HEIGHT, _BAR_GAP, _TITLE_HEIGHT = 16, 5, 34
_OURS_COLOUR, _LIMIT_COLOUR, _THEIRS_COLOUR, _INK = "#1f6f8b", "#b9c4c9", "#d98e4a", "#222222"


def write(results: Path, docs: Path, order: Sequence[str]) -> None:
    """Write the pages from the rows that exist."""
    rows = [json.loads(file.read_text()) for letter in order if (file := results / f"{letter}.json").exists()]
    if not rows:
        return
    (docs / "results.md").write_text(_page(rows))
    (docs / "results.svg").write_text(_picture(rows))
    for row in rows:
        if row["row"] == "w":
            parts = [*_disturbed(row), *map(_windows, row["measured"]["contests"])]
            fill(docs / "windows.md", "windows", "\n\n".join(parts))


def fill(page: Path, mark: str, text: str) -> None:
    """Put ``text`` between the two comments with that name."""
    begin, end = f"<!-- {mark}: made by make bench -->", f"<!-- {mark} ends -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    old = page.read_text()
    if not pattern.search(old):
        raise ValueError(f"{page.name} has no comments that mark the place of {mark}")
    page.write_text(pattern.sub(lambda _: f"{begin}\n\n{text}\n\n{end}", old))


def _page(rows: Sequence[Mapping[str, Any]]) -> str:
    first, last = min(row["at"] for row in rows), max(row["at"] for row in rows)
    machine = rows[-1]["machine"]
    versions = {name: version for row in rows for name, version in row["versions"].items()}
    corpus = rows[-1]["corpus"]
    minutes = sum(row["seconds"] for row in rows) / 60
    parts = [
        "# Results",
        (
            "`make bench` generates this page. [README.md](README.md) explains the rows and how they are "
            "measured. Compare figures only within one contest, not with those of another day."
        ),
        (
            f"Measured from {first} to {last}, {minutes:.0f} minutes in total, on {machine['processors']}, "
            f"{machine['memory']}, {machine['disk']}, {machine['system']}, Python {machine['python']}."
        ),
        _circumstances(rows),
        "Versions: " + ", ".join(f"{name} {version}" for name, version in sorted(versions.items())) + ".",
        (
            f"The mail: {corpus['messages']:,} messages, {corpus['octets'] / 1e6:.0f} MB; median "
            f"{corpus['median'] / 1e3:.1f} KB, mean {corpus['mean'] / 1e3:.1f} KB, largest "
            f"{corpus['largest'] / 1e6:.1f} MB."
        ),
        "## Goals",
        _goals(rows),
        "![Rates of the archiver and of other programs](results.svg)",
    ]
    for row in rows:
        parts += [f"## {row['row']}: {row['title']}", *_disturbed(row)]
        for contest in row["measured"]["contests"]:
            parts += [f"**{contest['title']}**", _table(contest)]
        if statements := row["measured"]["facts"].get("statements"):
            parts.append(_statements(statements))
        parts += row["measured"]["notes"]
    return "\n\n".join(parts) + "\n"


def _disturbed(row: Mapping[str, Any]) -> list[str]:
    return [_DISTURBED] if row["others"] > _OTHERS else []


def _circumstances(rows: Sequence[Mapping[str, Any]]) -> str:
    """Which commit each row measured, and how busy the machine was with other processes."""
    lines = [
        "| commit | rows | load average before | share of the machine used by other processes |",
        "| --- | --- | ---: | ---: |",
    ]
    runs: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for row in rows:
        runs.setdefault((row["commit"], row["load"]), []).append(row)
    for (commit, load), of_it in runs.items():
        letters = " ".join(row["row"] for row in of_it)
        shares = [row["others"] for row in of_it]
        busy = ", **a busy machine**" if max(shares) > _OTHERS else ""
        lines.append(f"| {commit} | {letters} | {load:.1f} | {min(shares):.0%} to {max(shares):.0%}{busy} |")
    return "\n".join(lines)


def _goals(rows: Iterable[Mapping[str, Any]]) -> str:
    lines = ["| row | what | measured | goal | |", "| --- | --- | ---: | ---: | --- |"]
    for row in rows:
        for goal in row["measured"]["goals"]:
            value, target, sense = goal["value"], goal["target"], goal["sense"]
            if value is None:
                shown, verdict = _NOTHING, "not measured"
            else:
                shown = _number(value)
                verdict = "met" if (value >= target if sense == ">=" else value <= target) else "**missed**"
                verdict += ", busy machine" if row["others"] > _OTHERS else ""
            aimed = f"{'≥' if sense == '>=' else '≤'} {_number(target)}"
            lines.append(f"| {row['row']} | {goal['text']} | {shown} | {aimed} | {verdict} |")
    return "\n".join(lines)


def _table(contest: Mapping[str, Any]) -> str:
    unit = contest["unit"]
    lines = [
        (
            f"| | {unit}/s: median | min | max | n | client CPU ms each | machine CPU ms each | "
            "server CPU ms each | peak MB | start s | |"
        ),
        f"| --- |{' ---: |' * 9} --- |",
    ]
    for name, samples in _samples(contest).items():
        rates = [figure_of(sample, "rate") for sample in samples]
        server = _median(figure_of(sample, "server_cpu_ms") for sample in samples)
        cells = [
            name,
            _number(statistics.median(rates)),
            _number(min(rates)),
            _number(max(rates)),
            str(len(rates)),
            _number(_median(figure_of(sample, "client_cpu_ms") for sample in samples)),
            _number(_median(sample.machine_cpu_seconds * 1000 / sample.units for sample in samples)),
            _number(server) if server else "",
            f"{_median(sample.peak_bytes / _MIB for sample in samples):.0f}",
            f"{start:.2f}" if (start := _median(sample.start_seconds for sample in samples)) else "",
            contest["does"][name],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"| {name} | {_NOTHING}{' |' * 9} {reason} |" for name, reason in contest["absent"].items()]
    return "\n".join(lines)


def _windows(contest: Mapping[str, Any]) -> str:
    samples = _samples(contest)
    limit = _median(figure_of(sample, "rate") for sample in samples["bare pipelined reader"])
    lines = ["| | messages/s: median | min | max | n | of the bare reader |", "| --- |" + " ---: |" * 5]
    for name, of_it in samples.items():
        rates = [figure_of(sample, "rate") for sample in of_it]
        median = statistics.median(rates)
        cells = (_number(median), _number(min(rates)), _number(max(rates)), str(len(rates)))
        lines.append(f"| {name} | {' | '.join(cells)} | {median / limit:.2f} |")
    return f"**{contest['title']}**\n\n" + "\n".join(lines)


def _statements(found: Mapping[str, Mapping[str, int]]) -> str:
    counted = [
        f"{name}: " + ", ".join(f"{count} in a batch of {size}" for size, count in counts.items())
        for name, counts in found.items()
    ]
    return "Statements sent to the database. " + ". ".join(counted) + "."


def _samples(contest: Mapping[str, Any]) -> dict[str, list[Sample]]:
    return {
        name: [Sample(**sample) for sample in samples]
        for name, samples in contest["samples"].items()
        if samples
    }


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)


def _number(value: float) -> str:
    """Three significant digits, or all digits before the decimal point."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _picture(rows: Sequence[Mapping[str, Any]]) -> str:
    """Bars of the median rates, with whiskers from min to max. Each contest is a block with its own scale."""
    shapes: list[str] = []
    y = 0
    for row in rows:
        for contest in row["measured"]["contests"]:
            samples = _samples(contest)
            rates = {name: [figure_of(sample, "rate") for sample in of_it] for name, of_it in samples.items()}
            most = max(max(of_it) for of_it in rates.values())
            y += _TITLE_HEIGHT
            title = f"{row['row']}: {contest['title']} ({contest['unit']}/s)"
            shapes.append(f'<text x="0" y="{y - 10}" font-weight="bold">{escape(title)}</text>')
            for name, of_it in rates.items():
                shapes += _bar(name, of_it, most, y)
                y += _BAR_HEIGHT + _BAR_GAP
    style = f'font-family="sans-serif" font-size="12" fill="{_INK}"'
    height = y + _BAR_GAP
    legend = "archiver: blue; other programs: orange; bare clients, which keep nothing: grey"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-10 -20 {_WIDTH + 20} {height + 30}" {style}>\n'
        f"<title>Rates of the archiver and of other programs</title>\n"
        f'<rect x="-10" y="-20" width="{_WIDTH + 20}" height="{height + 30}" fill="#ffffff"/>\n'
        f'<text x="0" y="0">{legend}; lines from minimum to maximum</text>\n'
        + "\n".join(shapes)
        + "\n</svg>\n"
    )


def _bar(name: str, rates: Sequence[float], most: float, y: int) -> list[str]:
    room = _WIDTH - _LABEL_WIDTH - _FIGURE_WIDTH

    def at(rate: float) -> float:
        return round(_LABEL_WIDTH + room * rate / most, 1)

    median, middle = statistics.median(rates), y + _BAR_HEIGHT / 2
    baseline, width = y + _BAR_HEIGHT - 4, at(median) - _LABEL_WIDTH
    return [
        f'<text x="{_LABEL_WIDTH - 8}" y="{baseline}" text-anchor="end">{escape(name)}</text>',
        (
            f'<rect x="{_LABEL_WIDTH}" y="{y}" width="{width:.1f}" height="{_BAR_HEIGHT}" '
            f'fill="{_colour(name)}"/>'
        ),
        f'<path d="M{at(min(rates))} {middle}H{at(max(rates))}" stroke="{_INK}" stroke-width="1.5"/>',
        f'<text x="{at(max(rates)) + 8}" y="{baseline}">{_number(median)}</text>',
    ]


def _colour(name: str) -> str:
    if name.startswith(("archiver", "SQLite", "PostgreSQL")):
        return _OURS_COLOUR
    if name.startswith(("bare", "reader", "no line", "a line", "40 ms")):
        return _LIMIT_COLOUR
    return _THEIRS_COLOUR
