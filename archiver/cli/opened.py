"""From the settings to an open archive: what nearly every command begins with."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from archiver.bootstrap import App


@contextmanager
def opened() -> Iterator["App"]:
    """The parts of this process by its settings, closed at the end. Raises UsageError for wrong settings."""
    from archiver.bootstrap import App
    from archiver.settings import load

    with App(load()) as app:
        yield app
