"""uvicorn's HTTP/1.1 with the limits that it leaves to a proxy: header bytes, chunks, connections, slow clients.

What is refused before there is a request is answered in the same form as everything else: ``{"error": "..."}``.
"""

import asyncio
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import httptools
import orjson
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from flserving.api.options import ApiOptions
from flserving.api.sockets import readable

GONE = "the client is gone"
"""With what a request's task is cancelled when its connection is lost."""
HALF_CLOSED_S = 0.5  # how long to answer a client that has shut its side down: most of those have gone
_MOST_HEADER_BYTES, _MOST_CHUNKS, _MOST_JOINED, _MOST_PIPELINED = 64 << 10, 1 << 16, 64 << 10, 128
_REASONS = {400: "InvalidInput", 408: "DeadlineExceeded", 501: "NotSupported"}  # others are too large
_LONG_HEAD = 431, f"the headers have more than {_MOST_HEADER_BYTES} bytes: send fewer"


class _Cycle(RequestResponseCycle):
    """One request and its answer. uvicorn writes the head and the body of an answer each by itself; here a whole answer
    is one write, hence one packet: a fifth of the work of a small one."""

    _head: Any = None

    async def send(self, message: Any) -> None:
        if self.transport.is_closing():
            self.disconnected = True  # nobody will read it
        elif self._head is None and not self.response_started:
            self._head = message
            return
        head, self._head = self._head, None
        body: bytes = message.get("body", b"")
        whole = head is not None and self.scope["method"] != "HEAD" and not message.get("more_body")
        if not whole or self.disconnected or self.flow.write_paused or len(body) > _MOST_JOINED:
            if head is not None:
                await super().send(head)
            return await super().send(message)
        parts, has_length, closes = [STATUS_LINE[head["status"]]], head["status"] == 204, False
        for name, value in (*self.default_headers, *head["headers"]):
            parts += (name, b": ", value, b"\r\n")
            has_length = has_length or name == b"content-length"
            closes = closes or name == b"connection"  # nobody here says anything but close
        if not has_length:
            parts += (b"content-length: ", b"%d" % len(body), b"\r\n")
        if not (self.keep_alive or closes):
            parts.append(b"connection: close\r\n")
        parts += (b"\r\n", body)
        self.response_started = self.response_complete = True
        self.transport.write(b"".join(parts))
        self.message_event.set()
        if closes or not self.keep_alive:
            self.keep_alive = False
            self.transport.close()
        self.on_response()


class _Trailers(list[tuple[bytes, bytes]]):
    """Where uvicorn puts what follows the chunks. It comes after all checks: it is no header, and nobody keeps it."""

    def append(self, pair: tuple[bytes, bytes]) -> None: ...


class Http1(HttpToolsProtocol):
    """One connection. :func:`protocol_class` makes a class of its own for each endpoint.

    A client has ``slow_client_s`` from its first byte to the last one of a request, and as long to take an answer, also
    while its connection closes. One sweep over all connections looks after that, instead of a timer per request.
    """

    slow_client_s: ClassVar[float]
    max_connections: ClassVar[int]
    sweeping: ClassVar[asyncio.TimerHandle | None] = None

    _task: asyncio.Task[None] | None = None
    _running: RequestResponseCycle | None = None  # what ``_task`` answers; ``cycle`` is the newest, which may wait
    _ended = False  # nothing more is read: what has come whole is answered, then the connection closes
    _waits_since_s: float | None = None  # for the rest of a request
    _stalled_since_s: float | None = None  # nobody takes the answer, or what is left of it when we close
    _head_bytes = _chunks = 0
    _data = b""  # what the parser reads
    _in_head = True
    _problem: tuple[int, str] | None = None

    @staticmethod
    def refused(reason: str) -> None:
        """Told of each refusal that the application never saw."""

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
        """A client that says no more may still listen (``nc -N``), or be gone: an answer that comes soon is sent."""
        if self._answering and not self._ended and not self.cycle.more_body and self.scheme == "http":
            self._ended, self.cycle.keep_alive = True, False
            self.loop.call_later(HALF_CLOSED_S, self.transport.close)
        return self._answering and self._ended  # TLS has no half

    def data_received(self, data: bytes) -> None:
        if self._ended:
            return
        if self._waits_since_s is None:
            self._waits_since_s = self.loop.time()
        if self._in_head:
            self._head_bytes += len(data)
        self._data = data
        super().data_received(data)
        self._data = b""
        if self._in_head and self._head_bytes > _MOST_HEADER_BYTES and self._problem is None:
            self._problem = _LONG_HEAD
            self.send_400_response("")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._waits_since_s, self._in_head, self._chunks = self.loop.time(), True, 0

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
            return  # see _unsupported_upgrade_warning
        self._in_head, self._head_bytes = False, 0
        super().on_headers_complete()
        self.headers = _Trailers()
        self.cycle.__class__ = _Cycle  # its task has not begun; uvicorn names the class in the midst of that method

    def _check_coding(self) -> None:
        """Refuse a body that would be read undecoded, or whose end is in doubt (RFC 9112, 6.1)."""
        codings = [value for name, value in self.headers if name == b"transfer-encoding"]
        if not codings:
            return
        if self.parser.get_http_version() != "1.1":
            self._problem = 400, "Transfer-Encoding in HTTP/1.0: its body has no certain end; send Content-Length"
            raise ValueError(self._problem)
        coding = b", ".join(codings).strip()
        if coding.lower() != b"chunked":
            shown = coding[:64].decode("latin-1")
            self._problem = 501, f"Transfer-Encoding {shown!r} is not read here: chunked alone, and Content-Encoding"
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
        self._waits_since_s, self._in_head = None, True

    def _unsupported_upgrade_warning(self) -> None:
        """Called in the handler of HttpParserUpgrade. The parser stops at an ``Upgrade`` (to HTTP/2: Java's client,
        ``curl --http2``) and loses the body; the head without it, and what follows, go through a new one."""
        stopped, method = sys.exc_info()[1], self.parser.get_method()
        if method == b"CONNECT" or stopped is None:
            return self.send_400_response("")
        lines = [b"%s: %s\r\n" % pair for pair in self.headers if pair[0] != b"upgrade"]
        head = b"".join((method, b" ", self.url, b" HTTP/1.1\r\n", *lines, b"\r\n"))
        self.parser, self._data = httptools.HttpRequestParser(self), head + self._data[stopped.args[0] :]
        super().data_received(self._data)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled_since_s = self.loop.time()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stalled_since_s = None

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running, self._task = cycle, (task := self.loop.create_task(cycle.run_asgi(app)))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def send_400_response(self, msg: str) -> None:
        """uvicorn's one way out of what is no HTTP: answer, and close the connection."""
        if self.transport.is_closing():
            return
        status, text = self._problem or (400, "the request is not HTTP/1.1: send a request line, headers and a body")
        self._ended = True
        if self.pipeline and self.cycle.more_body:
            self.pipeline.popleft()  # the newest, which will never be whole
        earlier = self.pipeline[0][0] if self.pipeline else self._running
        if earlier is not None and self._answering and not earlier.more_body:
            earlier.keep_alive = False  # those before are still to be answered: that is the last one then
            self.flow.pause_reading()
            return
        if self._in_head or not self.cycle.response_complete:  # else in a body that nobody wanted
            self.refused(_REASONS.get(status, "TooLarge"))
            body = orjson.dumps({"error": text})
            head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
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
        body = orjson.dumps({"error": f"more than {self.max_connections} connections: close some, or try again later"})
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)),
                   (b"retry-after", b"1"), (b"connection", b"close")]  # fmt: skip
        await send({"type": "http.response.start", "status": 429, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def retire(self, first_s: float) -> None:
        """Close unless that would lose something: a client in the midst of a request, or one that waits for the answer,
        still gets it, as the last one; one that has only connected gets ``first_s`` to begin."""
        if self.transport.is_closing() or readable(self.transport.get_extra_info("socket")):
            return
        since_s = self._waits_since_s
        begun = since_s is not None and (self._head_bytes > 0 or not self._in_head)
        if not begun and (since_s is None or since_s < self.loop.time() - first_s):
            self.shutdown()

    def _sweep(self) -> None:
        """Close who has kept us waiting for too long; again soon, while there is a connection."""
        now_s = self.loop.time()
        for connection in list(self.connections):
            assert isinstance(connection, Http1)
            connection._check_pace(now_s - self.slow_client_s)
        kind = type(self)
        kind.sweeping = self.loop.call_later(self.slow_client_s / 4, self._sweep) if self.connections else None

    def _check_pace(self, before_s: float) -> None:
        if not self.transport.get_write_buffer_size():
            self._stalled_since_s = None
        elif self._stalled_since_s is None:  # below the mark of pause_writing, where nobody tells us
            self._stalled_since_s = self.loop.time()
        if self._stalled_since_s is not None and self._stalled_since_s < before_s:
            self.transport.abort()
        elif self._waits_since_s is not None and self._waits_since_s < before_s and self._problem is None:
            if self._answering and not self.cycle.more_body:
                return  # it is we who are late
            if self._in_head and not self._head_bytes:
                self.transport.close()  # it never said a word
            else:
                self._problem = 408, f"the request did not end within {self.slow_client_s:g} s: send it faster"
                self.send_400_response("")


def protocol_class(options: ApiOptions, refused: Callable[[str], None]) -> type[Http1]:
    """The protocol of one endpoint. ``refused`` is told the reason of each refusal that the application never saw."""
    limits = {"slow_client_s": options.slow_client_s, "max_connections": options.max_connections}
    return type("Http1", (Http1,), {**limits, "refused": staticmethod(refused)})
