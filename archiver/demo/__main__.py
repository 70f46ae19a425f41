"""A mail server to practise with, for docs/tutorial.md: ``python -m archiver.demo DIRECTORY``.

Owns one mailbox of sample mail on loopback, and a new directory with what a
client needs to read it: the URL, the password, the certificate, and a copy of
each message as it was delivered. A line on standard input delivers one more
message. Everything but the directory is gone when the program stops.
"""

import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TextIO

from archiver.demo import start_mail_server
from archiver.demo.corpus import corpus
from archiver.errors import ArchiverError

_USER = "anna"
_PASSWORD = "anna's password"  # noqa: S105 - of a mailbox on loopback that holds sample mail only
_MESSAGES = 20
_MOST_MESSAGES = 1000
_SEED = 20260102
_SCALE = 0.4


def practise(directory: Path, lines: Iterable[str], output: TextIO) -> None:
    """Serve the mailbox until ``lines`` end. Raises FileExistsError when ``directory`` is there already."""
    sent = directory / "sent"
    directory.mkdir(parents=True)
    sent.mkdir()
    samples = corpus(_MOST_MESSAGES, _SEED, scale=_SCALE)
    numbers = iter(range(1, _MOST_MESSAGES + 1))
    with tempfile.TemporaryDirectory(prefix="archiver-demo-") as place:
        # Dovecot may run as another user, who must be able to enter.
        Path(place).chmod(0o755)
        with start_mail_server(Path(place), {_USER: _PASSWORD}) as server:
            server.deliver(_USER, _written(islice(samples, _MESSAGES), numbers, sent))
            (directory / "url").write_text(server.url(_USER) + "\n")
            (directory / "password").write_text(_PASSWORD + "\n")
            (directory / "ca.pem").write_bytes(server.ca_file.read_bytes())
            output.write(
                f"A mail server is running on this machine, with {_MESSAGES} messages for {_USER}.\n\n"
                f"  {directory}/url        the mailbox\n"
                f"  {directory}/password   its password\n"
                f"  {directory}/ca.pem     the certificate to trust\n"
                f"  {directory}/sent/      the messages as they were delivered\n\n"
                "Press Enter to deliver one more message, Ctrl-C to stop.\n"
            )
            output.flush()
            for _ in lines:
                server.deliver(_USER, _written(islice(samples, 1), numbers, sent))
                output.write(f"Delivered one more: {len(server.messages(_USER))} messages.\n")
                output.flush()


def _written(messages: Iterable[bytes], numbers: Iterator[int], sent: Path) -> Iterator[bytes]:
    """Pass messages on, and keep a copy of each under its number."""
    for message in messages:
        (sent / f"{next(numbers):04}.eml").write_bytes(message)
        yield message


def main() -> None:
    """Run the program and exit."""
    if len(sys.argv) != 2:  # noqa: PLR2004 - the program and its one argument
        sys.exit("usage: python -m archiver.demo DIRECTORY")
    # A killed program would leave its Dovecot running.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        practise(Path(sys.argv[1]), sys.stdin, sys.stdout)
    except KeyboardInterrupt:
        sys.exit(0)
    except FileExistsError as error:
        sys.exit(f"{error.filename} is there already: name a new directory")
    except (OSError, ArchiverError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
