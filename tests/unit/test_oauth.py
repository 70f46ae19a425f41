"""Access tokens: had from a real endpoint, shared by threads, renewed in time, and never seen anywhere."""

import io
import json
import os
import re
import ssl
import threading
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from joserfc.jwk import RSAKey

from archiver.errors import ArchiverError, OperatorNeeded, TryLater, UsageError
from archiver.model import Account
from archiver.oauth import GOOGLE, MICROSOFT, AccessTokens, Credential, Poster, Provider
from archiver.oauth.consent import Browser, ask_device_code, await_device
from archiver.oauth.endpoint import Client
from archiver.outbound import ANSWER_BYTES
from archiver.secrets import Secrets, check_reference
from tests.harness.oauth_provider import (
    CLIENT,
    SCOPE,
    SECRET,
    Drip,
    Fault,
    Flood,
    Hang,
    OauthProvider,
    Say,
    error,
)

KEY = "bm90IGEga2V5IGJ1dCBhcyBsb25nIGFzIG9uZSBpcyE="
USER = "anna@contoso.example"


@pytest.fixture
def provider(tmp_path: Path) -> Iterator[OauthProvider]:
    with OauthProvider(tmp_path / "provider") as provider:
        yield provider


def told(failure: BaseException) -> str:
    """Everything that a log could show of an error, and of what led to it."""
    hint = getattr(failure, "hint", "")
    return f"{failure} {failure!r} {hint} {''.join(traceback.format_exception(failure))}"


class World:
    """What surrounds the tokens: a clock, a database of secrets, a provider."""

    def __init__(self, provider: OauthProvider, *, seconds: float = 20.0) -> None:
        self.provider = provider
        self.time = 1000.0
        self.secrets = Secrets(KEY)
        self.kept: list[str] = []
        self.lost_writes = 0
        self.tokens = self.process(seconds=seconds)

    def process(self, *, seconds: float = 20.0) -> AccessTokens:
        """A process that was just started, and holds nothing."""
        return AccessTokens(
            self.secrets,
            self.keep,
            poster=Poster(tls=self.provider.client_tls, seconds=seconds),
            monotonic=lambda: self.time,
        )

    def keep(self, account: Account, reference: str, document: str) -> str:
        if self.lost_writes:
            self.lost_writes -= 1
            raise TryLater("the database is away")
        assert reference == (self.kept[-1] if self.kept else account.secret_reference)
        self.kept.append(f"oauth:{self.secrets.seal(account, document)}")
        return self.kept[-1]

    def document(self, **fields: str) -> str:
        known = {"token_endpoint": self.provider.token_endpoint, "client_id": CLIENT, "scope": SCOPE}
        return json.dumps(known | {"client_secret": SECRET} | fields)

    def account(self, name: str = "anna", *, secret_reference: str | None = None, **fields: str) -> Account:
        bare = Account(name, name, "pop3s://x@host", "implicit", "")
        reference = secret_reference or f"oauth:{self.secrets.seal(bare, self.document(**fields))}"
        return replace(bare, secret_reference=reference)

    def person(self) -> Account:
        return self.account(refresh_token=self.provider.refresh_token(USER))


@pytest.fixture
def world(provider: OauthProvider) -> World:
    return World(provider)


# What an account keeps.


def test_references_to_credentials() -> None:
    for reference in ("oauth:file:/etc/key.json", "oauth:env:CREDENTIAL", "oauth:sealed:abc"):
        assert check_reference(reference) == reference
    for given in ("oauth:", "oauth:file:", "oauth:prompt:", "oauth:oauth:file:/x", '{"client_secret": "x"}'):
        with pytest.raises(UsageError):
            check_reference(given)


def test_a_provider_implies_endpoint_and_scope() -> None:
    google = Credential.parse('{"provider": "google", "client_id": "i", "refresh_token": "r"}', "a")
    assert (google.token_endpoint, google.scope) == (GOOGLE.token_endpoint, "https://mail.google.com/")
    person = Credential.parse('{"provider": "microsoft", "client_id": "i", "refresh_token": "r"}', "a")
    assert person.token_endpoint == "https://login.microsoftonline.com/common/oauth2/v2.0/token"
    assert person.scope == "https://outlook.office.com/POP.AccessAsUser.All offline_access"
    document = (
        '{"provider": "microsoft", "tenant": "contoso.example", "client_id": "i", "client_secret": "s"}'
    )
    application = Credential.parse(document, "a")
    assert application.token_endpoint == MICROSOFT.of("contoso.example").token_endpoint
    assert application.scope == "https://outlook.office365.com/.default"


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ("hunter2", "not a JSON object"),
        ("[" * 100_000, "not a JSON object"),
        ('["hunter2"]', "not a JSON object"),
        ("{}", "neither refresh_token nor client_secret"),
        ('{"client_secret": "hunter2"}', "no token_endpoint"),
        ('{"provider": "hunter2"}', "one of google, microsoft"),
        ('{"provider": "google", "client_secret": "hunter2"}', "no client_id"),
        ('{"provider": "google", "client_id": "i"}', "neither refresh_token nor client_secret"),
        ('{"provider": "google", "client_id": "i", "client_secret": "hunter2"}', "no scope"),
        (
            '{"provider": "google", "client_id": "i", "refresh_token": ["hunter2"]}',
            "refresh_token is not text",
        ),
        ('{"provider": "microsoft", "client_id": "i", "client_secret": "hunter2"}', "needs a tenant"),
        (
            '{"provider": "microsoft", "tenant": "a/../b", "client_id": "i", "client_secret": "hunter2"}',
            "is not a tenant",
        ),
        (
            '{"token_endpoint": "http://x/t", "scope": "s", "client_id": "i", "client_secret": "hunter2"}',
            "an endpoint is an https:// address",
        ),
        (
            '{"token_endpoint": "https://u:hunter2@x", "scope": "s", "client_id": "i", "client_secret": "x"}',
            "an endpoint is an https:// address",
        ),
        ('{"type": "service_account", "client_email": "x", "client_id": "hunter2"}', "neither"),
    ],
)
def test_a_credential_that_cannot_be_used_says_why_and_not_what(document: str, reason: str) -> None:
    with pytest.raises(OperatorNeeded, match=reason) as caught:
        Credential.parse(document, "anna")
    assert "hunter2" not in told(caught.value)


def test_a_credential_is_kept_as_it_was_read(world: World) -> None:
    credential = Credential.parse(world.document(refresh_token="r"), "anna")
    assert Credential.parse(credential.document(), "anna") == credential


# Grants.


def test_a_refresh_token_gives_access(world: World) -> None:
    token = world.tokens.current(world.person(), USER)
    assert world.provider.access_tokens[token] == USER
    [asked] = world.provider.requests
    assert asked["grant_type"] == "refresh_token"
    assert asked["scope"] == SCOPE


def test_an_application_without_a_secret_shows_none(tmp_path: Path) -> None:
    with OauthProvider(tmp_path / "public", public=True) as provider:
        world = World(provider)
        document = {"token_endpoint": provider.token_endpoint, "client_id": CLIENT, "scope": SCOPE}
        document["refresh_token"] = provider.refresh_token(USER)
        sealed = world.secrets.seal(world.account(), json.dumps(document))
        account = world.account(secret_reference=f"oauth:{sealed}")
        assert world.tokens.current(account, USER) in provider.access_tokens
        assert "client_secret" not in provider.requests[0]


def test_m6_an_applications_token_is_shared_by_all_mailboxes(world: World, tmp_path: Path) -> None:
    file = tmp_path / "application.json"
    file.write_text(world.document())
    accounts = [world.account(f"user{number}", secret_reference=f"oauth:file:{file}") for number in range(5)]
    accounts += [world.account("sealed")]
    tokens = {world.tokens.current(account, account.name) for account in accounts}
    assert len(tokens) == 1
    assert [asked["grant_type"] for asked in world.provider.requests] == ["client_credentials"]


def test_a_service_account_acts_for_each_user(world: World, tmp_path: Path) -> None:
    key = RSAKey.generate_key(2048, private=True)
    world.provider.service_keys["robot@project"] = key
    file = tmp_path / "key.json"
    document = {
        "type": "service_account",
        "client_email": "robot@project",
        "client_id": "1234",
        "private_key": key.as_pem(private=True).decode(),
        "token_uri": world.provider.token_endpoint,
    }
    file.write_text(json.dumps(document))
    account = world.account(secret_reference=f"oauth:file:{file}")
    for user in ("anna@contoso.example", "berta@contoso.example"):
        assert world.provider.access_tokens[world.tokens.current(account, user)] == user
    world.provider.service_keys.clear()
    file.write_text(json.dumps(document | {"private_key": "-----BEGIN hunter2-----"}))
    with pytest.raises(OperatorNeeded, match="private key of robot@project cannot") as caught:
        world.tokens.current(account, USER)
    assert "hunter2" not in told(caught.value)


# How long a token is held.


def test_a_token_is_held_until_shortly_before_its_end(world: World) -> None:
    account = world.person()
    first = world.tokens.current(account, USER)
    world.time += 3299
    assert world.tokens.current(account, USER) == first
    world.time += 1
    assert world.tokens.current(account, USER) != first
    assert len(world.provider.requests) == 2


@pytest.mark.parametrize(
    ("lives", "held_seconds"),
    [(None, 540), ("3600", 3300), (20, 18), (-5, 540), ("soon", 540), (10**12, 86100)],
)
def test_whatever_a_provider_says_of_a_tokens_life(
    tmp_path: Path, lives: int | str | None, held_seconds: float
) -> None:
    with OauthProvider(tmp_path / "p", lives_seconds=lives) as provider:
        world = World(provider)
        account = world.person()
        first = world.tokens.current(account, USER)
        world.time += held_seconds - 1
        assert world.tokens.current(account, USER) == first
        world.time += 1
        assert world.tokens.current(account, USER) != first


def test_many_threads_make_one_request(world: World) -> None:
    account = world.person()
    together = threading.Barrier(8)

    def ask(_: int) -> str:
        together.wait()
        return world.tokens.current(account, USER)

    with ThreadPoolExecutor(8) as pool:
        tokens = set(pool.map(ask, range(8)))
    assert len(tokens) == len(world.provider.requests) == 1


def test_a_refused_token_is_had_anew_once_for_all_who_held_it(world: World) -> None:
    account = world.person()
    refused = world.tokens.current(account, USER)
    world.time += 600
    another = world.tokens.instead(account, USER, refused)
    assert another not in {None, refused}
    assert world.tokens.instead(account, USER, refused) == another
    assert world.tokens.current(account, USER) == another
    assert len(world.provider.requests) == 2


def test_a_token_that_was_just_fetched_is_not_what_is_refused(world: World) -> None:
    account = world.person()
    refused = world.tokens.current(account, USER)
    world.time += 59
    assert world.tokens.instead(account, USER, refused) is None
    assert len(world.provider.requests) == 1


def test_what_nobody_asks_for_is_forgotten(world: World) -> None:
    old = [
        world.account(f"user{number}", refresh_token=world.provider.refresh_token(USER))
        for number in range(3)
    ]
    for account in old:
        world.tokens.current(account, USER)
    world.time += 25 * 3600
    world.tokens.current(world.person(), USER)
    assert len(world.tokens.cached) == 1


# Refresh tokens that are replaced.


@pytest.fixture
def rotating(tmp_path: Path) -> Iterator[World]:
    with OauthProvider(tmp_path / "rotating", rotates=True) as provider:
        yield World(provider)


def test_a_replaced_refresh_token_is_kept_before_its_access_token_is_used(rotating: World) -> None:
    account = rotating.person()
    rotating.tokens.current(account, USER)
    [kept] = rotating.kept
    assert kept.startswith("oauth:sealed:")
    again = rotating.process()
    assert again.current(replace(account, secret_reference=kept), USER) in rotating.provider.access_tokens


def test_a_poll_that_goes_on_for_days_knows_every_replacement(rotating: World) -> None:
    account = rotating.person()  # as it was read when the process began
    for _ in range(5):
        rotating.tokens.current(account, USER)
        rotating.time += 3600
    assert len(rotating.kept) == 5
    assert len(rotating.tokens.cached) == 3
    newest = replace(account, secret_reference=rotating.kept[-1])
    assert rotating.tokens.current(newest, USER) in rotating.provider.access_tokens


def test_a_database_that_is_away_loses_no_refresh_token(rotating: World) -> None:
    account = rotating.person()
    rotating.lost_writes = 1
    with pytest.raises(TryLater, match="the database is away"):
        rotating.tokens.current(account, USER)
    token = rotating.tokens.current(account, USER)
    assert token in rotating.provider.access_tokens
    assert len(rotating.kept) == 2
    again = rotating.process()
    assert again.current(replace(account, secret_reference=rotating.kept[-1]), USER)


def test_a_replaced_refresh_token_of_a_file_is_held_in_memory_and_said(
    rotating: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from archiver import observe

    observe.log_quietly()
    caplog.set_level("WARNING", "archiver")
    file = tmp_path / "credential.json"
    file.write_text(rotating.document(refresh_token=rotating.provider.refresh_token(USER)))
    content = file.read_bytes()
    account = rotating.account(secret_reference=f"oauth:file:{file}")
    for _ in range(3):
        assert rotating.tokens.current(account, USER) in rotating.provider.access_tokens
        rotating.time += 3600
    assert (rotating.kept, file.read_bytes()) == ([], content)
    assert [record.message for record in caplog.records] == ["credential.not_kept"]


# Failures.


FAILURES: list[tuple[Fault, type[ArchiverError], str]] = [
    (Say(503, b"<html>busy"), TryLater, "answered 503"),
    (Say(500, b'{"error": "invalid_grant"}'), TryLater, "answered 500"),
    (Say(429), TryLater, "answered 429"),
    (Say(408), TryLater, "answered 408"),
    (error("temporarily_unavailable"), TryLater, "temporarily_unavailable"),
    (
        error("invalid_grant", "AADSTS700082: expired"),
        OperatorNeeded,
        r"AADSTS700082: expired \(the access was",
    ),
    (error("interaction_required", "AADSTS50076"), OperatorNeeded, "interaction_required: AADSTS50076"),
    (error("consent_required"), OperatorNeeded, "consent_required"),
    (error("invalid_grant", "x" * 5000), OperatorNeeded, r"x{300}\.\.\."),
    (error("invalid_grant", "a\x1b[31m\r\nb"), OperatorNeeded, r"a \[31m b"),
    (
        Say(302, b"", (("Location", "https://elsewhere.example/"),)),
        OperatorNeeded,
        "a redirect, which is not followed",
    ),
    (Say(404, b"not here"), OperatorNeeded, "answered 404, and not as OAuth does"),
    (Say(200, b"<html>Welcome to the hotel"), OperatorNeeded, "not as OAuth does"),
    (Say(200, b"[]"), OperatorNeeded, "not as OAuth does"),
    (Say(200, b"[" * 100_000), OperatorNeeded, "not as OAuth does"),
    (Say(200, b"{}"), OperatorNeeded, "without a bearer token"),
    (Say(200, b'{"access_token": 5}'), OperatorNeeded, "without a bearer token"),
    (Say(200, b'{"access_token": "x", "token_type": "mac"}'), OperatorNeeded, "without a bearer token"),
    (Flood(), OperatorNeeded, f"more than {ANSWER_BYTES} bytes"),
]


@pytest.mark.parametrize(("fault", "kind", "reason"), FAILURES)
def test_what_a_provider_says_instead_of_a_token(
    world: World, fault: Fault, kind: type[ArchiverError], reason: str
) -> None:
    world.provider.faults.append(fault)
    account = world.person()
    with pytest.raises(kind, match=reason) as caught:
        world.tokens.current(account, USER)
    assert "\n" not in str(caught.value)
    assert world.tokens.current(account, USER) in world.provider.access_tokens


@pytest.mark.parametrize("fault", [Hang(), Drip()])
def test_a_provider_that_hangs_or_drips_holds_no_thread(provider: OauthProvider, fault: Fault) -> None:
    world = World(provider, seconds=0.3)
    provider.faults.append(fault)
    with pytest.raises(TryLater, match=r"longer than 0\.3 s|in time"):
        world.tokens.current(world.person(), USER)


@pytest.mark.parametrize(
    ("asked", "seconds"),
    [("17", 17.0), ("999999999999", 3600.0), ("-1", None), ("soon", None), ("", None), ("0", 0.0)],
)
def test_retry_after_is_obeyed_within_reason(world: World, asked: str, seconds: float | None) -> None:
    world.provider.faults.append(Say(429, b"", (("Retry-After", asked),)))
    with pytest.raises(TryLater) as caught:
        world.tokens.current(world.person(), USER)
    assert caught.value.wait_seconds == seconds


def test_retry_after_may_be_a_date(world: World) -> None:
    then = format_datetime(datetime.now(UTC) + timedelta(minutes=5), usegmt=True)
    world.provider.faults.append(Say(503, b"", (("Retry-After", then),)))
    with pytest.raises(TryLater) as caught:
        world.tokens.current(world.person(), USER)
    assert caught.value.wait_seconds is not None
    assert 200 < caught.value.wait_seconds <= 300


def test_a_refused_credential_needs_an_operator_who_is_told_what_to_do(world: World) -> None:
    account = world.person()
    world.provider.refresh_tokens.clear()
    with pytest.raises(OperatorNeeded, match="said invalid_grant: Token ") as caught:
        world.tokens.current(account, USER)
    assert caught.value.hint == "archiver account authorize anna"


def test_nobody_there_is_a_trouble_that_passes(tmp_path: Path) -> None:
    with OauthProvider(tmp_path / "p") as provider:
        world = World(provider)
        account = world.person()
    with pytest.raises(TryLater, match="cannot ask localhost:"):
        world.tokens.current(account, USER)


def test_a_certificate_that_nobody_vouches_for_gets_no_secret(provider: OauthProvider) -> None:
    world = World(provider)
    tokens = AccessTokens(world.secrets, world.keep, poster=Poster(tls=ssl.create_default_context()))
    with pytest.raises(OperatorNeeded, match="certificate is not accepted"):
        tokens.current(world.person(), USER)
    assert provider.requests == []


# Nowhere to be seen.


def test_no_secret_is_in_any_error_or_repr(world: World) -> None:
    refresh_token = world.provider.refresh_token(USER)
    account = world.account(refresh_token=refresh_token)
    token = world.tokens.current(account, USER)
    credential = Credential.parse(world.document(refresh_token=refresh_token), "anna")
    held = world.tokens.cached[0]
    for value in (world.tokens, credential, credential.client, held, held.token, vars(held)):
        assert not [secret for secret in (refresh_token, SECRET, token) if secret in repr(value)]
    world.provider.refresh_tokens.clear()
    wrong = world.account(refresh_token=refresh_token, client_secret="hunter2-" * 4)
    for one in (account, wrong):
        world.time += 3600
        with pytest.raises(OperatorNeeded) as caught:  # this provider repeats what it was sent
            world.tokens.current(one, USER)
        assert "***" in str(caught.value)
        assert not [s for s in (refresh_token, SECRET, token, "hunter2") if s in told(caught.value)]


# By a device code.


class Patience:
    """Sleeps, and tells how long; ``then`` happens at each."""

    def __init__(self, *then: Callable[[], object]) -> None:
        self.slept: list[float] = []
        self._then = list(then)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        if self._then:
            self._then.pop(0)()

    def monotonic(self) -> float:
        return sum(self.slept)


def by_device(provider: OauthProvider, patience: Patience) -> Credential:
    poster, client = Poster(tls=provider.client_tls), Client(CLIENT, SECRET)
    theirs = Provider("theirs", provider.token_endpoint, SCOPE, device_endpoint=provider.device_endpoint)
    code = ask_device_code(poster, theirs, client)
    assert (code.user_code, code.lives_seconds) == ("WDJB-MJHT", 900)
    assert code.device_code not in repr(code)
    return await_device(poster, theirs, client, code, sleep=patience.sleep, monotonic=patience.monotonic)


def test_a_person_types_a_code(provider: OauthProvider) -> None:
    def later(*faults: Fault) -> Callable[[], None]:
        return lambda: provider.faults.extend(faults)

    patience = Patience(
        lambda: None,
        later(error("slow_down")),
        later(Say(503)),
        later(error("authorization_pending")),
        lambda: provider.grant(USER),
    )
    credential = by_device(provider, patience)
    assert patience.slept == [5, 5, 10, 20, 20]
    assert credential.refresh_token in provider.refresh_tokens
    assert credential.client == Client(CLIENT, SECRET)


def test_a_provider_without_an_interval_is_asked_every_five_seconds(tmp_path: Path) -> None:
    with OauthProvider(tmp_path / "p", interval_seconds=None) as provider:
        patience = Patience(lambda: provider.grant(USER))
        by_device(provider, patience)
    assert patience.slept == [5]


@pytest.mark.parametrize(
    ("code", "hint"), [("expired_token", "run the command again"), ("access_denied", "administrator")]
)
def test_a_person_says_no_or_nothing(provider: OauthProvider, code: str, hint: str) -> None:
    patience = Patience(lambda: provider.faults.append(error(code)))
    with pytest.raises(OperatorNeeded, match=code) as caught:
        by_device(provider, patience)
    assert hint in (caught.value.hint or "")


def test_a_code_is_not_asked_for_after_its_end(provider: OauthProvider) -> None:
    patience = Patience()
    with pytest.raises(OperatorNeeded, match="the code has expired"):
        by_device(provider, patience)
    assert 890 <= sum(patience.slept) < 900


@pytest.mark.parametrize(
    "answer", [b"{}", b'{"device_code": "d", "user_code": "\\u001b[2J", "verification_uri": "https://x"}']
)
def test_an_answer_that_is_no_device_code(provider: OauthProvider, answer: bytes) -> None:
    provider.faults.append(Say(200, answer))
    with pytest.raises(OperatorNeeded, match="without a device code"):
        by_device(provider, Patience())


def test_access_that_would_end_within_the_hour_is_not_taken(provider: OauthProvider) -> None:
    patience = Patience(lambda: provider.faults.append(Say(200, b'{"access_token": "x"}')))
    with pytest.raises(OperatorNeeded, match="gave no refresh token") as caught:
        by_device(provider, patience)
    assert "offline_access" in (caught.value.hint or "")


def test_google_has_no_device_codes_for_mail(provider: OauthProvider) -> None:
    with pytest.raises(OperatorNeeded, match="no device codes for mail"):
        ask_device_code(Poster(), GOOGLE, Client(CLIENT))


# By a browser.


@pytest.fixture
def browser(provider: OauthProvider) -> Iterator[Browser]:
    theirs = Provider(
        "theirs",
        provider.token_endpoint,
        SCOPE,
        consent_endpoint=f"{provider.url}/authorize",
        consent_parameters=GOOGLE.consent_parameters,
    )
    with Browser(theirs, Client(CLIENT, SECRET), user=USER) as browser:
        yield browser


def pasted(line: str) -> Any:
    """Somebody's terminal, on which this was typed."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as terminal:
        terminal.write(f"\n{line}\n")
    return os.fdopen(reader, "r", buffering=1)


def test_the_browser_comes_back_by_itself(provider: OauthProvider, browser: Browser) -> None:
    assert "access_type=offline" in browser.address
    assert "login_hint=anna%40contoso.example" in browser.address
    back = provider.consent(browser.address, USER)
    poster = Poster(tls=provider.client_tls)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(browser.wait, poster, None, seconds=20)
        with pytest.raises(urllib.error.HTTPError):  # what browsers ask for besides
            urllib.request.urlopen(re.sub(r"\?.*", "favicon.ico", back), timeout=10)
        with urllib.request.urlopen(back, timeout=10) as page:
            assert b"Go back to the terminal" in page.read()
        credential = waiting.result()
    assert credential.refresh_token in provider.refresh_tokens


def test_the_address_is_pasted_where_the_browser_is_elsewhere(
    provider: OauthProvider, browser: Browser
) -> None:
    with pasted(provider.consent(browser.address, USER)) as terminal:
        credential = browser.wait(Poster(tls=provider.client_tls), terminal, seconds=20)
    assert credential.refresh_token in provider.refresh_tokens


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("http://127.0.0.1:1/?code=x&state=another", "not the answer to this request"),
        ("hello", "not the answer to this request"),
    ],
)
def test_another_address_is_not_taken(browser: Browser, line: str, reason: str) -> None:
    with pasted(line) as terminal, pytest.raises(OperatorNeeded, match=reason):
        browser.wait(Poster(), terminal, seconds=20)


def test_a_person_who_says_no_in_the_browser(provider: OauthProvider, browser: Browser) -> None:
    back = re.sub(r"code=.*", "error=access_denied", provider.consent(browser.address, USER))
    with pasted(back) as terminal, pytest.raises(OperatorNeeded, match="did not grant access: access_denied"):
        browser.wait(Poster(), terminal, seconds=20)


def test_nobody_waits_for_ever(browser: Browser) -> None:
    time = iter(range(0, 100, 10))
    with pytest.raises(OperatorNeeded, match="no answer in time"):
        browser.wait(Poster(), io.StringIO() and None, seconds=5, monotonic=lambda: next(time))
