"""An OAuth provider on loopback: RFC 6749, RFC 7636, RFC 7523 and RFC 8628, by TLS, with faults on demand.

Owns two listeners: the provider's endpoints, by TLS with a certificate of its
own; and, in clear for a mail server on the same machine, what whoever is shown
a token asks about it. Knows clients, people, devices and the tokens that it
gave. Nothing ends by itself: a test says what has run out.
"""

import base64
import hashlib
import json
import secrets
import ssl
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import RSAKey

from tests.harness.certificates import self_signed

CLIENT, SECRET = "an-application", "s3cret~of.the-application"
SCOPE = "https://mail.example/pop offline_access"
_DEVICE_GRANT = "urn:ietf:params:oauth:grant-type:device_code"
_JWT_GRANT = "urn:ietf:params:oauth:grant-type:jwt-bearer"


# What may happen instead of the right answer.


@dataclass(frozen=True, slots=True)
class Say:
    """Answer so."""

    status: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Hang:
    """Say nothing until the client goes away."""


@dataclass(frozen=True, slots=True)
class Drip:
    """Send a header line that never ends, an octet at a time."""


@dataclass(frozen=True, slots=True)
class Flood:
    """Send a body that never ends."""


Fault = Say | Hang | Drip | Flood


def error(code: str, description: str = "", status: int = 400) -> Say:
    """An error of RFC 6749 section 5.2."""
    told = {"error": code} | ({"error_description": description} if description else {})
    return Say(status, json.dumps(told).encode(), (("Content-Type", "application/json"),))


class Refuse(Exception):
    """Why a request is not granted."""

    def __init__(self, code: str, description: str = "") -> None:
        super().__init__(code)
        self.say = error(code, description, 401 if code == "invalid_client" else 400)


@dataclass(slots=True)
class _Device:
    user: str | None


@dataclass(slots=True)
class _Consent:
    user: str
    challenge: str
    redirect: str


@dataclass
class OauthProvider:
    """The provider. A context manager.

    ``rotates``: each use of a refresh token replaces it, and ends it.
    ``requests`` has the form of each request to the token endpoint, in order.
    """

    directory: Path
    rotates: bool = False
    lives_seconds: int | str | None = 3600
    public: bool = False
    interval_seconds: float | None = 5
    at_once: str | None = None
    """The person who types each code as soon as it is shown."""
    requests: list[dict[str, str]] = field(default_factory=list)
    faults: deque[Fault] = field(default_factory=deque)
    """What happens to the next requests."""
    refresh_tokens: dict[str, str] = field(default_factory=dict)
    """Whose each is."""
    access_tokens: dict[str, str] = field(default_factory=dict)
    """Whose each is, by the mailbox's user; an application's is of ``*``."""
    service_keys: dict[str, RSAKey] = field(default_factory=dict)
    """Public keys of service accounts, by their names."""
    devices: dict[str, _Device] = field(default_factory=dict)
    consents: dict[str, _Consent] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _gone: threading.Event = field(default_factory=threading.Event)
    _servers: list[ThreadingHTTPServer] = field(default_factory=list)

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.ca_file, key = self_signed(self.directory)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.ca_file, key)
        endpoint = self._serve(self._ask)
        endpoint.socket = context.wrap_socket(
            endpoint.socket, server_side=True, do_handshake_on_connect=False
        )
        self.url = f"https://localhost:{endpoint.server_port}"
        told = self._serve(self._tell_of)
        self.tokeninfo_url = f"http://127.0.0.1:{told.server_port}/?access_token="
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._gone.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    @property
    def token_endpoint(self) -> str:
        return f"{self.url}/token"

    @property
    def device_endpoint(self) -> str:
        return f"{self.url}/devicecode"

    @property
    def client_tls(self) -> ssl.SSLContext:
        """What trusts this provider."""
        return ssl.create_default_context(cafile=self.ca_file)

    def refresh_token(self, user: str) -> str:
        """A new refresh token of this person's."""
        token = f"refresh-{secrets.token_urlsafe(24)}"
        self.refresh_tokens[token] = user
        return token

    def expire_access_tokens(self) -> None:
        self.access_tokens.clear()

    def grant(self, user: str) -> None:
        """The person types the code of every device that waits."""
        for device in self.devices.values():
            device.user = user

    def consent(self, address: str, user: str) -> str:
        """A person's browser opens an address and agrees; where it is sent back to, with what."""
        asked = {name: values[0] for name, values in parse_qs(urlsplit(address).query).items()}
        assert asked["response_type"] == "code"
        assert asked["client_id"] == CLIENT
        assert asked["code_challenge_method"] == "S256"
        code = secrets.token_urlsafe(16)
        self.consents[code] = _Consent(user, asked["code_challenge"], asked["redirect_uri"])
        return f"{asked['redirect_uri']}?state={asked['state']}&code={code}"

    # Answers.

    def _ask(self, path: str, form: dict[str, str]) -> Say:
        grants: dict[str, Callable[[dict[str, str]], dict[str, Any]]] = {
            "refresh_token": self._refresh,
            "client_credentials": self._application,
            "authorization_code": self._code,
            _DEVICE_GRANT: self._device,
            _JWT_GRANT: self._service,
        }
        with self._lock:
            try:
                self._check_client(form)
                if path == "/devicecode":
                    return _good(self._new_device())
                self.requests.append(form)
                return _good(grants[form["grant_type"]](form))
            except Refuse as refusal:
                return refusal.say
            except KeyError as missing:
                return error("invalid_request", str(missing))

    def _check_client(self, form: dict[str, str]) -> None:
        if form.get("grant_type") == _JWT_GRANT:
            return
        if form["client_id"] != CLIENT or (not self.public and form.get("client_secret") != SECRET):
            # A careless provider repeats what it was sent.
            raise Refuse(
                "invalid_client", f"AADSTS7000215: Invalid secret {form.get('client_secret')}\r\nTrace"
            )

    def _refresh(self, form: dict[str, str]) -> dict[str, Any]:
        shown = form["refresh_token"]
        user = self.refresh_tokens.get(shown)
        if user is None:
            raise Refuse("invalid_grant", f"Token {shown} has been expired or revoked.")
        if not self.rotates:
            return self._access(user)
        del self.refresh_tokens[shown]
        return self._access(user) | {"refresh_token": self.refresh_token(user)}

    def _application(self, form: dict[str, str]) -> dict[str, Any]:
        if self.public:
            raise Refuse("unauthorized_client")
        return self._access("*")

    def _code(self, form: dict[str, str]) -> dict[str, Any]:
        consent = self.consents.pop(form["code"], None)
        digest = hashlib.sha256(form["code_verifier"].encode()).digest()
        challenge = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
        if consent is None or consent.challenge != challenge or consent.redirect != form["redirect_uri"]:
            raise Refuse("invalid_grant")
        return self._access(consent.user) | {"refresh_token": self.refresh_token(consent.user)}

    def _new_device(self) -> dict[str, Any]:
        code = secrets.token_urlsafe(16)
        self.devices[code] = _Device(self.at_once)
        told: dict[str, Any] = {"device_code": code, "user_code": "WDJB-MJHT", "expires_in": 900}
        if self.interval_seconds is not None:
            told["interval"] = self.interval_seconds
        return told | {"verification_uri": f"{self.url}/device"}

    def _device(self, form: dict[str, str]) -> dict[str, Any]:
        device = self.devices[form["device_code"]]
        if device.user is None:
            raise Refuse("authorization_pending")
        return self._access(device.user) | {"refresh_token": self.refresh_token(device.user)}

    def _service(self, form: dict[str, str]) -> dict[str, Any]:
        assertion = form["assertion"]
        payload = assertion.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        try:
            jwt.decode(assertion, self.service_keys[claims["iss"]], algorithms=["RS256"])
        except JoseError:
            raise Refuse("invalid_grant", "Invalid JWT Signature.") from None
        if claims["aud"] != self.token_endpoint or claims["exp"] - claims["iat"] > 3600:
            raise Refuse("invalid_grant", "Invalid JWT")
        return self._access(claims["sub"])

    def _access(self, user: str) -> dict[str, Any]:
        token = f"access-{secrets.token_urlsafe(24)}"
        self.access_tokens[token] = user
        told: dict[str, Any] = {"access_token": token, "token_type": "Bearer"}
        return told if self.lives_seconds is None else told | {"expires_in": self.lives_seconds}

    def _tell_of(self, path: str, _form: dict[str, str]) -> Say:
        """Whose token it is, as Dovecot's ``tokeninfo_url`` asks for it."""
        [token] = parse_qs(urlsplit(path).query).get("access_token", [""])
        user = self.access_tokens.get(token)
        return error("invalid_token", status=401) if user is None else _good({"username": user})

    def _serve(self, answer: "Answer") -> ThreadingHTTPServer:
        server = _Server(answer, self.faults, self._gone)
        self._servers.append(server)
        return server


# HTTP.

Answer = Callable[[str, dict[str, str]], Say]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, answer: Answer, faults: deque[Fault], gone: threading.Event) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.faults = faults
        self.gone = gone

    def handle_error(self, *_: object) -> None:
        """A client that went away has said nothing."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = 20

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        match self.server.faults.popleft() if self.server.faults else None:
            case Hang():
                self.server.gone.wait(20)
            case Drip():
                self._endlessly(b"HTTP/1.1 200 OK\r\nX-Drip: ", b"x", pause=0.01)
            case Flood():
                self._endlessly(b"HTTP/1.1 200 OK\r\n\r\n", b" " * 65536, pause=0)
            case Say() as said:
                self._say(said)
            case None:
                form = {name: values[0] for name, values in parse_qs(raw.decode()).items()}
                self._say(self.server.answer(self.path, form))

    def do_GET(self) -> None:
        self._say(self.server.answer(self.path, {}))

    def _endlessly(self, first: bytes, octets: bytes, pause: float) -> None:
        self.close_connection = True
        try:
            self.wfile.write(first)
            while not self.server.gone.wait(pause):
                self.wfile.write(octets)
        except OSError:
            return

    def _say(self, say: Say) -> None:
        self.send_response(say.status)
        for name, value in (*say.headers, ("Content-Length", str(len(say.body)))):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(say.body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def _good(told: dict[str, Any]) -> Say:
    return Say(200, json.dumps(told).encode(), (("Content-Type", "application/json"),))
