"""OAuth for mailboxes: from an account's credential to the access token that its mail server takes.

From the bottom up, each module knowing only those before it:

- ``endpoint``: one request to a provider, and what its refusal means;
- ``credential``: what an account keeps, and the settings of Google and Microsoft;
- ``consent``: how a person grants access, once: by a device code, or by a browser;
- ``tokens``: the access tokens of this process, fetched and renewed as polls need them.

Promises that no token, client secret or code is in a log, an error or a
``repr``. A provider's answer is bounded in time and size, comes by verified TLS,
and redirects are not followed. When a provider replaces a refresh token, the new
one is kept before it is used. Authlib introduces the client and signs; it is
imported when an account first needs it. Leaves mail servers to others.
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
