"""The access tokens of this process: fetched when a poll needs one, renewed before they expire.

Owns the cache. It is in memory only: a token is valid for about an hour, and is
never written anywhere. Promises:

- For one credential, one request is running at a time, however many threads use it.
- A token that is returned is valid for some minutes more.
- A refresh token that the provider replaces is kept before the access token that
  came with it is used.

Leaves to the poll when a token was refused, and to the caller where a replaced
refresh token is kept.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final

from archiver import observe
from archiver.errors import OperatorNeeded
from archiver.model import Account
from archiver.oauth.credential import Credential
from archiver.oauth.endpoint import Poster, Refusal
from archiver.secrets import OAUTH, Secrets, is_sealed

MARGIN_SECONDS: Final = 300.0
"""A token is renewed so long before it expires: a login may wait three minutes for another session's lock."""
MARGIN_SHARE: Final = 0.1
"""The same for short-lived tokens, as a share of their lifetime."""
UNTOLD_SECONDS: Final = 600.0
"""The assumed lifetime when the provider does not state one, which RFC 6749 section 5.1 allows."""
LONGEST_SECONDS: Final = 24 * 3600.0
"""Longer than any provider's. A wrong figure must not keep a token for longer."""
YOUNG_SECONDS: Final = 60.0
"""If a mail server refuses a younger token, it refuses the mailbox or the scope."""
FORGOTTEN_SECONDS: Final = 24 * 3600.0
"""A token that no poll asked for in this time is dropped."""
KEYS_KEPT: Final = 3
"""How many documents of one credential lead to its token: the first, the last but one, and the last."""

Keep = Callable[[Account, str, str], str]
"""Seal a document, keep it in place of the one that this reference leads to, and return the new reference."""

_JWT_SECONDS: Final = 300
_JWT_GRANT: Final = "urn:ietf:params:oauth:grant-type:jwt-bearer"
_REMEDIES: Final = {
    "invalid_grant": "the access was revoked, or has expired",
    "invalid_client": "the client secret is wrong, or has expired",
    "unauthorized_client": "the application may not do this: check its permissions",
    "invalid_scope": "the application has no right to this scope",
}


@dataclass(frozen=True, slots=True)
class _Token:
    """An access token; times are of the monotonic clock."""

    value: str = field(repr=False)
    fetched_at: float
    renew_at: float


class CachedToken:
    """One credential's newest form, where that is kept, and a token. Its lock guards them."""

    def __init__(self, credential: Credential, reference: str) -> None:
        self.lock = threading.Lock()
        self.credential = credential
        self.reference = reference
        self.keys: list[bytes] = []
        self.unkept = False
        """Whether the provider replaced the refresh token, and only this process has the new one."""
        self.token: _Token | None = None
        self.used_at = 0.0

    @property
    def is_sealed(self) -> bool:
        """Whether the credential is in the database, and not in a file or variable that others write."""
        return is_sealed(self.reference)


class AccessTokens:
    """Access tokens by account. Used by many threads.

    An account is one whose secret ``is_oauth``; ``user`` is the mailbox's user.
    Each method raises TryLater when the provider is unavailable, OperatorNeeded when it
    refuses, and what ``Secrets.resolve`` raises.
    """

    def __init__(
        self,
        secrets: Secrets,
        keep: Keep,
        *,
        poster: Poster | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._secrets = secrets
        self._keep = keep
        self._poster = poster or Poster()
        self._monotonic = monotonic
        self._now = now
        self._lock = threading.Lock()
        self._cached: dict[bytes, CachedToken] = {}
        self._swept_at = monotonic()

    @property
    def cached(self) -> tuple[CachedToken, ...]:
        """What this process holds: one entry for each document by which a token is found."""
        with self._lock:
            return tuple(self._cached.values())

    def current(self, account: Account, user: str) -> str:
        """A token that is valid for some minutes more: the cached one, or a new one."""
        cached = self._find(account, user)
        with cached.lock:
            return self._valid(cached, account, user).value

    def instead(self, account: Account, user: str, refused: str) -> str | None:
        """Another token than the one that the mail server refused; None when a new one would not help."""
        cached = self._find(account, user)
        with cached.lock:
            token = cached.token
            if token is not None and token.value == refused:
                if self._monotonic() - token.fetched_at < YOUNG_SECONDS:
                    return None
                cached.token = None
            value = self._valid(cached, account, user).value
        return None if value == refused else value

    def _find(self, account: Account, user: str) -> CachedToken:
        inner = account.secret_reference.removeprefix(OAUTH)
        document = self._secrets.resolve(account, inner, what="OAuth credential")
        credential = Credential.parse(document, account.name)
        key = credential.key(account.id, user)
        now = self._monotonic()
        with self._lock:
            self._sweep(now)
            cached = self._cached.get(key)
            if cached is None:
                cached = CachedToken(credential, account.secret_reference)
                self._know(cached, key)
            cached.used_at = now
            return cached

    def _know(self, cached: CachedToken, key: bytes) -> None:
        """Find the token by this key, too, from now on.

        Accounts that were read before a replacement have an older document: the
        first, if one process polls for long, or the last but one.
        """
        self._cached[key] = cached
        cached.keys.append(key)
        if len(cached.keys) > KEYS_KEPT:
            del self._cached[cached.keys.pop(1)]

    def _sweep(self, now: float) -> None:
        if now - self._swept_at < FORGOTTEN_SECONDS:
            return
        self._swept_at = now
        self._cached = {
            key: cached
            for key, cached in self._cached.items()
            if cached.unkept or now - cached.used_at < FORGOTTEN_SECONDS
        }

    def _valid(self, cached: CachedToken, account: Account, user: str) -> _Token:
        self._keep_replaced(cached, account)  # the database may not have taken it before
        if cached.token is None or self._monotonic() >= cached.token.renew_at:
            cached.token = None
            cached.token = self._fetch(cached, account, user)
        return cached.token

    def _fetch(self, cached: CachedToken, account: Account, user: str) -> _Token:
        asked_at = self._monotonic()
        try:
            answer = request(self._poster, cached.credential, user, now=self._now())
        except Refusal as refusal:
            observe.TOKEN_REQUESTS.labels("refused").inc()
            remedy = _REMEDIES.get(refusal.code)
            raise OperatorNeeded(
                f"no access token for {account.name}: {refusal}{f' ({remedy})' if remedy else ''}",
                hint=f"archiver account authorize {account.name}",
            ) from None
        except Exception:
            observe.TOKEN_REQUESTS.labels("failed").inc()
            raise
        observe.TOKEN_REQUESTS.labels("ok").inc()
        replaced = answer.get("refresh_token")
        if isinstance(replaced, str) and replaced and cached.credential.refresh_token not in {None, replaced}:
            self._replace(cached, account, user, replaced)
        value = access_token(answer, account.name)
        lives = _seconds(answer.get("expires_in"))
        margin = min(MARGIN_SECONDS, lives * MARGIN_SHARE)
        return _Token(value, asked_at, asked_at + lives - margin)

    def _replace(self, cached: CachedToken, account: Account, user: str, refresh_token: str) -> None:
        """Take over a refresh token that the provider gave in place of the one it was shown.

        In a file, the old one stays. A restart goes on with that, if the provider
        still accepts it, as Microsoft does for 90 days.
        """
        if not cached.is_sealed and not cached.unkept:
            observe.get_logger().warning("credential.not_kept", account=account.name)
        cached.credential = replace(cached.credential, refresh_token=refresh_token)
        cached.unkept = True
        with self._lock:
            self._know(cached, cached.credential.key(account.id, user))
        self._keep_replaced(cached, account)

    def _keep_replaced(self, cached: CachedToken, account: Account) -> None:
        if cached.unkept and cached.is_sealed:
            cached.reference = self._keep(account, cached.reference, cached.credential.document())
            cached.unkept = False


def request(poster: Poster, credential: Credential, user: str, *, now: float) -> dict[str, Any]:
    """Ask for an access token by the credential's grant. Raises Refusal, TryLater, OperatorNeeded."""
    if credential.private_key is not None:
        return poster.ask(
            credential.token_endpoint,
            credential.client,
            grant_type=_JWT_GRANT,
            assertion=_assertion(credential, user, int(now)),
        )
    if credential.refresh_token is not None:
        return poster.ask(
            credential.token_endpoint,
            credential.client,
            grant_type="refresh_token",
            refresh_token=credential.refresh_token,
            scope=credential.scope,
        )
    return poster.ask(
        credential.token_endpoint,
        credential.client,
        grant_type="client_credentials",
        scope=credential.scope,
    )


def access_token(answer: dict[str, Any], account: str) -> str:
    """The access token in a provider's answer. Raises OperatorNeeded when there is none."""
    value, kind = answer.get("access_token"), str(answer.get("token_type", "bearer"))
    if not isinstance(value, str) or not value or kind.lower() != "bearer":
        raise OperatorNeeded(
            f"no access token for {account}: the provider answered without a bearer token",
            hint="check the token endpoint and the scope",
        )
    return value


def _assertion(credential: Credential, user: str, now: int) -> str:
    """A service account's signed claim to act for ``user`` (RFC 7523 section 3).

    https://developers.google.com/identity/protocols/oauth2/service-account#httprest
    """
    from authlib.oauth2.rfc7523 import assertion
    from joserfc.jwk import RSAKey

    try:
        signed: str = assertion.sign_jwt_bearer_assertion(
            RSAKey.import_key(credential.private_key or ""),
            issuer=credential.client.id,
            audience=credential.token_endpoint,
            subject=user,
            issued_at=now,
            expires_at=now + _JWT_SECONDS,
            claims={"scope": credential.scope},
            alg="RS256",
        )
    except ValueError:
        # The exception is not chained: it may quote the key.
        raise OperatorNeeded(
            f"the private key of {credential.client.id} cannot be used",
            hint="give the key file as the provider made it",
        ) from None
    return signed


def _seconds(told: object) -> float:
    """How long a token is valid. Some providers write the figure as text."""
    try:
        seconds = float(told) if isinstance(told, int | float | str) else UNTOLD_SECONDS
    except ValueError:
        return UNTOLD_SECONDS
    return min(seconds, LONGEST_SECONDS) if seconds > 0 else UNTOLD_SECONDS
