"""What a whole first archive costs here, beside the bare download of the same mailbox.

Run it by ``python -m tests.bench.capture [MESSAGES]``. A bare socket that sends
every RETR at once and throws away what comes is the limit of any client. The
archiver does all its work: TLS, hash, object, journal, rows. Both take turns
at one real Dovecot over TLS, so that what disturbs one disturbs the other.
"""

import os
import socket
import ssl
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from archiver import observe
from archiver.bootstrap import Archiver
from archiver.db import accounts, migrate
from archiver.demo.corpus import corpus
from archiver.demo.dovecot import Dovecot
from archiver.model import Account, PollReport, new_account_id
from archiver.poll import Unwatched
from archiver.settings import Settings
from tests.harness.postgres import postgres
from tests.harness.seaweedfs import seaweedfs

_MESSAGES, _SEED, _ROUNDS = 1_000, 3, 3
_USER, _PASSWORD = "bench", "secret"
_END = b"\r\n.\r\n"
_READ_BYTES = 256 * 1024


@dataclass
class Measured:
    """Of each round: messages a second, and this process's CPU in milliseconds a message."""

    rates: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def measure(self, work: Callable[[], int]) -> None:
        began, cpu = time.perf_counter(), time.process_time()
        messages = work()
        self.rates.append(messages / (time.perf_counter() - began))
        self.cpu.append((time.process_time() - cpu) * 1000 / messages)

    def __str__(self) -> str:
        return f"{statistics.median(self.rates):8.0f} messages/s {statistics.median(self.cpu):7.2f} ms CPU"


def download(server: Dovecot, count: int) -> int:
    """Every message by a bare socket, all RETRs at once; returns how many came."""
    context = ssl.create_default_context(cafile=str(server.ca_file))
    with (
        socket.create_connection((server.host, server.pop3s_port)) as plain,
        context.wrap_socket(plain, server_hostname=server.host) as line,
    ):
        retrs = b"".join(b"RETR %d\r\n" % number for number in range(1, count + 1))
        asking = threading.Thread(
            target=line.sendall,
            args=(f"USER {_USER}\r\nPASS {_PASSWORD}\r\n".encode() + retrs + b"QUIT\r\n",),
        )
        asking.start()
        ends, tail = 0, b""
        while octets := line.recv(_READ_BYTES):
            seen = tail + octets
            ends += seen.count(_END)
            tail = seen[-len(_END) + 1 :]
        asking.join()
    return ends


def archive(archiver: Archiver, server: Dovecot) -> int:
    """The mailbox as a new account, into what the archiver is set up with; returns how many were captured."""
    account = Account(
        id=new_account_id(),
        name=new_account_id(),
        url=server.url(_USER),
        tls="implicit",
        secret="prompt:",
        ca_file=str(server.ca_file),
    )
    archiver.passwords[account.id] = _PASSWORD
    archiver.database.transact(lambda connection: accounts.add(connection, account, archiver.now()))
    reports: list[PollReport] = archiver.worker.poll_now([account], lambda _: Unwatched())
    if reports[0].outcome != "ok":
        raise RuntimeError(reports[0].error)
    # Its address is to be another new account's.
    archiver.database.transact(lambda connection: accounts.remove(connection, account.id, archiver.now()))
    return reports[0].new


def main() -> None:
    observe.log_quietly()
    count = int(sys.argv[1]) if len(sys.argv) > 1 else _MESSAGES
    with tempfile.TemporaryDirectory(prefix="archiver-bench-", ignore_cleanup_errors=True) as name:
        place = Path(name)
        place.chmod(0o755)
        with (
            Dovecot(place / "mail", {_USER: _PASSWORD}) as mail,
            seaweedfs(place / "s3") as s3,
            postgres(place / "pg") as database,
        ):
            mail.deliver(_USER, corpus(count, _SEED))
            s3.create_bucket("bench")
            in_directory = Settings(
                database_url=f"sqlite:///{place / 'archiver.db'}", store_url=f"file:{place / 'store'}"
            )
            in_bucket = Settings(
                database_url=database.create_database("bench"),
                store_url="s3://bench/mail",
                s3_endpoint_url=s3.endpoint_url,
            )
            os.environ.update(s3.environment)
            with Archiver(in_directory) as near, Archiver(in_bucket) as far:
                migrate.upgrade(far.raw_database)
                near.open_archive()
                far.open_archive()
                bare, directory, bucket = Measured(), Measured(), Measured()
                for _ in range(_ROUNDS):
                    bare.measure(lambda: download(mail, count))
                    directory.measure(lambda: archive(near, mail))
                    bucket.measure(lambda: archive(far, mail))
    sys.stdout.write(f"{count} messages, medians of {_ROUNDS} rounds\n")
    for what, measured in (
        ("bare download, nothing kept", bare),
        ("into a directory, SQLite", directory),
        ("into SeaweedFS, PostgreSQL", bucket),
    ):
        share = statistics.median(measured.rates) / statistics.median(bare.rates)
        sys.stdout.write(f"{what:28} {measured}   {share:.2f} of the bare rate\n")


if __name__ == "__main__":
    main()
