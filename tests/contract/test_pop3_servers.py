"""The POP3 client, and a poll of the whole archiver, against eight unrelated servers.

``tests/harness/servers`` says where they come from. What differs between them
lawfully is a row of ``docs/reference/servers.md``; what must not differ is a test here.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from archiver.pop3 import FailureKind, Mailbox, Pop3Error, Tls, TlsSettings
from tests.conftest import require
from tests.harness import servers
from tests.harness.cli import cli
from tests.harness.servers import Server, survey
from tests.harness.servers.survey import MESSAGES, fetch, session

pytestmark = pytest.mark.pop3_servers

# What RETR gives beyond what is stored, for servers that do that: quirks S1 and GM1.
ADDITIONS = {"solid-pop3d": {"one more empty line"}, "mailutils": {"one more field, X-UIDL"}}

# mailutils writes X-UIDL, X-UID and Status into its mailbox as a session ends, until all are there:
# for this many sessions a message is not the one that was fetched before.
SETTLING = {"mailutils": 2}


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in servers.NAMES]
)
def name(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def server(name: str, server_directory: Path) -> Iterator[Server]:
    require(servers.unavailable(name, server_directory))
    with servers.start(name, server_directory / f"pop3-{name}") as started:
        yield started


def test_a_server_that_was_stopped_is_gone(name: str, server_directory: Path) -> None:
    require(servers.unavailable(name, server_directory))
    with servers.start(name, server_directory / f"pop3-{name}-stopped") as started:
        box = servers.box(started)
        session(box).close()
    for tls in started.ports:
        with pytest.raises(Pop3Error, match="no connection"):
            Mailbox.connect(box.endpoint(tls))


def test_every_message_comes_as_it_is_stored(name: str, server: Server) -> None:
    for tls in server.ports:
        fetched = fetch(servers.box(server, MESSAGES), tls)
        assert len(fetched) == len(MESSAGES)
        assert {each.difference for each in fetched} == ADDITIONS.get(name, {"as stored"})
        for each, delivered in zip(fetched, MESSAGES, strict=True):
            assert each.stored.endswith(delivered.partition(b"\r\n\r\n")[2])


def test_pipelined_or_not_the_same_comes(name: str, server: Server) -> None:
    box = servers.box(server, MESSAGES)
    for _ in range(SETTLING.get(name, 0)):
        fetch(box)
    pipelined = fetch(box)
    one_at_a_time = fetch(box, avoid={"PIPELINING"})
    assert [each.got for each in one_at_a_time] == [each.got for each in pipelined]


def test_uidls_stay_over_sessions(server: Server) -> None:
    box = servers.box(server, MESSAGES)
    listings = []
    for _ in range(2):
        with session(box) as mailbox:
            listings.append(mailbox.list())
            mailbox.quit()
    first, second = listings
    assert first.has_uidl
    assert first.skipped_lines == second.skipped_lines == 0
    assert [entry.uidl for entry in first.entries] == [entry.uidl for entry in second.entries]


def test_an_empty_mailbox_is_listed(server: Server) -> None:
    with session(servers.box(server)) as mailbox:
        listing = mailbox.list()
        mailbox.quit()
    assert listing.entries == ()


def test_tls_is_verified(server: Server) -> None:
    offered = [tls for tls in server.ports if tls is not Tls.NONE]
    for tls in offered:
        box = servers.box(server)
        with session(box, tls) as mailbox:
            assert mailbox.facts.tls_version in {"TLSv1.2", "TLSv1.3"}
        with pytest.raises(Pop3Error) as caught:
            Mailbox.connect(box.endpoint(tls), tls_settings=TlsSettings())
        assert caught.value.kind is FailureKind.OPERATOR


def test_a_server_without_stls_never_sees_the_password(server: Server) -> None:
    if Tls.STARTTLS in server.ports:
        with session(servers.box(server), Tls.STARTTLS) as mailbox:
            assert mailbox.facts.tls_version is not None
        return
    clear = servers.box(server).endpoint(Tls.NONE)
    demanded = type(clear)(clear.host, clear.port, Tls.STARTTLS, clear.user)
    with pytest.raises(Pop3Error) as caught:
        Mailbox.connect(demanded)
    assert caught.value.kind is FailureKind.SECURITY


@pytest.fixture(scope="module")
def found(server: Server) -> dict[str, str]:
    """What the survey of this server found."""
    return survey.survey(server)


def test_a_dropped_connection_deletes_nothing_and_quit_does(found: dict[str, str]) -> None:
    assert (found["after DELE and a cut"], found["after DELE and QUIT"]) == ("kept", "gone")


def test_a_wrong_password_is_told_from_everything_else(found: dict[str, str]) -> None:
    assert found["wrong password"] in {"auth", "auth, [AUTH]"}


def test_a_second_session_is_let_in_or_told_that_the_mailbox_is_in_use(found: dict[str, str]) -> None:
    assert found["second session"] in {"allowed", "transient, [IN-USE]"}


def test_the_table_in_the_documentation_is_what_the_server_does(name: str, found: dict[str, str]) -> None:
    assert survey.rows().get(name) == found, (
        "docs/reference/servers.md differs; python -m tests.harness.servers.survey rewrites it"
    )


def test_a_poll_archives_every_message_once(server: Server, name: str, tmp_path: Path) -> None:
    box = servers.box(server, MESSAGES)
    endpoint = box.endpoint()
    scheme = "pop3s" if endpoint.tls is Tls.IMPLICIT else "pop3"
    password, store = tmp_path / "password", tmp_path / "store"
    password.write_text(box.password)
    environment = {
        "ARCHIVER_DATABASE_URL": f"sqlite:///{tmp_path / 'archiver.db'}",
        "ARCHIVER_STORE_URL": f"file:{store}",
    }
    arguments = ["sync", "--json", f"{scheme}://{box.user}@{endpoint.host}:{endpoint.port}"]
    arguments += ["--tls", endpoint.tls.value, "--password-file", str(password)]
    arguments += ["--ca-file", str(server.ca_file)]

    def archived() -> dict[str, bytes]:
        return {path.stem: path.read_bytes() for path in store.glob("messages/*/*/*.eml")}

    with cli(tmp_path / "work", environment) as archiver:
        (first,) = archiver.do(*arguments).json
        assert (first["outcome"], first["listed"], first["new"]) == ("ok", len(MESSAGES), len(MESSAGES))
        assert len(archived()) == len(MESSAGES)
        for _ in range(SETTLING.get(name, 0)):
            archiver.do(*arguments)
        kept = archived()
        (again,) = archiver.do(*arguments).json
        assert (again["outcome"], again["listed"], again["quarantined"]) == ("ok", len(MESSAGES), 0)
        assert (again["new"], archived()) == (0, kept)
        (verified,) = archiver.do("verify", "--json").json
    assert all(hashlib.sha256(content).hexdigest() == digest for digest, content in kept.items())
    assert {each.got for each in fetch(box)} <= set(kept.values())
    assert (verified["checked"], verified["missing"], verified["damaged"]) == (len(kept), 0, 0)
    assert len(kept) == len(MESSAGES) or name in SETTLING
