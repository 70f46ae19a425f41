"""``archiver account check``: what a mail server is, and what to expect of it."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from archiver.accounts.fields import Group
from archiver.cli import lookup, options
from archiver.cli.opened import opened
from archiver.cli.output import Json, complain, emit, say, size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from archiver.pop3 import Entry, Listing, ServerFacts

SLOW_SECONDS = 0.05
"""A round trip from which on pipelining decides how long a first archive takes."""
CERTIFICATE_DAYS = 21
"""So long before its end a certificate is worth a word."""


@options.account_options(Group.CONNECTION)
def check(
    target: Annotated[
        str, typer.Argument(metavar="NAME|URL", help="An account, or a POP URL.", show_default=False)
    ],
    given: options.Given,
    json: Json = False,
) -> None:
    """Look at a mail server and its mailbox, and say in plain words what to expect.

    Changes nothing there. Exit code 1 when it does not work.
    """
    from archiver.errors import ArchiverError
    from archiver.model import Account
    from archiver.poll.server import translated, warnings
    from archiver.secrets import PROMPT

    with opened() as app:
        if "://" in target:
            endpoint = given.endpoint(target)
            account = Account("", endpoint.url, endpoint.url, endpoint.tls.value, PROMPT)
        else:
            account = lookup.active_account(app, target)
        account = given.applied_to(account)
        account = replace(account, secret_reference=given.reference() or account.secret_reference)
        if given.password_stdin or account.secret_reference == PROMPT:
            ask = options.from_stdin if given.password_stdin else lambda: options.ask(account.name)
            app.passwords[account.id] = ask()
        password = app.password(account)
        try:
            with translated(), app.connect(account) as mailbox:
                mailbox.login(password)
                listing = mailbox.list()
                round_trip = mailbox.round_trip()
                facts = mailbox.facts
                mailbox.quit()
        except ArchiverError as error:
            complain(error)
            raise typer.Exit(1) from None
        now = app.now()
    entries = listing.entries
    days = None if facts.certificate_not_after is None else (facts.certificate_not_after - now).days
    advice = [
        *map(_sentence, warnings(account, facts)),
        *_advice(facts, entries, has_uidl=listing.has_uidl, days=days, round_trip=round_trip),
        *_quirks(facts, listing),
    ] or ["Nothing to mend."]
    known_sizes = [entry.size for entry in entries if entry.size is not None]
    if json:
        emit(
            {
                "account": account.name,
                "host": facts.host,
                "port": facts.port,
                "greeting": facts.greeting,
                "implementation": facts.implementation,
                "capabilities": facts.capabilities,
                "tls_version": facts.tls_version,
                "cipher": facts.cipher,
                "certificate_sha256": facts.certificate_sha256,
                "certificate_days_left": days,
                "mechanism": facts.mechanism,
                "pipelining": facts.pipelining,
                "login_delay_seconds": facts.login_delay_seconds,
                "expire_days": facts.expire_days,
                "utf8": facts.utf8,
                "messages": len(entries),
                "bytes": sum(known_sizes),
                "has_uidl": listing.has_uidl,
                "unreadable_lines": listing.skipped_lines,
                "trips_over": sorted(facts.avoid | facts.suspect),
                "round_trip_seconds": round(round_trip, 4),
                "advice": advice,
            }
        )
        return
    say(f"{facts.host}:{facts.port}  {facts.implementation or facts.greeting}")
    say(f"  channel     {facts.tls_version or 'clear text'}{f', {facts.cipher}' if facts.cipher else ''}")
    if days is not None:
        say(f"  certificate {days} days left, SHA-256 {facts.certificate_sha256}")
    say(f"  login       works, by {facts.mechanism}")
    say(f"  offers      {', '.join(facts.capabilities) or 'nothing (no CAPA)'}")
    ids = "by UIDL" if listing.has_uidl else "no UIDL"
    say(f"  mailbox     {len(entries)} messages, {size(sum(known_sizes))}, {ids}")
    say(f"  round trip  {round_trip * 1000:.1f} ms")
    for line in advice:
        say(f"  * {line}")


def _advice(
    facts: "ServerFacts", entries: "Sequence[Entry]", *, has_uidl: bool, days: int | None, round_trip: float
) -> list[str]:
    """What an operator should know of this server, in plain words. A pure function."""
    from archiver.poll.plan import without_own_id

    advice = []
    if facts.tls_version is None:
        hidden = (facts.mechanism or "").startswith(("SCRAM", "CRAM", "APOP"))
        what = "Mail crosses" if hidden else "Password and mail cross"
        advice.append(f"{what} the network in clear. Use pop3s, or starttls, if the server has it.")
    if days is not None and days < CERTIFICATE_DAYS:
        advice.append(f"The certificate ends in {days} days; polls will stop then.")
    if not has_uidl:
        advice.append("No UIDL: messages are told apart by content, so each poll fetches all of them.")
    elif uncertain := without_own_id(entries):
        advice.append(
            f"{uncertain} messages have no id of their own; each poll fetches these to compare them."
        )
    if not facts.pipelining and round_trip > SLOW_SECONDS:
        advice.append(
            "No PIPELINING over a slow line: the first archive takes a round trip for each message."
        )
    if facts.login_delay_seconds:
        advice.append(
            f"The server wants {facts.login_delay_seconds:g} s between logins (LOGIN-DELAY): "
            "polls are never closer together, whatever the interval."
        )
    if facts.expire_days:
        advice.append(f"Messages are removed after {facts.expire_days} days, archived or not (EXPIRE).")
    if facts.host.endswith(("gmail.com", "googlemail.com")):
        advice.append(
            "Gmail shows a few hundred messages at a time and hides what was fetched: poll until none is new."
        )
    return advice


def _quirks(facts: "ServerFacts", listing: "Listing") -> list[str]:
    """What this session tripped over. A pure function."""
    found = [
        f"The server hung, or hung up, at {name} and was called again without it; polls remember that."
        for name in sorted(facts.avoid | facts.suspect)
    ]
    if listing.skipped_lines:
        found.append(
            f"{listing.skipped_lines} lines of UIDL and LIST make no sense: what is gone from this mailbox "
            "cannot be told while that is so."
        )
    if not listing.has_sizes:
        found.append("The server refused LIST, so what has no UIDL is not seen, nor what is gone.")
    if facts.bare_lf:
        found.append("The server ends its lines in a bare LF, which POP3 does not allow; it is read so.")
    return found


def _sentence(warning: str) -> str:
    return f"{warning[0].upper()}{warning[1:]}."
