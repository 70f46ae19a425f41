"""Accounts from a file, as the configuration of a cluster has them.

The file is TOML, with a table ``[[account]]`` for each account; ``fields`` lists
what a table may hold. Accounts are added, and changed to what the file says. An
account that is no longer in the file is still polled: an archive must not stop
because a line was lost.
"""

import difflib
import json
import re
import tomllib
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archiver.accounts import rules
from archiver.accounts.fields import BY_NAME, FIELDS
from archiver.db import Database, accounts
from archiver.errors import UsageError
from archiver.model import Account, new_account_id
from archiver.states import AccountState

if TYPE_CHECKING:
    from sqlalchemy import Connection

HINT = "docs/reference/settings.md describes the accounts file"

_TABLE = re.compile(r"^[ \t]*\[\[[ \t]*account[ \t]*\]\]", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Entry:
    """One table of the file, its values read."""

    place: str
    """Which table it is, for messages."""
    settings: dict[str, Any]


def take_in(database: Database, path: Path, at: datetime, *, interval_seconds: float) -> int:
    """Bring the accounts of a file into the database; returns how many were added or changed.

    All or none. ``interval_seconds`` is for accounts that name none. Raises
    UsageError that names the account and what is wrong with it.
    """
    wanted = [account_of(entry, interval_seconds) for entry in read(path)]

    def work(connection: "Connection") -> int:
        accounts.wait_for_others(connection)
        return sum(_take(connection, account, at) for account in wanted)

    return database.transact(work)


def _take(connection: "Connection", account: Account, at: datetime) -> bool:
    found = accounts.by_name(connection, account.name)
    if found is None or found.state is AccountState.REMOVED:
        accounts.add(connection, account, at)
        return True
    same = replace(found, **{field.attribute: getattr(account, field.attribute) for field in FIELDS})
    if same == found:
        return False
    accounts.change(connection, same, at)
    return True


def read(path: Path) -> list[Entry]:
    """The tables of a file. Raises UsageError that says where it is wrong."""
    try:
        text = path.read_text("utf-8")
        content = tomllib.loads(text)
    except OSError as error:
        raise UsageError(f"cannot read the accounts file {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path} is not TOML: {error}", hint=HINT) from None
    tables = content.pop("account", [])
    for name in content:
        raise UsageError(f"{path}: unknown key {name!r}: each account is a table [[account]]", hint=HINT)
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UsageError(f"{path}: each account is a table [[account]]", hint=HINT)
    lines = [text.count("\n", 0, found.end()) + 1 for found in _TABLE.finditer(text)]
    entries: list[Entry] = []
    names: set[str] = set()
    for index, table in enumerate(tables):
        name = table.get("name")
        told = [json.dumps(name, ensure_ascii=not name.isprintable())] if isinstance(name, str) else []
        # Text in a string that looks like a table's head would shift the lines: better none than wrong ones.
        told += [f"line {lines[index]}"] if len(lines) == len(tables) else []
        place = f"{path}: entry {index + 1}" + (f" ({', '.join(told)})" if told else "")
        entries.append(Entry(place, _settings(place, table)))
        if name in names:
            raise UsageError(f"{place}: an entry before it has the same name")
        names.add(str(name))
    return entries


def _settings(place: str, table: dict[str, Any]) -> dict[str, Any]:
    missing = [field.name for field in FIELDS if field.required and field.name not in table]
    unknown = [name for name in table if name not in BY_NAME]
    wrong = [f"no {name}" for name in missing] + [_unknown(name) for name in unknown]
    if wrong:
        raise UsageError(f"{place}: {'; '.join(wrong)}", hint=HINT)
    settings = {}
    for name, value in table.items():
        try:
            settings[name] = BY_NAME[name].kind.read(value)
        except ValueError as error:
            raise UsageError(f"{place}: {name}: {error}", hint=HINT) from None
    return settings


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, BY_NAME, 1)
    return f"unknown key {name}" + (f" (did you mean {close[0]}?)" if close else "")


def account_of(entry: Entry, interval_seconds: float) -> Account:
    """The account that a table describes, with an id of its own. Raises UsageError."""
    account = Account(new_account_id(), name="", url="", tls="", secret_reference="")
    try:
        return rules.changed(account, {"interval_seconds": interval_seconds} | entry.settings)
    except UsageError as error:
        raise UsageError(f"{entry.place}: {error}", hint=error.hint) from None
