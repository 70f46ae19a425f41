"""Options that several commands share, and what they mean for an account.

The options for an account's settings are made from ``accounts.fields``.
"""

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from archiver.accounts.fields import FIELDS, NONE, Field, Group

if TYPE_CHECKING:
    from archiver.model import Account
    from archiver.pop3 import Endpoint

PASSWORDS = {
    "password_file": Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Read the password from this file at each poll. The whole file counts, except one final "
            "line end.",
        ),
    ],
    "password_env": Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Read the password from this environment variable at each poll."),
    ],
    "password_stdin": Annotated[
        bool,
        typer.Option("--password-stdin", metavar="", help="Read the password from standard input."),
    ],
}


@dataclass(frozen=True, slots=True)
class Given:
    """What the options of one command say of an account, checked."""

    settings: Mapping[str, Any]
    """The settings that were given, by the names of their fields."""
    password_file: Path | None = None
    password_env: str | None = None
    password_stdin: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Given":
        """From the values of options, by the names of their fields. Raises UsageError for unusable ones."""
        from archiver.errors import UsageError

        file, variable, stdin = (options[name] for name in PASSWORDS)
        if (file is not None) + (variable is not None) + stdin > 1:
            raise UsageError("give one of --password-file, --password-env, --password-stdin")
        settings = {}
        for field in FIELDS:
            text = options.get(field.name)
            if text is None or text == []:
                continue
            try:
                settings[field.name] = _value(field, text)
            except ValueError as error:
                raise UsageError(f"{field.flag}: {error}") from None
        return cls(settings, file and file.absolute(), variable, stdin)

    def endpoint(self, url: str) -> "Endpoint":
        """The endpoint of a URL, with the TLS mode if one was given. Raises UsageError."""
        from archiver.accounts import rules

        return rules.endpoint(url, self.settings.get("tls"))

    def applied_to(self, account: "Account", *, url: str | None = None) -> "Account":
        """The account with the given settings, and with the URL if there is one. Leaves the password alone.

        Raises UsageError for settings that do not agree.
        """
        from archiver.accounts import rules

        return rules.changed(account, self.settings if url is None else {**self.settings, "url": url})

    def reference(self) -> str | None:
        """The reference to the password, where one was given."""
        if self.password_file is not None:
            return f"file:{self.password_file}"
        if self.password_env is not None:
            return f"env:{self.password_env}"
        return None

    @property
    def names_password(self) -> bool:
        """Whether an option says where the password is."""
        return self.password_stdin or self.reference() is not None

    @property
    def changes(self) -> str | None:
        """The first given option that would change an account; None if there is no such option."""
        flags = {"--password-file": self.password_file, "--password-env": self.password_env}
        given = [flag for flag, value in flags.items() if value is not None]
        given += [field.flag for field in FIELDS if field.name in self.settings]
        return given[0] if given else None

    def check_password(self) -> None:
        """Check that the password can be read. Raises OperatorNeeded."""
        from archiver.model import Account
        from archiver.secrets import Secrets

        reference = self.reference()
        if reference is not None:
            Secrets(None).resolve(Account("", "this account", "", "", reference))


def account_options(*groups: Group) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options for passwords and for these groups of settings.

    They take the place of its parameter ``given``, in which it receives them.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        fields = [field for field in FIELDS if field.group in groups]
        types = PASSWORDS | {field.name: _option(field) for field in fields}

        @wraps(command)
        def wrapped(**values: Any) -> None:
            options = {name: values.pop(name) for name in types}
            command(given=Given.of(options), **values)

        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            if parameter.name != "given":
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
                continue
            parameters += [
                inspect.Parameter(
                    name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=False if name == "password_stdin" else None,
                    annotation=annotation,
                )
                for name, annotation in types.items()
            ]
        wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return wrapped

    return decorate


def _option(field: Field) -> Any:
    given = list[str] if field.kind.repeated else str
    described = " ".join(part for part in (field.help, field.without) if part)
    return Annotated[
        given | None,
        typer.Option(field.flag, metavar=field.metavar, help=described, rich_help_panel=field.group.value),
    ]


def _value(field: Field, given: str | list[str]) -> Any:
    """The value of an option. Raises ValueError with a sentence."""
    from archiver.accounts.fields import DEFAULTS

    if field.without and given in (NONE, [NONE]):
        return DEFAULTS[field.name]
    if isinstance(given, list):
        return field.kind.read(given)
    return field.kind.parse(given)


def need_terminal(account: str) -> None:
    """Raises UsageError if there is no terminal at which to ask for a password."""
    from archiver.errors import UsageError

    if not sys.stdin.isatty():
        raise UsageError(
            f"{account} needs a password, and there is no terminal to ask for it",
            hint="give --password-file FILE, --password-env NAME or --password-stdin",
        )


def ask(account: str) -> str:
    """Ask for the password at the terminal. Raises UsageError if there is no terminal."""
    import getpass

    need_terminal(account)
    return getpass.getpass(f"Password of {account}: ")


def from_stdin() -> str:
    """The password on standard input, as in a password file. Raises OperatorNeeded when there is none."""
    from archiver.secrets import SECRET_BYTES, from_bytes

    return from_bytes(sys.stdin.buffer.read(SECRET_BYTES + 1), "the password on standard input")


def log_quietly() -> None:
    from archiver import observe

    observe.log_quietly()
