"""Which mechanism is tried, what each of them says, and which answers it takes."""

import base64
import hashlib
import json
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hypothesis import given, settings
from hypothesis import strategies as st

from archiver.pop3.failures import FailureKind, Pop3Error
from archiver.pop3.sasl import (
    APOP,
    LOGIN_COMMANDS,
    MECHANISMS,
    MOST_ITERATIONS,
    SCRAM_MECHANISMS,
    CramMd5,
    Credentials,
    External,
    Login,
    Mechanism,
    OauthBearer,
    Plain,
    RefusedInside,
    Scram,
    Xoauth2,
    apop_digest,
    apop_stamp,
    binding_for,
    choose_mechanism,
    is_prepared,
)
from archiver.pop3.transport import end_point
from tests.harness.scram import ScramServer

USER = Credentials("user", "hunter2", "mail.example", 995)
BINDING = b"b" * 32
ALL = frozenset(MECHANISMS)
ALONE = sorted(ALL - {"GSSAPI"})
"""Those that need nothing but a server; Kerberos has a contract test of its own, with a realm."""


def refusal_of(call: Callable[[], object]) -> Pop3Error:
    with pytest.raises(Pop3Error) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)
    return caught.value


# The choice.


@pytest.mark.parametrize(
    ("offered", "fixed", "ways"),
    [
        (frozenset({"PLAIN"}), None, ("PLAIN", LOGIN_COMMANDS)),
        (frozenset({"XOAUTH2", "PLAIN", "LOGIN"}), None, ("PLAIN", "LOGIN", LOGIN_COMMANDS)),
        (
            frozenset({"CRAM-MD5", "PLAIN", "SCRAM-SHA-1", "SCRAM-SHA-256"}),
            None,
            ("SCRAM-SHA-256", "SCRAM-SHA-1", "PLAIN", LOGIN_COMMANDS),
        ),
        (frozenset(), None, (LOGIN_COMMANDS,)),
        (frozenset({"GSSAPI", "CRAM-MD5", "OAUTHBEARER", "EXTERNAL"}), None, (LOGIN_COMMANDS,)),
        (frozenset({"PLAIN"}), "+LOGIN", (LOGIN_COMMANDS,)),
        (frozenset({"PLAIN"}), "+APOP", (APOP,)),
        (frozenset({"PLAIN"}), "PLAIN", ("PLAIN",)),
        (frozenset(), "PLAIN", ("PLAIN",)),  # servers under-report
        (ALL, "LOGIN", ("LOGIN",)),
        (ALL, "XOAUTH2", ("XOAUTH2",)),
        (ALL, "CRAM-MD5", ("CRAM-MD5",)),
    ],
)
def test_the_choice_is_ours(offered: frozenset[str], fixed: str | None, ways: tuple[str, ...]) -> None:
    assert choose_mechanism(offered, fixed, private=True) == ways


def test_the_strongest_comes_first_and_binding_before_none() -> None:
    ways = choose_mechanism(ALL, None, private=True, binds=True)
    assert ways == (
        "SCRAM-SHA-512-PLUS",
        "SCRAM-SHA-256-PLUS",
        "SCRAM-SHA-512",
        "SCRAM-SHA-256",
        "SCRAM-SHA-1-PLUS",
        "SCRAM-SHA-1",
        "PLAIN",
        "LOGIN",
        LOGIN_COMMANDS,
    )
    without = choose_mechanism(ALL, None, private=True, binds=False)
    assert without == tuple(way for way in ways if not way.endswith("-PLUS"))


@pytest.mark.parametrize(
    "fixed", [None, "PLAIN", "LOGIN", "+LOGIN", "+APOP", "XOAUTH2", "OAUTHBEARER", "EXTERNAL", "GSSAPI"]
)
def test_nothing_reveals_a_password_on_a_channel_that_is_not_private(fixed: str | None) -> None:
    offered = frozenset({"PLAIN", "LOGIN", "CRAM-MD5", "XOAUTH2", "OAUTHBEARER", "EXTERNAL"})
    error = refusal_of(lambda: choose_mechanism(offered, fixed, private=False))
    assert error.kind is FailureKind.SECURITY


def test_challenge_and_response_may_cross_a_channel_that_is_not_private() -> None:
    assert choose_mechanism(ALL, None, private=False) == ("SCRAM-SHA-512", "SCRAM-SHA-256", "SCRAM-SHA-1")
    assert choose_mechanism(ALL, "CRAM-MD5", private=False) == ("CRAM-MD5",)


@pytest.mark.parametrize("fixed", ["NTLM", "+KERBEROS", "LOGIN_COMMANDS", "APOP", "USER/PASS"])
def test_a_mechanism_that_the_url_fixes_is_never_replaced(fixed: str) -> None:
    error = refusal_of(lambda: choose_mechanism(ALL, fixed, private=True))
    assert error.kind is FailureKind.OPERATOR
    assert fixed in str(error)


def test_binding_that_is_fixed_and_cannot_be_had_is_an_error() -> None:
    assert choose_mechanism(ALL, "SCRAM-SHA-1-PLUS", private=True, binds=True) == ("SCRAM-SHA-1-PLUS",)
    error = refusal_of(lambda: choose_mechanism(ALL, "SCRAM-SHA-1-PLUS", private=True))
    assert error.kind is FailureKind.OPERATOR


@pytest.mark.parametrize(
    ("way", "offered", "flag"),
    [
        ("SCRAM-SHA-256-PLUS", {"SCRAM-SHA-256", "SCRAM-SHA-256-PLUS"}, "p=tls-server-end-point"),
        ("SCRAM-SHA-256-PLUS", set(), "p=tls-server-end-point"),
        ("SCRAM-SHA-256", {"SCRAM-SHA-256"}, "y"),
        ("SCRAM-SHA-256", {"SCRAM-SHA-256", "SCRAM-SHA-1-PLUS"}, "n"),
        ("SCRAM-SHA-256", set(), "n"),
    ],
)
def test_a_server_learns_that_its_offer_to_bind_was_stripped(way: str, offered: set[str], flag: str) -> None:
    """RFC 5802 section 6."""
    binding = binding_for(way, frozenset(offered), BINDING)
    first = Scram(way, Credentials("user", "hunter2", binding=binding)).start()
    assert first.startswith(f"{flag},,n=user,r=".encode())


def test_without_a_binding_nothing_is_said_of_it() -> None:
    assert binding_for("SCRAM-SHA-256", frozenset({"SCRAM-SHA-256"}), None) is None


# PLAIN, LOGIN, EXTERNAL.


def test_plain_says_user_and_password_at_once() -> None:
    """RFC 4616 section 2."""
    mechanism = Plain(Credentials("J\u00fcrgen", "gar\u00e7on"))
    assert not mechanism.complete
    assert mechanism.start() == b"\0J\xc3\xbcrgen\0gar\xc3\xa7on"
    assert mechanism.complete


def test_login_answers_two_prompts_whatever_they_say() -> None:
    mechanism: Mechanism = Login(Credentials("J\u00fcrgen", "gar\u00e7on"))
    assert mechanism.start() is None
    assert mechanism.respond(b"Password:") == b"J\xc3\xbcrgen"
    assert not mechanism.complete
    assert mechanism.respond(b"") == b"gar\xc3\xa7on"
    assert mechanism.complete


def test_external_names_the_user() -> None:
    """RFC 4422 appendix A."""
    mechanism = External(USER)
    assert mechanism.start() == b"user"
    assert mechanism.complete


@pytest.mark.parametrize("name", ALONE)
def test_a_mechanism_has_no_answer_to_one_challenge_too_many(name: str) -> None:
    mechanism = completed(name)
    assert mechanism.complete
    error = refusal_of(lambda: mechanism.respond(b"more?"))
    oauth = isinstance(error, RefusedInside)
    assert error.kind is (FailureKind.AUTH if oauth else FailureKind.PROTOCOL)


def completed(name: str) -> Mechanism:
    """A mechanism that has said all."""
    mechanism = MECHANISMS[name](Credentials("user", "hunter2", binding=BINDING if "PLUS" in name else None))
    first = mechanism.start()
    if name.startswith("SCRAM"):
        flag = "p=tls-server-end-point" if "PLUS" in name else "n"
        server = ScramServer(name, "hunter2", flag, BINDING)
        mechanism.respond(server.final(mechanism.respond(server.first(first or b""))))
    elif name == "LOGIN":
        mechanism.respond(b"")
    if not mechanism.complete:
        mechanism.respond(b"<1@b>")
    return mechanism


@pytest.mark.parametrize("name", ALONE)
def test_success_before_all_was_said_is_an_attack(name: str) -> None:
    credentials = Credentials("user", "hunter2", binding=BINDING if "PLUS" in name else None)
    assert refusal_of(lambda: MECHANISMS[name](credentials).conclude(b"")).kind is FailureKind.SECURITY
    completed(name).conclude(b"welcome")


@pytest.mark.parametrize("name", ALONE)
def test_a_mechanism_does_not_show_its_secret(name: str) -> None:
    mechanism = completed(name)
    assert "hunter2" not in repr(mechanism) + str(mechanism) + repr(USER) + mechanism.hint


def test_m15_kerberos_is_never_taken_unasked() -> None:
    """Exchange offers it, and cannot do it."""
    assert choose_mechanism(frozenset({"GSSAPI", "PLAIN"}), None, private=True) == ("PLAIN", LOGIN_COMMANDS)
    assert choose_mechanism(frozenset({"PLAIN"}), "GSSAPI", private=True) == ("GSSAPI",)


# CRAM-MD5 and APOP.


def test_cram_md5_as_in_its_rfc() -> None:
    """RFC 2195 section 2."""
    mechanism: Mechanism = CramMd5(Credentials("tim", "tanstaaftanstaaf"))
    assert mechanism.start() is None
    answer = mechanism.respond(b"<1896.697170952@postoffice.reston.mci.net>")
    assert answer == b"tim b913a602c7eda7a495b4e6e7334d3890"


@pytest.mark.parametrize("challenge", [b"", b"1@b", b"<a b>", b"<a>\r\n", b"<\xff@b>", b"<a><b>", b"<>"])
def test_cram_md5_takes_no_challenge_that_is_none(challenge: bytes) -> None:
    assert refusal_of(lambda: CramMd5(USER).respond(challenge)).kind is FailureKind.PROTOCOL


def test_apop_as_in_its_rfc() -> None:
    """RFC 1939 section 7."""
    stamp = apop_stamp(b"POP3 server ready <1896.697170952@dbc.mtview.ca.us>")
    assert stamp == b"<1896.697170952@dbc.mtview.ca.us>"
    assert apop_digest(stamp, "tanstaaf") == "c4c9334bac560ecc979e58001b3e22fb"


@pytest.mark.parametrize(
    "greeting",
    [
        b"ready",
        b"<>",
        b"<no at>",
        b"<1@>",
        b"<@b>",
        b"<1\xff@b>",  # what an attacker of CVE-2007-1558 sends
        b"<1\x01@b>",
        b"<1 2@b>",
        b"<1@b> <2@b>",
        b"<<1@b>>",
        b"<1@b",
    ],
)
def test_cve_2007_1558_a_stamp_that_is_no_message_id_is_not_used(greeting: bytes) -> None:
    assert apop_stamp(greeting) is None


# SCRAM.


def test_scram_sha_1_as_in_its_rfc() -> None:
    """RFC 5802 section 5."""
    mechanism = Scram("SCRAM-SHA-1", Credentials("user", "pencil"), nonce="fyko+d2lbbFgONRv9qkxdawL")
    assert mechanism.start() == b"n,,n=user,r=fyko+d2lbbFgONRv9qkxdawL"
    nonce = b"r=fyko+d2lbbFgONRv9qkxdawL3rfcNHYJY1ZVvWVs7j"
    answer = mechanism.respond(nonce + b",s=QSXCR+Q6sek8bf92,i=4096")
    assert answer == b"c=biws," + nonce + b",p=v0X8v3Bz2T0CJGbJQyF0X+HI4Ts="
    assert not mechanism.complete
    assert mechanism.respond(b"v=rmF9pqV8S7suAoZWja4dJRkFsKQ=") == b""
    assert mechanism.complete


def test_scram_sha_256_as_in_its_rfc() -> None:
    """RFC 7677 section 3."""
    mechanism = Scram("SCRAM-SHA-256", Credentials("user", "pencil"), nonce="rOprNGfwEbeRWgbNEkqO")
    assert mechanism.start() == b"n,,n=user,r=rOprNGfwEbeRWgbNEkqO"
    nonce = b"r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
    answer = mechanism.respond(nonce + b",s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096")
    assert answer == b"c=biws," + nonce + b",p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="
    assert mechanism.respond(b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=") == b""
    assert mechanism.complete


def test_scram_writes_a_name_so_that_it_cannot_end_early_and_prepares_both() -> None:
    """RFC 5802 section 5.1; RFC 4013 section 3: a soft hyphen is nothing, a Roman numeral is letters."""
    mechanism = Scram("SCRAM-SHA-256", Credentials("a=b,c", "I\u00adX \u2168"))
    first = mechanism.start()
    assert first.startswith(b"n,,n=a=3Db=2Cc,r=")
    server = ScramServer("SCRAM-SHA-256", "IX IX")
    mechanism.respond(server.final(mechanism.respond(server.first(first))))
    assert mechanism.complete


def test_what_saslprep_forbids_is_left_to_plain() -> None:
    assert is_prepared(USER)
    forbidden = Credentials("user", "hunter2 \U0001f511")  # not in the Unicode of RFC 3454
    assert not is_prepared(forbidden)
    assert refusal_of(lambda: Scram("SCRAM-SHA-1", forbidden)).kind is FailureKind.OPERATOR


def test_every_run_has_a_nonce_of_its_own() -> None:
    nonces = {Scram("SCRAM-SHA-256", USER).start() for _ in range(100)}
    assert len(nonces) == 100
    assert min(map(len, nonces)) > len(b"n,,n=user,r=") + 24


def lied_to(server_first: str) -> Pop3Error:
    mechanism = Scram("SCRAM-SHA-256", USER, nonce="clientnonce")
    mechanism.start()
    return refusal_of(lambda: mechanism.respond(server_first.encode("latin-1")))


SALT = "c2l4dGVlbiBvY3RldHMuLg=="


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        pytest.param(f"r=clientnonce,s={SALT},i=4096", FailureKind.SECURITY, id="no nonce of the server"),
        pytest.param(f"r=clientnonc,s={SALT},i=4096", FailureKind.SECURITY, id="a shorter nonce"),
        pytest.param(f"r=other,s={SALT},i=4096", FailureKind.SECURITY, id="another nonce"),
        pytest.param(f"r=clientnonceX,s={SALT},i=4095", FailureKind.SECURITY, id="few iterations"),
        pytest.param(f"r=clientnonceX,s={SALT},i=1", FailureKind.SECURITY, id="one iteration"),
        pytest.param(f"r=clientnonceX,s={SALT},i=-1", FailureKind.SECURITY, id="less than none"),
        pytest.param(f"r=clientnonceX,s={SALT},i=1000001", FailureKind.SECURITY, id="many iterations"),
        pytest.param(f"r=clientnonceX,s={SALT},i=99999999999", FailureKind.SECURITY, id="absurdly many"),
        pytest.param(f"r=clientnonceX,s={SALT},i={'9' * 5000}", FailureKind.SECURITY, id="a number of 5 KB"),
        pytest.param(f"r=clientnonceX,s={SALT},i=x", FailureKind.SECURITY, id="no number"),
        pytest.param("r=clientnonceX,s=,i=4096", FailureKind.SECURITY, id="an empty salt"),
        pytest.param("r=clientnonceX,s=AAAA,i=4096", FailureKind.SECURITY, id="a salt of three octets"),
        pytest.param("r=clientnonceX,s=!!!!,i=4096", FailureKind.SECURITY, id="a salt that is not base64"),
        pytest.param("r=clientnonceX,i=4096", FailureKind.SECURITY, id="no salt"),
        pytest.param("", FailureKind.SECURITY, id="nothing"),
        pytest.param("\xff", FailureKind.SECURITY, id="no text"),
        pytest.param("v=AAAA", FailureKind.SECURITY, id="the end at the beginning"),
        pytest.param(f"m=x,r=clientnonceX,s={SALT},i=4096", FailureKind.OPERATOR, id="an extension"),
        pytest.param("e=unknown-user", FailureKind.AUTH, id="an unknown user"),
        pytest.param("e=other-error", FailureKind.AUTH, id="an error that is not told"),
        pytest.param("e=\x1b[31mwhat", FailureKind.AUTH, id="an unknown error"),
        pytest.param("e=no-resources", FailureKind.TRANSIENT, id="a busy server"),
        pytest.param(
            "e=server-does-support-channel-binding", FailureKind.SECURITY, id="an offer that was stripped"
        ),
        pytest.param("e=channel-bindings-dont-match", FailureKind.SECURITY, id="an attacker in between"),
        pytest.param("e=unsupported-channel-binding-type", FailureKind.OPERATOR, id="another binding"),
    ],
)
def test_a_server_that_lies_at_first_is_refused(message: str, kind: FailureKind) -> None:
    started = time.process_time()
    error = lied_to(message)
    assert error.kind is kind
    assert str(error).isprintable()
    assert time.process_time() - started < 0.2, "nothing was computed for it"


@pytest.mark.parametrize("final", [b"", b"v=", b"v=AAAA", b"v=\xff", b"x=1", b"r=1", b"v=!!!!"])
def test_a_server_that_does_not_know_the_password_cannot_prove_that_it_does(final: bytes) -> None:
    mechanism, _ = before_the_proof()
    assert refusal_of(lambda: mechanism.respond(final)).kind is FailureKind.SECURITY
    assert not mechanism.complete


def before_the_proof() -> tuple[Scram, bytes]:
    """A run that lacks the server's signature alone, and this."""
    mechanism, server = Scram("SCRAM-SHA-256", USER), ScramServer("SCRAM-SHA-256", "hunter2")
    return mechanism, server.final(mechanism.respond(server.first(mechanism.start())))


def test_a_proof_of_another_run_proves_nothing() -> None:
    mechanism, _ = before_the_proof()
    _, proof = before_the_proof()
    assert refusal_of(lambda: mechanism.respond(proof)).kind is FailureKind.SECURITY


@pytest.mark.parametrize("render", [lambda proof: proof, base64.b64encode])
def test_a_proof_in_the_text_of_success_counts_if_it_is_one(render: Callable[[bytes], bytes]) -> None:
    mechanism, proof = before_the_proof()
    mechanism.conclude(render(proof))
    assert mechanism.complete
    for text in (b"", b"Logged in.", render(b"v=AAAA"), b"!"):
        mechanism, _ = before_the_proof()
        assert refusal_of(partial(mechanism.conclude, text)).kind is FailureKind.SECURITY


def test_success_with_a_proof_for_nothing_is_an_attack() -> None:
    mechanism = Scram("SCRAM-SHA-256", USER)
    mechanism.start()
    assert refusal_of(lambda: mechanism.conclude(b"v=AAAA")).kind is FailureKind.SECURITY


@pytest.mark.slow
def test_the_most_that_a_server_can_make_us_compute_is_bounded() -> None:
    mechanism = Scram("SCRAM-SHA-512", USER)
    server = ScramServer("SCRAM-SHA-512", "hunter2", iterations=MOST_ITERATIONS)
    challenge = server.first(mechanism.start())
    started = time.process_time()
    mechanism.respond(challenge)
    assert time.process_time() - started < 10
    assert refusal_of(lambda: mechanism.respond(challenge)).kind is FailureKind.SECURITY


@pytest.mark.parametrize("name", SCRAM_MECHANISMS)
def test_every_scram_agrees_with_another_implementation(name: str) -> None:
    assert completed(name).complete


@settings(deadline=None)
@given(
    name=st.sampled_from(ALONE),
    challenges=st.lists(
        st.binary(max_size=60) | st.from_regex(rb"[rsimev]=[ -~]{0,20}(,[rsimev]=[ -~]{0,20})*"), max_size=4
    ),
)
def test_whatever_a_server_says_it_is_answered_or_refused(name: str, challenges: list[bytes]) -> None:
    mechanism = MECHANISMS[name](Credentials("user", "hunter2", binding=BINDING))
    mechanism.start()
    with suppress(Pop3Error):
        for challenge in challenges:
            assert isinstance(mechanism.respond(challenge), bytes)
    if name.startswith("SCRAM"):
        assert not mechanism.complete


# Channel binding.

Signing = hashes.SHA256 | hashes.SHA384


@pytest.mark.parametrize(
    ("signed_with", "expected"), [(hashes.SHA256(), "sha256"), (hashes.SHA384(), "sha384"), (None, None)]
)
def test_the_end_point_is_the_certificate_by_the_hash_of_its_signature(
    signed_with: Signing | None, expected: str | None
) -> None:
    """RFC 5929 section 4.1; Ed25519 has no hash of its own."""
    der = certificate(signed_with)
    assert end_point(der) == (hashlib.new(expected, der).digest() if expected else None)


def certificate(signed_with: Signing | None) -> bytes:
    key = ec.generate_private_key(ec.SECP256R1()) if signed_with else ed25519.Ed25519PrivateKey.generate()
    name = x509.Name([])
    now = datetime(2026, 1, 1, tzinfo=UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
        .sign(key, signed_with)
        .public_bytes(serialization.Encoding.DER)
    )


def test_no_certificate_has_no_end_point() -> None:
    assert end_point(b"") is None


# OAuth.


def test_oauthbearer_as_in_its_rfc() -> None:
    """RFC 7628 section 4.1."""
    token = "vF9dft4qmTc2Nvb3RlckBhbHRhdmlzdGEuY29tCg=="
    mechanism = OauthBearer(Credentials("user@example.com", token, "server.example.com", 143))
    assert base64.b64encode(mechanism.start()) == (
        b"bixhPXVzZXJAZXhhbXBsZS5jb20sAWhvc3Q9c2VydmVyLmV4YW1wbGUuY29tAXBvcnQ9MTQzAWF1dGg9QmVhcmVyI"
        b"HZGOWRmdDRxbVRjMk52YjNSbGNrQmhiSFJoZG1semRHRXVZMjl0Q2c9PQEB"
    )
    assert mechanism.complete
    wrong = b'{"status":"invalid_token","scope":"example_scope"}'
    error = refusal_of(lambda: mechanism.respond(wrong))
    assert isinstance(error, RefusedInside)
    assert error.kind is FailureKind.AUTH
    assert base64.b64encode(error.farewell) == b"AQ=="


def test_oauthbearer_writes_a_name_so_that_it_cannot_end_early() -> None:
    assert OauthBearer(Credentials("a=b,c", "t", "h", 1)).start().startswith(b"n,a=a=3Db=2Cc,\1host=h\1")


def test_xoauth2_waits_to_be_asked() -> None:
    """Google's example, in the two steps that Microsoft wants."""
    token = "ya29.vF9dft4qmTc2Nvb3RlckBhdHRhdmlzdGEuY29tCg"
    mechanism: Mechanism = Xoauth2(Credentials("someuser@example.com", token))
    assert mechanism.start() is None
    assert base64.b64encode(mechanism.respond(b"")) == (
        b"dXNlcj1zb21ldXNlckBleGFtcGxlLmNvbQFhdXRoPUJlYXJlciB5YTI5LnZGOWRmdDRxbVRjMk52YjNSbGNrQmhkSFJoZG1semRHRXVZ"
        b"Mjl0Q2cBAQ=="
    )
    assert mechanism.complete


@pytest.mark.parametrize(
    ("told", "kind"),
    [
        ({"status": "400", "schemes": "Bearer", "scope": "https://mail.google.com/"}, FailureKind.AUTH),
        ({"status": "401"}, FailureKind.AUTH),
        ({"status": 401}, FailureKind.AUTH),
        ({"status": "invalid_token"}, FailureKind.AUTH),
        ({"status": "403"}, FailureKind.OPERATOR),
        ({"status": "insufficient_scope"}, FailureKind.OPERATOR),
        ({"status": "500"}, FailureKind.TRANSIENT),
        ({"status": "\x1b[31m" + "x" * 1000}, FailureKind.AUTH),
        ({"status": "\ud800"}, FailureKind.AUTH),
        ([], FailureKind.AUTH),
        ({}, FailureKind.AUTH),
    ],
)
def test_g13_what_a_server_says_of_a_token_that_it_refuses(told: object, kind: FailureKind) -> None:
    mechanism = Xoauth2(USER)
    mechanism.respond(b"")
    error = refusal_of(lambda: mechanism.respond(json.dumps(told).encode()))
    assert isinstance(error, RefusedInside)
    assert (error.kind, error.farewell) == (kind, b"")
    assert str(error).isprintable()
    assert len(str(error)) < 200


def test_what_a_server_repeats_in_its_refusal_is_not_shown() -> None:
    """``refusal_of`` looks for the secret."""
    repeated = json.dumps({"status": USER.secret}).encode()
    assert refusal_of(lambda: OauthBearer(USER).respond(repeated)).kind is FailureKind.AUTH
    assert "c=biws" not in str(lied_to("e=c=biws,r=abc,p=AAAA"))
    assert "(unknown-user)" in str(lied_to("e=unknown-user"))


@pytest.mark.parametrize("told", [b"", b"{", b"\xff", b"[" * 6000, b"9" * 6000])
def test_a_refusal_that_cannot_be_read_is_a_refusal(told: bytes) -> None:
    assert refusal_of(lambda: OauthBearer(USER).respond(told)).kind is FailureKind.AUTH


@pytest.mark.parametrize(
    ("user", "token"), [("user", ""), ("user", "a b"), ("user", "a\1b"), ("user", "\u00e9"), ("us\1er", "t")]
)
@pytest.mark.parametrize("mechanism", [Xoauth2, OauthBearer])
def test_what_is_no_token_is_not_sent(mechanism: type[Mechanism], user: str, token: str) -> None:
    run = mechanism(Credentials(user, token))
    error = refusal_of(lambda: run.start() or run.respond(b""))
    assert error.kind is FailureKind.OPERATOR


def test_m3_the_length_of_a_long_token_is_told() -> None:
    assert "5000 bytes" in Xoauth2(Credentials("user", "t" * 5000)).hint
    assert OauthBearer(USER).hint == ""
