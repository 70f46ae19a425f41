"""From a secret's reference to the secret, at poll time and not before.

An account keeps one of these references, never a password in clear:

``file:/path``
    read at each poll: a mounted Kubernetes Secret, a file that a vault agent
    renews. Counts whole, less one final line end.
``env:NAME``
    an environment variable.
``sealed:...``
    the password itself, encrypted and authenticated with the key in
    ``ARCHIVER_SECRET_KEY`` (Fernet: https://github.com/fernet/spec), bound to
    its account, so that a sealed secret moved to another row does not open.
``prompt:``
    nothing is kept: ``archiver sync`` asks the person at the terminal.
"""

import base64
import binascii
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from archiver.errors import OperatorNeeded, UsageError

if TYPE_CHECKING:
    from cryptography.fernet import MultiFernet

SECRET_OCTETS = 64 * 1024
"""Longer than any password or token; a path given by mistake is not read whole."""

PROMPT = "prompt:"

KEY_HINT = (
    "make a key with: openssl rand -base64 32 - keep it as ARCHIVER_SECRET_KEY, apart from the database; "
    "or refer to the password by --password-file"
)


def check_reference(reference: str) -> str:
    """A reference as it was given, if it is one. Raises UsageError; never repeats what it was given."""
    kind, separator, rest = reference.partition(":")
    if separator and rest and kind in ("file", "env", "sealed") and rest.isprintable():
        return reference
    raise UsageError(
        "a password is referred to as file:/path or env:NAME",
        hint="a password itself is never written where this was read from",
    )


def from_file(path: Path) -> str:
    """A password file: its whole content, less one final line end. Raises OperatorNeeded."""
    try:
        with path.open("rb") as file:
            octets = file.read(SECRET_OCTETS + 1)
    except OSError as error:
        raise OperatorNeeded(f"cannot read the password file {path}: {error.strerror}") from error
    return from_octets(octets, f"the password file {path}")


def from_octets(octets: bytes, where: str) -> str:
    """The password in these octets, less one final line end. Raises OperatorNeeded, naming ``where``."""
    if len(octets) > SECRET_OCTETS:
        raise OperatorNeeded(f"{where} is too large for a password")
    for ending in (b"\r\n", b"\n"):
        if octets.endswith(ending):
            octets = octets[: -len(ending)]
            break
    if not octets:
        raise OperatorNeeded(f"{where} is empty")
    try:
        return octets.decode()
    except UnicodeDecodeError:
        raise OperatorNeeded(f"{where} is not UTF-8 text") from None


class Secrets:
    """Resolves references; seals and opens what the database keeps.

    ``key`` is one Fernet key, or several separated by commas: the first
    seals, all open, so that a key can be changed without a break.
    """

    def __init__(self, key: str | None, *, environment: Mapping[str, str] = os.environ) -> None:
        self._key = key
        self._environment = environment

    def seal(self, account_id: str, secret: str) -> str:
        """The reference that holds the secret itself. Raises UsageError without a usable key."""
        sealed = self._fernet().encrypt(json.dumps([account_id, secret]).encode())
        return f"sealed:{sealed.decode()}"

    def resolve(self, account_id: str, account_name: str, reference: str) -> str:
        """The secret. Raises OperatorNeeded, or UsageError without a usable key."""
        kind, _, rest = reference.partition(":")
        match kind:
            case "file":
                return from_file(Path(rest))
            case "env":
                value = self._environment.get(rest)
                if not value:
                    raise OperatorNeeded(
                        f"the password of {account_name} is in the variable {rest}, which is not set"
                    )
                return value
            case "sealed":
                return self._open(account_id, account_name, rest)
            case _:
                raise OperatorNeeded(
                    f"account {account_name} has no password that could be used unattended",
                    hint=f"give it one: archiver account edit {account_name} --password-file FILE",
                )

    def _open(self, account_id: str, account_name: str, token: str) -> str:
        from cryptography.fernet import InvalidToken

        try:
            owner, secret = json.loads(self._fernet().decrypt(token.encode()))
        except InvalidToken:
            raise OperatorNeeded(
                f"the password of {account_name} was sealed with another key than ARCHIVER_SECRET_KEY",
                hint=f"set both keys (NEW,OLD), or: archiver account edit {account_name} --password-file F",
            ) from None
        if owner != account_id:
            raise OperatorNeeded(f"the password kept for {account_name} was sealed for another account")
        return str(secret)

    def _fernet(self) -> "MultiFernet":
        from cryptography.fernet import Fernet, MultiFernet

        if not self._key:
            raise UsageError(
                "a password is to be sealed in the database, and there is no ARCHIVER_SECRET_KEY",
                hint=KEY_HINT,
            )
        try:
            return MultiFernet([Fernet(_fernet_key(part)) for part in self._key.split(",")])
        except (ValueError, binascii.Error):
            raise UsageError(
                "ARCHIVER_SECRET_KEY is not a key: 32 random octets in base64 are needed", hint=KEY_HINT
            ) from None


def _fernet_key(text: str) -> bytes:
    # Fernet wants the URL-safe alphabet; openssl writes the standard one.
    octets = base64.b64decode(text.strip().translate(str.maketrans("-_", "+/")), validate=True)
    return base64.urlsafe_b64encode(octets)
