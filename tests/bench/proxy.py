"""A long line to a mail server: latency each way and one bandwidth for all, in a process of its own.

    with far_line(port, round_trip_seconds=0.04, bytes_per_second=12.5e6) as line:
        ...  # clients connect to 127.0.0.1, line.port

Owns a listener and an event loop, in a child. Promises that nothing is held
back that a real line would carry: every octet is on its way as soon as there
is room on the line, which never idles while anybody has something to send, so
pipelining gains here what it gains there. A connection costs one round trip
before it carries anything, as TCP's handshake does. All connections share the
bandwidth of a direction, each in its turn, so that a handshake does not stand
behind somebody's megabytes. Timers that fire late do not slow it down: a chunk
begins when the line was free, not when the process woke up.

What it costs itself is told by ``FarLine.cpu_seconds``.
"""

import asyncio
import json
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.bench.machine import cpu_seconds_of

_HOST = "127.0.0.1"
_BACKLOG = 1024
_CHUNK_OCTETS = 16 * 1024  # 1.3 ms of 100 Mbit/s: how long another connection may have to wait
_QUEUED_OCTETS = 512 * 1024  # of one direction of a connection: 40 ms of 100 Mbit/s
_UNREAD_OCTETS = 6 * 1024 * 1024  # what Linux lets a receive window grow to, net.ipv4.tcp_rmem
_AHEAD_SECONDS = 0.004  # how far ahead the line is given away: event loops wake up a millisecond late
_STOP_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class FarLine:
    """A line that runs."""

    port: int
    pid: int

    def cpu_seconds(self) -> float:
        """What its process has used so far."""
        return cpu_seconds_of(self.pid)


@contextmanager
def far_line(target_port: int, *, round_trip_seconds: float, bytes_per_second: float) -> Iterator[FarLine]:
    """A line to a port of this machine, until the end of the block."""
    command = [sys.executable, "-m", "tests.bench.proxy", str(target_port)]
    process = subprocess.Popen(
        [*command, repr(round_trip_seconds), repr(bytes_per_second)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            if process.stdout is None or process.stdin is None:
                raise RuntimeError("a pipe was asked for")
            yield FarLine(json.loads(process.stdout.readline()), process.pid)
            process.stdin.close()
            process.wait(_STOP_SECONDS)
        finally:
            if process.poll() is None:
                process.kill()


class _Direction:
    """One direction of the line: who has something to send takes turns, then it travels."""

    def __init__(self, latency_seconds: float, bytes_per_second: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._latency_seconds = latency_seconds
        self._seconds_per_octet = 1 / bytes_per_second
        self._turns: deque[_End] = deque()
        self._free_at = 0.0
        self._wakes = False
        self._travelling: deque[tuple[float, _End, bytes]] = deque()
        self._arrives: asyncio.TimerHandle | None = None

    def wants(self, end: "_End") -> None:
        """An end has its first chunk in its queue."""
        self._turns.append(end)
        if not self._wakes:
            self._send()

    def _send(self) -> None:
        self._wakes = False
        now = self._loop.time()
        while self._turns:
            if self._free_at > now + _AHEAD_SECONDS:
                self._wakes = True
                self._loop.call_at(self._free_at - _AHEAD_SECONDS / 2, self._send)
                break
            end = self._turns.popleft()
            read_at, chunk = end.take()
            self._free_at = max(self._free_at, read_at) + len(chunk) * self._seconds_per_octet
            self._travelling.append((self._free_at + self._latency_seconds, end, chunk))
            if end.queue:
                self._turns.append(end)
        self._expect()

    def _expect(self) -> None:
        if self._arrives is None and self._travelling:
            self._arrives = self._loop.call_at(self._travelling[0][0], self._deliver)

    def _deliver(self) -> None:
        self._arrives = None
        now = self._loop.time()
        while self._travelling and self._travelling[0][0] <= now:
            _, end, chunk = self._travelling.popleft()
            end.arrived(chunk)
        self._expect()
        if not self._wakes and self._turns:
            self._send()


@dataclass(slots=True, eq=False)
class _End(asyncio.Protocol):
    """One side of a connection: what it says goes down its direction and comes out at the other side."""

    direction: _Direction
    opens_at: float = 0.0
    other: "_End | None" = None
    transport: asyncio.Transport | None = None
    queue: deque[tuple[float, bytes]] = field(default_factory=deque)
    queued_bytes: int = 0
    stopped_by: bool = False
    closed: bool = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not isinstance(transport, asyncio.Transport):
            raise TypeError(transport)
        self.transport = transport
        transport.set_write_buffer_limits(high=_UNREAD_OCTETS)

    def data_received(self, data: bytes) -> None:
        now = max(self.opens_at, asyncio.get_running_loop().time())
        idle = not self.queue
        for start in range(0, len(data), _CHUNK_OCTETS):
            self.queue.append((now, data[start : start + _CHUNK_OCTETS]))
        self.queued_bytes += len(data)
        if idle:
            self.direction.wants(self)
        self.regulate()

    def eof_received(self) -> bool:
        self._end()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()

    def pause_writing(self) -> None:
        if self.other is not None:
            self.other.stopped_by = True
            self.other.regulate()

    def resume_writing(self) -> None:
        if self.other is not None:
            self.other.stopped_by = False
            self.other.regulate()

    def take(self) -> tuple[float, bytes]:
        """The next chunk, and when it could be sent; an empty one is the end."""
        read_at, chunk = self.queue.popleft()
        self.queued_bytes -= len(chunk)
        self.regulate()
        return read_at, chunk

    def arrived(self, chunk: bytes) -> None:
        other = None if self.other is None else self.other.transport
        if other is None or other.is_closing():
            return
        if chunk:
            other.write(chunk)
        else:
            # Nobody here closes one half only: what the server says after QUIT is on its way before.
            other.close()

    def regulate(self) -> None:
        """Read on while there is room: no more is under way than a real line's windows would let."""
        if self.transport is None or self.transport.is_closing():
            return
        if self.stopped_by or self.queued_bytes >= _QUEUED_OCTETS:
            self.transport.pause_reading()
        else:
            self.transport.resume_reading()

    def _end(self) -> None:
        if not self.closed:
            self.closed = True
            self.queue.append((asyncio.get_running_loop().time(), b""))
            if len(self.queue) == 1:
                self.direction.wants(self)


async def _serve(target_port: int, round_trip_seconds: float, bytes_per_second: float) -> None:
    loop = asyncio.get_running_loop()
    up = _Direction(round_trip_seconds / 2, bytes_per_second)
    down = _Direction(round_trip_seconds / 2, bytes_per_second)
    connecting: set[asyncio.Task[None]] = set()

    class Client(_End):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            # What it says waits in its socket until there is somebody to hear it.
            self.stopped_by = True
            self.regulate()
            self.opens_at = loop.time() + round_trip_seconds
            task = loop.create_task(reach(self))
            connecting.add(task)
            task.add_done_callback(connecting.discard)

    async def reach(client: _End) -> None:
        await asyncio.sleep(client.opens_at - loop.time())
        server = _End(down, client.opens_at)
        server.other, client.other = client, server
        try:
            await loop.create_connection(lambda: server, _HOST, target_port)
        except OSError:
            if client.transport is not None:
                client.transport.abort()
        else:
            client.stopped_by = False
            client.regulate()

    listener = await loop.create_server(lambda: Client(up), _HOST, 0, backlog=_BACKLOG)
    sys.stdout.write(json.dumps(listener.sockets[0].getsockname()[1]) + "\n")
    sys.stdout.flush()
    await loop.run_in_executor(None, sys.stdin.read)


def main() -> None:
    target_port, round_trip_seconds, bytes_per_second = sys.argv[1:]
    asyncio.run(_serve(int(target_port), float(round_trip_seconds), float(bytes_per_second)))


if __name__ == "__main__":
    main()
