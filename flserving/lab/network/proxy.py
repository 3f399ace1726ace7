"""A TCP proxy in front of a real server, as slow and as broken as a test wants: a :class:`Link` in
real time.

Bytes pass unread, so that HTTP, gRPC and TLS all work through it. What arrives while the line is
still busy belongs to the same message; a message pays its delay once. A new connection pays a round
trip more, as TCP's handshake does.
"""

import asyncio
import concurrent.futures
import contextlib
import socket
import struct
import threading
from typing import Literal, Self, get_args

from flserving.errors import ConfigError
from flserving.lab.network.link import Link

Cut = Literal["refuse", "black_hole"]
CHUNK_NBYTES = 16_384
CHUNKS = 256
"""Most chunks under way per direction: 4 MiB. More waits in the sender's socket, as with a full TCP
window."""
_PATIENCE_S = 10.0


class Proxy:
    """Listens on a free port of 127.0.0.1 until closed, in an event loop and a thread of its own.

    Args:
        link: Its outages count in seconds from the start of the proxy.
        host, port: The server behind it.
        max_connections: Further ones are reset.

    Attributes: ``port``; ``connections``, now; ``up_nbytes`` and ``down_nbytes``, delivered to the
    server and from it.
    """

    def __init__(self, link: Link, host: str, port: int, *, max_connections: int = 256) -> None:
        self.up_nbytes = self.down_nbytes = 0
        self._link = link
        self._target = (host, port)
        self._max_connections = max_connections
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        # Bound and never listening: the port stays ours while connections to it are refused.
        self._reserved = _bound(0)
        self.port: int = self._reserved.getsockname()[1]
        started: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(
            target=self._run, args=(started,), name="flserving-proxy", daemon=True
        )
        self._thread.start()
        started.result(_PATIENCE_S)

    @property
    def connections(self) -> int:
        return len(self._tasks)

    def cut(self, how: Cut) -> None:
        """Break the path, from now on and until :meth:`heal`; done when this returns.

        ``refuse``: nobody listens, and open connections are reset. ``black_hole``: connections
        open, nothing passes; what was sent is delivered after ``heal``, as TCP sends it again.
        """
        if how not in get_args(Cut):
            raise ConfigError(f"cut is {how!r}: choose one of {', '.join(get_args(Cut))}")
        asyncio.run_coroutine_threadsafe(self._set(how), self._loop).result(_PATIENCE_S)

    def heal(self) -> None:
        """End a cut."""
        asyncio.run_coroutine_threadsafe(self._set(None), self._loop).result(_PATIENCE_S)

    def close(self) -> None:
        """Reset what is open, end the thread, free the port. Idempotent."""
        if self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # it ended by itself
                self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(_PATIENCE_S)
        self._reserved.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # In the event loop

    def _run(self, started: "concurrent.futures.Future[None]") -> None:
        with asyncio.Runner() as runner:
            try:
                runner.run(self._main(started))
            except BaseException as error:
                if started.done():
                    raise
                started.set_exception(error)

    async def _main(self, started: "concurrent.futures.Future[None]") -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._passing = asyncio.Event()
        self._started_s = self._loop.time()
        await self._set(None)
        started.set_result(None)
        await self._stop.wait()
        await self._set("refuse")

    async def _set(self, how: Cut | None) -> None:
        if how == "black_hole":
            self._passing.clear()
        else:
            self._passing.set()
        if how != "refuse":
            self._server = self._server or await asyncio.start_server(
                self._accept, sock=_bound(self.port)
            )
        elif self._server is not None:
            self._server.close()
            self._server = None
            for task in (gone := list(self._tasks)):
                task.cancel()
            await asyncio.gather(*gone, return_exceptions=True)
            await asyncio.sleep(0)  # aborted transports close their sockets one turn later

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._server is None or len(self._tasks) >= self._max_connections:
            return _reset(writer)
        task = self._loop.create_task(self._connect(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers = [writer]
        try:
            await self._passing.wait()
            handshake_s = float(self._link.finish_s(self._now_s(), self._link.rtts_s()))
            server_reader, server_writer = await asyncio.open_connection(*self._target)
            writers.append(server_writer)
            async with asyncio.TaskGroup() as group:
                for source, sink, up in (
                    (reader, server_writer, True),
                    (server_reader, writer, False),
                ):
                    line: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(CHUNKS)
                    group.create_task(self._send(source, line, handshake_s, up))
                    group.create_task(self._deliver(line, sink, up))
            for each in writers:
                each.close()
                await each.wait_closed()
        except* OSError:
            pass  # either side went away: so does the other
        finally:
            for each in writers:
                _reset(each)

    async def _send(
        self,
        source: asyncio.StreamReader,
        line: "asyncio.Queue[tuple[float, bytes]]",
        free_s: float,
        up: bool,
    ) -> None:
        """Say of each chunk when it is due; b"" is the end."""
        message_nbytes = 0
        delay_s = 0.0
        due_s = 0.0
        data = b"-"
        while data:
            data = await source.read(CHUNK_NBYTES)
            now_s = self._now_s()
            if now_s >= free_s or not message_nbytes:
                message_nbytes = 0
                delay_s = float(self._link.delay_s(len(data)))
            before_s = self._link.line_s(message_nbytes, up=up)
            message_nbytes += len(data)
            line_s = self._link.line_s(message_nbytes, up=up) - before_s
            free_s = float(self._link.finish_s(max(now_s, free_s), line_s))
            due_s = max(due_s, float(self._link.finish_s(free_s, delay_s)))
            await line.put((due_s, data))

    async def _deliver(
        self, line: "asyncio.Queue[tuple[float, bytes]]", sink: asyncio.StreamWriter, up: bool
    ) -> None:
        data = b"-"
        while data:
            due_s, data = await line.get()
            await asyncio.sleep(due_s - self._now_s())
            await self._passing.wait()
            if up:  # counted first: whoever has the bytes finds them counted
                self.up_nbytes += len(data)
            else:
                self.down_nbytes += len(data)
            sink.write(data)
            await sink.drain()
        sink.write_eof()

    def _now_s(self) -> float:
        return self._loop.time() - self._started_s


def _bound(port: int) -> socket.socket:
    # The protocol is named because asyncio switches Nagle's algorithm off only where it is.
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(("127.0.0.1", port))
    return bound


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST, now: a linger time of 0 drops what was not sent."""
    with contextlib.suppress(OSError):
        writer.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
    writer.transport.abort()
