"""The states of an account, of a sighting and of a lease, and which of them may follow which.

Every change of a state goes through the table beside its enum: a statement
that moves a row names the states it may come from with ``sources``.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import TypeVar

State = TypeVar("State", bound=StrEnum)


class AccountState(StrEnum):
    """Whether an account is polled, and if not, who can change that."""

    ACTIVE = "active"
    """Polled on its schedule."""
    PAUSED = "paused"
    """Stopped by a person, until a person resumes it."""
    WAITING = "waiting"
    """Stopped by the service, until an operator fixes what the reason beside it says."""
    REMOVED = "removed"
    """Not polled any more. Its archive stays; adding the same name and URL brings it back."""


ACCOUNT_TRANSITIONS: Mapping[AccountState, frozenset[AccountState]] = {
    AccountState.ACTIVE: frozenset({AccountState.PAUSED, AccountState.WAITING, AccountState.REMOVED}),
    AccountState.PAUSED: frozenset({AccountState.ACTIVE, AccountState.REMOVED}),
    AccountState.WAITING: frozenset({AccountState.ACTIVE, AccountState.PAUSED, AccountState.REMOVED}),
    AccountState.REMOVED: frozenset({AccountState.ACTIVE}),
}


class SightingState(StrEnum):
    """What became of a message that a listing showed."""

    PENDING = "pending"
    """Fetching it has cost a connection, or an operator wants it fetched again."""
    CAPTURED = "captured"
    """Its content is in the archive."""
    QUARANTINED = "quarantined"
    """It fails by itself. It stays on the server and is retried ever more rarely."""


SIGHTING_TRANSITIONS: Mapping[SightingState, frozenset[SightingState]] = {
    SightingState.PENDING: frozenset({SightingState.CAPTURED, SightingState.QUARANTINED}),
    # A retry captures it, or dies again on the way.
    SightingState.QUARANTINED: frozenset({SightingState.CAPTURED, SightingState.PENDING}),
    # Another message may have taken the same UIDL: then it is fetched again, and may fail.
    SightingState.CAPTURED: frozenset({SightingState.PENDING, SightingState.QUARANTINED}),
}


class LeaseState(StrEnum):
    """Where an account's lease row stands in the schedule."""

    PARKED = "parked"
    """Not due: the account is not active."""
    DUE = "due"
    """Due at a time, now or later, and claimed from then on."""
    QUEUED = "queued"
    """Due, and waiting at its host for a session."""
    LEASED = "leased"
    """A worker has it, or had it until the lease expired and another takes it over."""


LEASE_TRANSITIONS: Mapping[LeaseState, frozenset[LeaseState]] = {
    LeaseState.PARKED: frozenset({LeaseState.DUE, LeaseState.LEASED}),
    LeaseState.DUE: frozenset({LeaseState.QUEUED, LeaseState.LEASED, LeaseState.PARKED}),
    LeaseState.QUEUED: frozenset({LeaseState.DUE, LeaseState.LEASED, LeaseState.PARKED}),
    LeaseState.LEASED: frozenset({LeaseState.DUE, LeaseState.PARKED}),
}


def lease_state(*, owned: bool, due: bool, queued: bool) -> LeaseState:
    """The state of a lease row, from its columns: ``owner`` and ``due_at`` are set or not, ``queued``."""
    if owned:
        return LeaseState.LEASED
    if not due:
        return LeaseState.PARKED
    return LeaseState.QUEUED if queued else LeaseState.DUE


def sources(transitions: Mapping[State, frozenset[State]], target: State) -> list[State]:
    """The states from which ``target`` may be entered, itself included: to enter a state twice is lawful."""
    return [state for state, targets in transitions.items() if state is target or target in targets]
