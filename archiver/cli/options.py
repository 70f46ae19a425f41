"""Options that several commands share, and what they mean for an account."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from archiver.model import Account
    from archiver.pop3 import Endpoint

PasswordFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="The password is in this file, whole, less one final line end. It is read at each poll.",
    ),
]
PasswordEnv = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="The password is in this environment variable at each poll."),
]
PasswordStdin = Annotated[
    bool, typer.Option("--password-stdin", help="Read the password from standard input.")
]
TlsMode = Annotated[
    str | None,
    typer.Option(
        metavar="MODE",
        help="implicit (port 995), starttls (port 110), or none: the password crosses the network in clear. "
        "A URL with pop3s: is implicit, one with pop3: demands starttls, one with pop2: needs this.",
    ),
]
CaFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Certificates (PEM) to trust in place of the system's.")
]
TlsPin = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SHA256",
        help="Trust the certificate, or the public key, with this SHA-256 and no other, whatever its name, "
        "issuer and dates. May be given again, for the next one. none: no pins any more.",
    ),
]
TlsMinimum = Annotated[
    str | None,
    typer.Option(
        metavar="VERSION",
        help="1.2 (default) or 1.3; 1.0 or 1.1 for a server that cannot be replaced: they are broken.",
    ),
]
TlsServerName = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Expect this name in the certificate, not the URL's. none: the URL's."),
]
ClientCertificate = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Show this certificate (PEM) to the server. none: no certificate."),
]
ClientKey = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="The client certificate's key (PEM, without a passphrase), if it is not in the same file.",
    ),
]
Delete = Annotated[
    str | None,
    typer.Option(
        metavar="POLICY",
        help="never (default), after-archived, or after-days=N: on the mail server, once proved.",
    ),
]
Timeout = Annotated[
    float | None,
    typer.Option(metavar="SECONDS", help="How long to wait for the mail server at each step.", min=1),
]

Interval = Annotated[float | None, typer.Option(metavar="SECONDS", help="Between two polls.", min=1)]
IntervalMax = Annotated[
    str | None,
    typer.Option(
        metavar="SECONDS",
        help="Up to which the interval grows while no mail comes. none: it does not.",
    ),
]
Cron = Annotated[
    str | None,
    typer.Option(
        metavar="EXPRESSION",
        help="Poll at these moments in place of the interval: minute hour day month weekday. none: not so.",
    ),
]
TimeZone = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Of --cron and --blackout, such as Europe/Berlin. UTC unless given."),
]
Blackout = Annotated[
    str | None,
    typer.Option(
        metavar="WINDOWS",
        help='When not to poll, such as "Mon-Fri 08:00-18:00, Sat 22:00-02:00". none: never.',
    ),
]
DayBytes = Annotated[
    str | None,
    typer.Option(metavar="OCTETS", help="To fetch in one day (UTC) at most. none: as the settings say."),
]


NONE = "none"
"""Takes away what an account has."""
NO_FILE = Path(NONE)


@dataclass(frozen=True, slots=True)
class Given:
    """The options of one command, checked. None where an option was not given."""

    password_file: Path | None
    password_env: str | None
    password_stdin: bool
    tls: str | None
    ca_file: Path | None
    delete: str | None
    timeout: float | None
    tls_pins: tuple[str, ...] | None = None
    tls_minimum: str | None = None
    tls_server_name: str | None = None
    client_certificate: Path | None = None
    client_key: Path | None = None

    @classmethod
    def of(
        cls,
        *,
        password_file: Path | None,
        password_env: str | None,
        password_stdin: bool,
        tls: str | None,
        ca_file: Path | None,
        delete: str | None,
        timeout: float | None,
        tls_pin: list[str] | None = None,
        tls_minimum: str | None = None,
        tls_server_name: str | None = None,
        client_certificate: Path | None = None,
        client_key: Path | None = None,
    ) -> "Given":
        """Raises UsageError for values and combinations that make no sense."""
        from archiver.errors import UsageError
        from archiver.model import DeletePolicy
        from archiver.pop3 import TLS_VERSIONS, Tls

        if (password_file is not None) + (password_env is not None) + password_stdin > 1:
            raise UsageError("give one of --password-file, --password-env, --password-stdin")
        modes = [mode.value for mode in Tls]
        if tls is not None and tls not in modes:
            raise UsageError(f"--tls {tls} is unknown: use {', '.join(modes[:-1])} or {modes[-1]}")
        if delete is not None:
            try:
                DeletePolicy.parse(delete)
            except ValueError as error:
                raise UsageError(str(error)) from None
        if tls_minimum is not None and tls_minimum not in TLS_VERSIONS:
            raise UsageError(f"--tls-minimum {tls_minimum} is unknown: use {', '.join(TLS_VERSIONS)}")
        if ca_file is not None and not ca_file.is_file():
            raise UsageError(f"there is no CA file {ca_file}")
        for what, file in (("certificate", client_certificate), ("key", client_key)):
            if file is not None and file != NO_FILE and not file.is_file():
                raise UsageError(f"there is no client {what} {file}")
        return cls(
            password_file and password_file.absolute(),
            password_env,
            password_stdin,
            tls,
            ca_file and ca_file.absolute(),
            delete,
            timeout,
            _pins(tls_pin),
            tls_minimum,
            tls_server_name,
            client_certificate,
            client_key,
        )

    def endpoint(self, url: str) -> "Endpoint":
        """The endpoint of a URL. Raises UsageError."""
        from archiver.errors import UsageError
        from archiver.pop3 import Tls, UrlError, parse_url

        try:
            return parse_url(url, None if self.tls is None else Tls(self.tls))
        except UrlError as error:
            raise UsageError(str(error), hint="a URL looks like pop3s://you@mail.example.com") from None

    def applied_to(self, account: "Account") -> "Account":
        """The account with what was given, apart from the password.

        Raises UsageError for choices about TLS that do not go together.
        """
        from archiver.bootstrap import tls_settings
        from archiver.model import DeletePolicy

        changed = replace(
            account,
            ca_file=account.ca_file if self.ca_file is None else str(self.ca_file),
            delete=account.delete if self.delete is None else DeletePolicy.parse(self.delete),
            timeout_seconds=account.timeout_seconds if self.timeout is None else self.timeout,
            tls_pins=account.tls_pins if self.tls_pins is None else self.tls_pins,
            tls_minimum=self.tls_minimum or account.tls_minimum,
            tls_server_name=_kept(account.tls_server_name, self.tls_server_name),
            client_certificate=_kept(account.client_certificate, self.client_certificate),
            client_key=None if self.client_certificate else account.client_key,
        )
        changed = replace(changed, client_key=_kept(changed.client_key, self.client_key))
        tls_settings(changed)
        return changed

    def reference(self) -> str | None:
        """The reference to the password, where one was given."""
        if self.password_file is not None:
            return f"file:{self.password_file}"
        if self.password_env is not None:
            return f"env:{self.password_env}"
        return None

    @property
    def names_password(self) -> bool:
        """Whether it was told where the password is."""
        return self.password_stdin or self.reference() is not None

    @property
    def changes(self) -> str | None:
        """The first option given that would change an account, None when there is none."""
        options = {
            "--password-file": self.password_file,
            "--password-env": self.password_env,
            "--tls": self.tls,
            "--ca-file": self.ca_file,
            "--delete": self.delete,
            "--timeout": self.timeout,
            "--tls-pin": self.tls_pins,
            "--tls-minimum": self.tls_minimum,
            "--tls-server-name": self.tls_server_name,
            "--client-certificate": self.client_certificate,
            "--client-key": self.client_key,
        }
        return next((name for name, value in options.items() if value is not None), None)

    def check_password(self) -> None:
        """See now that the password can be had. Raises OperatorNeeded."""
        from archiver.secrets import Secrets

        reference = self.reference()
        if reference is not None:
            Secrets(None).resolve("", "this account", reference)


@dataclass(frozen=True, slots=True)
class Calendar:
    """The options that say when an account is polled, and how much. None where one was not given."""

    interval: float | None
    interval_max: str | None
    cron: str | None
    time_zone: str | None
    blackout: str | None
    day_bytes: str | None

    def applied_to(self, account: "Account") -> "Account":
        """The account with what was given. Raises UsageError for what makes no sense."""
        from archiver.errors import UsageError
        from archiver.timetable import Timetable

        changed = replace(
            account,
            interval_seconds=self.interval or account.interval_seconds,
            interval_max_seconds=_number("--interval-max", self.interval_max, account.interval_max_seconds),
            cron=_kept(account.cron, self.cron),
            time_zone=self.time_zone or account.time_zone,
            blackout=_kept(account.blackout, self.blackout) or "",
        )
        day_bytes = _number("--day-bytes", self.day_bytes, account.day_bytes)
        changed = replace(changed, day_bytes=None if day_bytes is None else int(day_bytes))
        try:
            Timetable.of(changed)
        except ValueError as error:
            raise UsageError(f"account {account.name}: {error}") from None
        return changed


def _number(option: str, given: str | None, before: float | None) -> float | None:
    from archiver.errors import UsageError

    if given is None:
        return before
    if given == NONE:
        return None
    if not (given.isascii() and given.isdigit() and int(given)):
        raise UsageError(f"{option} {given!r} is neither a whole number above 0 nor none")
    return float(given)


def _pins(given: list[str] | None) -> tuple[str, ...] | None:
    """The pins given, none of them if that is what was said. Raises UsageError."""
    from archiver.errors import UsageError
    from archiver.pop3 import parse_pin

    if not given:
        return None
    if given == [NONE]:
        return ()
    try:
        return tuple(sorted({parse_pin(pin) for pin in given}))
    except ValueError as error:
        raise UsageError(f"--tls-pin: {error}") from None


def _kept(before: str | None, given: str | Path | None) -> str | None:
    if given is None:
        return before
    if str(given) == NONE:
        return None
    return str(given.absolute()) if isinstance(given, Path) else given


def need_terminal(account: str) -> None:
    """Raises UsageError where nobody can be asked for a password."""
    from archiver.errors import UsageError

    if not sys.stdin.isatty():
        raise UsageError(
            f"{account} needs a password, and nobody can be asked here",
            hint="give --password-file FILE, --password-env NAME or --password-stdin",
        )


def ask(account: str) -> str:
    """Ask the person at the terminal. Raises UsageError where there is none."""
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
