"""uvicorn's HTTP/1.1 with the limits that it leaves to a proxy: header bytes, chunks, connections,
slow clients.

What is refused before there is a request is answered in the same form as everything else:
``{"error": "..."}``.

This is the only file that knows uvicorn, and it leans on parts that uvicorn promises to nobody. So
pyproject.toml bounds uvicorn by the release that was tested, and
``tests/api/test_api_rest_canary.py`` names each part.
"""

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable
from email.utils import formatdate
from typing import Any, ClassVar

import httptools
import orjson
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)
from uvicorn.server import ServerState

from flserving.api.options import ApiOptions
from flserving.api.sockets import readable, refuse

GONE = "the client is gone"
"""With what a request's task is cancelled when its connection is lost."""
# how long to answer a client that has shut its side down: most of those have gone
HALF_CLOSED_S = 0.5
_MOST_HEADER_BYTES = 64 << 10
_MOST_CHUNKS = 1 << 16
_MOST_JOINED = 64 << 10  # bytes of an answer that is one write
_MOST_PIPELINED = 128
# every other status says that something is too large
_REASONS = {400: "InvalidInput", 408: "DeadlineExceeded", 501: "NotSupported"}
_LONG_HEAD = 431, f"the headers have more than {_MOST_HEADER_BYTES} bytes: send fewer"


class _Answer:
    """One answer. uvicorn writes its head and its body each by itself; here a whole answer is one
    write, hence one packet: a fifth of the work of a small one."""

    __slots__ = ("_app", "_cycle", "_head")

    def __init__(self, app: ASGIApp, cycle: RequestResponseCycle) -> None:
        self._app = app
        self._cycle = cycle
        self._head: Message | None = None

    async def run(self, scope: Any, receive: Any, send: Any) -> None:
        await self._app(scope, receive, self._send)

    async def _send(self, message: Any) -> None:
        cycle = self._cycle
        if cycle.transport.is_closing():
            cycle.disconnected = True  # nobody will read it
        elif self._head is None and not cycle.response_started:
            self._head = message
            return
        head = self._head
        self._head = None
        body: bytes = message.get("body", b"")
        whole = (
            head is not None and cycle.scope["method"] != "HEAD" and not message.get("more_body")
        )
        if (
            head is None
            or not whole
            or cycle.disconnected
            or cycle.flow.write_paused
            or len(body) > _MOST_JOINED
        ):
            if head is not None:
                await cycle.send(head)  # type: ignore[arg-type]
            return await cycle.send(message)
        parts = [STATUS_LINE[head["status"]]]
        has_length = head["status"] == 204
        closes = False
        for name, value in (*cycle.default_headers, *head["headers"]):
            parts += (name, b": ", value, b"\r\n")
            has_length = has_length or name == b"content-length"
            closes = closes or name == b"connection"  # nobody here says anything but close
        if not has_length:
            parts += (b"content-length: ", b"%d" % len(body), b"\r\n")
        if not (cycle.keep_alive or closes):
            parts.append(b"connection: close\r\n")
        parts += (b"\r\n", body)
        cycle.response_started = cycle.response_complete = True
        cycle.transport.write(b"".join(parts))
        cycle.message_event.set()
        if closes or not cycle.keep_alive:
            cycle.keep_alive = False
            cycle.transport.close()
        cycle.on_response()


class _Trailers(list[tuple[bytes, bytes]]):
    """Where uvicorn puts what follows the chunks. It comes after all checks: it is no header, and
    nobody keeps it."""

    def append(self, pair: tuple[bytes, bytes]) -> None: ...


class Http1(HttpToolsProtocol):
    """One connection. :func:`protocol_class` makes a class of its own for each endpoint.

    A client has ``slow_client_s`` from its first byte to the last one of a request, and as long to
    take an answer, also while its connection closes. One sweep over all connections looks after
    that, instead of a timer per request.
    """

    slow_client_s: ClassVar[float]
    max_connections: ClassVar[int]
    sweeping: ClassVar[asyncio.TimerHandle | None] = None

    _task: asyncio.Task[None] | None = None
    # what ``_task`` answers; ``cycle`` is the newest, which may wait
    _running: RequestResponseCycle | None = None
    # nothing more is read: what has come whole is answered, then the connection closes
    _ended = False
    _waits_since_s: float | None = None  # for the rest of a request
    # nobody takes the answer, or what is left of it when we close
    _stalled_since_s: float | None = None
    _head_bytes = _chunks = 0
    _in_head = True
    _problem: tuple[int, str] | None = None

    @staticmethod
    def refused(reason: str) -> None:
        """Called at each refusal that the application never saw."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._waits_since_s = self.loop.time()
        if len(self.connections) > self.max_connections:
            self.app = self._crowded
        if self.sweeping is None:
            type(self).sweeping = self.loop.call_later(self.slow_client_s / 4, self._sweep)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._task is not None and self._running is not None and self._answering:
            self._running.disconnected = True
            self._task.cancel(GONE)
        self.pipeline.clear()

    def eof_received(self) -> bool:  # type: ignore[override]
        """A client that says no more may still listen (``nc -N``), or be gone: an answer that comes
        soon is sent."""
        if (
            self._answering
            and not self._ended
            and not self.cycle.more_body
            and self.scheme == "http"
        ):
            self._ended = True
            self.cycle.keep_alive = False
            self.loop.call_later(HALF_CLOSED_S, self.transport.close)
        return self._answering and self._ended  # TLS has no half

    def data_received(self, data: bytes) -> None:
        if self._ended:
            return
        if self._waits_since_s is None:
            self._waits_since_s = self.loop.time()
        if self._in_head:
            self._head_bytes += len(data)
        self._unset_keepalive_if_required()
        self._parse(data)
        if self._in_head and self._head_bytes > _MOST_HEADER_BYTES and self._problem is None:
            self._problem = _LONG_HEAD
            self._refuse()

    def _parse(self, data: bytes) -> None:
        while data:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserError:
                return self._refuse()
            except httptools.HttpParserUpgrade as stopped:
                data = self._without_upgrade(data[stopped.args[0] :])
            else:
                return

    def _without_upgrade(self, rest: bytes) -> bytes:
        """What is to be parsed once the parser has stopped at an ``Upgrade`` (to HTTP/2: Java's
        client, ``curl --http2``): it loses the body, so the head without it and the ``rest`` go
        through a new one."""
        method = self.parser.get_method()
        if method == b"CONNECT":
            self._refuse()
            return b""
        lines = [b"%s: %s\r\n" % pair for pair in self.headers if pair[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        return b"".join((method, b" ", self.url, b" HTTP/1.1\r\n", *lines, b"\r\n", rest))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._waits_since_s = self.loop.time()
        self._in_head = True
        self._chunks = 0

    def on_headers_complete(self) -> None:
        if self._head_bytes > _MOST_HEADER_BYTES:  # that counts a part of the body too: look closer
            size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
            if size > _MOST_HEADER_BYTES:
                self._problem = _LONG_HEAD
                raise ValueError(self._problem)
        if len(self.pipeline) >= _MOST_PIPELINED:
            raise ValueError("too many requests wait on one connection")
        self._check_coding()
        if self.parser.should_upgrade():
            return  # see _without_upgrade
        self._in_head = False
        self._head_bytes = 0
        super().on_headers_complete()
        self.headers = _Trailers()

    def _check_coding(self) -> None:
        """Refuse a body that would be read undecoded, or whose end is in doubt (RFC 9112, 6.1)."""
        codings = [value for name, value in self.headers if name == b"transfer-encoding"]
        if not codings:
            return
        if self.parser.get_http_version() != "1.1":
            self._problem = (
                400,
                "Transfer-Encoding in HTTP/1.0: its body has no certain end; send Content-Length",
            )
            raise ValueError(self._problem)
        coding = b", ".join(codings).strip()
        if coding.lower() != b"chunked":
            shown = coding[:64].decode("latin-1")
            self._problem = (
                501,
                f"Transfer-Encoding {shown!r} is not read here: chunked alone, and Content-Encoding",
            )
            raise ValueError(self._problem)

    def on_chunk_header(self) -> None:
        self._chunks += 1
        if self._chunks > _MOST_CHUNKS:
            self._problem = 413, f"the body has more than {_MOST_CHUNKS} chunks: send larger ones"
            raise ValueError(self._problem)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        super().on_message_complete()
        self._waits_since_s = None
        self._in_head = True

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled_since_s = self.loop.time()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stalled_since_s = None

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        self._task = self.loop.create_task(cycle.run_asgi(_Answer(app, cycle).run))
        self.tasks.add(self._task)
        self._task.add_done_callback(self.tasks.discard)

    def _refuse(self) -> None:
        """The one way out of what is no HTTP, or none that is read here: answer, and close the
        connection."""
        if self.transport.is_closing():
            return
        status, text = self._problem or (
            400,
            "the request is not HTTP/1.1: send a request line, headers and a body",
        )
        self._ended = True
        if self.pipeline and self.cycle.more_body:
            self.pipeline.popleft()  # the newest, which will never be whole
        earlier = self.pipeline[0][0] if self.pipeline else self._running
        if earlier is not None and self._answering and not earlier.more_body:
            # those before are still to be answered: that is the last one then
            earlier.keep_alive = False
            self.flow.pause_reading()
            return
        if self._in_head or not self.cycle.response_complete:  # else in a body that nobody wanted
            self.refused(_REASONS.get(status, "TooLarge"))
            body = orjson.dumps({"error": text})
            head = (
                b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
                % len(body)
            )
            if not (self._answering and self.cycle.response_started):
                self.transport.write(STATUS_LINE[status] + head + body)
        if self._answering:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    @property
    def _answering(self) -> bool:
        return self._running is not None and not self._running.response_complete

    async def _crowded(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.refused("Overloaded")
        body = orjson.dumps(
            {
                "error": f"more than {self.max_connections} connections: close some, or try again later"
            }
        )
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"retry-after", b"1"),
            (b"connection", b"close"),
        ]
        await send({"type": "http.response.start", "status": 429, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def retire(self, first_s: float) -> None:
        """Close unless that would lose something: a client in the midst of a request, or one that
        waits for the answer, still gets it, as the last one; one that has only connected gets
        ``first_s`` to begin."""
        if self.transport.is_closing() or readable(self.transport.get_extra_info("socket")):
            return
        since_s = self._waits_since_s
        begun = since_s is not None and (self._head_bytes > 0 or not self._in_head)
        if not begun and (since_s is None or since_s < self.loop.time() - first_s):
            self.shutdown()

    def _sweep(self) -> None:
        """Close connections that were silent for too long; again soon, while there is a
        connection."""
        now_s = self.loop.time()
        for connection in list(self.connections):
            assert isinstance(connection, Http1)
            connection._check_pace(now_s - self.slow_client_s)
        kind = type(self)
        kind.sweeping = None
        if self.connections:
            kind.sweeping = self.loop.call_later(self.slow_client_s / 4, self._sweep)

    def _check_pace(self, before_s: float) -> None:
        if not self.transport.get_write_buffer_size():
            self._stalled_since_s = None
        elif (
            self._stalled_since_s is None
        ):  # below the mark of pause_writing, which does not call us
            self._stalled_since_s = self.loop.time()
        if self._stalled_since_s is not None and self._stalled_since_s < before_s:
            self.transport.abort()
        elif (
            self._waits_since_s is not None
            and self._waits_since_s < before_s
            and self._problem is None
        ):
            if self._answering and not self.cycle.more_body:
                return  # it is we who are late
            if self._in_head and not self._head_bytes:
                self.transport.close()  # it never sent a byte
            else:
                self._problem = (
                    408,
                    f"the request did not end within {self.slow_client_s:g} s: send it faster",
                )
                self._refuse()


class RestServer:
    """Accepts connections of one listener in the running event loop, each with an :class:`Http1` of
    its own.

    uvicorn's own server polls ten times a second, and closes idle connections without a word to
    their clients.

    Args:
        refused: Gets the reason of each refusal that the application never saw.
    """

    POLL_S = 0.005
    FIRST_S = 0.5
    """How long a client that has just connected may take to send its request when the endpoint
    closes."""
    SURPLUS = 64
    """So many connections beyond the limit are answered 429; further ones are closed at once."""

    def __init__(
        self,
        app: ASGIApp,
        options: ApiOptions,
        listener: socket.socket,
        refused: Callable[[str], None],
    ) -> None:
        self._options = options
        self._listener = listener
        self._refused = refused
        self._context = options.ssl_context() if options.secure else None
        self._state = ServerState()
        self._shaking: set[asyncio.Task[None]] = set()
        self._accepting: asyncio.Task[None] | None = None
        settings = {
            "slow_client_s": options.slow_client_s,
            "max_connections": options.max_connections,
            "refused": staticmethod(refused),
        }
        self._protocol: type[Http1] = type("Http1", (Http1,), settings)
        self._config = uvicorn.Config(
            app,
            http=self._protocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            access_log=False,
            log_config=None,
            proxy_headers=False,
        )

    def open(self) -> None:
        self.tick()
        self._listener.setblocking(False)
        self._accepting = asyncio.create_task(self._accept())

    def tick(self) -> None:
        """Once a second: the Date header."""
        self._state.default_headers = [(b"date", formatdate(usegmt=True).encode())]

    async def _accept(self) -> None:
        while True:
            try:
                connection, _ = await asyncio.get_running_loop().sock_accept(self._listener)
            except OSError:  # no file is left for it, or it has gone already
                await asyncio.sleep(self.POLL_S)
                continue
            self._admit(connection)
            # a crowd comes in at once, not one a pass of the loop
            with contextlib.suppress(OSError):
                for _ in range(self.SURPLUS):
                    self._admit(self._listener.accept()[0])

    def _admit(self, connection: socket.socket) -> None:
        """Close here what is too much, before it can take a file, a handshake or a place: only
        ``SURPLUS`` more than the limit stay to be answered 429."""
        if (
            len(self._shaking) + len(self._state.connections)
            >= self._options.max_connections + self.SURPLUS
        ):
            connection.close()
            self._refused("Overloaded")
            return
        shaking = asyncio.create_task(self._connect(connection))
        self._shaking.add(shaking)
        shaking.add_done_callback(self._shaking.discard)

    async def _connect(self, connection: socket.socket) -> None:
        """Hand a connection to the protocol; with TLS, after the handshake."""
        timeout_s = None if self._context is None else self._options.slow_client_s
        connection.setblocking(False)
        with contextlib.suppress(OSError):  # a handshake that failed or took too long
            await asyncio.get_running_loop().connect_accepted_socket(
                self._made,
                connection,
                ssl=self._context,
                ssl_handshake_timeout=timeout_s,
                ssl_shutdown_timeout=timeout_s,
            )

    def _made(self) -> Http1:
        return self._protocol(config=self._config, server_state=self._state, app_state={})

    def close_after_answers(self) -> None:
        """From now on each answer is the last one of its connection."""
        self._state.default_headers = [*self._state.default_headers, (b"connection", b"close")]

    async def close(self, drain_s: float) -> None:
        """Close the listener and idle connections, wait for the busy ones, cut off what is left
        after ``drain_s``."""
        if self._accepting is None:
            return
        state = self._state
        end_s = time.monotonic() + drain_s
        await refuse(self._listener, end_s)
        await asyncio.sleep(self.POLL_S)  # an accept that has just succeeded must not be cancelled
        self._accepting.cancel()
        await asyncio.gather(self._accepting, return_exceptions=True)
        # the drain may take long: others who share the port take new connections
        self._listener.close()
        while (self._shaking or state.connections or state.tasks) and time.monotonic() < end_s:
            for connection in list(state.connections):
                connection.retire(self.FIRST_S)  # type: ignore[union-attr]
            await asyncio.sleep(self.POLL_S)
        for connection in list(state.connections):
            connection.transport.abort()  # a lost connection takes its request with it
        for shaking in self._shaking:
            shaking.cancel()
        await asyncio.gather(*state.tasks, *self._shaking, return_exceptions=True)
