"""``archiver demo``: a whole archive on this machine, with sample mailboxes."""

import os
import shutil
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from archiver.cli import options
from archiver.cli.output import SyncProgress, say, show, size, table

if TYPE_CHECKING:
    from archiver.bootstrap import App
    from archiver.demo import MailServer
    from archiver.evidence.verify import Findings
    from archiver.model import Account, PollReport

MESSAGES = {"anna": 150, "ben": 100, "carla": 50}
"""Three mailboxes, of a size that takes seconds and is more than a handful."""
LATE_MESSAGES = 5
SCALE = 0.4
"""Factor on the usual size of sample messages: about 10 MB in all."""
SEED = 20260101
MARK = "DEMO.txt"
INDEX = "archiver.db"


def register(app: typer.Typer) -> None:
    app.command()(demo)


def demo(
    directory: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Where to put the archive: a new directory, or an earlier demo's, which is replaced.",
        ),
    ] = Path("archive"),
) -> None:
    """See the archiver work on this machine, with sample mailboxes, in less than a minute.

    Starts a mail server on loopback (Dovecot, if it is installed), archives three
    mailboxes, polls them again, delivers new mail, and verifies the archive. The
    archive stays for you to look at.
    """
    from archiver.bootstrap import App
    from archiver.demo import start_mail_server
    from archiver.settings import Settings

    _replace_earlier(directory)
    options.log_quietly()
    passwords = {user: f"{user}'s password" for user in MESSAGES}
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="archiver-demo-")))
        # The mail server may run as another user, who must be able to enter.
        place.chmod(0o755)
        server = stack.enter_context(start_mail_server(place, passwords))
        settings = Settings(
            database_url=f"sqlite:///{directory / INDEX}", store_url=f"file:{directory / 'store'}"
        )
        app = stack.enter_context(App(settings))
        app.open_archive()
        (directory / MARK).write_text(
            "This archive was made by `archiver demo`, which replaces it unless other mail was added.\n"
        )
        _play(app, server, passwords, directory)


def _replace_earlier(directory: Path) -> None:
    """Replace an earlier demo's archive, and nothing else. Raises UsageError, OperatorNeeded."""
    from archiver.errors import OperatorNeeded, UsageError

    try:
        if directory.exists() and any(directory.iterdir()):
            if not _is_a_demos(directory):
                raise UsageError(
                    f"{directory} has content that is not from a demo",
                    hint="choose another directory: archiver demo --directory DIR",
                )
            shutil.rmtree(directory)
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OperatorNeeded(f"cannot prepare {directory} for the archive: {error.strerror}") from error


def _is_a_demos(directory: Path) -> bool:
    """Whether an archive is a demo's, and no other mail was added to it."""
    from archiver.db import Database, accounts

    if not (directory / MARK).is_file():
        return False
    database = Database(f"sqlite:///{directory / INDEX}")
    if not database.exists:
        return True
    try:
        with database.reading() as connection:
            return {account.name for account in accounts.every(connection)} <= MESSAGES.keys()
    finally:
        database.close()


@dataclass(slots=True)
class _Story:
    """The demo so far, for the summary."""

    app: "App"
    accounts: "list[Account]"

    def poll(self) -> "list[PollReport]":
        """Poll every account. Raises OperatorNeeded if a poll fails."""
        from archiver.errors import OperatorNeeded

        with SyncProgress(quiet=False) as progress:
            reports = self.app.worker.poll_now(self.accounts, progress.watch)
        for report in reports:
            if report.outcome != "ok":
                raise OperatorNeeded(f"{report.account}: {report.error}", hint=report.hint)
        return reports

    def pause(self) -> None:
        """Pause the accounts: their mail server stops with the demo."""
        from archiver.db import schedule
        from archiver.states import AccountState

        for account in self.accounts:
            self.app.database.transact(
                partial(schedule.stop, account_id=account.id, state=AccountState.PAUSED)
            )


def _play(app: "App", server: "MailServer", passwords: dict[str, str], directory: Path) -> None:
    from archiver.demo.corpus import corpus

    samples = corpus(sum(MESSAGES.values()) + LATE_MESSAGES, SEED, scale=SCALE)
    for user, count in MESSAGES.items():
        server.deliver(user, [next(samples) for _ in range(count)])
    kind = type(server).__name__
    say(f"1. A mail server with {len(MESSAGES)} mailboxes is running: {kind}, TLS, on loopback.")
    app.worker.start_clock(claim=False)
    story = _Story(app, [_account(app, server, user, passwords[user]) for user in MESSAGES])

    say("\n2. Archiving all messages.")
    reports = story.poll()
    _reports(reports)

    say("\n3. Polling again: no message is fetched twice.")
    _reports(story.poll())

    lucky = next(iter(MESSAGES))
    say(f"\n4. Delivering {LATE_MESSAGES} new messages to {lucky}, and polling: only these are fetched.")
    server.deliver(lucky, list(samples))
    _reports(story.poll())

    say("\n5. Verifying: every message is read from the archive and hashed again.")
    findings = _verify(story)
    say(
        f"   {findings.checked} messages, {size(findings.hashed_bytes)}; "
        f"{findings.segments} journal segments: "
        f"{findings.missing} missing, {findings.damaged} damaged, {findings.chain_breaks} chain breaks, "
        f"{findings.unrecorded} unrecorded"
    )
    story.pause()
    _farewell(story, findings, directory)
    if not findings.clean:
        raise typer.Exit(1)


def _account(app: "App", server: "MailServer", user: str, password: str) -> "Account":
    from archiver.db import accounts
    from archiver.model import Account, new_account_id
    from archiver.pop3 import Tls
    from archiver.secrets import PROMPT

    account = Account(
        id=new_account_id(),
        name=user,
        url=server.url(user),
        tls=Tls.IMPLICIT.value,
        secret_reference=PROMPT,
        ca_file=str(server.ca_file),
    )
    app.passwords[account.id] = password
    return app.database.transact(lambda connection: accounts.add(connection, account, app.now()))


def _reports(reports: "list[PollReport]") -> None:
    numbers = ("on the server", "fetched", "known", "size", "seconds")
    made = table("mailbox", *numbers, right=numbers)
    for report in reports:
        made.add_row(
            report.account,
            str(report.listed),
            str(report.counts.new),
            str(report.counts.known),
            size(report.counts.fetched_bytes),
            f"{report.seconds:.2f}",
        )
    show(made)


def _verify(story: _Story) -> "Findings":
    from concurrent.futures import ThreadPoolExecutor

    from archiver.evidence.verify import Findings, verify

    findings = Findings()
    with ThreadPoolExecutor(4) as readers:
        for account in story.accounts:
            verify(
                account,
                story.app.database,
                story.app.store,
                findings,
                now=story.app.now(),
                readers=readers,
            )
    return findings


def _farewell(story: _Story, findings: "Findings", directory: Path) -> None:
    from archiver.db import captures

    with story.app.database.reading() as connection:
        newest = next(captures.listed(connection, limit=1, newest=True))
    count, boxes = findings.checked, len(story.accounts)
    command = _command()
    elsewhere = ""
    if directory != Path("archive"):
        elsewhere = (
            f"\n  export ARCHIVER_DATABASE_URL=sqlite:///{directory / INDEX}"
            f"\n  export ARCHIVER_STORE_URL=file:{directory / 'store'}"
        )
    say(f"""
Done. {count} messages of {boxes} mailboxes are archived, each once, byte for byte.

  {directory}/store/messages/  the messages as they were sent, each named by its SHA-256
  {directory}/store/journal/   what was captured, when and from where: a hash-chained log
  {directory}/{INDEX}      the index; the store is the truth

Look at the archive:{elsewhere}
  {command} status
  {command} message list --newest --limit 10
  {command} message get {newest.sha256.hex()[:12]}

Archive your own mailbox:
  {command} account check pop3s://you@mail.example.com
  {command} sync pop3s://you@mail.example.com""")


def _command() -> str:
    """How to call this command from the current directory."""
    called = Path(sys.argv[0])
    if called.name != "archiver":
        return "python -m archiver"
    if shutil.which("archiver") == str(called):
        return "archiver"
    return os.path.relpath(called)
