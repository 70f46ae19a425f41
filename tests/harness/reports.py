"""Reports of polls that never were, for tests of what is done with reports."""

from typing import Any

from archiver.errors import Outcome
from archiver.model import Counts, PollReport

_COUNTED = Counts.names()


def poll_report(account: str, outcome: Outcome = "ok", **what: Any) -> PollReport:
    """A report. Its counts are given by their own names, beside its other fields."""
    counts = {name: value for name, value in what.items() if name in _COUNTED}
    others = {name: value for name, value in what.items() if name not in _COUNTED}
    return PollReport(account, outcome, counts=Counts(**counts), **others)
