"""A TCP relay on loopback that measures, delays and breaks connections to a real server.

Owns a listener and a thread with an event loop of its own. Promises that
latency and bandwidth delay octets but never hold the next ones back: what a
client sends while earlier octets are under way is under way too, so that
pipelining gains here what it gains on a long line. (Connecting itself is not
delayed.) Sees through nothing: what is encrypted is counted, not read.
"""

import array
import asyncio
import concurrent.futures
import fcntl
import math
import re
import socket
import struct
import termios
import threading
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self

Break = Literal["cut", "reset", "stall", "trickle"]
Direction = Literal["up", "down"]  # up: from client to server
_End = tuple[asyncio.StreamReader, asyncio.StreamWriter]

_HOST = "127.0.0.1"
_BACKLOG = 512
_CHUNK_OCTETS = 64 * 1024
_CHUNKS_UNDER_WAY = 4096  # bounds memory; far above any bandwidth-delay product used in tests
_LINE_OCTETS = 8192  # longer lines are no commands
_SEEN_OCTETS = 1024 * 1024  # of each direction, to find a pattern in
_TRICKLE_SECONDS = 0.5  # from one octet to the next
_DELIVERY_SECONDS = 2.0  # for a client that reads; one that does not gets less
_RESET_AT_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER with no time to linger: close sends RST


@dataclass(slots=True)
class _Plan:
    """Break the next ``times`` connections that have relayed so much in one direction.

    ``until`` is a number of octets, or what the last of them look like.
    """

    how: Break
    direction: Direction
    until: int | re.Pattern[bytes]
    times: int

    def allows(self, seen: "_Seen", chunk: bytes) -> int | None:
        """How many octets of this chunk may pass before the break; None where it does not come in it."""
        if isinstance(self.until, int):
            until: int | None = self.until
        else:
            found = self.until.search(bytes(seen.octets) + chunk)
            until = None if found is None else found.end()
        if until is None or until > seen.count + len(chunk):
            return None
        return max(0, until - seen.count)


@dataclass(slots=True)
class _Seen:
    """What was relayed in one direction of one connection: the number, and the first of the octets."""

    count: int = 0
    octets: bytearray = field(default_factory=bytearray)

    def add(self, chunk: bytes) -> None:
        self.count += len(chunk)
        self.octets += chunk[: _SEEN_OCTETS - len(self.octets)]


class Proxy:
    """A relay to ``target_port``; clients connect to ``(host, port)``. A context manager.

    ``latency_seconds`` is added each way, so a round trip gains twice that.
    ``bytes_per_second`` limits each direction of each connection.
    ``record`` selects the lines from clients to keep; it is of use in clear text only.
    ``bytes_up``, ``bytes_down`` and ``connections`` count what was relayed so far,
    ``breaks`` the connections that a plan broke.
    """

    host = _HOST

    def __init__(
        self,
        target_port: int,
        *,
        latency_seconds: float = 0.0,
        bytes_per_second: float = math.inf,
        record: re.Pattern[bytes] | None = None,
    ) -> None:
        self.target_port = target_port
        self.latency_seconds = latency_seconds
        self.bytes_per_second = bytes_per_second
        self.bytes_up = 0
        self.bytes_down = 0
        self.connections = 0
        self.breaks = 0
        self._plan: _Plan | None = None
        self._record = record
        self._lines: list[bytes] = []
        self._live: set[_Connection] = set()
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        started: concurrent.futures.Future[int] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._run, args=(started,), name="proxy", daemon=True)
        self._thread.start()
        self.port = started.result()

    def lines(self, pattern: bytes = b"") -> list[bytes]:
        """The recorded lines in which this regular expression is found, in the order of their arrival."""
        return [line for line in list(self._lines) if re.search(pattern, line)]

    def break_now(self, how: Break) -> None:
        """Break every connection there is.

        "cut" ends it, "reset" sends RST, "stall" lets nothing pass, "trickle" an octet now and then.
        """

        async def break_all() -> None:
            for connection in list(self._live):
                connection.break_off(how)

        asyncio.run_coroutine_threadsafe(break_all(), self._loop).result()

    def break_after(self, octets: int, how: Break, *, direction: Direction = "down", times: int = 1) -> None:
        """Let the next ``times`` connections relay exactly ``octets`` in ``direction``, then break them."""
        self._plan = _Plan(how, direction, octets, times)

    def break_at(self, pattern: bytes, how: Break, *, direction: Direction = "down", times: int = 1) -> None:
        """Let the next ``times`` connections relay up to the end of what looks so, then break them.

        The regular expression is looked for in all that went in ``direction``, from the first octet on.
        """
        self._plan = _Plan(how, direction, re.compile(pattern, re.DOTALL), times)

    def heal(self) -> None:
        """Forget ``break_after`` and ``break_at``. What is stalled stays so."""
        self._plan = None

    def close(self) -> None:
        """Reset all connections and stop listening. May be called again."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._closing.set)
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def keep(self, lines: list[bytes]) -> None:
        if self._record is not None:
            self._lines.extend(filter(self._record.search, lines))

    def passing(self, direction: Direction, seen: _Seen, chunk: bytes) -> tuple[bytes, Break | None, bytes]:
        """How much of a chunk a connection may relay, the break after it, and what may follow that."""
        plan, how, rest = self._plan, None, b""
        if plan is not None and plan.direction == direction:
            allowed = plan.allows(seen, chunk)
            if allowed is not None:
                how = plan.how
                # What is only slow loses nothing of what it was given.
                chunk, rest = chunk[:allowed], chunk[allowed:] if how == "trickle" else b""
                self.breaks += 1
                plan.times -= 1
                if plan.times == 0:
                    self._plan = None
        seen.add(chunk + rest)
        if direction == "up":
            self.bytes_up += len(chunk + rest)
        else:
            self.bytes_down += len(chunk + rest)
        return chunk, how, rest

    def _run(self, started: concurrent.futures.Future[int]) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._listen(started))

    async def _listen(self, started: concurrent.futures.Future[int]) -> None:
        server = await asyncio.start_server(self._serve, _HOST, 0, backlog=_BACKLOG)
        started.set_result(server.sockets[0].getsockname()[1])
        await self._closing.wait()
        server.close()
        live = list(self._live)
        for connection in live:
            connection.break_off("reset")
        await asyncio.gather(*(connection.ended.wait() for connection in live))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            server = await asyncio.open_connection(_HOST, self.target_port)
        except OSError:
            writer.close()
            return
        self.connections += 1
        connection = _Connection(self, (reader, writer), server)
        self._live.add(connection)
        await connection.relay()
        self._live.discard(connection)


class _Connection:
    """One client's connection and ours to the server; closed when both directions end, or by a break."""

    def __init__(self, proxy: Proxy, client: _End, server: _End) -> None:
        self.ended = asyncio.Event()
        self._proxy = proxy
        self._client = client
        self._server = server
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._trickles = False
        self._broken: Break | None = None
        self._relaying = asyncio.current_task()

    async def relay(self) -> None:
        """Return when the connection has ended, in whatever way."""
        try:
            async with asyncio.TaskGroup() as directions:
                self._start(directions, "up", self._client, self._server)
                self._start(directions, "down", self._server, self._client)
        except* OSError:
            pass  # one side is gone; closing tells the other
        except* asyncio.CancelledError:
            if self._broken is None:
                raise
        finally:
            for _, writer in (self._client, self._server):
                self._end(writer)
            self.ended.set()

    def break_off(self, how: Break) -> None:
        if how == "stall":
            self._flowing.clear()
        elif how == "trickle":
            self._trickles = True
        elif self._broken is None and self._relaying is not None:
            self._broken = how
            self._relaying.cancel()

    def _start(self, directions: asyncio.TaskGroup, direction: Direction, source: _End, sink: _End) -> None:
        under_way: asyncio.Queue[tuple[float, bytes, Break | None]] = asyncio.Queue(_CHUNKS_UNDER_WAY)
        directions.create_task(self._take(direction, source[0], under_way))
        directions.create_task(self._give(sink[1], under_way))

    async def _take(
        self,
        direction: Direction,
        source: asyncio.StreamReader,
        under_way: asyncio.Queue[tuple[float, bytes, Break | None]],
    ) -> None:
        """Read as fast as the source sends; say of every chunk when it is due at the other side."""
        proxy, now = self._proxy, asyncio.get_running_loop().time
        lines = _Lines()
        seen, line_free_at = _Seen(), 0.0
        while chunk := await source.read(_CHUNK_OCTETS):
            await self._flowing.wait()
            chunk, how, rest = proxy.passing(direction, seen, chunk)
            if direction == "up":
                proxy.keep(lines.completed_by(chunk + rest))
            line_free_at = max(now(), line_free_at) + len(chunk) / proxy.bytes_per_second
            await under_way.put((line_free_at + proxy.latency_seconds, chunk, how))
            if rest:
                await under_way.put((line_free_at + proxy.latency_seconds, rest, None))
        await under_way.put((max(now(), line_free_at) + proxy.latency_seconds, b"", None))

    async def _give(
        self, sink: asyncio.StreamWriter, under_way: asyncio.Queue[tuple[float, bytes, Break | None]]
    ) -> None:
        """Write each chunk when it is due, and break the connection behind it where that is planned."""
        loop = asyncio.get_running_loop()
        while True:
            due, chunk, how = await under_way.get()
            await asyncio.sleep(due - loop.time())
            await self._flowing.wait()
            if chunk and self._trickles:
                await self._trickle(sink, chunk)
            elif chunk:
                sink.write(chunk)
                await sink.drain()
            elif how is None:
                sink.write_eof()
                return
            if how is not None:
                await _delivered(sink)
                self.break_off(how)

    async def _trickle(self, sink: asyncio.StreamWriter, chunk: bytes) -> None:
        for octet in chunk:
            sink.write(bytes([octet]))
            await sink.drain()
            await asyncio.sleep(_TRICKLE_SECONDS)
            await self._flowing.wait()

    def _end(self, writer: asyncio.StreamWriter) -> None:
        if self._broken == "reset":
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)
            writer.transport.abort()
        else:
            writer.close()


async def _delivered(sink: asyncio.StreamWriter) -> None:
    """Wait until the other side's kernel has all that was written: a reset drops what has not left ours."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _DELIVERY_SECONDS
    unacknowledged = array.array("i", [1])
    while loop.time() < deadline and (sink.transport.get_write_buffer_size() or unacknowledged[0]):
        await asyncio.sleep(0.001)
        fcntl.ioctl(sink.get_extra_info("socket").fileno(), termios.TIOCOUTQ, unacknowledged)


class _Lines:
    """Cuts a stream into lines; what is longer than a command can be is dropped."""

    def __init__(self) -> None:
        self._rest = b""

    def completed_by(self, chunk: bytes) -> list[bytes]:
        *lines, rest = (self._rest + chunk).split(b"\n")
        self._rest = rest[-_LINE_OCTETS:]
        return [line.removesuffix(b"\r") for line in lines]
