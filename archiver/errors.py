"""The errors, few, grouped by what happens next.

Whatever a mail server, a store, a database or a person does wrong ends up as
one of these. Errors of libraries are translated once, at the border where
they arise, with the original kept as ``__cause__``. A message says what was
tried, on what, and why it failed, in one line; ``hint`` says what to do. A
secret is never part of either.
"""

from typing import ClassVar, Literal

Outcome = Literal["ok", "try_later", "operator_needed", "integrity", "lease_lost"]


class ArchiverError(Exception):
    """The root of every error that this project raises on purpose."""

    outcome: ClassVar[Outcome] = "operator_needed"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class TryLater(ArchiverError):
    """It may work by itself later: network, timeout, throttling, a lock. Backed off with jitter.

    ``wait_seconds`` is what the other side asked for, where it said so.
    """

    outcome = "try_later"

    def __init__(self, message: str, *, hint: str | None = None, wait_seconds: float | None = None) -> None:
        super().__init__(message, hint=hint)
        self.wait_seconds = wait_seconds


class OperatorNeeded(ArchiverError):
    """Only an operator can fix it: credentials, a certificate, a missing bucket, a refused access."""

    outcome = "operator_needed"


class MessageRefused(ArchiverError):
    """This message alone cannot be fetched or stored. It is quarantined; the others go on."""

    outcome = "operator_needed"


class IntegrityError(ArchiverError):
    """A digest, a size or a chain is not what it must be. Stop, delete nothing, raise the alarm."""

    outcome = "integrity"


class LeaseLost(ArchiverError):
    """Another worker holds a newer token. Stop at once, write nothing more."""

    outcome = "lease_lost"


class UsageError(ArchiverError):
    """Wrong use or wrong settings; nothing was touched. The command exits with 2."""
