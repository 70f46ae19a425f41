"""From a reference to the secret, resolved when a poll needs it.

An account keeps one of these references, never a password in clear text:

``file:/path``
    a file that is read at each poll, such as a mounted Kubernetes Secret. The
    whole file counts, except one final line end.
``env:NAME``
    an environment variable, except those of the service itself.
``sealed:...``
    the password itself, encrypted and authenticated with the key in
    ``ARCHIVER_SECRET_KEY`` (Fernet: https://github.com/fernet/spec). It is bound
    to its account and to ``Account.login``: write access to the database without
    the key does not suffice to send it to another server, or in clear text.
``prompt:``
    nothing is kept: ``archiver sync`` asks at the terminal.
``none:``
    no password is needed: a certificate or a Kerberos ticket logs in.

``oauth:`` before one of the first three refers to an OAuth credential instead of
a password (``archiver.oauth``).
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
"""Longer than any password or token, so that a wrong path does not fill the memory."""

PROMPT = "prompt:"
NONE = "none:"
OAUTH = "oauth:"
"""Prefix of a reference to an OAuth credential, which gives access tokens."""

_SEALED = "sealed:"

KEY_HINT = (
    "make a key with `openssl rand -base64 32`, and set it as ARCHIVER_SECRET_KEY, apart from the database; "
    "or keep the password in a file: --password-file FILE"
)


def check_reference(reference: str) -> str:
    """The reference, if it is valid. Raises UsageError, which never repeats it: it may be a password."""
    kind, separator, rest = reference.removeprefix(OAUTH).partition(":")
    if separator and rest and kind in ("file", "env", "sealed") and rest.isprintable():
        if kind == "env" and is_own_variable(rest):
            raise UsageError(f"the variable {rest} is the service's own, not a password's", hint=_OWN_HINT)
        return reference
    raise UsageError(
        "a password is given as file:/path or env:NAME, an OAuth credential as oauth:file:/path",
        hint="never write the password itself here",
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
    """Whether the service keeps its own secrets in this file, as far as its environment shows."""
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
    """The reference for people: where the secret is. A sealed secret itself is omitted."""
    head, sealed, _ = reference.partition(_SEALED)
    return f"{head}{sealed}".removesuffix(":") if sealed or reference in (PROMPT, NONE) else reference


def is_sealed(reference: str) -> bool:
    """Whether the reference holds the secret itself, a password or a credential, sealed."""
    return reference.removeprefix(OAUTH).startswith(_SEALED)


def from_file(path: Path, what: str = "password") -> str:
    """The content of a password file, without one final line end. Raises OperatorNeeded, naming ``what``."""
    try:
        with path.open("rb") as file:
            octets = file.read(SECRET_BYTES + 1)
    except OSError as error:
        raise OperatorNeeded(f"cannot read the {what} file {path}: {error.strerror}") from error
    return from_bytes(octets, f"the {what} file {path}")


def from_bytes(octets: bytes, where: str) -> str:
    """The password in these bytes, without one final line end. Raises OperatorNeeded, naming ``where``.

    A byte order mark, which editors on Windows add, is not part of the password.
    """
    if len(octets) > SECRET_BYTES:
        raise OperatorNeeded(f"{where} is too large: more than {SECRET_BYTES} bytes")
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
"""The number of sealed parts: the account's id, its login, the secret."""


class Secrets:
    """Resolves references; seals and opens what the database keeps.

    ``key`` is one Fernet key, or several separated by commas. The first key
    seals, all keys open, so that a key can be changed without interruption.
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

        None if the first key sealed it already, or if the reference does not
        contain the secret. Raises like ``resolve``.
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
                    f"account {account.name} has no password that the service can use",
                    hint=f"give it one: archiver account edit {account.name} --password-file FILE",
                )

    def _open(self, account: Account, token: str, what: str = "password") -> str:
        from cryptography.fernet import InvalidToken

        try:
            owner, *login, secret = json.loads(self._fernet().decrypt(token.encode()))
        except InvalidToken:
            raise OperatorNeeded(
                f"the {what} of {account.name} was not sealed with ARCHIVER_SECRET_KEY, but with another key",
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
        """One for each key; the first one seals. Raises UsageError."""
        from cryptography.fernet import Fernet

        if not self._key:
            raise UsageError(
                "ARCHIVER_SECRET_KEY is not set, so passwords cannot be kept in the database",
                hint=KEY_HINT,
            )
        try:
            return [Fernet(_fernet_key(part)) for part in self._key.split(",")]
        except (ValueError, binascii.Error):
            raise UsageError(
                "ARCHIVER_SECRET_KEY is not a key: it must be 32 random bytes in base64", hint=KEY_HINT
            ) from None


def _fernet_key(text: str) -> bytes:
    # Fernet wants the URL-safe alphabet; openssl writes the standard one.
    octets = base64.b64decode(text.strip().translate(str.maketrans("-_", "+/")), validate=True)
    return base64.urlsafe_b64encode(octets)
