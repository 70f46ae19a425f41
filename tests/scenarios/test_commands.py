"""Commands on accounts, in this process: what an operator may do in which order, and what comes of it."""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from archiver.cli import app
from archiver.cli.account.check import advice
from archiver.cli.output import show, table
from archiver.cli.sync import is_done
from archiver.db import Database, accounts, migrate
from archiver.db.tables import account as account_table
from archiver.errors import ArchiverError, UsageError
from archiver.model import Account
from archiver.pop3 import ServerFacts
from archiver.states import AccountState
from tests.harness.cli import wait_for
from tests.harness.reports import poll_report
from tests.harness.scripted_pop3 import HangUp, MailboxPlay, ScriptedPop3, Send
from tests.scenarios.story import message

KEY = base64.b64encode(bytes(32)).decode()


@dataclass(frozen=True, slots=True)
class Commands:
    """The command line, with settings of its own."""

    directory: Path

    @property
    def environment(self) -> dict[str, str]:
        return {
            "ARCHIVER_DATABASE_URL": f"sqlite:///{self.directory / 'archiver.db'}",
            "ARCHIVER_STORE_URL": f"file:{self.directory / 'store'}",
            "ARCHIVER_SECRET_KEY": KEY,
            "PASSWORD": "secret",
        }

    def run(self, *arguments: str, stdin: bytes | None = None, code: int = 0) -> str:
        result = CliRunner().invoke(app, arguments, input=stdin, env=self.environment)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return result.stdout

    def json(self, *arguments: str, code: int = 0) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.run(*arguments, "--json", code=code).splitlines()]

    def process(
        self, *arguments: str, unset: str = "", encoding: str = "utf-8"
    ) -> "subprocess.CompletedProcess[str]":
        """The command in a process of its own, in its directory, without one of the settings."""
        command = [sys.executable, "-m", "archiver", *arguments]
        environment = {name: value for name, value in self.environment.items() if name != unset}
        return subprocess.run(
            command,
            env=environment | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
            cwd=self.directory,
            capture_output=True,
            encoding=encoding,
            check=False,
            timeout=60,
        )

    def database(self) -> Database:
        return Database(self.environment["ARCHIVER_DATABASE_URL"])


@pytest.fixture
def commands(tmp_path: Path) -> Commands:
    return Commands(tmp_path)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_any_name_is_printed_in_any_character_set(
    commands: Commands, server: ScriptedPop3, encoding: str
) -> None:
    name = "Büro 東京"
    commands.run("account", "add", name, server.endpoint.url, "--tls", "none", "--password-env", "PASSWORD")
    for arguments in (
        ["sync"],
        ["account", "list"],
        ["account", "show", name],
        ["status"],
        ["sync", "--json"],
    ):
        done = commands.process(*arguments, encoding=encoding)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
    assert server.commands["QUIT"] == server.connections


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_full_disk_under_the_output_ends_no_poll(
    commands: Commands, server: ScriptedPop3, stream: str
) -> None:
    commands.run("account", "add", "work", server.endpoint.url, "--tls", "none", "--password-env", "PASSWORD")
    with Path("/dev/full").open("w") as full:
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: full}
        command = [sys.executable, "-m", "archiver", "sync"]
        done = subprocess.run(command, env=commands.environment, text=True, check=False, timeout=60, **pipes)
    assert server.commands["QUIT"] == server.connections
    if stream == "stdout":
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith("archiver: cannot write to standard output")
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("group_reads", "others"), [("false", 0o077), ("true", 0o027)])
@pytest.mark.parametrize("is_made_before", [True, False])
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_only_the_user_reads_what_is_made(
    commands: Commands,
    server: ScriptedPop3,
    group_reads: str,
    others: int,
    umask: int,
    *,
    is_made_before: bool,
) -> None:
    place = commands.directory / "place"
    former = os.umask(umask)
    try:
        if is_made_before:
            (place / "store").mkdir(parents=True)
        before = set(place.rglob("*"))
        environment = {"ARCHIVER_FILE_GROUP_READ": group_reads}
        private = Elsewhere(place, environment)
        private.run("sync", server.endpoint.url, "--tls", "none", "--password-env", "PASSWORD")
        assert os.umask(umask) == umask
    finally:
        os.umask(former)
    made = [path for path in place.rglob("*") if path not in before]
    assert {".eml", ".ndjson", ".db"} <= {path.suffix for path in made}
    for path in made:
        mode = path.stat().st_mode & 0o777
        assert not mode & others, f"{path} {mode:o}"
        assert mode & 0o400
        assert bool(mode & 0o040) is (group_reads == "true"), f"{path} {mode:o}"


@dataclass(frozen=True, slots=True)
class Elsewhere(Commands):
    """The command line with more settings."""

    more: dict[str, str]

    @property
    def environment(self) -> dict[str, str]:
        return super(Elsewhere, self).environment | self.more


@pytest.mark.parametrize(
    "change",
    [
        ("--url", "pop3s://work@elsewhere.example"),
        ("--url", "pop3s://other@mail.example"),
        ("--url", "pop3://work@mail.example"),
        ("--tls", "none", "--url", "pop3://work@mail.example"),
    ],
)
def test_an_account_that_moves_needs_its_sealed_password_again(
    commands: Commands, change: tuple[str, ...]
) -> None:
    commands.run("account", "add", "work", "pop3s://work@mail.example", "--password-stdin", stdin=b"secret")
    (before,) = commands.json("account", "list")
    with pytest.raises(UsageError, match="needs a password"):
        commands.run("account", "edit", "work", *change)
    assert commands.json("account", "list") == [before]
    commands.run("account", "edit", "work", *change, "--password-stdin", stdin=b"secret")
    (after,) = commands.json("account", "list")
    assert after["url"] != before["url"]


def test_an_account_that_stays_keeps_its_sealed_password(commands: Commands) -> None:
    commands.run("account", "add", "work", "pop3s://work@mail.example", "--password-stdin", stdin=b"secret")
    commands.run("account", "edit", "work", "--url", "pop3s://work;AUTH=PLAIN@mail.example")
    commands.run("account", "edit", "work", "--interval", "60")
    assert commands.json("account", "reseal") == [{"resealed": 0, "current": 1, "unsealed": 0, "failed": 0}]


def test_a_row_that_was_changed_sends_the_sealed_password_nowhere(
    commands: Commands, server: ScriptedPop3
) -> None:
    commands.run("account", "add", "work", "pop3s://work@mail.example", "--password-stdin", stdin=b"secret")
    url = f"pop3://work@localhost:{server.port}"
    moved = sa.update(account_table).values(url=url, tls="none")
    with closing(commands.database()) as database:
        database.transact(lambda connection: connection.execute(moved))
    (report,) = commands.json("sync", "work", code=1)
    assert "another server, user or TLS mode" in report["error"]
    assert not any(b"secret" in line for line, _ in server.received)


@pytest.fixture
def server() -> Iterator[ScriptedPop3]:
    with ScriptedPop3(MailboxPlay([(b"a", message("a"))])) as server:
        yield server


def url(server: ScriptedPop3) -> str:
    return f"pop3://user@localhost:{server.port}"


def test_an_account_that_was_removed_comes_back_with_its_archive(
    commands: Commands, server: ScriptedPop3
) -> None:
    add = ("account", "add", "work", url(server), "--tls", "none", "--password-stdin")
    commands.run(*add, stdin=b"secret\n")
    assert commands.json("sync", "work")[0]["new"] == 1
    (before,) = commands.json("account", "list")
    commands.run("account", "remove", "work", "--yes")
    assert commands.json("account", "list") == []

    commands.run(*add, stdin=b"secret\r\n")
    (after,) = commands.json("account", "list")
    assert after["id"] == before["id"]
    # The password is sealed for the account that it came back as.
    (report,) = commands.json("sync", "work")
    assert (report["outcome"], report["known"]) == ("ok", 1)
    with pytest.raises(UsageError, match="already"):
        commands.run(*add, stdin=b"secret\n")


def test_a_removed_account_can_be_added_and_nothing_else(commands: Commands, server: ScriptedPop3) -> None:
    commands.run("account", "add", "work", url(server), "--tls", "none", "--password-env", "PASSWORD")
    commands.run("account", "remove", "work", "--yes")
    for command in (("account", "edit"), ("account", "pause"), ("account", "resume")):
        with pytest.raises(UsageError, match="was removed"):
            commands.run(*command, "work")
    with pytest.raises(UsageError, match="no account named work"):
        commands.run("sync", "work", "--password-stdin", stdin=b"secret")
    database = commands.database()
    with database.reading() as connection:
        found = accounts.by_name(connection, "work")
        row = connection.execute(sa.select(account_table.c.removed_at)).scalar_one()
    database.close()
    assert found is not None
    assert (found.state, found.secret_reference) == (AccountState.REMOVED, "")
    assert row is not None
    assert server.connections == 0


def test_no_two_accounts_share_a_mailbox(commands: Commands) -> None:
    one, two = "pop3s://me@one.example.com", "pop3s://me@two.example.com"
    for name, address in (("one", one), ("two", two)):
        commands.run("account", "add", name, address, "--password-env", "PASSWORD")
    with pytest.raises(UsageError, match="account one archives"):
        commands.run("account", "edit", "two", "--url", one)
    commands.run("account", "edit", "two", "--url", two, "--interval", "60")
    # The URL of one that was removed is free, until it comes back.
    commands.run("account", "remove", "one", "--yes")
    commands.run("account", "edit", "two", "--url", one)
    with pytest.raises(UsageError, match="account two archives"):
        commands.run("account", "add", "one", one, "--password-env", "PASSWORD")


@pytest.mark.parametrize("stdin", [b"", b"\n", b"\xff\xfe\n", b"x" * 70_000])
def test_no_usable_password_on_standard_input(commands: Commands, server: ScriptedPop3, stdin: bytes) -> None:
    with pytest.raises(ArchiverError, match="the password on standard input"):
        commands.run("account", "add", "work", url(server), "--tls", "none", "--password-stdin", stdin=stdin)
    assert not (commands.directory / "archiver.db").exists()


@pytest.mark.slow
def test_a_poll_that_does_not_end_well_is_1_and_wrong_use_2(commands: Commands, server: ScriptedPop3) -> None:
    commands.run("account", "add", "work", url(server), "--tls", "none", "--password-env", "PASSWORD")
    commands.run("sync", "work")
    (capture,) = commands.json("message", "list")
    (commands.directory / "store" / capture["key"]).unlink()

    missing = commands.process("message", "get", capture["sha256"])
    assert missing.returncode == 1
    assert "is not in" in missing.stderr
    assert commands.process("verify").returncode == 1
    wrong = commands.process("message", "get", "000000")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("archiver: there is no capture")


@pytest.mark.slow
def test_a_reader_who_has_enough_is_no_fault_of_ours(commands: Commands, server: ScriptedPop3) -> None:
    play = MailboxPlay([(b"%d" % number, message(str(number))) for number in range(300)])
    with ScriptedPop3(play) as many:
        commands.run("account", "add", "work", url(many), "--tls", "none", "--password-env", "PASSWORD")
        commands.run("sync", "work")
    for arguments in (["message", "list", "--json"], ["message", "list"], ["feed", "tail"]):
        shell = f"{sys.executable} -m archiver {' '.join(arguments)} | head -n 1"
        found = subprocess.run(
            ["bash", "-o", "pipefail", "-c", shell],
            env=commands.environment | {"PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert "Traceback" not in found.stderr
        assert "Exception ignored" not in found.stderr
        assert found.returncode in (0, 1)


def test_a_quarantined_message_that_is_gone_needs_nobody(commands: Commands) -> None:
    play = MailboxPlay(
        [(b":100:[/x]", message("a"))], faults={"RETR 1": Send(b"-ERR [SYS/PERM] [/red] :x:\r\n")}
    )
    with ScriptedPop3(play) as server:
        commands.run("account", "add", "work", url(server), "--tls", "none", "--password-env", "PASSWORD")
        assert commands.json("sync", "work")[0]["quarantined"] == 1
        assert commands.json("status", code=1)[0]["quarantined"] == 1
        assert "next attempt in" in commands.run("account", "show", "work")
        play.messages.clear()
        commands.run("sync", "work")
    assert commands.json("status")[0]["quarantined"] == 0
    shown = commands.run("account", "show", "work")
    assert "no longer on the server" in shown
    # A server's words are shown as they are.
    assert "[SYS/PERM] [/red] :x:" in shown
    assert ":100:[/x]" in shown


def test_what_a_server_trips_over_is_shown_and_can_be_forgotten(commands: Commands) -> None:
    play = MailboxPlay([(b"a", message("a"))], faults={"CAPA": HangUp()})
    with ScriptedPop3(play) as server:
        commands.run("account", "add", "work", url(server), "--tls", "none", "--password-env", "PASSWORD")
        commands.run("sync", "work")
        # Once may be chance, and is nothing to tell.
        assert commands.json("account", "show", "work")[0]["avoids"] == []
        assert "avoids" not in commands.run("account", "show", "work")
        commands.run("sync", "work")
        (avoids,) = commands.json("account", "show", "work")[0]["avoids"]
        assert avoids["name"] == "CAPA"
        assert avoids["since"] < avoids["until"]
        line = f"avoids CAPA until {avoids['until']}: {avoids['reason']}"
        assert line in " ".join(commands.run("account", "show", "work").split())

        play.faults = {}
        commands.run("sync", "work")
        assert server.commands["CAPA"] == 2
        commands.run("account", "edit", "work", "--forget-quirks")
        assert commands.json("account", "show", "work")[0]["avoids"] == []
        commands.run("sync", "work")
        assert server.commands["CAPA"] > 2


def test_an_edit_leaves_alone_what_it_did_not_change(commands: Commands, server: ScriptedPop3) -> None:
    """A refresh token may be exchanged by a poll while somebody edits the account."""
    commands.run("account", "add", "work", url(server), "--tls", "none", "--password-env", "PASSWORD")
    database = commands.database()
    with database.reading() as connection:
        former = accounts.by_name(connection, "work")
    assert former is not None
    database.transact(
        lambda c: accounts.exchange_secret(c, former.id, former.secret_reference, "env:RENEWED")
    )
    edited = replace(former, interval_seconds=60.0)
    database.transact(lambda c: accounts.change(c, edited, datetime.now(UTC), former=former))
    with database.reading() as connection:
        assert accounts.by_name(connection, "work") == replace(edited, secret_reference="env:RENEWED")


def test_tables_show_foreign_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    made = table("what")
    made.add_row("[/x] [bold]:100:[/bold]")
    show(made)
    assert "[/x] [bold]:100:[/bold]" in capsys.readouterr().out


def test_a_narrow_terminal_gets_the_columns_that_say_something() -> None:
    made = table("account", "messages", "lost", "url", right=("messages", "lost"), spare=("url",))
    made.add_row("sales", "12", "0", "pop3s://sales@pop.example.com")
    assert made.fitted(80) == ["account", "messages", "lost", "url"]
    assert made.fitted(55) == ["account", "messages", "url"]
    assert made.fitted(40) == ["account", "messages"]


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("pop3:/anna@localhost", "write pop3://anna@localhost"),
        ("pop3s:anna@localhost", "there is no account named"),
        ("anna@example.com", "pop3s://anna@example.com"),
        ("nobody", "archiver account list"),
    ],
)
def test_a_name_that_is_no_account_is_answered_with_what_was_meant(
    commands: Commands, target: str, says: str
) -> None:
    result = commands.process("sync", target, "--password-env", "PASSWORD")
    assert result.returncode == 2
    assert says in result.stderr


def test_a_missing_archive_is_reported_with_the_place_that_was_looked_at(commands: Commands) -> None:
    result = commands.process("status")
    assert result.returncode == 2
    assert "the settings name" in result.stderr
    result = commands.process("status", unset="ARCHIVER_DATABASE_URL")
    assert f"ARCHIVER_DATABASE_URL is not set, so the current directory was used ({commands.directory})" in (
        result.stderr
    )


@pytest.mark.parametrize(
    ("days", "pinned", "says"),
    [
        (-6, False, "expired 6 days ago; polls fail from then on"),
        (-6, True, "expired 6 days ago; it is pinned, so polls go on"),
        (1, False, "expires in 1 day; polls fail from then on"),
    ],
)
def test_the_end_of_a_certificate_matters_unless_it_is_pinned(days: int, pinned: bool, says: str) -> None:
    facts = ServerFacts("pop.example.com", 995, "+OK", tls_version="TLSv1.3", pipelining=True)
    found = advice(facts, [], has_uidl=True, days=days, round_trip=0.0, pinned=pinned)
    assert found == [f"The certificate {says}."]


def test_a_command_to_copy_quotes_a_name_with_spaces(commands: Commands) -> None:
    url = "pop3s://a@mail.example.com"
    result = commands.process("account", "add", "a b", url, "--password-env", "PASSWORD")
    assert "archiver account check 'a b'" in result.stderr


def test_an_accounts_file_is_checked_as_a_whole(commands: Commands, tmp_path: Path) -> None:
    from archiver.bootstrap import App
    from archiver.settings import Settings

    file = tmp_path / "accounts.toml"
    good = '[[account]]\nname = "{}"\nurl = "pop3s://{}@mail.example.com"\npassword = "env:P"\n'
    environment = commands.environment
    settings = Settings(
        database_url=environment["ARCHIVER_DATABASE_URL"], store_url=environment["ARCHIVER_STORE_URL"]
    )
    with App(settings) as app:
        app.make_database()
        for bad, words in (
            (good.format("a", "other"), "has the same name"),
            (good.format("\\u001b[2J", "b"), "printable characters"),
            (good.format("b", "b").replace("env:P", "sesame"), "file:/path or env:NAME"),
            (good.format("b", "b").replace("env:P", "file:/a\\u0000"), "file:/path or env:NAME"),
            (good.format("b", "a"), "archives pop3s://a@mail.example.com already"),
        ):
            file.write_text(good.format("a", "a") + bad)
            with pytest.raises(UsageError, match=words) as caught:
                app.take_in(file)
            assert "sesame" not in str(caught.value)
            with app.database.reading() as connection:
                assert accounts.every(connection) == []
        file.write_text("".join(good.format(name, name) for name in "abc"))
        assert (app.take_in(file), app.take_in(file)) == (3, 0)


@pytest.mark.slow
def test_an_accounts_file_is_taken_in_once_by_processes_that_start_together(
    postgres_url: str, tmp_path: Path
) -> None:
    """The first commits when the second has looked, or waits to look."""
    from concurrent.futures import ThreadPoolExecutor
    from threading import Event

    from archiver.bootstrap import App
    from archiver.settings import Settings

    file = tmp_path / "accounts.toml"
    file.write_text('[[account]]\nname = "a"\nurl = "pop3s://a@mail.example.com"\npassword = "env:P"\n')
    settings = Settings(database_url=postgres_url, store_url=f"file:{tmp_path / 's'}")
    looked, committed = Event(), Event()

    def after_look(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if "FROM account" in statement and not looked.is_set():
            looked.set()
            committed.wait(60)

    with (
        App(settings) as first,
        App(settings) as second,
        psycopg.connect(postgres_url, autocommit=True) as observer,
        ThreadPoolExecutor(1) as pool,
    ):
        migrate.upgrade(first.raw_database)
        waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        starts: list[Future[int]] = []

        def is_there_too() -> bool:
            return looked.is_set() or observer.execute(waiting).fetchone() == (1,)

        def before_commit(_connection: object) -> None:
            starts.append(pool.submit(second.take_in, file))
            wait_for(is_there_too, "the second looks, or waits")

        sa.event.listen(second.database.engine, "after_cursor_execute", after_look)
        sa.event.listen(first.database.engine, "commit", before_commit)
        try:
            assert first.take_in(file) == 1
        finally:
            committed.set()
        assert [start.result(60) for start in starts] == [0]


def test_accounts_added_at_the_same_moment_are_told_apart(database_url: str) -> None:
    """The same name or the same URL: one is added, and the other is told so."""
    from concurrent.futures import ThreadPoolExecutor
    from datetime import UTC, datetime

    database = Database(database_url, sleep=lambda _: None)
    migrate.upgrade(database)

    def add(number: int) -> str:
        new = Account(f"{number:016x}", "work", "pop3s://me@mail.example.com", "implicit", "env:P")
        try:
            database.transact(lambda connection: accounts.add(connection, new, datetime.now(UTC)))
        except UsageError:
            return "taken"
        return "added"

    with ThreadPoolExecutor(4) as pool:
        outcomes = sorted(pool.map(add, range(4)))
    database.close()
    assert outcomes == ["added", "taken", "taken", "taken"]


def test_a_retry_by_hand_fetches_at_once_what_was_set_aside(commands: Commands) -> None:
    play = MailboxPlay([(b"a", message("a")), (b"b", message("b"))])
    play.faults = {f"RETR {number}": Send(b"-ERR [SYS/PERM] corrupt\r\n") for number in (1, 2)}
    with ScriptedPop3(play) as server:
        commands.run("account", "add", "x", url(server), "--tls", "none", "--password-env", "PASSWORD")
        assert commands.json("sync", "x")[0]["quarantined"] == 2
        play.faults = {}
        with pytest.raises(UsageError, match="no message with UIDL 'c'"):
            commands.run("message", "retry", "x", "--uidl", "c")
        [report] = commands.json("message", "retry", "x", "--uidl", "b")
        assert (report["outcome"], report["new"], report["quarantined"]) == ("ok", 1, 1)
        [report] = commands.json("message", "retry", "x")
        assert (report["new"], report["quarantined"]) == (1, 0)
        with pytest.raises(UsageError, match="nothing is in quarantine for x"):
            commands.run("message", "retry", "x")
        [report] = commands.json("message", "retry", "x", "--uidl", "b")
        assert (report["outcome"], report["new"], report["known"]) == ("ok", 0, 2)


@pytest.mark.parametrize(
    ("left", "done"),
    [
        ({}, True),
        ({"known": 0, "stopped_by": "session"}, False),
        ({"known": 0}, False),
        ({"known": 0, "stopped_by": "day"}, True),
        ({"outcome": "try_later"}, False),
    ],
)
def test_a_sync_that_left_messages_to_come_does_not_end_well(left: dict[str, Any], done: bool) -> None:
    report = poll_report("x", **({"listed": 1, "known": 1} | left))
    assert is_done(report) == done


def test_what_would_be_deleted_is_told_before(commands: Commands, server: ScriptedPop3) -> None:
    commands.run("account", "add", "x", url(server), "--tls", "none", "--password-env", "PASSWORD")
    commands.run("sync", "x")
    server_commands = dict(server.commands)
    assert [one["verdict"] for one in commands.json("account", "deletable", "x")] == ["never"]
    [line] = commands.json("account", "deletable", "x", "--delete", "after-archived")
    assert (line["uidl"], line["verdict"]) == ("a", "goes")
    assert "1 to delete at the next poll" in commands.run(
        "account", "deletable", "x", "--delete", "after-archived"
    )
    with pytest.raises(UsageError, match="unknown deletion policy"):
        commands.run("account", "deletable", "x", "--delete", "now")
    assert dict(server.commands) == server_commands


def test_a_hold_is_shown_and_lifted(commands: Commands, server: ScriptedPop3) -> None:
    commands.run("account", "add", "x", url(server), "--tls", "none", "--password-env", "PASSWORD")
    commands.run("sync", "x")
    held = sa.update(account_table).values(deletion_suspended="the server gave its messages other ids")
    commands.database().transact(lambda connection: connection.execute(held))
    assert commands.json("account", "show", "x")[0]["deletion_suspended"] is not None
    assert "allow-deletion x" in commands.run("account", "show", "x")
    after_archived = ("--delete", "after-archived")
    assert commands.json("account", "deletable", "x", *after_archived)[0]["verdict"] == "suspended"
    commands.run("account", "allow-deletion", "x")
    assert commands.json("account", "deletable", "x", *after_archived)[0]["verdict"] == "goes"
