"""An HTTP server in a thread of this process: where it listens, how it starts and ends."""

import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import uvicorn
from starlette.applications import Starlette

from archiver.errors import OperatorNeeded, UsageError
from archiver.web.connections import ACCEPTED_AT_ONCE, HEAD_BYTES, Limits, limited

START_SECONDS: Final = 10.0
"""How long the server may take to start."""
END_SECONDS: Final = 5.0
"""How long its thread may take to end."""
HIGHEST_PORT: Final = 65535
DEFAULT_LIMITS: Final = Limits()

_HINT: Final = "ARCHIVER_HTTP_LISTEN is host:port, such as 127.0.0.1:8080"


@contextmanager
def serving(
    listen: str, make: Callable[[bool], Starlette], *, limits: Limits = DEFAULT_LIMITS
) -> Iterator[str]:
    """Serve at ``host:port`` in a thread, for the length of the block; yields the server's address.

    ``make`` receives whether it listens on loopback only. Raises UsageError for
    an address that cannot be one, OperatorNeeded if nothing can listen there.
    """
    host, port = _address(listen)
    config = uvicorn.Config(
        make(_is_loopback(host)),
        host=host,
        port=port,
        loop="asyncio",
        http=limited(limits),
        ws="none",
        backlog=ACCEPTED_AT_ONCE,
        h11_max_incomplete_event_size=HEAD_BYTES,
        proxy_headers=False,
        log_config=None,
        # Anyone can cause its warnings, as often as they like.
        log_level="error",
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=2,
    )
    server = uvicorn.Server(config)
    version_6 = ":" in host
    try:
        # [::] is every address of the machine, IPv4 included.
        listener = socket.create_server(
            (host, port),
            family=socket.AF_INET6 if version_6 else socket.AF_INET,
            dualstack_ipv6=version_6 and socket.has_dualstack_ipv6(),
        )
    except OSError as error:
        raise OperatorNeeded(f"cannot listen at {listen}: {error.strerror}", hint=_HINT) from error
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="web", daemon=True)
    thread.start()
    try:
        ends_at = time.monotonic() + START_SECONDS
        while not server.started and thread.is_alive() and time.monotonic() < ends_at:
            time.sleep(0.01)
        yield f"http://{f'[{host}]' if version_6 else host}:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=END_SECONDS)


def _address(listen: str) -> tuple[str, int]:
    host, separator, port = listen.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (separator and host and port.isascii() and port.isdigit() and int(port) <= HIGHEST_PORT):
        raise UsageError(f"{listen!r} is not an address to listen at", hint=_HINT)
    return host, int(port)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
