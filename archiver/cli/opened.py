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
    from archiver.process import private_files
    from archiver.settings import load

    settings = load()
    with private_files(group_reads=settings.file_group_read), App(settings) as app:
        yield app
