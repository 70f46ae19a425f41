"""From a secret's reference to the secret, at poll time and not before.

An account keeps one of these references, never a password in clear:

``file:/path``
    read at each poll: a mounted Kubernetes Secret, a file that a vault agent
    renews. Counts whole, less one final line end.
``env:NAME``
    an environment variable, but none of the service's own.
``sealed:...``
    the password itself, encrypted and authenticated with the key in
    ``ARCHIVER_SECRET_KEY`` (Fernet: https://github.com/fernet/spec). It is bound
    to its account and to ``Account.login``: who can write to the database, but
    lacks the key, cannot have it sent to another server, or in clear.
``prompt:``
    nothing is kept: ``archiver sync`` asks the person at the terminal.
``none:``
    there is none: a certificate or a Kerberos ticket logs in.

``oauth:`` before one of the first three says that an OAuth credential lies
there, and not a password (``archiver.oauth``).
"""

import base64
import binascii
import codecs
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from archiver.errors import OperatorNeeded, UsageError
from archiver.model import Account

if TYPE_CHECKING:
    from cryptography.fernet import Fernet, MultiFernet

SECRET_BYTES = 64 * 1024
"""Longer than any password or token; a path given by mistake is not read whole."""

PROMPT = "prompt:"
NONE = "none:"
OAUTH = "oauth:"
"""Before the reference to a credential by which access tokens are had."""

_SEALED = "sealed:"

KEY_HINT = (
    "make a key with: openssl rand -base64 32 - keep it as ARCHIVER_SECRET_KEY, apart from the database; "
    "or refer to the password by --password-file"
)


def check_reference(reference: str) -> str:
    """A reference as it was given, if it is one. Raises UsageError; never repeats what it was given."""
    kind, separator, rest = reference.removeprefix(OAUTH).partition(":")
    if separator and rest and kind in ("file", "env", "sealed") and rest.isprintable():
        if kind == "env" and is_own_variable(rest):
            raise UsageError(f"the variable {rest} is the service's own, not a password's", hint=_OWN_HINT)
        return reference
    raise UsageError(
        "a password is referred to as file:/path or env:NAME, an OAuth credential as oauth:file:/path",
        hint="a password itself is never written where this was read from",
    )


_OWN_PREFIXES = ("ARCHIVER_", "AWS_", "AZURE_", "GOOGLE_", "PG")
_OWN_HINT = (
    "no password is read from variables that begin with "
    + ", ".join(_OWN_PREFIXES)
    + ", nor from files that they name: mail servers would receive the service's own secrets"
)
_OWN_PATHS = ("~/.aws/credentials", "~/.aws/config", "~/.pgpass")
_OWN_PLACES = re.compile(
    r"/proc/\d+/(task/\d+/)?environ|(/var)?/run/secrets/(kubernetes\.io|eks\.amazonaws\.com)/.*"
)


def is_own_variable(name: str) -> bool:
    """Whether the service, or a library that it uses, has settings or secrets in this variable."""
    return name.upper().startswith(_OWN_PREFIXES)


def is_own_file(path: Path, environment: Mapping[str, str]) -> bool:
    """Whether the service has secrets of its own in this file, as far as its environment tells."""
    if _OWN_PLACES.fullmatch(os.path.realpath(path)):
        return True
    own = [Path(each).expanduser() for each in _OWN_PATHS]
    own += [
        Path(value) for name, value in environment.items() if is_own_variable(name) and value.startswith("/")
    ]
    return any(_is_same(path, each) for each in own)


def _is_same(path: Path, other: Path) -> bool:
    try:
        return path.samefile(other)
    except (OSError, ValueError):
        return False


def shown(reference: str) -> str:
    """The reference as it may be shown: where the secret is, and of a sealed one only that it is sealed."""
    head, sealed, _ = reference.partition(_SEALED)
    return f"{head}{sealed}".removesuffix(":") if sealed or reference in (PROMPT, NONE) else reference


def is_sealed(reference: str) -> bool:
    """Whether the reference holds the secret itself, a password or a credential, sealed."""
    return reference.removeprefix(OAUTH).startswith(_SEALED)


def from_file(path: Path, what: str = "password") -> str:
    """A password file: its whole content, less one final line end. Raises OperatorNeeded, naming ``what``."""
    try:
        with path.open("rb") as file:
            octets = file.read(SECRET_BYTES + 1)
    except OSError as error:
        raise OperatorNeeded(f"cannot read the {what} file {path}: {error.strerror}") from error
    return from_bytes(octets, f"the {what} file {path}")


def from_bytes(octets: bytes, where: str) -> str:
    """The password in these octets, less one final line end. Raises OperatorNeeded, naming ``where``.

    Editors on Windows put a byte order mark before UTF-8, which is no part of the password.
    """
    if len(octets) > SECRET_BYTES:
        raise OperatorNeeded(f"{where} is too large: more than {SECRET_BYTES} octets")
    if octets.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in octets:
        raise OperatorNeeded(f"{where} is UTF-16 or binary, not UTF-8 text", hint="save it as UTF-8")
    octets = octets.removeprefix(codecs.BOM_UTF8)
    for ending in (b"\r\n", b"\n"):
        if octets.endswith(ending):
            octets = octets[: -len(ending)]
            break
    if not octets:
        raise OperatorNeeded(f"{where} is empty")
    try:
        return octets.decode()
    except UnicodeDecodeError:
        raise OperatorNeeded(f"{where} is not UTF-8 text", hint="save it as UTF-8") from None


_PARTS = 3
"""Of what is sealed: the account's id, its login, the secret."""


class Secrets:
    """Resolves references; seals and opens what the database keeps.

    ``key`` is one Fernet key, or several separated by commas: the first
    seals, all open, so that a key can be changed without a break.
    """

    def __init__(self, key: str | None, *, environment: Mapping[str, str] = os.environ) -> None:
        self._key = key
        self._environment = environment

    def check_key(self) -> None:
        """Check that something can be sealed. Raises UsageError without a usable key."""
        self._fernets()

    def seal(self, account: Account, secret: str) -> str:
        """The reference that holds the secret itself. Raises UsageError without a usable key."""
        sealed = self._fernet().encrypt(json.dumps([account.id, account.login, secret]).encode())
        return f"{_SEALED}{sealed.decode()}"

    def resealed(self, account: Account) -> str | None:
        """The account's reference, of a password or a credential, sealed by the first key and for its login.

        None when it is so already, and for a reference that holds no secret
        itself. Raises as ``resolve`` does.
        """
        from cryptography.fernet import InvalidToken

        reference = account.secret_reference
        if not is_sealed(reference):
            return None
        inner = reference.removeprefix(OAUTH)
        token = inner.removeprefix(_SEALED)
        secret = self._open(account, token)
        try:
            if len(json.loads(self._fernets()[0].decrypt(token.encode()))) == _PARTS:
                return None
        except InvalidToken:
            pass  # another key seals it
        return reference.removesuffix(inner) + self.seal(account, secret)

    def resolve(self, account: Account, reference: str | None = None, *, what: str = "password") -> str:
        """The secret behind the account's reference, or behind another; ``what`` in errors.

        Raises OperatorNeeded, or UsageError without a usable key.
        """
        kind, _, rest = (account.secret_reference if reference is None else reference).partition(":")
        match kind:
            case "file":
                if is_own_file(Path(rest), self._environment):
                    raise OperatorNeeded(
                        f"the {what} file of {account.name} is the service's own: {rest}", hint=_OWN_HINT
                    )
                return from_file(Path(rest), what)
            case "env":
                if is_own_variable(rest):
                    raise OperatorNeeded(
                        f"the {what} of {account.name} is in the service's own variable {rest}",
                        hint=_OWN_HINT,
                    )
                value = self._environment.get(rest)
                if not value:
                    raise OperatorNeeded(
                        f"the {what} of {account.name} is in the variable {rest}, which is not set"
                    )
                return value
            case "sealed":
                return self._open(account, rest, what)
            case "none":
                return ""
            case _:
                raise OperatorNeeded(
                    f"account {account.name} has no password that could be used unattended",
                    hint=f"give it one: archiver account edit {account.name} --password-file FILE",
                )

    def _open(self, account: Account, token: str, what: str = "password") -> str:
        from cryptography.fernet import InvalidToken

        try:
            owner, *login, secret = json.loads(self._fernet().decrypt(token.encode()))
        except InvalidToken:
            raise OperatorNeeded(
                f"the {what} of {account.name} was sealed with another key than ARCHIVER_SECRET_KEY",
                hint=f"set both keys (NEW,OLD), or: archiver account edit {account.name} --password-file F",
            ) from None
        if owner != account.id:
            raise OperatorNeeded(f"the {what} kept for {account.name} was sealed for another account")
        # The former form names no login. ``archiver account reseal`` replaces it.
        if login and login != [account.login]:
            raise OperatorNeeded(
                f"the {what} of {account.name} was sealed for another server, user or TLS mode",
                hint=f"give it again: archiver account edit {account.name} --password-stdin",
            )
        return str(secret)

    def _fernet(self) -> "MultiFernet":
        from cryptography.fernet import MultiFernet

        return MultiFernet(self._fernets())

    def _fernets(self) -> "list[Fernet]":
        """One for each key, the first of which seals. Raises UsageError."""
        from cryptography.fernet import Fernet

        if not self._key:
            raise UsageError(
                "a password is to be sealed in the database, and there is no ARCHIVER_SECRET_KEY",
                hint=KEY_HINT,
            )
        try:
            return [Fernet(_fernet_key(part)) for part in self._key.split(",")]
        except (ValueError, binascii.Error):
            raise UsageError(
                "ARCHIVER_SECRET_KEY is not a key: 32 random octets in base64 are needed", hint=KEY_HINT
            ) from None


def _fernet_key(text: str) -> bytes:
    # Fernet wants the URL-safe alphabet; openssl writes the standard one.
    octets = base64.b64decode(text.strip().translate(str.maketrans("-_", "+/")), validate=True)
    return base64.urlsafe_b64encode(octets)
