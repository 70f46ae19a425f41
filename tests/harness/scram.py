"""The server's side of SCRAM, from RFC 5802 section 3 alone, so that two implementations check each other.

Owns one account's verifier and one exchange. Promises that ``final`` fails the
test when the client's proof, nonce or channel binding is not the right one.
"""

import base64
import hashlib
import hmac
from dataclasses import dataclass, field

SALT = b"sixteen octets.."


@dataclass(slots=True)
class ScramServer:
    """``mechanism`` gives the hash, and whether ``binding`` (tls-server-end-point) must be used.

    ``gs2`` is the flag that the client is expected to send.
    """

    mechanism: str
    password: str
    gs2: str = "n"
    binding: bytes = b""
    iterations: int = 4096
    salt: bytes = SALT
    nonce: str = "servernonce"
    client_nonce: str = field(default="", init=False)
    _first_bare: str = field(default="", init=False)
    _server_first: str = field(default="", init=False)

    def first(self, message: bytes) -> bytes:
        """Take the client's first message, give the server's."""
        flag, authzid, self._first_bare = message.decode().split(",", 2)
        assert (flag, authzid) == (self.gs2, "")
        self.client_nonce = self._first_bare.partition(",r=")[2]
        salt = base64.b64encode(self.salt).decode()
        self._server_first = f"r={self.client_nonce}{self.nonce},s={salt},i={self.iterations}"
        return self._server_first.encode()

    def final(self, message: bytes) -> bytes:
        """Take the client's final message, check its proof, give the server's signature."""
        without_proof, _, proof = message.decode().rpartition(",p=")
        bound = f"{self.gs2},,".encode() + (self.binding if self.gs2.startswith("p=") else b"")
        nonce = self.client_nonce + self.nonce
        assert without_proof == f"c={base64.b64encode(bound).decode()},r={nonce}"
        said = f"{self._first_bare},{self._server_first},{without_proof}".encode()
        salted = hashlib.pbkdf2_hmac(self._hash, self.password.encode(), self.salt, self.iterations)
        client_key = hmac.digest(salted, b"Client Key", self._hash)
        signature = hmac.digest(hashlib.new(self._hash, client_key).digest(), said, self._hash)
        expected = bytes(a ^ b for a, b in zip(client_key, signature, strict=True))
        assert base64.b64decode(proof) == expected
        server_key = hmac.digest(salted, b"Server Key", self._hash)
        return b"v=" + base64.b64encode(hmac.digest(server_key, said, self._hash))

    @property
    def _hash(self) -> str:
        return self.mechanism.removeprefix("SCRAM-").removesuffix("-PLUS").replace("-", "").lower()
