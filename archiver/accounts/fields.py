"""The settings of an account, each named once.

Owns the list of what an operator may say of an account: its name, how its value
is written, what it means. From this list come the options of ``account add``,
``account edit``, ``sync`` and ``account check``, the fields of the accounts file,
the settings in ``account show --json``, the chart's schema, and the table in the
documentation. Defaults are those of ``model.Account``.

Promises that no error repeats a value that may be a secret. Leaves the rules
between settings to ``rules``, and the database's columns to ``db``: a test
compares those with this list.
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any, Final

from archiver.model import Account, DeletePolicy

NONE: Final = "none"
"""On the command line: removes a setting, where it can be without."""


@dataclass(frozen=True, slots=True)
class Kind:
    """How the value of a setting is written, in each place where it is."""

    read: Callable[[object], Any]
    """From TOML to the value that an ``Account`` has. Raises ValueError with the rest of a sentence."""
    schema: Mapping[str, Any]
    """The same as JSON Schema, as far as that can say it."""
    parse: Callable[[str], Any]
    """From the command line. Raises ValueError likewise."""
    plain: Callable[[Any], Any] = lambda value: value
    """From an ``Account`` to JSON and TOML."""
    repeated: bool = False
    """Whether it is a list, whose option may be repeated."""


class Group(Enum):
    """Settings that go together: one heading in ``--help``."""

    ADDRESS = "Address"
    """Given in a way of their own: as arguments, or through the options for passwords."""
    CONNECTION = "Connection"
    DELETION = "Deletion"
    SCHEDULE = "Schedule"


@dataclass(frozen=True, slots=True)
class Field:
    """One setting."""

    name: str
    """In the accounts file, the chart and JSON."""
    kind: Kind
    group: Group
    help: str
    """One or two sentences: for ``--help``, the documentation and the chart."""
    metavar: str = ""
    option: str = ""
    """The option's name, where it is not made from the field's."""
    without: str = ""
    """What `none` does on the command line; empty where the setting cannot be removed."""

    @property
    def flag(self) -> str:
        return f"--{(self.option or self.name).replace('_', '-')}"

    @property
    def attribute(self) -> str:
        """Its name in ``Account``, which keeps a reference to the password."""
        return "secret_reference" if self.name == "password" else self.name

    @property
    def required(self) -> bool:
        return self.name in _REQUIRED


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("write it as a string, in quotes")  # noqa: TRY004 - what was given is wrong, not the code
    return value


def _filled(value: object) -> str:
    text = _text(value)
    if not text.strip():
        raise ValueError("it is empty")
    return text


def _name(value: object) -> str:
    name = _filled(value)
    if not name.isprintable() or len(name) > LONGEST_NAME:
        raise ValueError(f"use up to {LONGEST_NAME} printable characters")
    if "://" in name:
        raise ValueError("use a word or the mail address, not a URL")
    return name


def _file(text: str) -> str:
    path = Path(text)
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    return str(path.absolute())


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value < float("inf"):
        raise ValueError("give a number of seconds of at least 1")
    return float(value)


def _seconds_of_text(text: str) -> float:
    try:
        return _seconds(float(text))
    except ValueError:
        raise ValueError(f"{text!r} is not a number of seconds of at least 1") from None


def _bytes(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError("give a whole number of bytes above 0")
    return value


def _bytes_of_text(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise ValueError(f"{text!r} is not a whole number of bytes above 0")
    return int(text)


def _choice(*choices: str) -> Kind:
    def read(value: object) -> str:
        if value not in choices:
            raise ValueError(f"{value} is unknown: use {', '.join(choices[:-1])} or {choices[-1]}")
        return str(value)

    return Kind(read, {"enum": list(choices)}, read)


def _pins(value: object) -> tuple[str, ...]:
    from archiver.pop3 import parse_pin

    if not isinstance(value, list) or not all(isinstance(pin, str) for pin in value):
        raise ValueError("write a list of strings")
    return tuple(sorted({parse_pin(pin) for pin in value}))


def _delete(value: object) -> DeletePolicy:
    return DeletePolicy.parse(_text(value))


def _reference(value: object) -> str:
    from archiver.errors import UsageError
    from archiver.secrets import check_reference

    try:
        return check_reference(_text(value))
    except UsageError as error:
        raise ValueError(str(error)) from None


def _string(read: Callable[[object], Any], **schema: Any) -> Kind:
    return Kind(read, {"type": "string", **schema}, read)


def _path() -> Kind:
    return Kind(_filled, {"type": "string", "pattern": r"^/[^\s]*[^\s/]$"}, _file)


def _number(read: Callable[[object], Any], parse: Callable[[str], Any], kind: str) -> Kind:
    return Kind(read, {"type": kind, "minimum": 1}, parse)


LONGEST_NAME: Final = 200

_PIN: Final = r"^(([0-9A-Fa-f]{2}:?){31}[0-9A-Fa-f]{2}|sha256//[A-Za-z0-9+/]{43}=)$"

FIELDS: Final = (
    Field(
        "name",
        _string(_name, minLength=1, maxLength=LONGEST_NAME, pattern=r"^[^\x00-\x1f\x7f]+$"),
        Group.ADDRESS,
        "The account's name in commands and reports.",
    ),
    Field(
        "url",
        _string(_filled),
        Group.ADDRESS,
        "The mailbox's address (RFC 2384) without a password, such as pop3s://user@host.",
        "URL",
    ),
    Field(
        "password",
        _string(_reference),
        Group.ADDRESS,
        "Where the password is: file:/path or env:NAME; for an OAuth credential, oauth:file:/path or "
        "oauth:env:NAME. Never the password itself.",
    ),
    Field(
        "tls",
        _choice("implicit", "starttls", "none"),
        Group.CONNECTION,
        "implicit (port 995), starttls (port 110), or none, which sends the password in clear text. "
        "pop3s:// implies implicit, and pop3:// implies starttls. pop2:// requires this setting.",
        "MODE",
    ),
    Field(
        "ca_file",
        _path(),
        Group.CONNECTION,
        "Trust the certificates in this file (PEM) instead of the system's.",
        "FILE",
        without="`none` trusts the system's again.",
    ),
    Field(
        "tls_pins",
        Kind(
            _pins,
            {"type": "array", "items": {"type": "string", "pattern": _PIN}},
            lambda text: _pins([text]),
            list,
            repeated=True,
        ),
        Group.CONNECTION,
        "Trust only the certificate, or public key, with this SHA-256, whatever its name, issuer and dates. "
        "Repeatable, for example for the server's next key.",
        "SHA256",
        "tls_pin",
        "`none` removes all pins.",
    ),
    Field(
        "tls_minimum",
        _choice("1.0", "1.1", "1.2", "1.3"),
        Group.CONNECTION,
        "The oldest TLS version to accept: 1.2 (default) or 1.3. Use 1.0 or 1.1, which are broken, only for "
        "a server that cannot be replaced.",
        "VERSION",
    ),
    Field(
        "tls_server_name",
        _string(_filled, pattern=r"^[^\s/@]+$"),
        Group.CONNECTION,
        "Expect this name in the certificate instead of the URL's host.",
        "NAME",
        without="`none` expects the URL's host again.",
    ),
    Field(
        "client_certificate",
        _path(),
        Group.CONNECTION,
        "Present this client certificate (PEM) to the server.",
        "FILE",
        without="`none` removes the certificate and its key.",
    ),
    Field(
        "client_key",
        _path(),
        Group.CONNECTION,
        "The client certificate's private key (PEM, without a passphrase), if it is in a file of its own.",
        "FILE",
        without="`none` reads it from the certificate's file.",
    ),
    Field(
        "timeout_seconds",
        _number(_seconds, _seconds_of_text, "number"),
        Group.CONNECTION,
        "How long to wait for the mail server at each step.",
        "SECONDS",
        "timeout",
        "`none` restores the service's defaults.",
    ),
    Field(
        "delete",
        Kind(
            _delete,
            {"type": "string", "pattern": "^(never|after-archived|after-days=[0-9]+)$"},
            _delete,
            str,
        ),
        Group.DELETION,
        "When to delete messages from the mail server: never (default), after-archived, or after-days=N. "
        "Only messages verified in the archive are deleted.",
        "POLICY",
    ),
    Field(
        "interval_seconds",
        _number(_seconds, _seconds_of_text, "number"),
        Group.SCHEDULE,
        "Time between two polls.",
        "SECONDS",
        "interval",
    ),
    Field(
        "interval_max_seconds",
        _number(_seconds, _seconds_of_text, "number"),
        Group.SCHEDULE,
        "Let the interval grow to at most this while no mail arrives.",
        "SECONDS",
        "interval_max",
        "`none` turns this off.",
    ),
    Field(
        "cron",
        _string(_filled, minLength=1),
        Group.SCHEDULE,
        "Poll on this cron schedule (minute hour day month weekday) instead of at an interval.",
        "EXPRESSION",
        without="`none` removes it.",
    ),
    Field(
        "time_zone",
        _string(_filled, minLength=1),
        Group.SCHEDULE,
        "The time zone of the cron schedule and the blackout windows, such as Europe/Berlin. Default: UTC.",
        "NAME",
    ),
    Field(
        "blackout",
        _string(_text),
        Group.SCHEDULE,
        'When not to poll, such as "Mon-Fri 08:00-18:00, Sat 22:00-02:00".',
        "WINDOWS",
        without="`none` removes all windows.",
    ),
    Field(
        "day_bytes",
        _number(_bytes, _bytes_of_text, "integer"),
        Group.SCHEDULE,
        "Fetch at most this many bytes in one day (UTC).",
        "BYTES",
        without="`none` restores the service's default.",
    ),
)

BY_NAME: Final = {field.name: field for field in FIELDS}

_REQUIRED: Final = frozenset({"name", "url", "password"})

DEFAULTS: Final = {field.name: field.default for field in fields(Account) if field.default is not MISSING}
"""What an account has where nothing is said."""


def as_json(account: Account) -> dict[str, Any]:
    """The settings of an account, by their names, without its address and its password."""
    return {
        field.name: field.kind.plain(getattr(account, field.name))
        for field in FIELDS
        if field.group is not Group.ADDRESS
    }


def schema() -> dict[str, Any]:
    """JSON Schema of one account in the accounts file; the chart holds a copy."""
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {field.name: {**field.kind.schema, "description": field.help} for field in FIELDS},
        "dependencies": {"client_key": ["client_certificate"]},
        "required": [field.name for field in FIELDS if field.required],
    }
