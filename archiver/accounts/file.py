"""Accounts from a file, as a cluster's configuration has them.

TOML, a table ``[[account]]`` for each: ``name`` and ``url``, and where wanted
``password`` (``file:/path`` or ``env:NAME``, never the password;
``oauth:file:/path`` for an OAuth credential), ``tls``,
``ca_file``, ``delete``, ``interval_seconds``, ``interval_max_seconds``,
``cron``, ``time_zone``, ``blackout``, ``day_bytes``, ``timeout_seconds``,
``tls_pins``, ``tls_minimum``, ``tls_server_name``, ``client_certificate``,
``client_key``. Accounts are added and changed to what the file says. One that
is no longer in it goes on: an archive must not stop because a line was lost.
"""

import tomllib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from archiver import secrets
from archiver.bootstrap import tls_settings
from archiver.db import accounts
from archiver.errors import UsageError
from archiver.model import NEVER_DELETE, Account, DeletePolicy, new_account_id
from archiver.pop3 import Tls, UrlError, parse_pin, parse_url
from archiver.states import AccountState
from archiver.timetable import Timetable

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from archiver.bootstrap import Archiver


def _printable(name: str) -> str:
    if not name.isprintable() or not name.strip():
        raise ValueError("it holds nothing, or what cannot be printed")
    return name


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    name: Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_printable)]
    url: str
    password: str
    tls: Literal["implicit", "starttls", "none"] | None = None
    ca_file: str | None = None
    delete: str = str(NEVER_DELETE)
    interval_seconds: Annotated[float, Field(ge=1)] | None = None
    interval_max_seconds: Annotated[float, Field(ge=1)] | None = None
    cron: str | None = None
    time_zone: str = "UTC"
    blackout: str = ""
    day_bytes: Annotated[int, Field(gt=0)] | None = None
    timeout_seconds: Annotated[float, Field(ge=1)] | None = None
    tls_pins: list[str] = []
    tls_minimum: str = "1.2"
    tls_server_name: str | None = None
    client_certificate: str | None = None
    client_key: str | None = None


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    account: list[_Entry] = []


def take_in(archiver: "Archiver", path: Path) -> int:
    """Bring the accounts of a file into the database; returns how many were added or changed.

    All or none. Raises UsageError that names the account and what is wrong with it.
    """
    entries = _read(path)
    wanted = [_account(archiver, path, entry) for entry in entries]
    for name, times in Counter(account.name for account in wanted).items():
        if times > 1:
            raise UsageError(f"{path}: account {name} stands there twice")

    def work(connection: "Connection") -> int:
        changed = 0
        accounts.take_turn(connection)
        for account in wanted:
            found = accounts.by_name(connection, account.name)
            if found is None or found.state is AccountState.REMOVED:
                accounts.add(connection, account, archiver.now())
                changed += 1
                continue
            same = replace(
                account,
                id=found.id,
                epoch=found.epoch,
                state=found.state,
                state_reason=found.state_reason,
                avoids=found.avoids,
                deletion_suspended=found.deletion_suspended,
            )
            if same != found:
                accounts.change(connection, same, archiver.now())
                changed += 1
        return changed

    return archiver.database.transact(work)


def _read(path: Path) -> list[_Entry]:
    try:
        return _File.model_validate(tomllib.loads(path.read_text("utf-8"))).account
    except OSError as error:
        raise UsageError(f"cannot read the accounts file {path}: {error.strerror}") from error
    except ValidationError as error:
        found = error.errors()[0]
        where = ".".join(str(part) for part in found["loc"])
        raise UsageError(
            f"{path}: {where}: {found['msg']}", hint="docs/reference/settings.md describes the file"
        ) from None
    except ValueError as error:
        raise UsageError(f"{path} is not TOML: {error}") from None


def _account(archiver: "Archiver", path: Path, entry: _Entry) -> Account:
    try:
        endpoint = parse_url(entry.url, None if entry.tls is None else Tls(entry.tls))
        delete = DeletePolicy.parse(entry.delete)
        pins = tuple(sorted({parse_pin(pin) for pin in entry.tls_pins}))
        reference = secrets.check_reference(entry.password)
    except (UrlError, ValueError, UsageError) as error:
        raise UsageError(f"{path}: account {entry.name}: {error}") from None
    account = Account(
        id=new_account_id(),
        name=entry.name,
        url=endpoint.url,
        tls=endpoint.tls.value,
        secret_reference=reference,
        ca_file=entry.ca_file,
        delete=delete,
        interval_seconds=entry.interval_seconds or archiver.settings.interval_seconds,
        interval_max_seconds=entry.interval_max_seconds,
        cron=entry.cron,
        time_zone=entry.time_zone,
        blackout=entry.blackout,
        day_bytes=entry.day_bytes,
        timeout_seconds=entry.timeout_seconds,
        tls_pins=pins,
        tls_minimum=entry.tls_minimum,
        tls_server_name=entry.tls_server_name,
        client_certificate=entry.client_certificate,
        client_key=entry.client_key,
    )
    try:
        tls_settings(account)
        Timetable.of(account)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    except ValueError as error:
        raise UsageError(f"{path}: account {entry.name}: {error}") from None
    return account
