"""``archiver account check``: whether an account works, and what to expect from its mail server."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from archiver.accounts.fields import Group
from archiver.cli import lookup, options
from archiver.cli.opened import opened
from archiver.cli.output import Json, complain, counted, emit, say, size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from archiver.pop3 import Entry, Listing, ServerFacts

SLOW_SECONDS = 0.05
"""From this round trip on, pipelining decides how long the first poll takes."""
CERTIFICATE_DAYS = 21
"""A certificate that expires sooner is worth a warning."""


@options.account_options(Group.CONNECTION)
def check(
    target: Annotated[
        str, typer.Argument(metavar="NAME|URL", help="An account, or a POP URL.", show_default=False)
    ],
    given: options.Given,
    json: Json = False,
) -> None:
    """Log in to a mail server, and report what its mailbox holds and what to expect from the server.

    Changes nothing. Exits with 1 if the login or the listing fails.
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
    sentences = [
        *map(_sentence, warnings(account, facts)),
        *advice(
            facts,
            entries,
            has_uidl=listing.has_uidl,
            days=days,
            round_trip=round_trip,
            pinned=bool(account.tls_pins),
        ),
        *_quirks(facts, listing),
    ] or ["No problems found."]
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
                "advice": sentences,
            }
        )
        return
    say(f"{facts.host}:{facts.port}  {facts.implementation or facts.greeting}")
    say(f"  channel     {facts.tls_version or 'clear text'}{f', {facts.cipher}' if facts.cipher else ''}")
    if days is not None:
        say(f"  certificate {days} days left, SHA-256 {facts.certificate_sha256}")
    say(f"  login       works, with {facts.mechanism}")
    say(f"  offers      {', '.join(facts.capabilities) or 'nothing (no CAPA)'}")
    ids = "UIDL" if listing.has_uidl else "no UIDL"
    say(f"  mailbox     {counted(len(entries), 'message')}, {size(sum(known_sizes))}, {ids}")
    say(f"  round trip  {round_trip * 1000:.1f} ms")
    for line in sentences:
        say(f"  * {line}")


def advice(
    facts: "ServerFacts",
    entries: "Sequence[Entry]",
    *,
    has_uidl: bool,
    days: int | None,
    round_trip: float,
    pinned: bool,
) -> list[str]:
    """What an operator should know about this server. A pure function."""
    from archiver.poll.plan import without_own_id

    found = []
    if facts.tls_version is None:
        hidden = (facts.mechanism or "").startswith(("SCRAM", "CRAM", "APOP"))
        what = "Mail crosses" if hidden else "Password and mail cross"
        found.append(f"{what} the network in clear text. Use pop3s or starttls if the server supports it.")
    if days is not None and days < CERTIFICATE_DAYS:
        when = f"expired {counted(-days, 'day')} ago" if days < 0 else f"expires in {counted(days, 'day')}"
        then = "it is pinned, so polls go on" if pinned else "polls fail from then on"
        found.append(f"The certificate {when}; {then}.")
    if not has_uidl:
        found.append("No UIDL: only content identifies messages, so each poll fetches all of them.")
    elif uncertain := without_own_id(entries):
        found.append(
            f"The UIDL does not identify {counted(uncertain, 'message')}; each poll fetches them to compare."
        )
    if not facts.pipelining and round_trip > SLOW_SECONDS:
        found.append(
            "No PIPELINING, and a slow connection: the first poll takes one round trip for each message."
        )
    if facts.login_delay_seconds:
        found.append(
            f"The server requires {facts.login_delay_seconds:g} s between logins (LOGIN-DELAY); "
            "a shorter interval has no effect."
        )
    if facts.expire_days:
        found.append(f"The server removes messages after {facts.expire_days} days, archived or not (EXPIRE).")
    if facts.host.endswith(("gmail.com", "googlemail.com")):
        found.append(
            "Gmail lists a few hundred messages at a time and hides fetched ones: poll until none is new."
        )
    return found


def _quirks(facts: "ServerFacts", listing: "Listing") -> list[str]:
    """The faults that this session met. A pure function."""
    found = [
        f"The server stalled or disconnected at {name}. The check reconnected without it; "
        "scheduled polls learn to skip it."
        for name in sorted(facts.avoid | facts.suspect)
    ]
    if listing.skipped_lines:
        found.append(
            f"{counted(listing.skipped_lines, 'line')} of UIDL or LIST cannot be read. Until that is fixed, "
            "the archiver cannot report which messages are gone from this mailbox."
        )
    if not listing.has_sizes:
        found.append(
            "The server refused LIST: messages without UIDL, and messages that are gone, are not seen."
        )
    if facts.bare_lf:
        found.append("The server ends lines with a bare LF. POP3 forbids that, but the archiver accepts it.")
    return found


def _sentence(warning: str) -> str:
    return f"{warning[0].upper()}{warning[1:]}."
