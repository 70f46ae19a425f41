"""Schedules as an operator says them: on the command line, in the accounts file, over HTTP."""

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from archiver import web
from archiver.bootstrap import App
from archiver.cli import app
from archiver.db import Database, accounts, hosts, migrate, overview, schedule
from archiver.db.tables import lease as lease_table
from archiver.errors import UsageError
from archiver.model import Account
from archiver.settings import Settings
from archiver.states import AccountState

URL = "pop3s://sales@pop.example.com"


class Commands:
    """The command line, with a database of its own."""

    def __init__(self, directory: Path) -> None:
        self.settings = {
            "ARCHIVER_DATABASE_URL": f"sqlite:///{directory / 'archiver.db'}",
            "ARCHIVER_STORE_URL": f"file:{directory / 'store'}",
            "PASSWORD": "secret",
        }

    def run(self, *arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(app, arguments, env=self.settings)
        if isinstance(result.exception, UsageError) and code == 2:
            return str(result.exception)
        assert result.exit_code == code, result.output
        return result.stdout

    def add(self, *options: str, code: int = 0) -> str:
        return self.run("account", "add", "sales", URL, "--password-env", "PASSWORD", *options, code=code)

    def shown(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.run("account", "show", "sales", "--json"))
        return found

    def database(self) -> Database:
        return Database(self.settings["ARCHIVER_DATABASE_URL"])


@pytest.fixture
def commands(tmp_path: Path) -> Commands:
    return Commands(tmp_path)


def test_a_schedule_is_said_shown_changed_and_taken_away(commands: Commands) -> None:
    commands.add("--cron", "30 2 * * *", "--time-zone", "Europe/Berlin", "--blackout", "Mon 08:00-18:00")
    commands.run(
        "account", "edit", "sales", "--interval", "60", "--interval-max", "900", "--day-bytes", "1000"
    )
    found = commands.shown()
    assert (found["cron"], found["time_zone"], found["blackout"]) == (
        "30 2 * * *",
        "Europe/Berlin",
        "Mon 08:00-18:00",
    )
    assert (found["interval_max_seconds"], found["day_bytes"]) == (900.0, 1000)
    assert (found["schedule"]["day_bytes"], found["schedule"]["fetched_today"]) == (1000, 0)
    assert "polled at '30 2 * * *' in Europe/Berlin" in commands.run("account", "show", "sales")
    commands.run(
        *("account", "edit", "sales", "--cron", "none", "--blackout", "none"),
        *("--interval-max", "none", "--day-bytes", "none"),
    )
    found = commands.shown()
    assert [found[name] for name in ("cron", "interval_max_seconds", "day_bytes")] == [None] * 3
    assert found["blackout"] == ""
    assert "polled every 60 s" in commands.run("account", "show", "sales")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--cron", "0 6 * *"), "five fields"),
        (("--cron", "0 6 * * *", "--time-zone", "Mars/Olympus"), "unknown time zone"),
        (("--blackout", "at night"), "not a blackout"),
        (("--interval", "600", "--interval-max", "60"), "shorter"),
        (("--day-bytes", "0"), "above 0"),
        (("--interval-max", "-5"), "at least 1"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused_and_nothing_is_added(
    commands: Commands, options: tuple[str, ...], says: str
) -> None:
    assert says in commands.add(*options, code=2)
    assert not Path(commands.settings["ARCHIVER_DATABASE_URL"].removeprefix("sqlite:///")).exists()


def test_why_an_account_waits_is_told(commands: Commands) -> None:
    commands.add()
    database = commands.database()
    for _ in range(5):
        database.transact(lambda c: hosts.unreached(c, "pop.example.com", "timed out", max))
    text = commands.run("account", "show", "sales")
    assert "waits because its host pop.example.com has been failing since" in text
    assert "timed out" in text
    database.transact(lambda c: hosts.reached(c, "pop.example.com"))
    assert commands.shown()["schedule"]["waits_because"] is None
    database.transact(lambda c: c.execute(sa.update(lease_table).values(queued=True)))
    assert commands.shown()["schedule"]["waits_because"] == "no_session"
    assert "as many sessions as it may have" in commands.run("account", "show", "sales")
    database.close()


def test_polls_are_asked_for_by_name_or_of_all(commands: Commands) -> None:
    commands.add()
    assert commands.run("account", "poll", "sales") == "1 account is due now\n"
    assert commands.run("account", "poll", "--all") == "1 account is due now\n"
    assert "give --all" in commands.run("account", "poll", code=2)
    assert "no account named nobody" in commands.run("account", "poll", "nobody", code=2)
    commands.run("account", "pause", "sales")
    assert "sales is paused" in commands.run("account", "poll", "sales", code=2)
    assert commands.run("account", "poll", "--all") == "0 accounts are due now\n"


def test_the_accounts_file_has_schedules_too(tmp_path: Path) -> None:
    file = tmp_path / "accounts.toml"
    head = f'[[account]]\nname = "sales"\nurl = "{URL}"\npassword = "env:PASSWORD"\n'
    file.write_text(
        head + 'cron = "0 6 * * 1-5"\ntime_zone = "Europe/Berlin"\nblackout = "12:00-13:00"\n'
        "interval_max_seconds = 900\nday_bytes = 1000\n"
    )
    settings = Settings(
        database_url=f"sqlite:///{tmp_path / 'archiver.db'}", store_url=f"file:{tmp_path / 's'}"
    )
    with App(settings) as app:
        app.make_database()
        assert [app.take_in(file) for _ in range(2)] == [1, 0]
        with app.database.reading() as connection:
            (found,) = accounts.all_active(connection)
        assert (found.cron, found.time_zone, found.blackout) == (
            "0 6 * * 1-5",
            "Europe/Berlin",
            "12:00-13:00",
        )
        assert (found.interval_max_seconds, found.day_bytes) == (900.0, 1000)
        file.write_text(head + 'blackout = "never"\n')
        with pytest.raises(UsageError, match=r'"sales", line 1\): .*not a blackout'):
            app.take_in(file)


@pytest.fixture
def ask(sqlite_url: str) -> Iterator[Callable[..., tuple[int, Any]]]:
    """POST for polls of an account, to a server that may have a token; the answer's status and body."""
    database = Database(sqlite_url)
    migrate.upgrade(database)
    health = web.Health(lambda: True, lambda: None, lambda: overview.Overview({}, 0, 0.0))
    account = Account("0" * 16, "sales/north", URL, "implicit", "env:NONE")
    database.transact(lambda c: accounts.add(c, account, App.now()))

    def post(name: str, token: str | None = None, **headers: str) -> tuple[int, Any]:
        with ExitStack() as stack:
            address = stack.enter_context(
                web.serving(
                    "127.0.0.1:0",
                    lambda _: web.application(
                        database, health, token=token, on_loopback=True, deletion_forbidden=False
                    ),
                )
            )
            request = urllib.request.Request(
                f"{address}/v1/accounts/{name}/poll", method="POST", headers=headers
            )
            try:
                with urllib.request.urlopen(request, timeout=20) as answer:
                    return answer.status, json.loads(answer.read())
            except urllib.error.HTTPError as refusal:
                with refusal:
                    return refusal.code, json.loads(refusal.read())

    def pause() -> None:
        database.transact(lambda c: schedule.stop(c, account.id, AccountState.PAUSED))

    post.pause = pause  # type: ignore[attr-defined]
    yield post
    database.close()


def test_polls_are_asked_for_over_http(ask: Callable[..., tuple[int, Any]]) -> None:
    assert ask("sales/north") == (202, {"account": "sales/north", "asked": True})
    assert ask("nobody")[0] == 404
    assert ask("sales/north", token="sesame")[0] == 401
    assert ask("sales/north", token="sesame", Authorization="Bearer sesame")[0] == 202
    # Any page that somebody looks at could have a browser say this.
    assert ask("sales/north", Origin="https://evil.example")[0] == 403
    ask.pause()  # type: ignore[attr-defined]
    assert ask("sales/north")[0] == 409
