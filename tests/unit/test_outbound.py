"""One bounded HTTPS request: what comes back, what is refused, and what no error shows."""

import ssl
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

from archiver.errors import ArchiverError, OperatorNeeded, TryLater
from archiver.outbound import Outbound, check_url, host_of
from tests.harness.oauth_provider import Drip, Fault, Flood, Hang, OauthProvider, Say

DOING = "notify hooks.example"
SECRET = "Bearer hunter2-hunter2"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[OauthProvider]:
    """Any HTTPS server: its faults are the answers."""
    with OauthProvider(tmp_path / "server") as server:
        yield server


def shown(error: BaseException) -> str:
    hint = getattr(error, "hint", "")
    return f"{error} {error!r} {hint} {''.join(traceback.format_exception(error))}"


@pytest.mark.parametrize("status", [200, 202, 400, 404, 422])
def test_an_answer_is_the_callers_to_judge(server: OauthProvider, status: int) -> None:
    server.faults.append(Say(status, b"\xffsecret", (("X-Request-ID", "7"),)))
    answer = Outbound(tls=server.client_tls).send("POST", server.token_endpoint, b"x", doing=DOING)
    assert (answer.status, answer.body, answer.headers["x-request-id"]) == (status, b"\xffsecret", "7")
    assert "secret" not in repr(answer)


def test_a_body_may_be_absent_and_a_method_another(server: OauthProvider) -> None:
    answer = Outbound(tls=server.client_tls).send("GET", server.token_endpoint, doing=DOING)
    assert answer.status in range(200, 500)


FAILURES: list[tuple[Fault, type[ArchiverError], str]] = [
    (Say(503, b"hunter2-hunter2"), TryLater, "^cannot notify hooks.example: it answered 503$"),
    (Say(429), TryLater, "it answered 429"),
    (Say(408), TryLater, "it answered 408"),
    (Say(301, b"", (("Location", "https://elsewhere.example/"),)), OperatorNeeded, "301, a redirect"),
    (Say(307, b"", (("Location", "/here"),)), OperatorNeeded, "307, a redirect"),
    (Flood(), OperatorNeeded, "more than 1000 bytes"),
    (Hang(), TryLater, r"longer than 0\.5 s|in time"),
    (Drip(), TryLater, r"longer than 0\.5 s|in time"),
]


@pytest.mark.parametrize(("fault", "kind", "reason"), FAILURES)
def test_failures(server: OauthProvider, fault: Fault, kind: type[ArchiverError], reason: str) -> None:
    server.faults.append(fault)
    outbound = Outbound(tls=server.client_tls, seconds=0.5, answer_bytes=1000)
    headers = {"Authorization": SECRET}
    with pytest.raises(kind, match=reason) as caught:
        outbound.send("POST", server.token_endpoint, SECRET.encode(), headers, doing=DOING)
    assert "hunter2" not in shown(caught.value)


def test_a_wait_that_the_server_asks_for_is_passed_on(server: OauthProvider) -> None:
    server.faults.append(Say(429, b"", (("Retry-After", "17"),)))
    with pytest.raises(TryLater) as caught:
        Outbound(tls=server.client_tls).send("POST", server.token_endpoint, b"", doing=DOING)
    assert caught.value.wait_seconds == 17.0


def test_the_largest_answer_that_is_allowed(server: OauthProvider) -> None:
    outbound = Outbound(tls=server.client_tls, answer_bytes=1000)
    server.faults += [Say(200, b"x" * 1000), Say(200, b"x" * 1001)]
    assert len(outbound.send("POST", server.token_endpoint, b"", doing=DOING).body) == 1000
    with pytest.raises(OperatorNeeded, match="more than 1000 bytes"):
        outbound.send("POST", server.token_endpoint, b"", doing=DOING)


def test_a_certificate_of_an_unknown_authority_gets_no_request(server: OauthProvider) -> None:
    with pytest.raises(OperatorNeeded, match="certificate is not accepted") as caught:
        Outbound(tls=ssl.create_default_context()).send("POST", server.token_endpoint, b"x", doing=DOING)
    assert "SSL_CERT_FILE" in (caught.value.hint or "")
    assert server.requests == []


@pytest.mark.parametrize(
    "headers", [{"Authorization": SECRET + "\r\nX: y"}, {"Authorization": SECRET + "é"}, {"X\n": SECRET}]
)
def test_a_header_that_is_none_is_neither_sent_nor_shown(
    server: OauthProvider, headers: dict[str, str]
) -> None:
    with pytest.raises(OperatorNeeded, match="header") as caught:
        Outbound(tls=server.client_tls).send("POST", server.token_endpoint, b"", headers, doing=DOING)
    assert "hunter2" not in shown(caught.value)
    assert server.requests == []


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.example/",
        "https://",
        "https://user:hunter2@hooks.example/",
        "https://hooks.example/#hunter2",
        "https://hooks.example/a b",
        "https://hooks.example:0/",
        "https://hooks.example:hunter2/",
        "https://[hunter2/",
        "file:///hunter2",
    ],
)
def test_a_url_to_which_nothing_is_sent(url: str) -> None:
    with pytest.raises(ValueError, match="https://") as caught:
        check_url(url)
    assert "hunter2" not in shown(caught.value)
    with pytest.raises(OperatorNeeded, match="https://"):
        Outbound().send("POST", url, b"", doing=DOING)


def test_the_host_of_a_url_for_messages() -> None:
    assert host_of("https://user:hunter2@hooks.example:8443/path") == "hooks.example:8443"
