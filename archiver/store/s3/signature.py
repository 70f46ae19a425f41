"""Signs a PUT by AWS Signature Version 4, with the SHA-256 of the body that the caller already knows.

The rules: https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html.
botocore's own signer does the same; it takes six times the CPU, which is more
than all the rest of a small PUT (docs/decisions/0015-small-puts.md).
"""

import hmac
from collections.abc import Mapping
from functools import lru_cache
from hashlib import sha256 as sha256_of
from typing import TYPE_CHECKING, NamedTuple, Self

if TYPE_CHECKING:
    from botocore.credentials import ReadOnlyCredentials

__all__ = ["Keys", "authorization"]


class Keys(NamedTuple):
    """Credentials, and where they are to count."""

    access_key: str
    secret_key: str
    region: str
    service: str

    @classmethod
    def of(cls, credentials: "ReadOnlyCredentials", region: str, service: str) -> Self:
        return cls(credentials.access_key or "", credentials.secret_key or "", region, service)


def authorization(keys: Keys, path: str, headers: Mapping[str, str]) -> str:
    """The value of the Authorization header of a PUT.

    ``path`` is quoted and has no query. ``headers`` are all those to be signed,
    with names in lower case: among them ``host``, ``x-amz-date`` and
    ``x-amz-content-sha256``.
    """
    names = sorted(headers)
    lines = [f"{name}:{' '.join(headers[name].split())}\n" for name in names]
    signed = ";".join(names)
    canonical = f"PUT\n{path}\n\n{''.join(lines)}\n{signed}\n{headers['x-amz-content-sha256']}"
    timestamp = headers["x-amz-date"]
    date = timestamp[:8]
    scope = f"{date}/{keys.region}/{keys.service}/aws4_request"
    to_sign = f"AWS4-HMAC-SHA256\n{timestamp}\n{scope}\n{sha256_of(canonical.encode()).hexdigest()}"
    key = _signing_key(keys.secret_key, date, keys.region, keys.service)
    signature = hmac.digest(key, to_sign.encode(), "sha256").hex()
    credential = f"{keys.access_key}/{scope}"
    return f"AWS4-HMAC-SHA256 Credential={credential}, SignedHeaders={signed}, Signature={signature}"


# Depends on the day and the secret: room for one of each, and for their successors.
@lru_cache(maxsize=4)
def _signing_key(secret_key: str, date: str, region: str, service: str) -> bytes:
    key = f"AWS4{secret_key}".encode()
    for part in (date, region, service, "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    return key
