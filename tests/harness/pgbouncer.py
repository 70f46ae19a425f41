"""A private PgBouncer on loopback, in transaction mode: each transaction may be on another connection.

Owns the process. Lets everybody on this machine in, and has few connections to
PostgreSQL for as many clients as come.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from archiver.demo import processes
from tests.harness.postgres import Postgres

CONNECTIONS = 6
"""To PostgreSQL, for all clients together."""

_START_SECONDS = 20.0
_STOP_SECONDS = 10.0

_SETTINGS = """\
[databases]
* = host={host} port={server_port} user=postgres
[pgbouncer]
listen_addr = {host}
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = {connections}
max_client_conn = 400
logfile = {directory}/pgbouncer.log
"""


@contextmanager
def pgbouncer(directory: Path, server: Postgres) -> Iterator[int]:
    """Runs it before ``server``; gives its port."""
    program = _program()
    if program is None:
        raise FileNotFoundError(unavailable())
    directory.mkdir(parents=True, exist_ok=True)
    (port,) = processes.free_ports(1)
    file = directory / "pgbouncer.ini"
    file.write_text(
        _SETTINGS.format(
            host=processes.HOST,
            port=port,
            server_port=server.port,
            connections=CONNECTIONS,
            directory=directory,
        )
    )
    processes.give(directory)
    output = directory / "output"
    process = processes.start([program, str(file)], output)
    try:
        url = f"postgresql://postgres@{processes.HOST}:{port}/postgres"
        processes.wait_until(lambda: _answers(url), process, output, seconds=_START_SECONDS)
        yield port
    finally:
        processes.stop(process, seconds=_STOP_SECONDS)


def unavailable() -> str | None:
    """Why there is none here, or None when there is."""
    return None if _program() else "pgbouncer is not installed"


def _program() -> str | None:
    places = [os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"]
    return shutil.which("pgbouncer", path=os.pathsep.join(places))


def _answers(url: str) -> bool:
    try:
        psycopg.connect(url, connect_timeout=5, prepare_threshold=None).close()
    except psycopg.OperationalError:
        return False
    return True
