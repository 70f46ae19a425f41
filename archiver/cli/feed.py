"""``archiver feed``: the ordered stream of events, for consumers that index messages."""

import time
from typing import Annotated, Any

import typer

from archiver.cli.opened import opened
from archiver.cli.output import Json, emit, say, size

commands = typer.Typer(
    no_args_is_help=True, help="The ordered stream of captured messages, for a search index to follow."
)

FOLLOW_SECONDS = 1.0


@commands.command()
def tail(
    after: Annotated[int, typer.Option(metavar="N", min=0, help="Start after this position.")] = 0,
    follow: Annotated[bool, typer.Option("--follow", metavar="", help="Wait for more events.")] = False,
    json: Json = False,
) -> None:
    """Show the events after a position, in order.

    A consumer that remembers the last position it has seen misses nothing: no
    event ever appears below that position.
    """
    from archiver import feed

    with opened() as app:
        while True:
            for event in feed.backlog(app.database, after=after):
                after = event["position"]
                if json:
                    emit(event)
                else:
                    say(_line(event))
            if not follow:
                return
            time.sleep(FOLLOW_SECONDS)


def _line(event: dict[str, Any]) -> str:
    what = f"{size(event['size'])} {event['key']}" if "size" in event else ascii(event.get("reason", ""))
    if event["event"] == "epoch_began":
        what = f"epoch {event['epoch']}, {event['listed']} messages under other ids"
    at = event["at"][:19]
    return f"{event['position']:>10} {at} {event['event']:11} {event['account']} {what}"
