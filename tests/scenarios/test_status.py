"""Nothing is unaccounted for: each listing, each day and each life of a mailbox adds up, and is told."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from archiver import web
from archiver.cli import app
from archiver.db import Database, accounts, claims, endings, history, migrate, overview, requests, schedule
from archiver.db.endings import Ending
from archiver.db.tables import account as account_table
from archiver.db.tables import host as host_table
from archiver.db.tables import mailbox as mailbox_table
from archiver.model import Account, DeletePolicy, PollReport, new_account_id
from archiver.states import AccountState
from archiver.timetable import Timetable
from archiver.views import status as view
from tests.harness.reports import poll_report
from tests.harness.scripted_pop3 import MailboxPlay, Send
from tests.scenarios.story import Archive, message, middle

REFUSED = Send(b"-ERR [SYS/PERM] this one not\r\n")


@dataclass
class Life:
    """A mailbox, and everything that it ever listed."""

    archive: Archive
    play: MailboxPlay
    account: Account
    ever: dict[bytes, bytes] = field(default_factory=dict)

    def poll(self) -> PollReport:
        shown = dict(self.play.messages)
        report = self.archive.sync(self.account)
        if report.listed is not None:
            self.ever.update(shown)
        self.archive.clock.advance(3600)
        return report

    def put(self, *names: str) -> None:
        self.play.messages += [(name.encode(), message(name)) for name in names]

    def take(self, *names: str) -> None:
        """Somebody else removes these from the server."""
        wanted = {name.encode() for name in names}
        self.play.messages[:] = [one for one in self.play.messages if one[0] not in wanted]


def begin(archive: Archive, **settings: Any) -> Life:
    play = MailboxPlay([])
    return Life(archive, play, archive.add(archive.serve(play), **settings))


def assert_accounted_for(life: Life) -> None:
    """Of each listing every entry; and of all listings every message, in exactly one place."""
    archive, account = life.archive, life.account
    for row in archive.polls(account):
        if row.listed is not None:
            assert row.listed == row.new + row.known + row.quarantined + row.to_come, row
    with archive.database.reading() as connection:
        (state,) = overview.account_states(connection, [account.id])
        ledger = view.ledger(connection, account.id, archive.clock.now(), days=30)
    for day in ledger.days:
        if day.listed is not None:
            parts = (day.archived, day.quarantined, day.to_come)
            assert None not in parts, day
            assert day.listed == sum(filter(None, parts)), day
    assert sum(day.new for day in ledger.days) == state.captures == len(archive.archived(account))
    assert sum(day.lost for day in ledger.days) == ledger.lost_ever
    assert len(life.ever) == state.captures + state.quarantined + state.to_come + ledger.lost_ever


def test_everything_ever_listed_is_in_exactly_one_place(archive: Archive) -> None:
    life = begin(archive)
    life.put("a", "b", "c")
    life.poll()
    assert_accounted_for(life)

    life.put("no", "d")
    life.play.faults = {**life.play.faults, "RETR 4": REFUSED}
    assert life.poll().counts.quarantined == 1
    assert_accounted_for(life)

    life.take("a")
    life.put("e")
    life.play.faults = {"RETR 3": REFUSED}
    life.poll()
    assert_accounted_for(life)

    # What was set aside is gone before it could be had.
    life.take("no")
    life.play.faults = {}
    life.poll()
    assert_accounted_for(life)
    with archive.database.reading() as connection:
        assert history.lost(connection, life.account.id) == 1
    assert sum(gone_by_day(archive, life.account)) == 1

    # And all of it tells the same once it was added up.
    history.tidy(archive.database, now=archive.clock.now(), keep_days=1)
    assert_accounted_for(life)


def gone_by_day(archive: Archive, account: Account) -> list[int]:
    """How many archived messages went by another's hand, by day."""
    now = archive.clock.now()
    with archive.database.reading() as connection:
        return [day.gone for day in view.ledger(connection, account.id, now, days=30).days]


def test_what_we_deleted_is_told_apart_from_what_others_did(archive: Archive) -> None:
    life = begin(archive, delete=DeletePolicy(0.0))
    life.put("a", "b")
    life.poll()
    life.put("c")
    life.poll()
    life.poll()
    assert_accounted_for(life)
    now = archive.clock.now()
    with archive.database.reading() as connection:
        ledger = view.ledger(connection, life.account.id, now, days=30)
    assert sum(day.deleted for day in ledger.days) == 3
    assert sum(day.gone + day.lost for day in ledger.days) == 0


def test_a_wrong_count_is_found_and_mended(archive: Archive) -> None:
    life = begin(archive)
    life.put("a", "b")
    life.poll()
    assert archive.verify(life.account).clean
    archive.execute(
        sa.update(mailbox_table).where(mailbox_table.c.account_id == life.account.id).values(captures=7)
    )
    findings = archive.verify(life.account)
    assert (findings.miscounted, findings.clean) == (1, False)
    mend = partial(requests.recount, account_id=life.account.id)
    assert [archive.database.transact(mend), archive.database.transact(mend)] == [True, False]
    assert archive.verify(life.account).clean
    assert_accounted_for(life)


# The commands and HTTP.


@dataclass
class Commands:
    """The command line over a database whose accounts the test made."""

    directory: Path
    database: Database
    settings: dict[str, str] = field(default_factory=dict)

    def add(self, name: str) -> Account:
        identity = new_account_id()
        new = Account(identity, name, f"pop3s://{identity}@mail.example.com", "implicit", "env:P")
        added = self.now - timedelta(days=2)
        return self.database.transact(lambda connection: accounts.add(connection, new, added))

    @property
    def now(self) -> datetime:
        return datetime.now(UTC)

    def poll(self, account: Account, **what: Any) -> None:
        report = poll_report(account.name, **what)

        def end(connection: sa.Connection) -> None:
            claim = claims.claim_account(connection, account.id, owner="somebody", lease_seconds=60)
            assert claim is not None
            endings.write(connection, [Ending(claim, report, self.now, Timetable(300.0))], uniform=middle)

        self.database.transact(end)

    def run(self, *arguments: str, code: int = 0) -> str:
        environment = {
            "ARCHIVER_DATABASE_URL": f"sqlite:///{self.directory / 'archiver.db'}",
            "ARCHIVER_STORE_URL": f"file:{self.directory / 'store'}",
            **self.settings,
        }
        result = CliRunner().invoke(app, arguments, env=environment)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return result.stdout

    def json(self, *arguments: str, code: int = 0) -> dict[str, Any]:
        (line,) = self.run(*arguments, "--json", code=code).splitlines()
        found: dict[str, Any] = json.loads(line)
        return found


@pytest.fixture
def commands(tmp_path: Path, sqlite_url: str) -> Iterator[Commands]:
    database = Database(sqlite_url)
    migrate.upgrade(database)
    yield Commands(tmp_path, database)
    database.close()


def stop(database: Database, account: Account, state: AccountState) -> None:
    database.transact(lambda connection: schedule.stop(connection, account.id, state, "a wrong password"))


def test_the_worst_comes_first(commands: Commands) -> None:
    names = ("all well", "by hand", "late", "aside", "held", "failing", "waiting", "lossy")
    made = {name: commands.add(name) for name in names}
    for name in names:
        if name != "late":
            commands.poll(made[name], listed=1, new=1)
    commands.poll(made["aside"], listed=2, known=1, quarantined=1)
    commands.poll(made["failing"], outcome="try_later", error="the server\nis away")
    commands.poll(made["lossy"], listed=0, lost=3)
    commands.database.transact(
        lambda connection: connection.execute(
            sa.update(account_table)
            .where(account_table.c.id == made["held"].id)
            .values(deletion_suspended="other ids")
        )
    )
    for name, state in (("by hand", AccountState.PAUSED), ("waiting", AccountState.WAITING)):
        stop(commands.database, made[name], state)
    found = commands.json("status", code=1)
    assert [one["account"] for one in found["attention"]] == [
        *("lossy", "waiting", "failing", "held", "aside", "late", "by hand")
    ]
    assert found["attention"][0] | {"troubles": ["lost messages"], "lost": 3} == found["attention"][0]
    assert (found["accounts"], found["paused"], found["waiting"], found["failing"]) == (8, 2, 1, 1)
    assert (found["lost"], found["late"], found["deletion_suspended"], found["quarantined"]) == (3, 1, 1, 1)
    assert (found["captures"], found["never_polled"]) == (0, 1)
    text = commands.run("status", code=1)
    lines = [line for line in text.splitlines() if "the server is away" in line]
    assert len(lines) == 1
    assert text.index("lossy") < text.index("waiting") < text.index("by hand")
    assert "all well" not in text
    assert [day["lost"] for day in commands.json("status", "--days", "1", code=1)["days"]] == [3]


def test_many_accounts_in_trouble_are_a_few_lines(commands: Commands) -> None:
    for number in range(45):
        commands.poll(commands.add(f"account {number:02}"), outcome="try_later", error="away")
    text = commands.run("status", code=1)
    assert sum("failing," in line or " failing " in line for line in text.splitlines()) < 25
    assert "25 more accounts: archiver status --all" in text
    assert len(commands.json("status", code=1)["attention"]) == view.SHOWN
    assert len(commands.json("status", "--all", code=1)["attention"]) == 45


def test_all_well_is_0_and_a_pause_by_hand_is_too(commands: Commands) -> None:
    account = commands.add("work")
    commands.poll(account, listed=0)
    assert commands.json("status")["attention"] == []
    commands.run("account", "pause", "work")
    assert [one["troubles"] for one in commands.json("status")["attention"]] == [["paused"]]


def test_a_host_in_trouble_is_named(commands: Commands) -> None:
    commands.database.transact(
        lambda connection: connection.execute(
            sa.insert(host_table).values(
                name="mail.example.com", failures=4, failing_since=commands.now, error="no route"
            )
        )
    )
    (host,) = commands.json("status")["hosts"]
    assert (host["host"], host["failures"], host["error"]) == ("mail.example.com", 4, "no route")
    assert "no route" in commands.run("status")


def test_an_account_shows_its_days(commands: Commands) -> None:
    account = commands.add("work")
    commands.poll(account, listed=5, new=3, quarantined=1, lost=2)
    shown = commands.json("account", "show", "work", "--days", "3")
    assert shown["lost"] == 2
    day = shown["days"][-1]
    assert (day["listed"], day["archived"], day["quarantined"], day["to_come"]) == (5, 3, 1, 1)
    assert len(shown["days"]) == 3
    # It was added two days ago, and nobody looked before this poll.
    (gap,) = shown["gaps"]
    assert gap["to"] is not None
    assert shown["days"][-2]["gap_seconds"] == 86400
    assert "no successful poll from" in commands.run("account", "show", "work")
    assert commands.json("db", "prune")["counted"] == 1
    assert commands.json("db", "recount") == {"accounts": 1, "corrected": []}
    assert commands.json("db", "catch-up") == {"accounts": 1}
    assert commands.json("account", "show", "work", "--days", "3")["days"] == shown["days"]


@pytest.mark.parametrize("forbidden", [False, True])
def test_http_tells_what_the_commands_tell(commands: Commands, forbidden: bool) -> None:
    commands.settings["ARCHIVER_FORBID_DELETION"] = str(forbidden)
    account = commands.add("work/of anna")
    commands.poll(account, listed=5, new=3, quarantined=1, lost=2)

    def standing() -> overview.Overview:
        with commands.database.reading() as connection:
            return overview.overview(connection, commands.now)

    health = web.Health(lambda: True, lambda: None, standing)
    with web.serving(
        "127.0.0.1:0",
        lambda _: web.application(
            commands.database, health, token="a token", on_loopback=True, deletion_forbidden=forbidden
        ),
    ) as at:

        def get(path: str) -> Any:
            request = urllib.request.Request(f"{at}{path}", headers={"Authorization": "Bearer a token"})
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.read().decode()

        told = json.loads(get("/v1/status?days=2"))
        assert told == commands.json("status", "--days", "2", code=1)
        assert told["deletion_forbidden"] is forbidden
        told = json.loads(get("/v1/accounts/work%2Fof%20anna/days?days=3"))
        shown = commands.json("account", "show", "work/of anna", "--days", "3")
        assert {name: told[name] for name in ("lost", "days", "gaps")} == {
            name: shown[name] for name in ("lost", "days", "gaps")
        }
        metrics = get("/metrics")
        assert "archiver_messages_quarantined 1.0" in metrics
        assert "archiver_accounts_late 0.0" in metrics
        for path, status in (
            ("/v1/accounts/nobody/days", 404),
            ("/v1/status?days=x", 400),
            ("/v1/status?limit=1001", 400),
        ):
            with pytest.raises(urllib.error.HTTPError) as refused:
                get(path)
            with refused.value:
                assert refused.value.code == status
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{at}/v1/status", timeout=20)
