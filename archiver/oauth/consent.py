"""How a person grants access to a mailbox, once. The result is a credential with a refresh token.

There are two ways. With a device code (RFC 8628) the person opens an address on
any machine and types a code: Microsoft and most others offer it. With a browser
(RFC 8252) the provider sends the person's browser back to this machine; if it
runs on another one, the person pastes its last address here. Google allows mail
only this way.

Both promise to end: with the person's answer, or when the provider's time is
up. Leaves dialogue with the person to the command line.
"""

import select
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import IO, Any, Final, Self
from urllib.parse import parse_qs, urlsplit

from archiver.errors import ArchiverError, OperatorNeeded, TryLater
from archiver.oauth.credential import Credential, Provider
from archiver.oauth.endpoint import Client, Poster, Refusal

INTERVAL_SECONDS: Final = 5.0
"""Between two questions, where the provider does not say (RFC 8628 section 3.2)."""
LONGEST_INTERVAL_SECONDS: Final = 60.0
LONGEST_CONSENT_SECONDS: Final = 1800.0
"""Providers give a person fifteen minutes; half an hour is more than anyone needs to type a code."""
CONNECTION_SECONDS: Final = 10.0
"""For a browser that connects to send its request. Some connect earlier, to be quick."""

_SHOWN_CHARACTERS: Final = 400
_DEVICE_GRANT: Final = "urn:ietf:params:oauth:grant-type:device_code"


@dataclass(frozen=True, slots=True)
class DeviceCode:
    """``address`` and ``user_code`` are for the person; the rest is for asking the provider meanwhile."""

    address: str
    user_code: str
    device_code: str = field(repr=False)
    interval_seconds: float
    lives_seconds: float


def ask_device_code(poster: Poster, provider: Provider, client: Client) -> DeviceCode:
    """Begin. Raises OperatorNeeded, TryLater."""
    if provider.device_endpoint is None:
        raise OperatorNeeded(f"{provider.name} has no device codes for mail", hint="use --browser")
    answer = _asked(poster, provider.device_endpoint, client, scope=provider.scope)
    # Google and others write verification_url, as in a draft of the RFC.
    address = answer.get("verification_uri", answer.get("verification_url"))
    codes = [address, answer.get("user_code"), answer.get("device_code")]
    if not all(isinstance(code, str) and code.isprintable() and code for code in codes):
        raise OperatorNeeded(
            f"{provider.device_endpoint} answered without a device code", hint="check --device-endpoint"
        )
    where, user_code, device_code = map(str, codes)
    return DeviceCode(
        where[:_SHOWN_CHARACTERS],
        user_code[:_SHOWN_CHARACTERS],
        device_code,
        min(_seconds(answer.get("interval"), INTERVAL_SECONDS), LONGEST_INTERVAL_SECONDS),
        min(_seconds(answer.get("expires_in"), LONGEST_CONSENT_SECONDS), LONGEST_CONSENT_SECONDS),
    )


def await_device(
    poster: Poster,
    provider: Provider,
    client: Client,
    code: DeviceCode,
    *,
    sleep: Callable[[float], None] = time.sleep,
    monotonic: Callable[[], float] = time.monotonic,
) -> Credential:
    """Ask until the person has answered (RFC 8628 section 3.5). Raises OperatorNeeded."""
    ends_at = monotonic() + code.lives_seconds
    interval = code.interval_seconds
    while monotonic() + interval < ends_at:
        sleep(interval)
        try:
            answer = poster.ask(
                provider.token_endpoint, client, grant_type=_DEVICE_GRANT, device_code=code.device_code
            )
        except Refusal as refusal:
            match refusal.code:
                case "authorization_pending":
                    pass
                case "slow_down":
                    interval += INTERVAL_SECONDS  # for good, as the RFC says
                case _:
                    raise _denied(refusal) from None
        except TryLater:
            interval = min(2 * interval, LONGEST_INTERVAL_SECONDS)
        else:
            return _credential(provider, client, answer)
    raise OperatorNeeded("no answer in time: the code has expired", hint="run the command again")


class Browser:
    """Consent by a browser. A context manager: while it is entered, a loopback port waits for the browser."""

    def __init__(self, provider: Provider, client: Client, *, user: str = "") -> None:
        """``user`` is suggested to the person as the one to log in as."""
        from authlib.common.security import generate_token
        from authlib.oauth2.client import OAuth2Client

        if provider.consent_endpoint is None:
            raise OperatorNeeded(
                f"the address of the page where {provider.name} asks for consent is not known",
                hint="give --consent-endpoint, or --device-endpoint",
            )
        self._provider = provider
        self._client = client
        self._server = _Listener()
        self._redirect = f"http://127.0.0.1:{self._server.server_port}/"
        self._verifier: str = generate_token(64)
        self._state: str = generate_token(32)
        speaker = OAuth2Client(
            None, client.id, scope=provider.scope, redirect_uri=self._redirect, code_challenge_method="S256"
        )
        self.address: str
        """The address for the person to open."""
        self.address, _ = speaker.create_authorization_url(
            provider.consent_endpoint,
            state=self._state,
            code_verifier=self._verifier,
            **dict(provider.consent_parameters),
            **({"login_hint": user} if user else {}),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.server_close()

    def wait(
        self,
        poster: Poster,
        typed: IO[str] | None,
        *,
        seconds: float = LONGEST_CONSENT_SECONDS,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> Credential:
        """Wait for the browser, or for a line in ``typed`` with the address that it ended at.

        Raises OperatorNeeded, TryLater.
        """
        ends_at = monotonic() + seconds
        while (left := ends_at - monotonic()) > 0:
            sources: list[Any] = [self._server.socket, *([typed] if typed is not None else [])]
            ready, _, _ = select.select(sources, [], [], left)
            if typed in ready and typed is not None:
                line = typed.readline()
                if not line:
                    typed = None  # standard input has ended
                elif line.strip():
                    return self._finish(poster, urlsplit(line.strip()).query)
            elif ready:
                self._server.handle_request()
                if self._server.query is not None:
                    return self._finish(poster, self._server.query)
        raise OperatorNeeded("no answer in time", hint="run the command again")

    def _finish(self, poster: Poster, query: str) -> Credential:
        told = {name: values[0] for name, values in parse_qs(query).items()}
        if told.get("state") != self._state:
            raise OperatorNeeded(
                "that is not the answer to this request",
                hint="paste the whole address at which the browser ended, beginning with http://127.0.0.1",
            )
        if "code" not in told:
            reason = "".join(c for c in told.get("error", "no code came") if c.isprintable())
            raise OperatorNeeded(f"{self._provider.name} did not grant access: {reason[:_SHOWN_CHARACTERS]}")
        answer = _asked(
            poster,
            self._provider.token_endpoint,
            self._client,
            grant_type="authorization_code",
            code=told["code"],
            code_verifier=self._verifier,
            redirect_uri=self._redirect,
        )
        return _credential(self._provider, self._client, answer)


class _Listener(HTTPServer):
    """Waits on loopback for a browser that comes back."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.query: str | None = None

    def handle_error(self, *_: object) -> None:
        """A browser that disconnected sent no answer."""


class _Handler(BaseHTTPRequestHandler):
    server: _Listener
    timeout = CONNECTION_SECONDS

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        came_back = parts.path == "/" and "state=" in parts.query
        if came_back:
            self.server.query = parts.query
        text = b"Go back to the terminal; this page can be closed.\n" if came_back else b""
        self.send_response(200 if came_back else 404)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """The path holds a code."""


def _asked(poster: Poster, endpoint: str, client: Client, **parameters: str) -> dict[str, Any]:
    try:
        return poster.ask(endpoint, client, **parameters)
    except Refusal as refusal:
        raise _denied(refusal) from None


def _denied(refusal: Refusal) -> ArchiverError:
    hints = {
        "access_denied": "the person refused, or may not decide this: ask the tenant's administrator",
        "expired_token": "run the command again",
        "invalid_client": "check --client-id and --client-secret-file; "
        "an application without a secret must allow public client flows",
        "unauthorized_client": "the application must allow public client flows",
    }
    return OperatorNeeded(f"no access was granted: {refusal}", hint=hints.get(refusal.code))


def _credential(provider: Provider, client: Client, answer: dict[str, Any]) -> Credential:
    refresh_token = answer.get("refresh_token")
    if not isinstance(refresh_token, str) or not refresh_token:
        raise OperatorNeeded(
            f"{provider.name} gave no refresh token, so access would end within the hour",
            hint="the scope may need offline_access",
        )
    return Credential(provider.token_endpoint, client, provider.scope, refresh_token=refresh_token)


def _seconds(told: object, otherwise: float) -> float:
    try:
        seconds = float(told) if isinstance(told, int | float | str) else otherwise
    except ValueError:
        return otherwise
    return seconds if seconds > 0 else otherwise
