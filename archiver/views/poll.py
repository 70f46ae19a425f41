"""What one poll counted, as JSON: the same names in ``sync --json``, ``account show --json`` and the log."""

from dataclasses import asdict

from archiver.model import Counts


def counts_json(counts: Counts, to_come: int | None) -> dict[str, int | None]:
    """The counts of messages by their names for scripts, with what is still to come of the listing."""
    numbers = asdict(counts)
    of_listing = {name: numbers[name] for name in ("new", "known", "quarantined")}
    del numbers["fetched_bytes"]
    return of_listing | {"to_come": to_come} | numbers
