"""HTTP, spoken to over a socket: who may read what, and what the probes say."""

import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from archiver import web
from archiver.db import Database, events, migrate, overview
from archiver.errors import OperatorNeeded, TryLater, UsageError
from archiver.web.connections import Limits
from archiver.web.serving import DEFAULT_LIMITS

TOKEN = "a token of the api"
PROBLEM = "application/problem+json"
STANDING = overview.Overview({"ok": 2, "failing": 0, "paused": 1}, quarantined=3, overdue_seconds=7.5)


@dataclass(slots=True)
class Answer:
    status: int
    body: str
    headers: dict[str, str] = field(default_factory=dict)

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(slots=True)
class Process:
    """What the probes ask."""

    alive: bool = True
    trouble: Exception | None = None

    def ready(self) -> None:
        if self.trouble is not None:
            raise self.trouble


@pytest.fixture
def database(sqlite_url: str) -> Iterator[Database]:
    database = Database(sqlite_url)
    migrate.upgrade(database)
    yield database
    database.close()


Serve = Callable[..., Callable[..., Answer]]


@pytest.fixture
def serve(database: Database) -> Iterator[Serve]:
    with ExitStack() as stack:

        def make(
            process: Process | None = None,
            token: str | None = None,
            *,
            on_loopback: bool | None = None,
            hosts: tuple[str, ...] = (),
            limits: Limits = DEFAULT_LIMITS,
        ) -> Callable[..., Answer]:
            process = process or Process()
            health = web.Health(lambda: process.alive, process.ready, lambda: STANDING)

            def application(found: bool) -> Any:
                return web.application(
                    database,
                    health,
                    token=token,
                    on_loopback=found if on_loopback is None else on_loopback,
                    deletion_forbidden=False,
                    hosts=hosts,
                )

            address = stack.enter_context(web.serving("127.0.0.1:0", application, limits=limits))

            def get(
                path: str, authorization: str | None = None, *, method: str = "GET", **headers: str
            ) -> Answer:
                named = {name.replace("_", "-"): value for name, value in headers.items()}
                request = urllib.request.Request(f"{address}{path}", method=method, headers=named)
                if authorization is not None:
                    request.add_header("Authorization", authorization)
                try:
                    with urllib.request.urlopen(request, timeout=20) as answer:
                        return Answer(answer.status, answer.read().decode(), dict(answer.headers))
                except urllib.error.HTTPError as refusal:
                    with refusal:
                        return Answer(refusal.code, refusal.read().decode(), dict(refusal.headers))

            return get

        yield make


def publish(database: Database, count: int) -> None:
    rows = [
        {"kind": "captured", "account_id": "a", "at": datetime.now(UTC), "body": f'{{"n":{number}}}'}
        for number in range(count)
    ]
    database.transact(lambda connection: events.publish(connection, rows))


# Who may read.


def test_on_loopback_no_token_is_needed(serve: Serve) -> None:
    assert serve()("/v1/events").json() == {"events": [], "next": 0}


@pytest.mark.parametrize("token", [None, ""])
def test_elsewhere_nothing_is_told_without_a_token(serve: Serve, token: str | None) -> None:
    get = serve(token=token, on_loopback=False)
    for authorization in (None, "Bearer ", "Bearer None", "Bearer x"):
        assert get("/v1/events", authorization).status == 403


@pytest.mark.parametrize("on_loopback", [True, False])
def test_a_token_that_is_set_is_demanded_everywhere(serve: Serve, on_loopback: bool) -> None:
    get = serve(token=TOKEN, on_loopback=on_loopback)
    for authorization in (None, "", "Bearer", f"Basic {TOKEN}", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}"):
        answer = get("/v1/events", authorization)
        assert answer.status == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert TOKEN not in answer.body
    assert get("/v1/events", f"Bearer {TOKEN}").status == 200
    # Probes and metrics tell nobody's mail.
    assert [get(path).status for path in ("/livez", "/readyz", "/metrics")] == [200, 200, 200]


# Whom a request is addressed to. The port is the test's own.


FOREIGN = (
    *("attacker.example", "attacker.example:8080", "localhost.attacker.example", "127.0.0.1.nip.example"),
    *("notlocalhost", "192.0.2.1", "0.0.0.0:80", "localhost@attacker.example", "127.1", "2130706433", ""),
)


def test_on_loopback_a_name_that_was_rebound_reads_nothing(serve: Serve) -> None:
    get = serve()
    for path in ("/v1/events", "/v1/status", "/v1/accounts/x/days", "/metrics", "/", "/v2"):
        for host in FOREIGN:
            answer = get(path, Host=host)
            assert (answer.status, answer.headers["content-type"]) == (403, PROBLEM), (path, host)


def test_on_loopback_its_own_names_are_answered(serve: Serve) -> None:
    get = serve()
    for host in ("localhost", "LocalHost:81", "localhost.", "mail.localhost:80", "127.9.9.9:1", "[::1]:8"):
        assert get("/v1/events", Host=host).status == 200, host


def test_names_of_an_ingress_are_known_when_they_are_set(serve: Serve) -> None:
    for on_loopback in (True, False):
        get = serve(token=TOKEN, on_loopback=on_loopback, hosts=("Archive.example.com", "fd00::1"))
        for host, status in (
            ("archive.example.com", 200),
            ("archive.example.com.:443", 200),
            ("[fd00::1]", 200),
        ):
            assert get("/v1/events", f"Bearer {TOKEN}", Host=host).status == status
        assert get("/v1/events", f"Bearer {TOKEN}", Host="other.example.com").status == 403


def test_elsewhere_addresses_are_known_and_prometheus_uses_any_name(serve: Serve) -> None:
    get = serve(token=TOKEN, on_loopback=False)
    assert get("/v1/events", f"Bearer {TOKEN}", Host="192.0.2.1:8080").status == 200
    assert get("/v1/events", f"Bearer {TOKEN}", Host="[2001:db8::1]:8080").status == 200
    assert get("/v1/events", f"Bearer {TOKEN}", Host="a.example").status == 403
    assert get("/metrics", Host="a.example").status == 200


@pytest.mark.parametrize("on_loopback", [True, False])
def test_probes_answer_under_any_name(serve: Serve, on_loopback: bool) -> None:
    get = serve(on_loopback=on_loopback)
    for path in ("/livez", "/readyz"):
        for host in ("10.1.2.3:8080", "any.example", ""):
            assert get(path, Host=host).status == 200


def test_a_page_of_another_origin_reads_nothing(serve: Serve) -> None:
    get = serve()
    for origin in (
        "http://attacker.example",
        "null",
        "http://localhost:3000",
        "http://localhost:80.a.example",
    ):
        assert get("/v1/events", Host="localhost:80", Origin=origin).status == 403, origin
    assert get("/v1/events", Sec_Fetch_Site="cross-site").status == 403
    assert get("/v1/events", Sec_Fetch_Site="same-site", Sec_Fetch_Mode="no-cors").status == 403


def test_its_own_origin_and_links_are_answered(serve: Serve) -> None:
    get = serve(hosts=("archive.example.com",))
    assert get("/v1/events", Host="localhost:80", Origin="http://localhost:80").status == 200
    # A proxy may put the upstream's address in Host.
    assert get("/v1/events", Origin="https://archive.example.com").status == 200
    assert get("/v1/events", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate").status == 200
    assert get("/v1/events", Sec_Fetch_Site="none").status == 200


# Every refusal has one form.


REFUSED = (
    *(("GET", "/", 404), ("GET", "/v1", 404), ("GET", "/v1/events/", 404), ("GET", "//v1/events", 404)),
    *(("DELETE", "/v1/events", 405), ("POST", "/livez", 405), ("GET", "/v1/accounts/x/poll", 405)),
    *(("GET", "/v1/accounts/x/days", 404), ("GET", "/v1/accounts/%00/days", 404)),
    *(("POST", "/v1/accounts/x/poll?force=1", 400), ("GET", "/v1/events?afterr=1", 400)),
    *(("GET", "/v1/events?after=1&after=2", 400), ("GET", "/v1/events?After=1", 400)),
    *(("GET", "/v1/status?after=1", 400), ("GET", "/v1/accounts/x/days?limit=1", 400)),
    *(("GET", "/v1/events?token=x", 400), ("GET", "/v1/events?=", 400), ("GET", "/v1/events?%00=1", 400)),
)


def test_every_refusal_is_a_problem(serve: Serve) -> None:
    get = serve()
    for method, path, status in REFUSED:
        answer = get(path, method=method)
        assert (answer.status, answer.json()["status"]) == (status, status), path
        assert answer.headers["content-type"] == PROBLEM
        assert all(answer.json()[part] for part in ("title", "detail"))
        assert ("allow" in answer.headers) == (status == 405)


def test_a_fault_of_the_program_is_a_problem_without_its_text(serve: Serve) -> None:
    answer = serve(Process(trouble=RuntimeError("a password in it")))("/readyz")
    assert (answer.status, answer.json()["status"]) == (500, 500)
    assert "password" not in answer.body


# The feed.


@pytest.mark.parametrize(
    "query",
    [
        *("after=-1", "after=x", "after=", "after=1.5", "after=0x1", "after=1e3", "after=%C2%B2"),
        *("after=9223372036854775808", f"after={'9' * 5000}", "limit=5001", "limit=-0", "limit=%00"),
    ],
)
def test_a_bad_parameter_is_a_bad_request(serve: Serve, query: str) -> None:
    answer = serve()(f"/v1/events?{query}")
    assert answer.status == 400
    assert answer.json()["status"] == 400
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_reader_goes_from_page_to_page(serve: Serve, database: Database) -> None:
    publish(database, 12)
    get = serve()
    seen: list[int] = []
    after = 0
    while page := get(f"/v1/events?after={after}&limit=5").json()["events"]:
        seen += [one["n"] for one in page]
        after = page[-1]["position"]
    assert seen == list(range(12))
    assert get(f"/v1/events?after={after}").json() == {"events": [], "next": after}
    assert get(f"/v1/events?after={2**63 - 1}").json()["next"] == 2**63 - 1
    assert get("/v1/events?limit=0").json() == {"events": [], "next": 0}


def test_a_database_that_is_away_is_said(database: Database, serve: Serve) -> None:
    get = serve()
    path = database.path
    assert path is not None
    database.close()
    path.write_bytes(b"no longer a database" * 100)
    Path(f"{path}-wal").unlink(missing_ok=True)
    answer = get("/v1/events")
    assert (answer.status, answer.json()["status"]) == (503, 503)


# Probes.


def test_what_the_probes_say(serve: Serve) -> None:
    process = Process()
    get = serve(process)
    assert (get("/livez").status, get("/readyz").status) == (200, 200)
    process.alive = False
    assert get("/livez").status == 503
    for trouble in (TryLater("draining"), OperatorNeeded("no bucket"), migrate.WrongSchema("too old")):
        process.trouble = trouble
        answer = get("/readyz")
        assert (answer.status, answer.json()["detail"]) == (503, str(trouble))


def test_metrics_are_there_when_the_database_is_not(database: Database) -> None:
    def away() -> overview.Overview:
        raise TryLater("no database")

    health = web.Health(lambda: True, lambda: None, away)
    with (
        web.serving(
            "127.0.0.1:0",
            lambda _: web.application(
                database, health, token=None, on_loopback=True, deletion_forbidden=False
            ),
        ) as at,
        urllib.request.urlopen(f"{at}/metrics", timeout=20) as answer,
    ):
        text = answer.read().decode()
    assert "archiver_overdue_seconds NaN" in text
    assert "archiver_polls_running" in text


def test_metrics_tell_how_all_accounts_stand(serve: Serve) -> None:
    text = serve()("/metrics").body
    assert "archiver_overdue_seconds 7.5" in text
    assert "archiver_messages_quarantined 3.0" in text
    assert 'archiver_accounts{state="paused"} 1.0' in text


def test_a_request_does_not_write(serve: Serve, database: Database) -> None:
    before = database.transact(lambda connection: connection.execute(sa.text("PRAGMA data_version")).scalar())
    serve()("/v1/events")
    after = database.transact(lambda connection: connection.execute(sa.text("PRAGMA data_version")).scalar())
    assert before == after


# What a connection may cost.


@contextmanager
def connections(database: Database, limits: Limits, process: Process | None = None) -> Iterator[Any]:
    """A server with these limits; yields what connects to it and sends the given bytes."""
    process = process or Process()
    health = web.Health(lambda: process.alive, process.ready, lambda: STANDING)
    application = web.application(database, health, token=None, on_loopback=True, deletion_forbidden=False)
    with web.serving("127.0.0.1:0", lambda _: application, limits=limits) as at, ExitStack() as stack:

        def connect(sent: bytes = b"") -> socket.socket:
            made = socket.create_connection(("127.0.0.1", int(at.rpartition(":")[2])), 20)
            stack.enter_context(made)
            made.sendall(sent)
            return made

        yield connect


def rest(connection: socket.socket) -> bytes:
    """All that arrives until the server ends the connection."""
    got = b""
    with suppress(ConnectionResetError):
        while block := connection.recv(65536):
            got += block
    return got


LIVEZ = b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def test_what_asks_for_nothing_is_disconnected(database: Database) -> None:
    with connections(database, Limits(head_seconds=0.3, answer_seconds=0.3)) as connect:
        assert rest(connect()) == b""
        assert rest(connect(b"GET /livez HTTP/1.1\r\nHost: x\r\nA: half of")) == b""
        # The answer comes before the body does, and then the connection has its time.
        body = b"POST /livez HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n1"
        assert rest(connect(body)).startswith(b"HTTP/1.1 405 ")
        # Between two requests.
        again = LIVEZ.replace(b"Connection: close\r\n", b"")
        assert rest(connect(again + b"GET /li")).count(b"HTTP/1.1 200 ") == 1
        assert rest(connect(again * 3)).count(b"HTTP/1.1 200 ") == 3


def test_a_header_that_drips_is_not_granted_more_time(database: Database) -> None:
    with connections(database, Limits(head_seconds=0.3)) as connect:
        connection = connect(b"GET /livez HTTP/1.1\r\nHost: x\r\n")
        connection.settimeout(0.01)
        for _ in range(1000):
            try:
                connection.sendall(b"A: b\r\n")
                if connection.recv(1) == b"":
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        else:
            pytest.fail("the connection is still open")


def test_a_new_connection_displaces_the_oldest_that_asks_nothing(database: Database) -> None:
    with connections(database, Limits(connections=5)) as connect:
        idle = [connect() for _ in range(40)]
        for _ in range(10):
            assert rest(connect(LIVEZ)).endswith(b"ok\n")
        assert rest(idle[0]) == b""
        # The answer needed one place only at a time.
        idle[-1].sendall(LIVEZ)
        assert rest(idle[-1]).endswith(b"ok\n")


def test_liveness_waits_for_no_thread(database: Database) -> None:
    """More requests wait for the database than there are threads, and liveness is asked beside them."""
    go_on = threading.Event()

    class Hanging(Process):
        def ready(self) -> None:
            go_on.wait(20)

    with connections(database, Limits(), Hanging()) as connect:
        try:
            waiting = [connect(LIVEZ.replace(b"/livez", b"/readyz")) for _ in range(100)]
            assert rest(connect(LIVEZ)).endswith(b"ok\n")
        finally:
            go_on.set()
        assert rest(waiting[-1]).endswith(b"ok\n")


@pytest.mark.parametrize(
    "request_bytes",
    [
        *(b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"GET /livez HTTP/1.1\r\n\r\n", b"\r\n" * 9 + b"\x00"),
        *(LIVEZ[:-2] + b"Host: y\r\n\r\n", LIVEZ[:-2] + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n"),
        LIVEZ[:-2] + b"A: " + b"a" * 20_000,
    ],
)
def test_what_is_no_request_is_a_problem(database: Database, request_bytes: bytes) -> None:
    with connections(database, Limits(head_seconds=5)) as connect:
        head, _, body = rest(connect(request_bytes)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert PROBLEM.encode() in head
    assert json.loads(body)["status"] == 400


# Where it listens.


@pytest.mark.parametrize(
    "listen", ["", "8080", ":8080", "host:", "host:x", "host:65536", "host:-1", "host:²"]
)
def test_what_is_no_address_is_wrong_use(listen: str, database: Database) -> None:
    health = web.Health(lambda: True, lambda: None, lambda: STANDING)
    with pytest.raises(UsageError, match="is not an address"):
        _serve_briefly(listen, database, health)


def _serve_briefly(listen: str, database: Database, health: web.Health) -> bool:
    found: list[bool] = []

    def make(on_loopback: bool) -> Any:
        found.append(on_loopback)
        return web.application(
            database, health, token=None, on_loopback=on_loopback, deletion_forbidden=False
        )

    with web.serving(listen, make):
        pass
    return found[0]


def test_a_port_that_is_taken_needs_an_operator(database: Database) -> None:
    health = web.Health(lambda: True, lambda: None, lambda: STANDING)
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(OperatorNeeded, match="cannot listen"),
    ):
        _serve_briefly(f"127.0.0.1:{taken.getsockname()[1]}", database, health)


@pytest.mark.parametrize(("host", "loopback"), [("127.0.0.1", True), ("localhost", True), ("0.0.0.0", False)])
def test_loopback_is_known(database: Database, host: str, loopback: bool) -> None:
    health = web.Health(lambda: True, lambda: None, lambda: STANDING)
    assert _serve_briefly(f"{host}:0", database, health) is loopback


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_every_address_is_that_of_ipv4_too(database: Database) -> None:
    health = web.Health(lambda: True, lambda: None, lambda: STANDING)
    application = web.application(database, health, token=None, on_loopback=False, deletion_forbidden=False)
    with web.serving("[::]:0", lambda _: application) as address:
        assert address.startswith("http://[::]:")
        port = address.rpartition(":")[2]
        for host in ("127.0.0.1", "[::1]"):
            with urllib.request.urlopen(f"http://{host}:{port}/livez", timeout=20) as answer:
                assert answer.status == 200
