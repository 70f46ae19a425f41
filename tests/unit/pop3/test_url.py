"""POP URLs: what is read, what is refused, and what an error must not repeat."""

import pytest

from archiver.pop3 import Endpoint, Tls, UrlError, parse_url

READ = {
    "pop3s://me@mail.example.com": Endpoint("mail.example.com", 995, Tls.IMPLICIT, "me"),
    "POP3S://me@MAIL.example.com:1995": Endpoint("mail.example.com", 1995, Tls.IMPLICIT, "me"),
    "pops://me@host": Endpoint("host", 995, Tls.IMPLICIT, "me"),
    "pop3://me@host": Endpoint("host", 110, Tls.STARTTLS, "me"),
    "pop://me@host/": Endpoint("host", 110, Tls.STARTTLS, "me"),
    "pop3://me%40example.com@host": Endpoint("host", 110, Tls.STARTTLS, "me@example.com"),
    "pop3://me@example.com@host": Endpoint("host", 110, Tls.STARTTLS, "me@example.com"),
    "pop3://me@example.com;AUTH=PLAIN@host": Endpoint("host", 110, Tls.STARTTLS, "me@example.com", "PLAIN"),
    "pop3://recent%3Ame%40gmail.com@host": Endpoint("host", 110, Tls.STARTTLS, "recent:me@gmail.com"),
    "pop3://a%20b%2Fc@host": Endpoint("host", 110, Tls.STARTTLS, "a b/c"),
    "pop3://J%C3%BCrgen@host": Endpoint("host", 110, Tls.STARTTLS, "J\u00fcrgen"),
    "pop3://me;AUTH=PLAIN@host": Endpoint("host", 110, Tls.STARTTLS, "me", "PLAIN"),
    "pop3://me;auth=scram-sha-256@host": Endpoint("host", 110, Tls.STARTTLS, "me", "SCRAM-SHA-256"),
    "pop3://me;AUTH=+APOP@host": Endpoint("host", 110, Tls.STARTTLS, "me", "+APOP"),
    "pop3://me;AUTH=*@host": Endpoint("host", 110, Tls.STARTTLS, "me"),
    "pop3s://me@[::1]": Endpoint("::1", 995, Tls.IMPLICIT, "me"),
    "pop3s://me@[2001:DB8::1]:1995": Endpoint("2001:db8::1", 1995, Tls.IMPLICIT, "me"),
    "pop3s://me@127.0.0.1": Endpoint("127.0.0.1", 995, Tls.IMPLICIT, "me"),
    "pop3s://me@b\u00fccher.example": Endpoint("xn--bcher-kva.example", 995, Tls.IMPLICIT, "me"),
}


@pytest.mark.parametrize(("url", "endpoint"), READ.items(), ids=READ.keys())
def test_a_url_is_read(url: str, endpoint: Endpoint) -> None:
    assert parse_url(url) == endpoint


@pytest.mark.parametrize("endpoint", READ.values(), ids=READ.keys())
def test_an_endpoint_writes_a_url_that_reads_back(endpoint: Endpoint) -> None:
    assert parse_url(endpoint.url) == endpoint
    assert parse_url(endpoint.url, endpoint.tls) == endpoint


@pytest.mark.parametrize(
    ("tls", "port"), [(None, 110), (Tls.STARTTLS, 110), (Tls.IMPLICIT, 995), (Tls.NONE, 110)]
)
def test_tls_in_words_decides_for_pop3(tls: Tls | None, port: int) -> None:
    endpoint = parse_url("pop3://me@host", tls)
    assert (endpoint.tls, endpoint.port) == (tls or Tls.STARTTLS, port)
    assert parse_url(endpoint.url, endpoint.tls) == endpoint


def test_a_url_that_is_copied_elsewhere_asks_for_tls() -> None:
    endpoint = parse_url("pop3://me@host", Tls.NONE)
    assert parse_url(endpoint.url).tls is Tls.STARTTLS


@pytest.mark.parametrize("tls", [Tls.STARTTLS, Tls.NONE])
def test_pop3s_contradicts_any_other_tls(tls: Tls) -> None:
    with pytest.raises(UrlError, match="pop3s://"):
        parse_url("pop3s://me@host", tls)


REFUSED = {
    "imap://me@host": "starts with pop3s",
    "me@host": "starts with pop3s",
    "": "starts with pop3s",
    "pop3s://host": "names no user",
    "pop3s://@host": "names no user",
    "pop3s://;AUTH=PLAIN@host": "names no user",
    "pop3s://me@": "names no host",
    "pop3s://me@:995": "names no host",
    "pop3s://me@host/INBOX": "no path",
    "pop3s://me@host//": "no path",
    "pop3s://me@host?x=1": "no query",
    "pop3s://me@host#x": "no fragment",
    "pop3s://me@host:": "port",
    "pop3s://me@host:0": "port",
    "pop3s://me@host:65536": "port",
    "pop3s://me@host:x": "port",
    "pop3s://me@host:\u0661": "port",
    "pop3s://me@host:+5": "port",
    "pop3s://me@::1": "brackets",
    "pop3s://me@[::1": "brackets",
    "pop3s://me@[::1]x": "brackets",
    "pop3s://me@[nonsense]": "not an IPv6",
    "pop3s://me@[fe80::1%25eth0]": "IPv6",
    "pop3s://me@-host": "neither a name",
    "pop3s://me@ho..st": "neither a name",
    "pop3s://me@" + "a." * 130 + "x": "neither a name",
    "pop3s://me;x=1@host": "AUTH",
    "pop3s://me;AUTH=@host": "AUTH",
    "pop3s://me;AUTH=A%20B@host": "AUTH",
    "pop3s://me%4@host": "hexadecimal",
    "pop3s://me%FF@host": "UTF-8",
    "pop3s://me%0D%0ADELE%201@host": "control character",
    "pop3s://me%00@host": "control character",
    "pop3s://me%C2%85@host": "control character",
    "pop3s://me\r\nDELE 1@host": "control character",
    "pop3s://me\0@host": "control character",
    "pop3s://me @host": "space",
    "pop3s://" + "u" * 1025 + "@host": "longer than",
}


@pytest.mark.parametrize(("url", "why"), REFUSED.items(), ids=[ascii(url)[:40] for url in REFUSED])
def test_a_url_is_refused_with_a_reason(url: str, why: str) -> None:
    with pytest.raises(UrlError, match=why) as caught:
        parse_url(url)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "pop3s://me:hunter2@host",
        "pop3s://me:hunter2/x@host",
        "pop3s://me:hunter2?x@host",
        "pop3s://me:hunter2#x@host",
        "pop3s://me:a@hunter2@host",
        "pop3s://me:hunter2@host:bad",
        "pop3s://me:hunter2@",
        "pop3s://:hunter2@host",
        "imap://me:hunter2@host",
        "me:hunter2@host",
        "pop3s://me: hunter2@host",
        "pop3s://hunter2",
        "pop3s://me@host:hunter2",
    ],
)
def test_a_password_in_a_url_is_refused_and_never_repeated(url: str) -> None:
    with pytest.raises(UrlError) as caught:
        parse_url(url)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_the_refusal_of_a_password_says_why() -> None:
    with pytest.raises(UrlError, match="shell history, process lists and logs"):
        parse_url("pop3s://me:hunter2@host")
