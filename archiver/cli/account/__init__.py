"""``archiver account``: the mailboxes that are archived. A module for each kind of question."""

import typer

from archiver.cli.account.authorize import authorize
from archiver.cli.account.check import check
from archiver.cli.account.deletion import allow_deletion, deletable
from archiver.cli.account.reseal import reseal
from archiver.cli.account.settings import add, edit
from archiver.cli.account.show import list_accounts, show_account
from archiver.cli.account.state import pause, poll, remove, resume

commands = typer.Typer(
    no_args_is_help=True, help="The mailboxes to archive: add, show, check, pause and remove them."
)

commands.command()(add)
commands.command()(edit)
commands.command("list")(list_accounts)
commands.command("show")(show_account)
for command in (pause, resume, poll, remove, check, authorize, reseal, deletable, allow_deletion):
    commands.command()(command)
