"""An account and its row: which column holds which of its values, and how.

Made from the fields of ``Account``, so that a new setting is a column and
nothing else in this layer.
"""

from collections.abc import Callable
from dataclasses import fields
from operator import attrgetter
from typing import Any, Final, NamedTuple

from archiver.model import Account, DeletePolicy
from archiver.states import AccountState


class _Coding(NamedTuple):
    """How a value is kept, where it is not kept as it is."""

    to_column: Callable[[Any], Any]
    from_column: Callable[[Any], Any]


_WORDS: Final = _Coding(" ".join, lambda text: tuple(text.split()))

_CODINGS: Final = {
    "delete": _Coding(str, DeletePolicy.parse),
    "tls_pins": _WORDS,
    "avoids": _WORDS,
    "state": _Coding(lambda state: state, AccountState),
}
_COLUMNS: Final = {"delete": "delete_policy"}
"""Where a column has another name than its field: DELETE is a word of SQL."""

_KEPT: Final = frozenset({"id", "name", "epoch", "state", "state_reason", "deletion_suspended"})
"""Values that have statements of their own, since polls and operators write them too."""

_NAMES: Final = [field.name for field in fields(Account)]
_READ: Final = attrgetter(*(_COLUMNS.get(name, name) for name in _NAMES))
_DECODED: Final = [
    (index, _CODINGS[name].from_column) for index, name in enumerate(_NAMES) if name in _CODINGS
]


def account_of(row: Any) -> Account:
    """The account in a row that has all of its columns."""
    values = list(_READ(row))
    for index, from_column in _DECODED:
        values[index] = from_column(values[index])
    return Account(*values)


def settings_of(account: Account) -> dict[str, Any]:
    """The columns that an operator may change, with their values."""
    return {column: value for column, value in columns_of(account).items() if column not in _KEPT}


def columns_of(account: Account) -> dict[str, Any]:
    """All columns that an account has values for."""
    columns = {}
    for name in _NAMES:
        value = getattr(account, name)
        coding = _CODINGS.get(name)
        columns[_COLUMNS.get(name, name)] = value if coding is None else coding.to_column(value)
    return columns
