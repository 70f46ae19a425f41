"""OAuth for mailboxes: from an account's credential to the access token that its mail server takes.

From the bottom up, each module knowing only those before it:

- ``endpoint``: one request to a provider, bounded, and what its refusal means;
- ``credential``: what an account keeps, and what is known of Google and Microsoft;
- ``consent``: how a person lets us in, once: by a device code, or by a browser;
- ``tokens``: the access tokens of this process, fetched and renewed as polls need them.

It promises that no token, client secret or code is in a log, an error or a
``repr``; that a provider's answer is bounded in time and size, comes by
verified TLS, and leads nowhere else; and that what a provider gives in place
of a refresh token is kept before it is used. Authlib introduces the client,
signs and proves, and is imported when an account first needs it. A mail server
is never talked to.
"""

from archiver.oauth.credential import (
    GOOGLE,
    MICROSOFT,
    PROVIDERS,
    Credential,
    Provider,
    is_oauth,
    reference_to,
)
from archiver.oauth.endpoint import Poster
from archiver.oauth.tokens import AccessTokens

__all__ = [
    "GOOGLE",
    "MICROSOFT",
    "PROVIDERS",
    "AccessTokens",
    "Credential",
    "Poster",
    "Provider",
    "is_oauth",
    "reference_to",
]
