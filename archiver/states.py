"""The states of an account, and which of them may follow which.

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


def sources(transitions: Mapping[State, frozenset[State]], target: State) -> list[State]:
    """The states from which ``target`` may be entered, itself included: to enter a state twice is lawful."""
    return [state for state, targets in transitions.items() if state is target or target in targets]
